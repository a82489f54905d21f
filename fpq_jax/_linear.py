"""How a quantized weight meets its input: the one place that decides it.

- FP8 codes on both sides (one scale a row, M1 or M2): one ``dot_general`` in FP8 over the full K with float32
  accumulation;
- integer codes on both sides, one scale a row: one int8 x int8 ``dot_general`` with int32 accumulation;
- any other pair, one scale a row: the codes, which bfloat16 holds exactly, multiplied in it with float32 accumulation;
- free scales of several groups: the weight, dequantized to bfloat16, and the activation's codes, multiplied in it;
- activations left alone: the dequantized weight in the activation's dtype.

Scales come behind the product, then LoRC in bfloat16, then the bias. Levels less their zero points are exact in
bfloat16 but do not fit int8: with int8 codes c and m that lack a and b, the product is
sum(c m) + a sum(m) + b sum(c) + K a b, all of it in int32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fpq_jax._errors import FpqError
from fpq_jax._formats import Format, IntFormat, decode, encode, unpack
from fpq_jax._qtensor import LowRank, QTensor, dequantize, expand
from fpq_jax._scales import Scale, range_scale


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
    activation = q.spec.activation
    assert activation is not None
    contract_last = (((tokens.codes.ndim - 1,), (1,)), ((), ()))
    if q.has_fp8_form and activation.is_float8:
        q = expand(q)
        y = jax.lax.dot_general(tokens.codes, q.codes, contract_last, preferred_element_type=jnp.float32)
        return (y * tokens.scale) * q.row_scale.T  # two products: XLA fuses both behind the FP8 matmul
    if q.has_int8_product:
        return _int8_product(tokens, q, contract_last)
    codes = _bfloat16_values(tokens.codes, activation, tokens.zero)
    if q.row_scale is None or q.exponents is not None:
        weight = dequantize(q, jnp.bfloat16, low_rank=False).T
        y = jax.lax.dot_general(codes, weight, contract_last, preferred_element_type=jnp.float32)
        return y * tokens.scale
    values = _bfloat16_values(_unpacked(q), q.spec.format, q.zero)
    y = jax.lax.dot_general(codes, values, contract_last, preferred_element_type=jnp.float32)
    return (y * tokens.scale) * q.row_scale.T


def _int8_product(tokens: QuantizedTokens, q: QTensor, contract_last: Any) -> Float[Array, "*batch out"]:
    """Integer codes on both sides, one scale a row."""
    (c, a), (m, b) = (
        _int8_codes(codes, fmt, zero)
        for codes, fmt, zero in (
            (tokens.codes, q.spec.activation, tokens.zero),
            (_unpacked(q), q.spec.format, q.zero),
        )
    )
    y = jax.lax.dot_general(c, m, contract_last, preferred_element_type=jnp.int32)
    column_sums = jnp.sum(m, axis=1, dtype=jnp.int32)
    if b is not None:
        y = y + b.T * jnp.sum(c, axis=-1, keepdims=True, dtype=jnp.int32)
        column_sums = column_sums + q.shape[0] * b[:, 0]
    if a is not None:
        y = y + a * column_sums
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
    """(x A) B with bfloat16 operands and float32 accumulation."""
    a, b = low_rank.factors(jnp.bfloat16)
    inner = jnp.matmul(x.astype(jnp.bfloat16), a, preferred_element_type=jnp.float32)
    return jnp.matmul(inner.astype(jnp.bfloat16), b, preferred_element_type=jnp.float32)
