"""GPTQ (Frantar et al., arXiv 2210.17323): rounding with error feedback, as pure functions of arrays.

Lingo, after the paper: W [in, out] the weight, H [in, in] the Hessian X^T X (any positive multiple of it), D = W - Q
the residual, U the upper Cholesky factor of the inverse Hessian.

The published algorithm walks over the inputs, and after each one moves what is left of the weights by the rounding
error times a row of U. Here the same numbers come without an inverse. With the upper triangular R of H = R R^T (a
Cholesky factorization from the far end), U = R^-1, and the loss is |R^T D|^2, whose row j holds D_0 .. D_j only. The
weights of a block, updated for everything before it, are therefore

    V = W_block + U_bb^T S,    S = R[before, block]^T D[before],    U_bb = R_bb^-1   (a diagonal block of U)

so finished blocks enter through one matrix product, and only small diagonal blocks are inverted. Inside a block the
published column loop runs on V with U_bb. Group scales are taken from V, with every earlier update in it.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fpq_jax._algorithms.linalg import matmul
from fpq_jax._numerics.formats import Format, encode
from fpq_jax._numerics.qtensor import QTensor, assemble
from fpq_jax._numerics.scales import Scale, group_scale, row_reference
from fpq_jax._numerics.spec import QuantSpec

_MAX_SEGMENT = 32  # inputs updated one by one; between segments a matrix product does it
_UNROLLED = 8  # steps of the loop over inputs in one of its turns, which a GPU launches apart
_MIN_BLOCK = 128  # small groups are put together into blocks of about this size
_ONE_GROUP_BLOCK = 256  # block size where the whole row is one group
_CHUNK = 512  # finished inputs entering one matrix product
_MAX_DAMPING_STEPS = 8  # each raises the damping tenfold


class GptqStats(NamedTuple):
    """Holds what GPTQ had to do to succeed.

    Attributes:
        damping: float32, the share of the mean of the Hessian's diagonal with which the Cholesky factorization
            succeeded.
        dead: int32, how many inputs were never seen.
    """

    damping: Float[Array, ""]
    dead: Int[Array, ""]


def gptq(
    w: Float[Array, "in out"], hessian: Float[Array, "in in"], spec: QuantSpec, *, damping: float = 0.01
) -> QTensor:
    """Quantizes one weight with GPTQ (Frantar et al., 2022, arXiv 2210.17323, algorithm 1).

    The codes are chosen so that the weight's outputs change least on inputs with this Hessian. Inputs that were never
    seen (a zero on the diagonal) get zero weights, as published. It can be jitted (``spec`` static) and vmapped.

    Args:
        w: ``[in, out]``, any float type.
        hessian: ``[in, in]``, the sum of x x^T over the inputs x, or any positive multiple of it (see ``hessian``).
        spec: format, groups and scale constraint.
        damping: what is added to the Hessian's diagonal, as a share of its mean; ten times more each time that the
            Cholesky factorization fails, at most eight times.

    Returns:
        A QTensor of logical shape [in, out].

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> x = jax.random.normal(jax.random.key(1), (256, 8)) @ jax.random.normal(jax.random.key(2), (8, 64))
        >>> spec = fpq.QuantSpec(group_size=32, constraint="m2")
        >>> q = fpq.gptq(w, fpq.hessian(x), spec)
        >>> error = lambda q: jnp.linalg.norm(x @ (fpq.dequantize(q) - w))
        >>> bool(error(q) < 0.5 * error(fpq.quantize_array(w, spec)))
        True
    """
    return gptq_with_stats(w, hessian, spec, damping=damping)[0]


@partial(jax.jit, static_argnames=("spec",))
def gptq_with_stats(
    w: Float[Array, "in out"], hessian: Float[Array, "in in"], spec: QuantSpec, *, damping: float | Array = 0.01
) -> tuple[QTensor, GptqStats]:
    """Quantizes one weight as ``gptq`` does, and reports the damping that this took.

    Args:
        w: ``[in, out]``, any float type.
        hessian: ``[in, in]``, the sum of x x^T over the inputs x, or any positive multiple of it.
        spec: format, groups and scale constraint.
        damping: what is added to the Hessian's diagonal, as a share of its mean.

    Returns:
        The QTensor, and a named tuple of the ``damping`` with which the Cholesky factorization succeeded and of
        ``dead``, the number of inputs that were never seen.

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> x = jax.random.normal(jax.random.key(1), (256, 64)).at[:, 0].set(0.0)
        >>> q, stats = fpq.gptq_with_stats(w, fpq.hessian(x), fpq.QuantSpec(group_size=32, constraint="m2"))
        >>> round(float(stats.damping), 3), int(stats.dead)
        (0.01, 1)
    """
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
    in_features = w.shape[0]
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    hessian = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0))
    w = jnp.where(dead[:, None], 0.0, w)
    importance = jnp.diagonal(hessian)

    blocking = _Blocking.of(spec, in_features)
    source = blocking.source(in_features)
    hessian, w_padded = _pad(hessian, w, source)
    factor, damping = _factorize(hessian, damping * jnp.mean(importance), damping, jnp.asarray(source >= 0))
    reference = row_reference(w, spec)
    weight = jnp.where(source >= 0, importance[source], jnp.float32(0))
    values, scales = _quantize_blocks(w_padded, factor, reference, weight, spec, blocking, in_features)

    codes = encode(values, spec.format)
    if blocking.padded != in_features:
        codes = codes[np.flatnonzero(source >= 0)]
    groups = spec.num_groups(in_features)
    q = assemble(codes, jax.tree.map(lambda m: m[:groups], scales), reference, spec)
    return q, GptqStats(damping, jnp.sum(dead))


@dataclass(frozen=True)
class _Blocking:
    """How the inputs are cut: blocks of segments; a group is ``per_group`` segments and never crosses a block.

    Groups are padded with dead inputs to whole segments, so every shape is static. A row that is one group has its
    scale from the start, and its blocks are cut for speed.
    """

    length: int  # inputs of a group
    segment: int
    per_group: int  # segments
    per_block: int  # segments
    blocks: int
    one_group: bool

    @classmethod
    def of(cls, spec: QuantSpec, in_features: int) -> "_Blocking":
        groups, length = spec.num_groups(in_features), spec.group_length(in_features)
        one_group = groups == 1
        cut = min(length, _ONE_GROUP_BLOCK) if one_group else length
        per_group = -(-cut // _MAX_SEGMENT)
        segment = -(-cut // per_group)
        together = 1 if one_group else max(1, min(groups, _MIN_BLOCK // (per_group * segment)))
        blocks = -(-in_features // (per_group * segment)) if one_group else -(-groups // together)
        return cls(length, segment, per_group, per_group * together, blocks, one_group)

    @property
    def block(self) -> int:
        return self.segment * self.per_block

    @property
    def padded(self) -> int:
        return self.block * self.blocks

    def source(self, in_features: int) -> np.ndarray:
        """For each padded position the input it holds, -1 for padding."""
        position = np.arange(self.padded)
        if self.one_group:
            return np.where(position < in_features, position, -1)
        group, offset = np.divmod(position, self.per_group * self.segment)
        source = group * self.length + offset
        return np.where((offset < self.length) & (source < in_features), source, -1)


def _pad(hessian: Array, w: Array, source: np.ndarray) -> tuple[Array, Array]:
    """Lay Hessian and weight out by ``source``; padding gets a one on the Hessian's diagonal and zero weights."""
    if len(source) == len(w):
        return hessian, w
    real = source >= 0
    hessian = jnp.where(
        real[:, None] & real[None, :], hessian[source][:, source], jnp.diag(1.0 - real.astype(np.float32))
    )
    return hessian, jnp.where(real[:, None], w[source], 0.0)


