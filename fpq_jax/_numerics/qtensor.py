"""QTensor, the quantized weight: codes, scales and a low-rank correction in one pytree.

Logical shape [in, out] like a Flax kernel; codes are stored [out, in], contraction last, as FP8 tensor cores want them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from fpq_jax._errors import FpqError
from fpq_jax._numerics.formats import E4M3, decode, encode, pack, unpack
from fpq_jax._numerics.scales import Scale, of_inputs, power_of_two, weight_scales
from fpq_jax._numerics.spec import QuantSpec

Kind = Literal["stack", "in", "out"]


@dataclass(frozen=True)
class Axes:
    """Describes the parameter that a QTensor stands for: what each of its axes is, and how large.

    The inputs and the outputs of a weight may be several axes each. An axis of kind "stack" indexes separate weights,
    such as scanned layers or experts. A QTensor's arrays have the stack axes in front, as many as are left after a scan
    or an index.

    Attributes:
        kinds: ``"in"``, ``"out"`` or ``"stack"`` for each axis.
        sizes: the sizes of the axes that are not "stack", in order.
        dtype: name of the parameter's dtype.

    Example:
        >>> axes = fpq.Axes.of(("in", "out", "out"), (64, 4, 16), jnp.bfloat16)  # to 4 heads of size 16
        >>> axes
        Axes(kinds=('in', 'out', 'out'), sizes=(64, 4, 16), dtype='bfloat16')
    """

    kinds: tuple[Kind, ...]
    sizes: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, kinds: Sequence[Kind], shape: Sequence[int], dtype: DTypeLike) -> "Axes":
        """Describes a parameter by its shape and dtype.

        Args:
            kinds: ``"in"``, ``"out"`` or ``"stack"`` for each axis.
            shape: the parameter's shape.
            dtype: the parameter's dtype.

        Returns:
            The axes of the parameter.
        """
        sizes = tuple(n for n, kind in zip(shape, kinds, strict=True) if kind != "stack")
        return cls(tuple(kinds), sizes, str(jnp.dtype(dtype)))

    def with_stack(self, count: int) -> "Axes":
        """Changes the number of stack axes: removes the first ones, or adds new ones in front.

        Args:
            count: how many stack axes there shall be.

        Returns:
            The changed axes.
        """
        kinds: list[Kind] = list(self.kinds)
        for _ in range(self.kinds.count("stack"), count):
            kinds.insert(0, "stack")
        for _ in range(count, self.kinds.count("stack")):
            kinds.remove("stack")
        return replace(self, kinds=tuple(kinds))

    def shape(self, stack: Sequence[int]) -> tuple[int, ...]:
        """Computes the parameter's shape.

        Args:
            stack: the sizes of the stack axes.

        Returns:
            The size of each axis.
        """
        stacks, sizes = iter(stack), iter(self.sizes)
        return tuple(next(stacks) if kind == "stack" else next(sizes) for kind in self.kinds)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """Holds a low-rank matrix in factors, ``a @ diag(scale) @ b``: the correction that LoRC adds to a weight.

    It is a pytree.

    Attributes:
        a: ``[in, r]``, bfloat16 or int8.
        b: ``[r, out]``, of the dtype of ``a``.
        scale: float32 ``[r]`` with int8 factors, otherwise None.

    Example:
        >>> low_rank = fpq.LowRank(jnp.ones((4, 1), jnp.bfloat16), jnp.ones((1, 3), jnp.bfloat16))
        >>> low_rank.product().shape
        (4, 3)
    """

    a: Any
    b: Any
    scale: Any = None

    def product(self) -> Float[Array, "in out"]:
        """Multiplies the factors.

        Returns:
            float32 ``[in, out]``.
        """
        a = self.a.astype(jnp.float32)
        a = a if self.scale is None else a * self.scale
        return jnp.matmul(a, self.b.astype(jnp.float32), precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """Holds a quantized weight of logical shape [in, out]: codes, scales and a low-rank correction.

    It is a pytree of arrays whose ``spec``, ``shape`` and ``axes`` are static. Codes are stored [out, in], contraction
    last, as FP8 tensor cores want them. Under ``jax.vmap`` all arrays get leading stack axes.

    Attributes:
        codes: ``[out, in]`` in float8, int8 or uint8, or two 4-bit codes to a byte, uint8 ``[out, ceil(in / 2)]``.
            Float8 codes may be padded with zeros; ``shape`` has the sizes that count.
        row_scale: float32 ``[out, 1]``, or ``[1, 1]`` for one scale of the tensor; None where every group has a free
            scale.
        exponents: int8 ``[out, groups]`` under M1 and M2, where a group's scale is ``row_scale * 2**exponent``.
        group_scale: float32 ``[out, groups]``, free scales of several groups.
        zero: uint8 in the shape of the scales, zero points of asymmetric integers, whose values are ``scale * (level -
            zero)``.
        input_scale: float32 ``[1]``, the static scale of the activations; None where each token has its own.
        input_zero: uint8 ``[1]``, the static zero point of the activations.
        low_rank: the correction of LoRC, or None.
        spec: the ``QuantSpec`` that it was quantized with.
        shape: (in, out).
        axes: the ``Axes`` of the parameter that it stands for; None where these are just [in, out].

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> q = fpq.quantize_array(w, fpq.QuantSpec(group_size=32, constraint="m2"))
        >>> q.codes.shape, q.row_scale.shape, q.exponents.shape
        ((32, 32), (32, 1), (32, 2))
        >>> q.bits_per_weight  # 4 of the code, 32 / 64 of the row's scale, 8 / 32 of the group's exponent
        4.75
    """

    codes: Any
    row_scale: Any = None
    exponents: Any = None
    group_scale: Any = None
    zero: Any = None
    input_scale: Any = None
    input_zero: Any = None
    low_rank: LowRank | None = None
    spec: QuantSpec = field(kw_only=True, metadata={"static": True})
    shape: tuple[int, int] = field(kw_only=True, metadata={"static": True})
    axes: Axes | None = field(kw_only=True, default=None, metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stack axes, which arrays made under ``jax.vmap`` have in front."""
        return tuple(self.codes.shape[:-2])

    @property
    def ndim(self) -> int:
        """The number of axes of one weight, which is 2."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights, of all matrices of a stack together."""
        return math.prod(self.stack) * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of everything stored."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """The bits of everything stored (codes, scales, exponents, low-rank factors) over the number of weights."""
        return 8 * self.nbytes / self.size

    @property
    def has_fp8_form(self) -> bool:
        """Whether one FP8 product computes it, since its codes are FP8 or expand exactly and no group scale is free."""
        return self.group_scale is None and self.spec.format.expands


# jitted here, since eagerly each of their many operations would be compiled for itself
@partial(jax.jit, static_argnames="spec", inline=True)
def quantize_array(w: Float[Array, "in out"], spec: QuantSpec) -> QTensor:
    """Quantizes one weight by rounding to nearest.

    It can be jitted (``spec`` static) and vmapped.

    Args:
        w: ``[in, out]``, any float type, finite.
        spec: format, groups and scale constraint.

    Returns:
        A QTensor of logical shape [in, out].

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> q = fpq.quantize_array(w, fpq.QuantSpec(group_size=32))
        >>> q.shape, q.codes.dtype, q.group_scale.shape
        ((64, 32), dtype('uint8'), (32, 2))
    """
    w = w.astype(jnp.float32)
    in_features = len(w)
    scales, reference = weight_scales(w, jnp.ones(in_features), spec)
    codes = encode(of_inputs(scales, spec, in_features).divided(w, spec.format), spec.format)
    return assemble(codes, scales, reference, spec)


def assemble(codes: Shaped[Array, "in out"], scales: Scale, reference: Scale, spec: QuantSpec) -> QTensor:
    """A QTensor of codes in logical orientation, each group's scale [groups, out], and the rows' reference."""
    in_features, out_features = codes.shape
    parts: dict[str, Any] = {}
    shared = slice(1) if spec.group_size == "tensor" else slice(None)  # one scale for all rows
    if len(scales.scale) == 1:
        parts["row_scale"] = scales.scale[0, shared, None]
    elif spec.constraint:
        parts |= {"row_scale": reference.scale[:, None], "exponents": scales.exponent.T}
    else:
        parts["group_scale"] = scales.scale.T
    if spec.format.asymmetric:
        parts["zero"] = scales.zero[:, shared].T.astype(jnp.uint8)
    codes = pack(codes.T) if spec.format.packed else codes.T
    return QTensor(codes, **parts, spec=spec, shape=(in_features, out_features))


@partial(jax.jit, static_argnames=("dtype", "low_rank"), inline=True)
def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32, *, low_rank: bool = True) -> Float[Array, "*stack in out"]:
    """Computes the weight that a QTensor stands for, in float32.

    Args:
        q: the quantized weight, or a stack of them.
        dtype: of the result.
        low_rank: whether to add the correction of LoRC.

    Returns:
        ``[in, out]``, with the stack axes of ``q`` in front.

    Example:
        >>> w = jnp.array([[1.0, 6.0], [2.0, -3.0]])
        >>> q = fpq.quantize_array(w, fpq.QuantSpec(format="int8", group_size="channel"))
        >>> bool(jnp.abs(fpq.dequantize(q) - w).max() <= q.row_scale.max() / 2)
        True
    """
    if q.codes.ndim > 2:
        return jax.vmap(lambda one: dequantize(one, dtype, low_rank=low_rank))(q)
    in_features, out_features = q.shape
    codes = unpack(q.codes, in_features) if q.spec.format.packed else q.codes
    w = decode(codes, q.spec.format)[:out_features, :in_features]
    if q.zero is not None:
        w = w - _per_weight(q.zero, q)
    w = (w * _per_weight(group_scales(q), q)).T
    if low_rank and q.low_rank is not None:
        w = w + q.low_rank.product()
    return w.astype(dtype)


def take_outputs(q: QTensor, index: Int[Array, "*batch"], dtype: DTypeLike) -> Float[Array, "*batch in"]:
    """The weights of some outputs of a weight with one scale for each, as a table of vectors has them."""
    codes = jnp.take(q.codes, index, axis=0, mode="clip")[..., : q.shape[0]]
    scales = jnp.take(q.row_scale, index, axis=0, mode="clip")
    return (decode(codes, q.spec.format) * scales).astype(dtype)


def group_scales(q: QTensor) -> Float[Array, "out groups"]:
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
    """Expands a weight, exactly, to 8-bit float codes with row scales only.

    4-bit codes become ``float8_e4m3fn`` with the power of two of their group folded in; 8-bit float codes stay. That
    needs M1, M2 or one scale for each row (ZeroQuant-FP, section 3). Exponents are checked where their values are
    known; traced ones are taken as valid, as those of every QTensor that this library makes are.

    Args:
        q: the quantized weight, or a stack of them.

    Returns:
        A QTensor of the same values, of which ``dequantize`` gives the same bits.

    Raises:
        FpqError: the format has no exact 8-bit float form, the group scales are free, or an exponent is out of the
            range where the expansion is exact.

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> q = fpq.quantize_array(w, fpq.QuantSpec(group_size=32, constraint="m2"))
        >>> wide = fpq.expand(q)
        >>> wide.codes.dtype, wide.exponents
        (dtype(float8_e4m3fn), None)
        >>> bool((fpq.dequantize(wide) == fpq.dequantize(q)).all())
        True
    """
    if q.codes.ndim > 2:
        return jax.vmap(expand)(q)
    fmt = q.spec.format
    if fmt.is_float8:
        return q
    if not fmt.expands:
        raise FpqError(f"A weight in {fmt} has no exact FP8 form; nf4, e2m1, e3m0 and int4 have one.")
    if not q.has_fp8_form:
        raise FpqError("A weight with free group scales has no exact FP8 form; quantize it with constraint m1 or m2.")
    check_exponents(q)
    return _expanded(q)


@partial(jax.jit, inline=True)
def _expanded(q: QTensor) -> QTensor:
    fmt, codes = q.spec.format, unpack(q.codes, q.shape[0])
    spec = replace(
        q.spec,
        format=E4M3,
        group_size="channel" if q.row_scale.shape[0] > 1 else q.spec.group_size,
        constraint=None,
        compute_rows=1,
    )
    if q.exponents is None:
        return replace(q, codes=decode(codes, fmt, jnp.float8_e4m3fn), spec=spec)
    low, high = fmt.exact_shifts
    # one byte table per shift: adding to the exponent field would be wrong for 0 and subnormals
    shifted = np.asarray(fmt.table, np.float64) * 2.0 ** np.arange(low, high + 1)[:, None]
    table = shifted.astype(jnp.float8_e4m3fn)
    index = _per_weight((q.exponents - low).astype(jnp.uint8), q) * 16 + codes
    return replace(q, codes=jnp.asarray(table.ravel())[index], exponents=None, spec=spec)


def check_exponents(q: QTensor) -> None:
    """FpqError for exponents, where there are any to look at, with which ``expand`` would not be exact."""
    if q.exponents is None or isinstance(q.exponents, (jax.core.Tracer, jax.ShapeDtypeStruct)) or not q.exponents.size:
        return
    low, high = q.spec.format.exact_shifts
    with jax.ensure_compile_time_eval():  # they may be constants of a function that is being traced
        found = int(jnp.min(q.exponents)), int(jnp.max(q.exponents))
    if found[0] < low or found[1] > high:
        raise FpqError(
            f"Exponents {found[0]} to {found[1]} are outside {low} to {high}, where {q.spec.format} expands exactly."
        )


def pad_to(codes: Shaped[Array, "out in"], rows: int, columns: int) -> Shaped[Array, "outs ins"]:
    """Zeros behind the last row and column, up to multiples of ``rows`` and ``columns``."""
    more = [(0, -size % multiple) for size, multiple in zip(codes.shape, (rows, columns), strict=True)]
    return jnp.pad(codes, more) if any(after for _, after in more) else codes
