"""What calibration finds out about the inputs of kernels."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fpq_jax._algorithms.linalg import matmul
from fpq_jax._numerics.scales import Scale

SharedInput = tuple[str, ...]  # kernels that see one input


class CalibrationStats(NamedTuple):
    """hessians: mean x^T x [in, in] over all tokens, by the kernels that see x. fixed: by kernel, the static scale of
    its x where it has one. All of it on every device."""

    hessians: dict[SharedInput, Any]
    fixed: dict[str, Scale]


def hessian(x: Float[Array, "*batch in"], mask: Shaped[Array, "*batch"] | None = None) -> Float[Array, "in in"]:
    """X^T X of a batch of inputs in float32; positions where ``mask`` is zero are left out."""
    x = x.astype(jnp.float32)
    if mask is not None:
        x = jnp.where(mask[..., None] != 0, x, 0.0)
    x = x.reshape(-1, x.shape[-1])
    return matmul(x.T, x)