def _factorize(hessian: Array, added: Array, damping: float | Array, real: Array) -> tuple[Array, Array]:
    """The lower triangular R^T with R R^T = H + damping, and the damping with which this succeeded."""

    def attempt(i):
        share = 10.0**i
        damped = hessian + jnp.diag(jnp.where(real, added * share, 0.0))
        # the Cholesky factor of the reversed matrix, reversed, is upper triangular
        return jnp.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)[::-1, ::-1].T

    def failed(state):
        i, factor = state
        return ~jnp.all(jnp.isfinite(factor)) & (i < _MAX_DAMPING_STEPS)

    i, factor = jax.lax.while_loop(failed, lambda s: (s[0] + 1, attempt(s[0] + 1.0)), (jnp.float32(0), attempt(0.0)))
    return factor, damping * 10.0**i


def _quantize_blocks(
    w: Float[Array, "P out"],
    factor: Float[Array, "P P"],
    reference: Scale,
    weight: Float[Array, " P"],
    spec: QuantSpec,
    blocking: _Blocking,
    in_features: int,
) -> tuple[Array, Scale]:
    """(values [P, out] of the format, scales [groups, out]) of the padded weight."""
    (padded, out), block, segment = w.shape, blocking.block, blocking.segment
    group = blocking.per_group * segment
    groups = 1 if blocking.one_group else padded // group
    chunks = -(-padded // _CHUNK)
    factor_columns = jnp.pad(factor, ((0, 0), (0, chunks * _CHUNK - padded)))
    blocks = _diagonal_blocks(factor, block)
    inverses = jax.lax.linalg.triangular_solve(
        blocks, jnp.broadcast_to(jnp.eye(block, dtype=jnp.float32), blocks.shape), left_side=True, lower=True
    )  # U_bb^T
    if blocking.one_group:
        scales = jax.tree.map(lambda m: m[None], group_scale(w, reference, weight, spec, in_features))
    else:
        scales = Scale(
            jnp.ones((groups, out), jnp.float32),
            jnp.zeros((groups, out), jnp.float32),
            jnp.zeros((groups, out), jnp.int8),
        )

    def one_block(b, state):
        values, residual, scales = state
        start = b * block
        w_block = jax.lax.dynamic_slice_in_dim(w, start, block)
        rows = jax.lax.dynamic_slice_in_dim(factor_columns, start, block)

        def add(c, s):
            return s + matmul(
                jax.lax.dynamic_slice_in_dim(rows, c * _CHUNK, _CHUNK, axis=1),
                jax.lax.dynamic_slice_in_dim(residual, c * _CHUNK, _CHUNK),
            )

        # rows of ``residual`` that are not finished are zero, so the last chunk may reach past them
        s = jax.lax.fori_loop(0, -(-start // _CHUNK), add, jnp.zeros_like(w_block))
        lower = jax.lax.dynamic_index_in_dim(inverses, b, keepdims=False)
        v = w_block + matmul(lower, s)

        def one_segment(i, state):
            v, values_block, scales, scale = state
            first = i * segment
            if not blocking.one_group:

                def new_scale(_):
                    rows = jax.lax.dynamic_slice_in_dim(v, first, group)
                    importance = jax.lax.dynamic_slice_in_dim(weight, start + first, group)
                    scale = group_scale(rows, reference, importance, spec, in_features)
                    index = (start + first) // group
                    return scale, jax.tree.map(lambda all_, one: all_.at[index].set(one), scales, scale)

                scale, scales = jax.lax.cond(i % blocking.per_group == 0, new_scale, lambda _: (scale, scales), None)
            columns = jax.lax.dynamic_slice_in_dim(lower, first, segment, axis=1)  # of U^T: rows of U
            diagonal = jax.lax.dynamic_slice_in_dim(columns, first, segment)
            v_segment = jax.lax.dynamic_slice_in_dim(v, first, segment)

            errors, values_segment = _one_by_one(v_segment, diagonal, scale, spec.format)
            behind = jnp.arange(block)[:, None] >= first + segment
            v = v - matmul(jnp.where(behind, columns, 0.0), errors)
            values_block = jax.lax.dynamic_update_slice_in_dim(values_block, values_segment, first, 0)
            return v, values_block, scales, scale

        state = (v, jnp.zeros_like(v), scales, jax.tree.map(lambda m: m[0], scales))
        _, values_block, scales, scale = jax.lax.fori_loop(0, blocking.per_block, one_segment, state)
        if not blocking.one_group:
            these = lambda m: jax.lax.dynamic_slice_in_dim(m, start // group, block // group)
            scale = jax.tree.map(lambda m: jnp.repeat(these(m), group, axis=0), scales)
        # residuals against the weights as given, not as updated
        d = w_block - scale.numbers(values_block, spec.format)
        residual = jax.lax.dynamic_update_slice_in_dim(residual, d, start, 0)
        values = jax.lax.dynamic_update_slice_in_dim(values, values_block, start, 0)
        return values, residual, scales

    state = (jnp.zeros_like(w), jnp.zeros((chunks * _CHUNK, out), jnp.float32), scales)
    values, _, scales = jax.lax.fori_loop(0, blocking.blocks, one_block, state)
    return values, scales


def _one_by_one(
    v: Float[Array, "t out"], lower: Float[Array, "t t"], scale: Scale, fmt: Format
) -> tuple[Float[Array, "t out"], Float[Array, "t out"]]:
    """The published loop over the inputs of a segment: (errors over U's diagonal, values of the format).

    ``lower`` is the segment's diagonal block of U^T. A finished input keeps the weight that it was rounded from, so the
    loop carries nothing else, and values and errors are taken of all inputs at once behind it.
    """
    strictly_lower = jnp.tril(lower, -1)

    def one_input(j, v):
        row = jax.lax.dynamic_index_in_dim(v, j, keepdims=False)
        column = jax.lax.dynamic_index_in_dim(strictly_lower, j, axis=1, keepdims=False)
        error = (row - scale.numbers(scale.values(row, fmt), fmt)) / lower[j, j]
        return v - column[:, None] * error

    v = jax.lax.fori_loop(0, v.shape[0], one_input, v, unroll=_UNROLLED)
    values = scale.values(v, fmt)
    return (v - scale.numbers(values, fmt)) / jnp.diagonal(lower)[:, None], values


def _diagonal_blocks(matrix: Float[Array, "P P"], block: int) -> Float[Array, "n b b"]:
    """The square blocks on the diagonal."""
    n = matrix.shape[0] // block
    index = np.arange(n)
    return matrix.reshape(n, block, n, block)[index, :, index, :]
