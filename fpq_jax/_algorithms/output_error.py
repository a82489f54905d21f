"""What a quantized weight loses of the outputs, given the Hessian of the inputs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fpq_jax._algorithms.linalg import matmul


@jax.jit
def output_error(
    w: Float[Array, "in out"], approximation: Float[Array, "in out"], hessian: Float[Array, "in in"]
) -> Float[Array, ""]:
    """Relative squared error of the outputs, tr(D^T H D) / tr(W^T H W); 0 where the outputs are all zero."""
    lost, total = (jnp.sum(column_errors(w, a, hessian)) for a in (approximation, jnp.zeros_like(w)))
    return jnp.where(total > 0, lost / jnp.where(total > 0, total, 1.0), 0.0)


def column_errors(
    w: Float[Array, "in out"], approximation: Float[Array, "in out"], hessian: Float[Array, "in in"]
) -> Float[Array, " out"]:
    """Mean squared error of each output, the diagonal of D^T H D."""
    d = w.astype(jnp.float32) - approximation.astype(jnp.float32)
    return jnp.sum(matmul(hessian, d) * d, axis=0)
