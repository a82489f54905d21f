"""Number formats: small floats, their casts and their codes.

A value is sign * 2**e * 1.f with ``exponent_bits`` and ``mantissa_bits``, subnormals included. Rounding is to nearest,
ties to the even code (for E3M0, which has no mantissa, that is the code with an even exponent field), and saturates.
Sources: OCP FP8 and MX specifications; ZeroQuant-FP (arXiv 2307.09782), section 3, for E3M0.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from fpq_jax._errors import FpqError


@dataclass(frozen=True)
class Format:
    """A small floating-point format.

    ``max`` is the largest finite value; ``dtype`` names the native JAX type of the codes, None for 4-bit formats,
    whose codes (sign in bit 3) are uint8 and are stored packed, two to a byte.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float
    dtype: str | None = None

    @property
    def bits(self) -> int:
        """Storage of one code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Offset of the exponent field."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def min_normal(self) -> float:
        """Smallest magnitude with a full mantissa."""
        return 2.0 ** (1 - self.bias)

    @property
    def min_step(self) -> float:
        """Distance between neighbouring subnormals, and the smallest magnitude above zero."""
        return self.min_normal * 2.0**-self.mantissa_bits

    @functools.cached_property
    def values(self) -> np.ndarray:
        """float32 [2**(bits-1)]: the magnitude of each code without its sign bit; codes that are no number give NaN."""
        code = np.arange(2 ** (self.bits - 1))
        field, fraction = code >> self.mantissa_bits, code & (2**self.mantissa_bits - 1)
        normal = (1 + fraction / 2**self.mantissa_bits) * 2.0 ** (field.astype(np.float64) - self.bias)
        values = np.where(field > 0, normal, fraction * self.min_step)
        return np.where(values <= self.max, values, np.nan).astype(np.float32)

    @functools.cached_property
    def exact_shifts(self) -> tuple[int, int]:
        """(low, high): every value times 2**j is a float8_e4m3fn number exactly for the integers j from low to high."""
        e4m3 = set(E4M3.values[np.isfinite(E4M3.values)].tolist())
        finite = self.values[np.isfinite(self.values)].astype(np.float64)
        fits = [j for j in range(-32, 33) if set((finite * 2.0**j).tolist()) <= e4m3]
        return (min(fits), max(fits)) if fits else (0, -1)

    def __str__(self) -> str:
        return self.name


E4M3 = Format("e4m3", 4, 3, 448.0, "float8_e4m3fn")
E5M2 = Format("e5m2", 5, 2, 57344.0, "float8_e5m2")
E2M1 = Format("e2m1", 2, 1, 6.0)
E3M0 = Format("e3m0", 3, 0, 16.0)

FORMATS = {f.name: f for f in (E4M3, E5M2, E2M1, E3M0)}


def get_format(name: "str | Format") -> Format:
    """The format of a name such as "e2m1"; FpqError lists the names when there is none."""
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise FpqError(f"There is no format {name!r}; the formats are {', '.join(FORMATS)}.")
    return FORMATS[name]


def _split(x: Array) -> tuple[Array, Array]:
    """Sign bit and magnitude bits of float32 values, as uint32."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return bits & jnp.uint32(0x80000000), bits & jnp.uint32(0x7FFFFFFF)


def _round_magnitude(magnitude: Array, fmt: Format) -> Array:
    """Round float32 magnitude bits to the format; returns float32 magnitudes. NaN in, anything finite out."""
    dropped = 23 - fmt.mantissa_bits
    odd = (magnitude >> dropped) & 1
    rounded = (magnitude + jnp.uint32(2 ** (dropped - 1) - 1) + odd) & jnp.uint32(0x100000000 - 2**dropped)
    value = jax.lax.bitcast_convert_type(magnitude, jnp.float32)
    subnormal = jnp.round(value * (1 / fmt.min_step)) * fmt.min_step
    normal = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    # compared as integers: inf and what rounds past float32's range must saturate too
    limit = int(np.float32(fmt.max).view(np.uint32))
    return jnp.where(value < fmt.min_normal, subnormal, jnp.where(rounded > limit, fmt.max, normal))


def cast(x: Float[Array, "..."], fmt: Format) -> Float[Array, "..."]:
    """Round each value to the nearest one of the format, keeping the dtype; saturates, NaN stays NaN, -0 stays -0."""
    sign, magnitude = _split(x)
    rounded = jax.lax.bitcast_convert_type(_round_magnitude(magnitude, fmt), jnp.uint32)
    value = jax.lax.bitcast_convert_type(rounded | sign, jnp.float32)
    return jnp.where(jnp.isnan(x), jnp.nan, value).astype(x.dtype)


def encode(x: Float[Array, "..."], fmt: Format) -> Shaped[Array, "..."]:
    """Codes of the nearest values: the native float8 array for 8-bit formats, uint8 codes 0..15 for 4-bit ones.

    NaN stays NaN in 8 bits; 4-bit formats have no NaN, and its code there is unspecified.
    """
    if fmt.dtype is not None:
        # clipped first: a bare cast of more than the maximum gives NaN or inf
        limit = jnp.asarray(fmt.max, x.dtype)
        return jnp.clip(x, -limit, limit).astype(fmt.dtype)
    sign, magnitude = _split(x)
    value = _round_magnitude(magnitude, fmt)
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    normal = (bits >> (23 - fmt.mantissa_bits)) - jnp.uint32((127 - fmt.bias) << fmt.mantissa_bits)
    subnormal = (value * (1 / fmt.min_step)).astype(jnp.uint32)
    code = jnp.where(value < fmt.min_normal, subnormal, normal)
    return (code | (sign >> (32 - fmt.bits))).astype(jnp.uint8)


def decode(codes: Shaped[Array, "..."], fmt: Format, dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """The values of codes, exact in float32, bfloat16 and float8_e4m3fn (the last for 4-bit formats only)."""
    if fmt.dtype is not None:
        return codes.astype(dtype)
    table = jnp.asarray(np.concatenate([fmt.values, -fmt.values]), dtype)
    return table[codes]


def pack(codes: UInt8[Array, "*rows n"]) -> UInt8[Array, "*rows half"]:
    """Two 4-bit codes to a byte along the last axis, the even index in the low half; an odd end is filled with 0."""
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: UInt8[Array, "*rows half"], size: int) -> UInt8[Array, "*rows n"]:
    """The ``size`` 4-bit codes that ``pack`` put together."""
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :size]
