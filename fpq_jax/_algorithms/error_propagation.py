"""What a weight should be, so that it makes up for the errors of everything quantized before it.

A Linear of the quantized model sees X where that of the original sees F. Its weight Q is to give X Q what F W is:
least squares have their minimum at W + H^-1 D W, with H = X^T X and D = X^T (F - X). All of it would fit the
calibration text too closely, so a share of it is taken (QEP, Arai and Ichikawa, 2025, arXiv 2504.09629; Qronos, Zhang
et al., 2025, arXiv 2505.11695).
"""

import jax
from jaxtyping import Array, Float

from fpq_jax._algorithms.linalg import matmul
from fpq_jax._algorithms.metric import Metric


def propagated(
    w: Float[Array, "in out"], metric: Metric, cross: Float[Array, "in in"], share: float
) -> Float[Array, "in out"]:
    """``w`` and the ``share`` of its correction. cross: D, over the same tokens as the metric's Hessian."""
    wanted = matmul(cross, w)[metric.order]
    # H = R R^T in the metric's order, and its factor is R^T
    half = jax.scipy.linalg.solve_triangular(metric.factor, wanted, lower=True, trans=1)
    found = jax.scipy.linalg.solve_triangular(metric.factor, half, lower=True)
    return w + share * w.at[metric.order].set(found)
