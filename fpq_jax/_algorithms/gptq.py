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

With the order "activation" (act-order, from the GPTQ code) inputs go by their Hessian's diagonal, the largest first,
while many others can still make up for their errors. Groups keep the inputs that they would have without it (static
groups), so nothing about what is stored changes; their scales are known before the first input is rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fpq_jax._algorithms.linalg import matmul, unrolled
from fpq_jax._algorithms.metric import GptqStats, Metric, Order, cholesky, factorize
from fpq_jax._numerics.formats import Format, encode
from fpq_jax._numerics.qtensor import QTensor, assemble
from fpq_jax._numerics.scales import Scale, group_scale, of_inputs, row_reference, weight_scales
from fpq_jax._numerics.spec import QuantSpec

_MAX_SEGMENT = 32  # inputs updated one by one; between segments a matrix product does it
_MIN_BLOCK = 128  # small groups are put together into blocks of about this size
_ONE_GROUP_BLOCK = 256  # block size where the whole row is one group
_CHUNK = 512  # finished inputs entering one matrix product


def gptq(
    w: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    order: Order = "natural",
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
        order: in which the inputs are rounded, ``"natural"`` or ``"activation"``: by the Hessian's diagonal, the
            largest first, with the groups that they have without it (act-order with static groups).

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
    return gptq_with_stats(w, hessian, spec, damping=damping, order=order)[0]


@partial(jax.jit, static_argnames=("spec", "order"))
def gptq_with_stats(
    w: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    spec: QuantSpec,
    *,
    damping: float | Array = 0.01,
    order: Order = "natural",
) -> tuple[QTensor, GptqStats]:
    """Quantizes one weight as ``gptq`` does, and reports the damping that this took.

    Args:
        w: ``[in, out]``, any float type.
        hessian: ``[in, in]``, the sum of x x^T over the inputs x, or any positive multiple of it.
        spec: format, groups and scale constraint.
        damping: what is added to the Hessian's diagonal, as a share of its mean.
        order: in which the inputs are rounded, see ``gptq``.

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
    if order == "activation":
        metric = factorize(hessian, damping, order)
        w = jnp.where(metric.dead[:, None], 0.0, w)
        scales, reference = weight_scales(w, jnp.diagonal(metric.hessian), spec)
        values = round_in_order(w, of_inputs(scales, spec, len(w)), metric, spec.format)
        return assemble(encode(values, spec.format), scales, reference, spec), metric.stats
    in_features = w.shape[0]
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    hessian = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0))
    w = jnp.where(dead[:, None], 0.0, w)
    importance = jnp.diagonal(hessian)

    blocking = _Blocking.of(spec, in_features)
    source = blocking.source(in_features)
    hessian, w_padded = _pad(hessian, w, source)
    factor, damping = cholesky(hessian, damping * jnp.mean(importance), damping, jnp.asarray(source >= 0))
    reference = row_reference(w, spec)
    weight = jnp.where(source >= 0, importance[source], jnp.float32(0))
    of_group = lambda rows, importance: group_scale(rows, reference, importance, spec, in_features)
    if blocking.one_group:
        scale = of_group(w_padded, weight)
        values, scales = _quantize_blocks(w_padded, factor, scale, spec.format, blocking)
    else:
        values, scales = _quantize_blocks(w_padded, factor, _ByGroup(of_group, weight), spec.format, blocking)

    codes = encode(values, spec.format)
    if blocking.padded != in_features:
        codes = codes[np.flatnonzero(source >= 0)]
    groups = spec.num_groups(in_features)
    q = assemble(codes, jax.tree.map(lambda m: m[:groups], scales), reference, spec)
    return q, GptqStats(damping, jnp.sum(dead))


def round_in_order(w: Float[Array, "in out"], scales: Scale, metric: Metric, fmt: Format) -> Float[Array, "in out"]:
    """The format's values for ``w`` with error feedback in the metric's order. ``scales``: of each input, [in, out]."""
    in_features = len(w)
    blocking = _Blocking.of_row(in_features)
    source = blocking.source(in_features)
    # R of the padded Hessian is R with ones on the diagonal
    factor, w = _pad(metric.factor, w[metric.order], source)
    rows = lambda m: m[metric.order][np.maximum(source, 0)]  # padding takes any scale, its weights are zero
    known = Scale(rows(scales.scale), rows(scales.zero))
    values, _ = _quantize_blocks(w, factor, known, fmt, blocking)
    return jnp.zeros_like(values[:in_features]).at[metric.order].set(values[:in_features])


@dataclass(frozen=True)
class _Blocking:
    """How the inputs are cut: blocks of segments; a group is ``per_group`` segments and never crosses a block.

    Groups are padded with dead inputs to whole segments, so every shape is static. Where scales are known from the
    start, as that of a row which is one group, blocks are cut for speed.
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
        if groups == 1:
            return cls.of_row(in_features)
        per_group = -(-length // _MAX_SEGMENT)
        segment = -(-length // per_group)
        together = max(1, min(groups, _MIN_BLOCK // (per_group * segment)))
        return cls(length, segment, per_group, per_group * together, -(-groups // together), False)

    @classmethod
    def of_row(cls, in_features: int) -> "_Blocking":
        """Of a row whose scales are known from the start."""
        cut = min(in_features, _ONE_GROUP_BLOCK)
        per_group = -(-cut // _MAX_SEGMENT)
        segment = -(-cut // per_group)
        return cls(in_features, segment, per_group, per_group, -(-in_features // (per_group * segment)), True)

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
    """Lay Hessian, or its factor, and weight out by ``source``; padding gets a one on the diagonal and zero weights."""
    if len(source) == len(w):
        return hessian, w
    real = source >= 0
    hessian = jnp.where(
        real[:, None] & real[None, :], hessian[source][:, source], jnp.diag(1.0 - real.astype(np.float32))
    )
    return hessian, jnp.where(real[:, None], w[source], 0.0)


class _ByGroup(NamedTuple):
    """Scales that are taken when the walk comes to a group: of(its weights, the importance of its inputs)."""

    of: Callable[[Array, Array], Scale]
    weight: Float[Array, " P"]


def _quantize_blocks(
    w: Float[Array, "P out"],
    factor: Float[Array, "P P"],
    scales: Scale | _ByGroup,
    fmt: Format,
    blocking: _Blocking,
) -> tuple[Array, Scale]:
    """(values [P, out] of the format, scales [groups, out]) of the padded weight. ``scales``: where they are known
    already, [out] of all inputs or [P, out] of each, and come back with an axis in front."""
    (padded, out), block, segment = w.shape, blocking.block, blocking.segment
    group = blocking.per_group * segment
    chunks = -(-padded // _CHUNK)
    factor_columns = jnp.pad(factor, ((0, 0), (0, chunks * _CHUNK - padded)))
    blocks = _diagonal_blocks(factor, block)
    inverses = jax.lax.linalg.triangular_solve(
        blocks, jnp.broadcast_to(jnp.eye(block, dtype=jnp.float32), blocks.shape), left_side=True, lower=True
    )  # U_bb^T
    if isinstance(scales, _ByGroup):
        shape = padded // group, out
        found = Scale(jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int8))
    else:
        found = jax.tree.map(lambda m: m[None], scales)

    def known(start, size):
        """The scales of some inputs, where they are known."""
        rows = lambda m: m if m.ndim == 1 else jax.lax.dynamic_slice_in_dim(m, start, size)
        return jax.tree.map(rows, scales)

    def one_block(b, state):
        values, residual, found = state
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
            v, values_block, found, scale = state
            first = i * segment
            if isinstance(scales, _ByGroup):

                def new_scale(_):
                    rows = jax.lax.dynamic_slice_in_dim(v, first, group)
                    scale = scales.of(rows, jax.lax.dynamic_slice_in_dim(scales.weight, start + first, group))
                    index = (start + first) // group
                    return scale, jax.tree.map(lambda all_, one: all_.at[index].set(one), found, scale)

                scale, found = jax.lax.cond(i % blocking.per_group == 0, new_scale, lambda _: (scale, found), None)
            columns = jax.lax.dynamic_slice_in_dim(lower, first, segment, axis=1)  # of U^T: rows of U
            diagonal = jax.lax.dynamic_slice_in_dim(columns, first, segment)
            v_segment = jax.lax.dynamic_slice_in_dim(v, first, segment)

            own = scale if isinstance(scales, _ByGroup) else known(start + first, segment)
            errors, values_segment = _one_by_one(v_segment, diagonal, own, fmt)
            behind = jnp.arange(block)[:, None] >= first + segment
            v = v - matmul(jnp.where(behind, columns, 0.0), errors)
            values_block = jax.lax.dynamic_update_slice_in_dim(values_block, values_segment, first, 0)
            return v, values_block, found, scale

        _, values_block, found, _ = jax.lax.fori_loop(
            0, blocking.per_block, one_segment, (v, jnp.zeros_like(v), found, jax.tree.map(lambda m: m[0], found))
        )
        if isinstance(scales, _ByGroup):
            these = lambda m: jax.lax.dynamic_slice_in_dim(m, start // group, block // group)
            scale = jax.tree.map(lambda m: jnp.repeat(these(m), group, axis=0), found)
        else:
            scale = known(start, block)
        # residuals against the weights as given, not as updated
        d = w_block - scale.numbers(values_block, fmt)
        residual = jax.lax.dynamic_update_slice_in_dim(residual, d, start, 0)
        values = jax.lax.dynamic_update_slice_in_dim(values, values_block, start, 0)
        return values, residual, found

    state = (jnp.zeros_like(w), jnp.zeros((chunks * _CHUNK, out), jnp.float32), found)
    values, _, found = jax.lax.fori_loop(0, blocking.blocks, one_block, state)
    return values, found


def _one_by_one(
    v: Float[Array, "t out"], lower: Float[Array, "t t"], scale: Scale, fmt: Format
) -> tuple[Float[Array, "t out"], Float[Array, "t out"]]:
    """The published loop over the inputs of a segment: (errors over U's diagonal, values of the format).

    ``lower`` is the segment's diagonal block of U^T; ``scale`` [out], or [t, out] of each input. A finished input keeps
    the weight that it was rounded from, so the loop carries nothing else, and values and errors are taken of all inputs
    at once behind it.
    """
    strictly_lower = jnp.tril(lower, -1)

    def one_input(j, v):
        row = jax.lax.dynamic_index_in_dim(v, j, keepdims=False)
        column = jax.lax.dynamic_index_in_dim(strictly_lower, j, axis=1, keepdims=False)
        at = jax.tree.map(lambda m: m if m.ndim == 1 else jax.lax.dynamic_index_in_dim(m, j, keepdims=False), scale)
        error = (row - at.numbers(at.values(row, fmt), fmt)) / lower[j, j]
        return v - column[:, None] * error

    v = jax.lax.fori_loop(0, v.shape[0], one_input, v, unroll=unrolled())
    values = scale.values(v, fmt)
    return (v - scale.numbers(values, fmt)) / jnp.diagonal(lower)[:, None], values


def _diagonal_blocks(matrix: Float[Array, "P P"], block: int) -> Float[Array, "n b b"]:
    """The square blocks on the diagonal."""
    n = matrix.shape[0] // block
    index = np.arange(n)
    return matrix.reshape(n, block, n, block)[index, :, index, :]
