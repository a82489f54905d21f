"""Products of matrices in full float32, whatever the backend's default precision is."""

from functools import partial

import jax.numpy as jnp

matmul = partial(jnp.matmul, precision="highest")
