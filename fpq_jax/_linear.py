"""How a quantized weight meets its input: the one place that decides it.

- "fp8", FP8 codes on both sides (one scale a row, M1 or M2): one ``dot_general`` in FP8 over the full K with float32
  accumulation;
- "int8", integer codes on both sides, one scale a row: one int8 x int8 ``dot_general`` with int32 accumulation;
- "codes", any other pair, one scale a row, M1 or M2: the codes, which bfloat16 holds exactly, multiplied in it with
  float32 accumulation;
- "dequantized", free scales of several groups: the weight, rounded to bfloat16, and the activation's codes in it;
- "weight_only", activations left alone: the dequantized weight in the activation's dtype.

Scales come behind the product, then LoRC in bfloat16, then the bias. Levels less their zero points are exact in
bfloat16 but do not fit int8: with int8 codes c and m that lack a and b, the product is
sum(c m) + a sum(m) + b sum(c) + K a b, all of it in int32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fpq_jax._errors import FpqError
from fpq_jax._formats import Format, IntFormat, decode, encode, unpack
from fpq_jax._qtensor import LowRank, QTensor, dequantize, expand
from fpq_jax._scales import Scale, range_scale

ProductKind = Literal["fp8", "int8", "codes", "dequantized", "weight_only"]
_LARGEST_INT32 = 2**31 - 1


def product_kind(q: QTensor) -> ProductKind:
    """How ``linear`` multiplies ``q``, as listed above."""
    fmt, activation = q.spec.format, q.spec.activation
    if activation is None:
        return "weight_only"
    one_scale = q.row_scale is not None and q.exponents is None
    if one_scale and isinstance(fmt, IntFormat) and isinstance(activation, IntFormat):
        return "int8"
    if q.has_fp8_form:
        return "fp8" if activation.is_float8 else "codes"
    return "codes" if one_scale else "dequantized"


def expand_all(tree: Any) -> Any:
    """The pytree with every QTensor expanded to FP8 whose product is of its expanded codes; the others as they are."""
    wanted = lambda leaf: isinstance(leaf, QTensor) and leaf.has_fp8_form and product_kind(leaf) != "int8"
    return jax.tree.map(
        lambda leaf: expand(leaf) if wanted(leaf) else leaf, tree, is_leaf=lambda leaf: isinstance(leaf, QTensor)
    )


@dataclass(frozen=True)
class Observed:
    """A kernel that is still an array, seen by calibration: the product is taken with the activations quantized as
    inference will have them (``activation`` None: left alone; ``fixed``: their static scale), and ``record`` is handed
    the input and those activations. It lives inside one trace."""

    kernel: Any
    activation: Format | None
    record: Callable[[Array, Array], None]
    fixed: Scale | None = None


class QuantizedTokens(NamedTuple):
    """codes [..., in] of activations, and what makes numbers of them: (values - zero) * scale.

    scale: float32 [..., 1], or [1] if static. zero: uint8, shaped alike, for asymmetric integers, otherwise None.
    """

    codes: Any
    scale: Any
    zero: Any


def linear(
    x: Float[Array, "*batch in"],
    kernel: Float[Array, "in out"] | QTensor | Observed,
    bias: Float[Array, " out"] | None = None,
) -> Float[Array, "*batch out"]:
    """x @ kernel + bias in the dtype of ``x``; kernel [in, out] is an array or a QTensor."""
    if isinstance(kernel, QTensor):
        return _quantized_linear(x, kernel, bias)
    if isinstance(kernel, Observed):
        seen = x if kernel.activation is None else fake_quantize_tokens(x, kernel.activation, kernel.fixed)
        kernel.record(x, seen)
        y = seen @ kernel.kernel
    else:
        y = x @ kernel
    return y if bias is None else y + bias


def quantize_tokens(x: Float[Array, "*batch in"], fmt: Format, fixed: Scale | None = None) -> QuantizedTokens:
    """Codes of ``x`` and one scale per token (absmax / format max; 1 for a token of zeros), or the ``fixed`` one."""
    scale = _token_scale(x, fmt) if fixed is None else fixed
    codes = encode(scale.divided(x.astype(jnp.float32), fmt), fmt)
    return QuantizedTokens(codes, scale.scale, scale.zero.astype(jnp.uint8) if fmt.asymmetric else None)


def fake_quantize_tokens(
    x: Float[Array, "*batch in"], fmt: Format, fixed: Scale | None = None
) -> Float[Array, "*batch in"]:
    """The values that ``quantize_tokens`` stands for, in the dtype of ``x``."""
    scale = _token_scale(x, fmt) if fixed is None else fixed
    return scale.numbers(scale.values(x.astype(jnp.float32), fmt), fmt).astype(x.dtype)


def static_scale(q: QTensor) -> Scale | None:
    """The calibrated scale of the activations that ``q`` meets, None where tokens have their own."""
    if q.spec.activation_scale == "token":
        return None
    if q.input_scale is None:
        raise FpqError("This weight's activation_scale is static, but it has no input_scale; calibration sets it.")
    return Scale(q.input_scale, None if q.input_zero is None else q.input_zero.astype(jnp.float32))


def _token_scale(x: Float[Array, "*batch in"], fmt: Format) -> Scale:
    high = jnp.max(x if fmt.asymmetric else jnp.abs(x), axis=-1, keepdims=True)
    # one reduction where one is enough
    return range_scale(jnp.min(x, axis=-1, keepdims=True) if fmt.asymmetric else -high, high, fmt)


def _quantized_linear(x: Float[Array, "*batch in"], q: QTensor, bias: Array | None) -> Float[Array, "*batch out"]:
    if q.spec.activation is None:
        y = jnp.matmul(x, dequantize(q, x.dtype, low_rank=False), preferred_element_type=jnp.float32)
    else:
        y = _product(quantize_tokens(x, q.spec.activation, static_scale(q)), q)
    if q.low_rank is not None:
        y = y + _low_rank_linear(x, q.low_rank)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def _product(tokens: QuantizedTokens, q: QTensor) -> Float[Array, "*batch out"]:
    """The product of quantized activations and the weight without LoRC, in float32."""
    kind, activation = product_kind(q), q.spec.activation
    assert activation is not None
    contract_last = (((tokens.codes.ndim - 1,), (1,)), ((), ()))
    if kind == "int8":
        return _int8_product(tokens, q, contract_last)
    q = expand(q) if q.has_fp8_form else q
    if kind == "fp8":
        x, w = tokens.codes, q.codes
    else:
        x = _bfloat16_values(tokens.codes, activation, tokens.zero)
        if kind == "dequantized":
            w = dequantize(q, jnp.bfloat16, low_rank=False).T
        else:
            w = _bfloat16_values(_unpacked(q), q.spec.format, q.zero)
    y = jax.lax.dot_general(x, w, contract_last, preferred_element_type=jnp.float32) * tokens.scale
    return y if kind == "dequantized" else y * q.row_scale.T  # a product each: XLA fuses both behind the FP8 matmul


def _int8_product(tokens: QuantizedTokens, q: QTensor, contract_last: Any) -> Float[Array, "*batch out"]:
    """Integer codes on both sides, one scale a row."""
    c, a = _int8_codes(tokens.codes, q.spec.activation, tokens.zero)
    m, b = _int8_codes(_unpacked(q), q.spec.format, q.zero)
    # sums of levels less zero points are up to 255 * 255 * K; the codes' own stay in int32 for any K below 131,072
    exact = jnp.int32 if 255 * 255 * q.shape[0] <= _LARGEST_INT32 else jnp.float32
    y = jax.lax.dot_general(c, m, contract_last, preferred_element_type=jnp.int32).astype(exact)
    column_sums = jnp.sum(m, axis=1, dtype=jnp.int32).astype(exact)
    if b is not None:
        y = y + b.T.astype(exact) * jnp.sum(c, axis=-1, keepdims=True, dtype=jnp.int32).astype(exact)
        column_sums = column_sums + q.shape[0] * b[:, 0].astype(exact)
    if a is not None:
        y = y + a.astype(exact) * column_sums
    return (y.astype(jnp.float32) * tokens.scale) * q.row_scale.T


def _unpacked(q: QTensor) -> Shaped[Array, "out in"]:
    return unpack(q.codes, q.shape[0]) if q.spec.format.packed else q.codes


def _int8_codes(codes: Shaped[Array, "..."], fmt: Format | None, zero: Array | None) -> tuple[Array, Array | None]:
    """int8 codes, and what to add to get levels less their zero point (int32; None: nothing)."""
    assert isinstance(fmt, IntFormat)
    return fmt.int8_codes(codes), None if zero is None else fmt.offset - zero.astype(jnp.int32)


def _bfloat16_values(codes: Shaped[Array, "..."], fmt: Format, zero: Array | None) -> Array:
    """Values in bfloat16, exactly: integers are of 8 bits and a sign at most."""
    values = decode(codes, fmt, jnp.bfloat16)
    return values if zero is None else values - zero.astype(jnp.bfloat16)


def _low_rank_linear(x: Float[Array, "*batch in"], low_rank: LowRank) -> Float[Array, "*batch out"]:
    """(x A) B with bfloat16 operands and float32 accumulation; int8 codes are exact in bfloat16, their scale is not."""
    matmul = lambda left, right: jnp.matmul(
        left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    inner = matmul(x, low_rank.a)
    return matmul(inner if low_rank.scale is None else inner * low_rank.scale, low_rank.b)
