"""How a quantized weight meets its input: the one place that decides it.

- one scale per row, M1 or M2, quantized activations: codes of both in FP8, one ``dot_general`` over the full K with
  float32 accumulation, times the token's scale, times the row's factor, plus LoRC in bfloat16, plus bias;
- free group scales, quantized activations: no FP8 form; the dequantized weight and the activation's codes are
  multiplied in bfloat16 with float32 accumulation, and the rest is the same;
- activations left alone: the dequantized weight in the activation's dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fpq_jax._formats import Format, cast, encode
from fpq_jax._qtensor import LowRank, QTensor, dequantize, expand
from fpq_jax._scales import free_scale


@dataclass(frozen=True)
class Observed:
    """A kernel that is still an array, seen by calibration: the product is taken with the activations quantized as
    inference will have them, and ``record`` is handed the input and those activations. It lives inside one trace."""

    kernel: Any
    activation: Format | None
    record: Callable[[Array, Array], None]


def linear(
    x: Float[Array, "*batch in"],
    kernel: Float[Array, "in out"] | QTensor | Observed,
    bias: Float[Array, " out"] | None = None,
) -> Float[Array, "*batch out"]:
    """x @ kernel + bias in the dtype of ``x``; kernel [in, out] is an array or a QTensor."""
    if isinstance(kernel, QTensor):
        return _quantized_linear(x, kernel, bias)
    if isinstance(kernel, Observed):
        seen = x if kernel.activation is None else fake_quantize_tokens(x, kernel.activation)
        kernel.record(x, seen)
        y = seen @ kernel.kernel
    else:
        y = x @ kernel
    return y if bias is None else y + bias


def quantize_tokens(
    x: Float[Array, "*batch in"], fmt: Format
) -> tuple[Shaped[Array, "*batch in"], Float[Array, "*batch 1"]]:
    """Codes of ``x`` and one float32 scale per token (absmax / format max; 1 for a token of zeros)."""
    scale = _token_scale(x, fmt)
    return encode(x.astype(jnp.float32) / scale, fmt), scale


def fake_quantize_tokens(x: Float[Array, "*batch in"], fmt: Format) -> Float[Array, "*batch in"]:
    """The values that ``quantize_tokens`` stands for, in the dtype of ``x``."""
    scale = _token_scale(x, fmt)
    return (cast(x.astype(jnp.float32) / scale, fmt) * scale).astype(x.dtype)


def _token_scale(x: Float[Array, "*batch in"], fmt: Format) -> Float[Array, "*batch 1"]:
    return free_scale(jnp.max(jnp.abs(x), axis=-1, keepdims=True), fmt)


def _quantized_linear(x: Float[Array, "*batch in"], q: QTensor, bias: Array | None) -> Float[Array, "*batch out"]:
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    if q.spec.activation is None:
        y = jnp.matmul(x, dequantize(q, x.dtype, low_rank=False), preferred_element_type=jnp.float32)
    else:
        codes, token_scale = quantize_tokens(x, q.spec.activation)
        if q.has_fp8_form:
            expanded = expand(q)
            y = jax.lax.dot_general(codes, expanded.codes, contract_last, preferred_element_type=jnp.float32)
            y = (y * token_scale) * expanded.row_scale.T  # two products: XLA fuses both behind the FP8 matmul
        else:
            weight = dequantize(q, jnp.bfloat16, low_rank=False)
            y = jnp.matmul(codes.astype(jnp.bfloat16), weight, preferred_element_type=jnp.float32) * token_scale
    if q.low_rank is not None:
        y = y + _low_rank_linear(x, q.low_rank)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def _low_rank_linear(x: Float[Array, "*batch in"], low_rank: LowRank) -> Float[Array, "*batch out"]:
    """(x A) B with bfloat16 operands and float32 accumulation."""
    a, b = low_rank.factors(jnp.bfloat16)
    inner = jnp.matmul(x.astype(jnp.bfloat16), a, preferred_element_type=jnp.float32)
    return jnp.matmul(inner.astype(jnp.bfloat16), b, preferred_element_type=jnp.float32)
