"""QTensor, the quantized weight: codes, scales and a low-rank correction in one pytree leaf-to-be.

Logical shape [in, out] like a Flax kernel; codes are stored [out, in], contraction last, as FP8 tensor cores want them.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from fpq_jax._errors import FpqError
from fpq_jax._formats import E4M3, decode, encode, pack, unpack
from fpq_jax._scales import group_scale, power_of_two, row_reference
from fpq_jax._spec import QuantSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """The product a @ diag(scale) @ b: a [in, r], b [r, out], bfloat16, or INT8 codes with ``scale`` float32 [r]."""

    a: Any
    b: Any
    scale: Any = None

    def factors(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """A [in, r] and B [r, out] in ``dtype``, the scale in A."""
        a = self.a.astype(jnp.float32)
        return (a if self.scale is None else a * self.scale).astype(dtype), self.b.astype(dtype)

    def product(self) -> Float[Array, "in out"]:
        """A @ B in float32."""
        a, b = self.factors(jnp.float32)
        return jnp.matmul(a, b, precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """A quantized weight of logical shape [in, out]; a pytree of arrays whose ``spec`` and ``shape`` are static.

    codes: float8 [out, in], or two 4-bit codes to a byte, uint8 [out, ceil(in / 2)].
    row_scale: float32 [out, 1] ([1, 1] for one scale per tensor); None when every group has a free scale of its own.
    exponents: int8 [out, groups] under M1 and M2: a group's scale is row_scale * 2**exponent.
    group_scale: float32 [out, groups]: free scales of several groups.
    low_rank: LoRC's correction, or None.
    """

    codes: Any
    row_scale: Any
    exponents: Any
    group_scale: Any
    low_rank: LowRank | None
    spec: QuantSpec = field(metadata={"static": True})
    shape: tuple[int, int] = field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Everything stored (codes, scales, exponents, low-rank factors) over the number of weights."""
        return 8 * self.nbytes / self.size

    @property
    def has_fp8_form(self) -> bool:
        """Whether one full-K FP8 product computes it: there are no free group scales."""
        return self.group_scale is None


def quantize_array(w: Float[Array, "in out"], spec: QuantSpec) -> QTensor:
    """Round ``w`` [in, out] to nearest under ``spec``. Jittable and vmappable; ``w`` must be finite."""
    w = w.astype(jnp.float32)
    in_features, out_features = w.shape
    reference = row_reference(w, spec)
    groups, length = spec.num_groups(in_features), spec.group_length(in_features)
    padded = jnp.pad(w, ((0, groups * length - in_features), (0, 0))).reshape(groups, length, out_features)
    scales, exponents = jax.vmap(lambda g: group_scale(g, reference, jnp.ones(length), spec, in_features))(padded)
    codes = encode(padded / scales[:, None, :], spec.format).reshape(groups * length, out_features)
    return assemble(codes[:in_features], scales, exponents, reference, spec)


def assemble(
    codes: Shaped[Array, "in out"],
    scales: Float[Array, "groups out"],
    exponents: Int[Array, "groups out"],
    reference: Float[Array, " out"],
    spec: QuantSpec,
) -> QTensor:
    """A QTensor of codes in logical orientation and each group's scale (and, under a constraint, its exponent)."""
    in_features, out_features = codes.shape
    codes = codes.T if spec.format.dtype else pack(codes.T)
    row_scale, stored_exponents, free = None, None, None
    if scales.shape[0] == 1:
        row_scale = scales[0, :1, None] if spec.group_size == "tensor" else scales[0, :, None]
    elif spec.constraint:
        row_scale, stored_exponents = reference[:, None], exponents.T
    else:
        free = scales.T
    return QTensor(codes, row_scale, stored_exponents, free, None, spec, (in_features, out_features))


def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32, *, low_rank: bool = True) -> Float[Array, "in out"]:
    """The weight that ``q`` stands for, [in, out], computed in float32; ``low_rank`` False leaves LoRC out."""
    in_features, _ = q.shape
    codes = q.codes if q.spec.format.dtype else unpack(q.codes, in_features)
    w = decode(codes, q.spec.format) * _per_weight(_scales(q), q)
    w = w.T
    if low_rank and q.low_rank is not None:
        w = w + q.low_rank.product()
    return w.astype(dtype)


def _scales(q: QTensor) -> Float[Array, "out groups"]:
    """Every group's scale; one column when a row has one."""
    if q.group_scale is not None:
        return q.group_scale
    return q.row_scale if q.exponents is None else q.row_scale * power_of_two(q.exponents)


def _per_weight(values: Shaped[Array, "out groups"], q: QTensor) -> Shaped[Array, "out in"]:
    """Group values repeated over their groups' inputs; a single column is left to broadcast."""
    if values.shape[1] == 1:
        return values
    return jnp.repeat(values, q.spec.group_length(q.shape[0]), axis=1)[:, : q.shape[0]]


def expand(q: QTensor) -> QTensor:
    """The same weight with 8-bit codes and row factors only, exactly; needs M1, M2 or one scale a row.

    4-bit codes become float8_e4m3fn with the group's power of two folded in; 8-bit codes stay. Free group scales and
    exponents outside the exact range have no such form: FpqError. (Traced exponents cannot be looked at and are taken
    as valid, which every QTensor made here is.)
    """
    fmt = q.spec.format
    if fmt.dtype is not None:
        return q
    if not q.has_fp8_form:
        raise FpqError("A weight with free group scales has no exact FP8 form; quantize it with constraint m1 or m2.")
    codes = unpack(q.codes, q.shape[0])
    spec = replace(
        q.spec,
        format=E4M3,
        group_size="channel" if q.row_scale.shape[0] > 1 else q.spec.group_size,
        constraint=None,
        compute_rows=1,
    )
    if q.exponents is None:
        return replace(q, codes=decode(codes, fmt, E4M3.dtype), spec=spec)
    low, high = fmt.exact_shifts
    if not isinstance(q.exponents, jax.core.Tracer) and q.exponents.size:
        found = int(q.exponents.min()), int(q.exponents.max())
        if found[0] < low or found[1] > high:
            raise FpqError(
                f"Exponents {found[0]} to {found[1]} are outside {low} to {high}, where {fmt} expands exactly."
            )
    # one byte table per shift: adding to the exponent field would be wrong for 0 and subnormals
    magnitudes = fmt.values[None, :].astype(np.float64) * 2.0 ** np.arange(low, high + 1)[:, None]
    table = np.concatenate([magnitudes, -magnitudes], axis=1).astype(jnp.float8_e4m3fn)
    index = _per_weight((q.exponents - low).astype(jnp.uint8), q) * 16 + codes
    return replace(q, codes=jnp.asarray(table.ravel())[index], exponents=None, spec=spec)


def expand_all(tree: Any) -> Any:
    """The pytree with every QTensor that has an FP8 form expanded to it; the others stay as they are."""
    is_qtensor = lambda leaf: isinstance(leaf, QTensor)
    return jax.tree.map(
        lambda leaf: expand(leaf) if is_qtensor(leaf) and leaf.has_fp8_form else leaf, tree, is_leaf=is_qtensor
    )
