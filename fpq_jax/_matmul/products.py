"""The product of quantized activations and a quantized weight, by the kinds that ``linear`` lists."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fpq_jax._errors import FpqError
from fpq_jax._matmul.fp4_kernel.fragments import Fragments, of_fragments
from fpq_jax._matmul.fp4_kernel.matmul import matmul
from fpq_jax._matmul.fp4_kernel.schedule import MOST_TOKENS
from fpq_jax._numerics.activations import QuantizedTokens, quantize_tokens
from fpq_jax._numerics.formats import E5M2, Format, IntFormat, decode, unpack
from fpq_jax._numerics.qtensor import QTensor, dequantize, expand, pad_to
from fpq_jax._numerics.scales import Scale

ProductKind = Literal["fp8", "int8", "codes", "dequantized", "weight_only"]
FP8_MULTIPLE = 16  # what FP8 products of a GPU want of every dimension
_LARGEST_INT32 = 2**31 - 1


def tokens_for(x: Float[Array, "*batch in"], q: QTensor | Fragments, *, axis: str | None = None) -> QuantizedTokens:
    """The activations that ``q`` meets, quantized as its spec says."""
    assert q.spec.activation is not None
    return quantize_tokens(x, q.spec.activation, static_scale(q), axis=axis)


def static_scale(q: QTensor | Fragments) -> Scale | None:
    """The calibrated scale of the activations that ``q`` meets, None where tokens have their own."""
    if q.spec.activation_scale == "token":
        return None
    if q.input_scale is None:
        raise FpqError("This weight's activation_scale is static, but it has no input_scale; calibration sets it.")
    return Scale(q.input_scale, None if q.input_zero is None else q.input_zero.astype(jnp.float32))


def product_kind(q: QTensor) -> ProductKind:
    """How ``linear`` multiplies ``q``, as listed above."""
    fmt, activation = q.spec.format, q.spec.activation
    if activation is None:
        return "weight_only"
    one_scale = q.row_scale is not None and q.exponents is None
    if one_scale and isinstance(fmt, IntFormat) and isinstance(activation, IntFormat):
        return "int8"
    if q.has_fp8_form:
        # no tensor core multiplies E5M2 by E5M2
        return "fp8" if activation.is_float8 and not (fmt is E5M2 and activation is E5M2) else "codes"
    return "codes" if one_scale else "dequantized"


def _product(tokens: QuantizedTokens, q: QTensor | Fragments) -> Float[Array, "*batch out"]:
    """The product of quantized activations and the weight without LoRC, in float32."""
    *batch, inner = tokens.codes.shape
    if isinstance(q, Fragments) and 0 < math.prod(batch) <= MOST_TOKENS:
        y = matmul(tokens.codes.reshape(-1, inner), q).reshape(*batch, -1) * tokens.scale
        return y if q.row_scale is None else y * q.row_scale.T
    q = of_fragments(q)
    kind, activation = product_kind(q), q.spec.activation
    assert activation is not None
    contract_last = (((tokens.codes.ndim - 1,), (1,)), ((), ()))
    if kind == "int8":
        return _int8_product(tokens, q, contract_last)
    q = expand(q) if q.has_fp8_form else q
    if kind == "fp8":
        y = _fp8_dot(tokens.codes, q.codes, q.shape[1])
    else:
        x = _bfloat16_values(tokens.codes, activation, tokens.zero)
        if kind == "dequantized":
            w = dequantize(q, jnp.bfloat16, low_rank=False).T
        else:
            w = _bfloat16_values(_unpacked(q), q.spec.format, q.zero)[: q.shape[1], : q.shape[0]]
        y = jax.lax.dot_general(x, w, contract_last, preferred_element_type=jnp.float32)
    y = y * tokens.scale
    return y if kind == "dequantized" else y * q.row_scale.T  # a product each: XLA fuses both behind the FP8 matmul


def _fp8_dot(
    x: Shaped[Array, "*batch in"], w: Shaped[Array, "outs ins"], out_features: int
) -> Float[Array, "*batch out"]:
    """x @ w.T of FP8 codes; ``w`` may be padded with zeros, and is here where it is not."""
    w = pad_to(w, FP8_MULTIPLE, FP8_MULTIPLE)
    rows = pad_to(x.reshape(-1, x.shape[-1]), FP8_MULTIPLE, w.shape[1])
    y = jax.lax.dot_general(rows, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    *batch, _ = x.shape
    return y[: math.prod(batch), :out_features].reshape(*batch, out_features)


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
