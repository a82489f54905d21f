"""Linear algebra as all algorithms here want it."""

from functools import partial

import jax.numpy as jnp

from fpq_jax._support.machine import on_cpu

matmul = partial(jnp.matmul, precision="highest")  # in full float32, whatever the backend's default precision is


def unrolled() -> int:
    """How many steps of a loop over inputs are one: a GPU launches each apart, and a CPU would only compile longer."""
    return 1 if on_cpu() else 8
