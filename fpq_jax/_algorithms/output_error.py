"""What a quantized weight loses of the outputs, given the Hessian of the inputs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fpq_jax._algorithms.linalg import matmul


@jax.jit
def output_error(
    w: Float[Array, "in out"], approximation: Float[Array, "in out"], hessian: Float[Array, "in in"]
) -> Float[Array, ""]:
    """Computes the relative squared error of a kernel's outputs, tr(D^T H D) / tr(W^T H W) with D = W - approximation.

    Args:
        w: ``[in, out]``, any float type.
        approximation: ``[in, out]``, for instance what ``dequantize`` gives.
        hessian: ``[in, in]``, the sum of x x^T over inputs x, or any positive multiple of it.

    Returns:
        A float32 scalar; 0 where the outputs are all zero.

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> h = fpq.hessian(jax.random.normal(jax.random.key(1), (256, 64)))
        >>> spec = fpq.QuantSpec(group_size=32)
        >>> rounded, better = fpq.quantize_array(w, spec), fpq.gptq(w, h, spec)
        >>> bool(fpq.output_error(w, fpq.dequantize(better), h) < fpq.output_error(w, fpq.dequantize(rounded), h))
        True
    """
    lost, total = (jnp.sum(column_errors(w, a, hessian)) for a in (approximation, jnp.zeros_like(w)))
    return jnp.where(total > 0, lost / jnp.where(total > 0, total, 1.0), 0.0)


def column_errors(
    w: Float[Array, "in out"], approximation: Float[Array, "in out"], hessian: Float[Array, "in in"]
) -> Float[Array, " out"]:
    """Mean squared error of each output, the diagonal of D^T H D."""
    d = w.astype(jnp.float32) - approximation.astype(jnp.float32)
    return jnp.sum(matmul(hessian, d) * d, axis=0)
