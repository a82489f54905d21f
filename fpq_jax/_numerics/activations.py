"""Quantized activations: codes of every token, and one scale per token or one for the whole tensor."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fpq_jax._numerics.formats import Format, encode
from fpq_jax._numerics.scales import Scale, range_scale

_MANY_TOKENS = 1024  # kernels of a decoder layer were counted for 256 and 2048


class QuantizedTokens(NamedTuple):
    """codes [..., in] of activations, and what makes numbers of them: (values - zero) * scale.

    scale: float32 [..., 1], or [1] if static. zero: uint8, shaped alike, for asymmetric integers, otherwise None.
    """

    codes: Any
    scale: Any
    zero: Any


def quantize_tokens(
    x: Float[Array, "*batch in"], fmt: Format, fixed: Scale | None = None, *, axis: str | None = None
) -> QuantizedTokens:
    """Codes of ``x`` and one scale per token (absmax / format max; 1 for a token of zeros), or the ``fixed`` one.

    ``axis``: under ``shard_map``, the mesh axis that a token's inputs are divided over.
    """
    if fixed is not None:
        codes, scale = _codes(x, fmt, fixed), fixed
    else:
        # Behind the barrier nobody computes these again: XLA would repeat a norm and its absmax in every product's
        # epilogue. For few tokens the scale is outside of it, cheaper there than as a kernel of its own; for many XLA
        # makes one anyway, and another where the codes are made.
        bounds = _token_bounds(x, fmt, axis)
        scale = _token_scale(bounds, fmt)
        codes = _codes(x, fmt, scale)
        if math.prod(x.shape[:-1]) < _MANY_TOKENS:
            codes, bounds = jax.lax.optimization_barrier((codes, bounds))
            scale = _token_scale(bounds, fmt)
        else:
            codes, scale = jax.lax.optimization_barrier((codes, scale))
    return QuantizedTokens(codes, scale.scale, scale.zero.astype(jnp.uint8) if fmt.asymmetric else None)


def fake_quantize_tokens(
    x: Float[Array, "*batch in"], fmt: Format, fixed: Scale | None = None
) -> Float[Array, "*batch in"]:
    """The values that ``quantize_tokens`` stands for, in the dtype of ``x``."""
    scale = _token_scale(_token_bounds(x, fmt), fmt) if fixed is None else fixed
    return scale.numbers(scale.values(x.astype(jnp.float32), fmt), fmt).astype(x.dtype)


def _codes(x: Float[Array, "*batch in"], fmt: Format, scale: Scale) -> Shaped[Array, "*batch in"]:
    return encode(scale.divided(x.astype(jnp.float32), fmt), fmt)


def _token_bounds(x: Float[Array, "*batch in"], fmt: Format, axis: str | None = None) -> tuple[Array, ...]:
    """What a token's scale is made of: its absmax; its least and its largest value for asymmetric integers."""
    if fmt.asymmetric:
        low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
        return (low, high) if axis is None else (jax.lax.pmin(low, axis), jax.lax.pmax(high, axis))
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return (absmax if axis is None else jax.lax.pmax(absmax, axis),)


def _token_scale(bounds: tuple[Array, ...], fmt: Format) -> Scale:
    low, high = bounds if fmt.asymmetric else (-bounds[0], bounds[0])
    return range_scale(low, high, fmt)
