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
    """Holds quantized activations, whose values are ``(values of the codes - zero) * scale``.

    Attributes:
        codes: ``[..., in]``.
        scale: float32 ``[..., 1]``, or ``[1]`` if static.
        zero: uint8 in the shape of ``scale`` for asymmetric integers, otherwise None.
    """

    codes: Any
    scale: Any
    zero: Any


def quantize_tokens(
    x: Float[Array, "*batch in"], fmt: Format, fixed: Scale | None = None, *, axis: str | None = None
) -> QuantizedTokens:
    """Quantizes activations, with one scale for each token: the largest magnitude over the format's largest value.

    A token of zeros has the scale 1. Asymmetric integers cover the range of a token's values and 0 instead, with a zero
    point.

    Args:
        x: ``[..., in]``, any float type.
        fmt: format of the codes.
        fixed: a static scale to use instead, as in ``Hessians.fixed``.
        axis: under ``jax.shard_map``, the mesh axis that the inputs of a token are divided over.

    Returns:
        A named tuple with ``codes`` ``[..., in]``, ``scale`` float32 ``[..., 1]`` (``[1]`` if static), and ``zero``,
        the uint8 zero points of asymmetric integers, otherwise None.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (2, 8, 64))
        >>> tokens = fpq.quantize_tokens(x, fpq.E4M3)
        >>> tokens.codes.dtype, tokens.scale.shape
        (dtype(float8_e4m3fn), (2, 8, 1))
        >>> error = jnp.abs(fpq.decode(tokens.codes, fpq.E4M3) * tokens.scale - x)
        >>> bool((error <= jnp.abs(x) / 16 + tokens.scale * 2**-10).all())
        True
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
