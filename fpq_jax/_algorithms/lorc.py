"""LoRC, low-rank compensation of the quantization error (ZeroQuant-V2, arXiv 2303.08302; ZeroQuant-FP, section 4).

E = W - What = U S V; the layer computes with What + A B, A = U_m sqrt(S_m) [in, m], B = sqrt(S_m) V_m [m, out].
The truncated SVD is randomized with power iterations (Halko, Martinsson, Tropp, 2011, algorithm 4.4).

Weighted by the inputs, what is least is the error of the outputs, |R^T (E - A B)| with the Hessian H = R R^T, which is
the truncated SVD of R^T E, times R^-T (QERA, Zhang et al., 2024, arXiv 2410.06040, in exact form).
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fpq_jax._algorithms.linalg import matmul
from fpq_jax._algorithms.metric import Metric
from fpq_jax._numerics.qtensor import LowRank, QTensor, dequantize

FactorDtype = Literal["bfloat16", "int8"]

OVERSAMPLING = 16
POWER_ITERATIONS = 4


@partial(jax.jit, static_argnames=("rank", "dtype"))
def lorc(
    w: Float[Array, "in out"], q: QTensor, *, rank: int = 8, dtype: FactorDtype = "bfloat16", seed: int | Array = 0
) -> QTensor:
    """Adds LoRC, a low-rank correction of the quantization error, to a quantized weight.

    With the singular value decomposition ``w - dequantize(q) = U S V``, the factors are ``U sqrt(S)`` and ``sqrt(S) V``
    of the largest singular values. The decomposition is randomized, with power iterations (Halko, Martinsson and Tropp,
    2011, algorithm 4.4), and exact for small matrices. It can be jitted and vmapped.

    Sources: ZeroQuant-V2 (Yao et al., 2023, arXiv 2303.08302); ZeroQuant-FP (Wu et al., 2023, arXiv 2307.09782),
    section 4.

    Args:
        w: ``[in, out]``, the weight before it was quantized, any float type.
        q: the quantized weight.
        rank: of the correction; more than a dimension of the weight means that dimension.
        dtype: what the factors are stored in, ``"bfloat16"`` or ``"int8"``.
        seed: of the randomized decomposition; the same seed gives the same factors.

    Returns:
        ``q`` with a ``LowRank``; one that it had is replaced.

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> q = fpq.quantize_array(w, fpq.QuantSpec(group_size=32, constraint="m2"))
        >>> corrected = fpq.lorc(w, q, rank=4)
        >>> corrected.low_rank.a.shape, corrected.low_rank.b.shape
        ((64, 4), (4, 32))
        >>> error = lambda q: jnp.linalg.norm(fpq.dequantize(q) - w)
        >>> bool(error(corrected) < error(q))
        True
    """
    error = w.astype(jnp.float32) - dequantize(q, low_rank=False)
    u, s, vt = truncated_svd(error, min(rank, *error.shape), seed)
    root = jnp.sqrt(s)
    return replace(q, low_rank=_factors(u * root, root[:, None] * vt, dtype))


def weighted_low_rank(
    error: Float[Array, "in out"],
    metric: Metric,
    rank: int,
    dtype: FactorDtype,
    seed: int | Array,
    kept: int | Array | None = None,
) -> LowRank:
    """The low-rank matrix nearest to ``error`` in the metric, in factors of equal norm, by falling singular values.

    ``kept``: how many of them, where some of the ``rank`` are to be zero.
    """
    u, s, vt = truncated_svd(matmul(metric.factor, error[metric.order]), min(rank, *error.shape), seed)
    if kept is not None:
        s = jnp.where(jnp.arange(len(s)) < kept, s, 0.0)
    a = jax.scipy.linalg.solve_triangular(metric.factor, u * s, lower=True)
    a = jnp.zeros_like(a).at[metric.order].set(a)
    norms = jnp.sqrt(jnp.linalg.norm(a, axis=0))
    norms = jnp.where(norms > 0, norms, 1.0)
    return _factors(a / norms, norms[:, None] * vt, dtype)


def truncated_svd(m: Float[Array, "n k"], rank: int, seed: int | Array) -> tuple[Array, Array, Array]:
    """(U [n, rank], S [rank], V [rank, k]) of the largest singular values; exact for small matrices."""
    width = rank + OVERSAMPLING
    if width >= min(m.shape):
        u, s, vt = jnp.linalg.svd(m, full_matrices=False)
    else:
        sample = jax.random.normal(jax.random.key(seed), (m.shape[1], width), jnp.float32)
        basis = jnp.linalg.qr(matmul(m, sample))[0]
        for _ in range(POWER_ITERATIONS):
            basis = jnp.linalg.qr(matmul(m.T, basis))[0]
            basis = jnp.linalg.qr(matmul(m, basis))[0]
        u, s, vt = jnp.linalg.svd(matmul(basis.T, m), full_matrices=False)
        u = matmul(basis, u)
    return u[:, :rank], s[:rank], vt[:rank]


def _factors(a: Float[Array, "in r"], b: Float[Array, "r out"], dtype: FactorDtype) -> LowRank:
    if dtype == "bfloat16":
        return LowRank(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    # one symmetric scale for each column of A and row of B; the two meet in the product
    scales = [jnp.max(jnp.abs(f), axis=axis, keepdims=True) * np.float32(1 / 127) for f, axis in ((a, 0), (b, 1))]
    scales = [jnp.where(s > 0, s, 1.0) for s in scales]
    codes = [jnp.round(f / s).astype(jnp.int8) for f, s in zip((a, b), scales, strict=True)]
    return LowRank(codes[0], codes[1], scales[0].ravel() * scales[1].ravel())
