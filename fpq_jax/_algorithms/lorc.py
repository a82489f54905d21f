"""LoRC, low-rank compensation of the quantization error (ZeroQuant-V2, arXiv 2303.08302; ZeroQuant-FP, section 4).

E = W - What = U S V; the layer computes with What + A B, A = U_m sqrt(S_m) [in, m], B = sqrt(S_m) V_m [m, out].
The truncated SVD is randomized with power iterations (Halko, Martinsson, Tropp, 2011, algorithm 4.4).
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fpq_jax._algorithms.linalg import matmul
from fpq_jax._numerics.qtensor import LowRank, QTensor, dequantize

FactorDtype = Literal["bfloat16", "int8"]

OVERSAMPLING = 16
POWER_ITERATIONS = 4


@partial(jax.jit, static_argnames=("rank", "dtype"))
def lorc(
    w: Float[Array, "in out"], q: QTensor, *, rank: int = 8, dtype: FactorDtype = "bfloat16", seed: int | Array = 0
) -> QTensor:
    """``q`` with the best ``rank`` correction of its error against ``w`` [in, out]; the same for the same seed.

    A rank above either dimension means that dimension. Jittable and vmappable.
    """
    error = w.astype(jnp.float32) - dequantize(q, low_rank=False)
    u, s, vt = truncated_svd(error, min(rank, *error.shape), seed)
    root = jnp.sqrt(s)
    return replace(q, low_rank=_factors(u * root, root[:, None] * vt, dtype))


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
