"""What calibration knows of the inputs of kernels: sums of x x^T and how many tokens they are of.

Kernels that see one input (query, key and value; gate and up) share its statistics.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fpq_jax._algorithms.linalg import matmul
from fpq_jax._numerics.scales import Scale

SharedInput = tuple[str, ...]  # the paths of kernels that see one input


class InputStats(NamedTuple):
    """Sums over calibration tokens of one input x [in]; of a stack of kernels with its axes in front.

    hessian: of x x^T, float32 [in, in]. count: of the tokens, int32. cross: of x (r - x)^T, where r is what a reference
    sees in the place of x; None without one.
    """

    hessian: Any
    count: Any
    cross: Any = None


class CalibrationStats(NamedTuple):
    """inputs: by the kernels that see them. static_scales: by kernel, that of its input where its recipe wants one."""

    inputs: dict[SharedInput, InputStats]
    static_scales: dict[str, Scale]

    def of(self, path: str) -> InputStats:
        """What is known of a kernel's input."""
        return next(stats for paths, stats in self.inputs.items() if path in paths)


def hessian(x: Float[Array, "*batch in"], mask: Shaped[Array, "*batch"] | None = None) -> Float[Array, "in in"]:
    """Computes the Hessian of a batch of inputs for GPTQ: the sum of x x^T over the inputs x.

    Args:
        x: ``[..., in]``, any float type.
        mask: ``[...]``, zero at the positions that are left out; None for all.

    Returns:
        float32 ``[in, in]``.

    Example:
        >>> fpq.hessian(jnp.array([[1.0, 2.0], [3.0, 4.0]]), mask=jnp.array([1, 0]))
        Array([[1., 2.],
               [2., 4.]], dtype=float32)
    """
    x = _rows(x, mask)
    return matmul(x.T, x)


def input_stats(
    x: Float[Array, "*batch in"],
    mask: Shaped[Array, "*batch"] | None = None,
    reference: Float[Array, "*batch in"] | None = None,
) -> InputStats:
    """The statistics of a batch of inputs, and of what the ``reference`` sees in their places, if there is one."""
    count = jnp.int32(x[..., 0].size) if mask is None else jnp.sum(mask != 0, dtype=jnp.int32)
    cross = None
    if reference is not None:
        rows = _rows(x, mask)
        cross = matmul(rows.T, _rows(reference, mask) - rows)
    return InputStats(hessian(x, mask), count, cross)


def _rows(x: Float[Array, "*batch in"], mask: Shaped[Array, "*batch"] | None) -> Float[Array, "rows in"]:
    x = x.astype(jnp.float32)
    if mask is not None:
        x = jnp.where(mask[..., None] != 0, x, 0.0)
    return x.reshape(-1, x.shape[-1])
