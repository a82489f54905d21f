"""Number formats: small floats and integers, their casts and their codes.

Floats: a value is sign * 2**e * 1.f with ``exponent_bits`` and ``mantissa_bits``, subnormals included. Rounding is to
nearest and saturates; ties go to the even code (for E3M0, which has no mantissa, that is the code with an even exponent
field), or away from zero in the variants of the QTorch library, which ZeroQuant-FP used.
Integers: symmetric ones are signed, -max to max; asymmetric ones are the levels 0 to max above a zero point that is
stored with the scale. Ties go to the even integer.
Tables: any sixteen values that are exact in E4M3, so that they multiply in FP8 as 4-bit floats do.
Sources: OCP FP8 and MX specifications; ZeroQuant-FP (arXiv 2307.09782), section 3; ZeroQuant-V2 (arXiv 2303.08302);
QLoRA (arXiv 2305.14314), appendix E, for NF4.
"""

import abc
import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

from fpq_jax._errors import FpqError


@dataclass(frozen=True, repr=False)
class Format(abc.ABC):
    """Defines a number format: the values that it holds, how numbers are rounded to them, and their codes.

    The formats are constants of ``fpq_jax``; a ``QuantSpec`` and a recipe also take them by name.

    ===============  ===============  ====  ======  ==========================================
    constant         name             bits  max     values
    ===============  ===============  ====  ======  ==========================================
    ``E4M3``         e4m3             8     448     float, codes are ``float8_e4m3fn``
    ``E5M2``         e5m2             8     57344   float, codes are ``float8_e5m2``
    ``E2M1``         e2m1             4     6       float
    ``E3M0``         e3m0             4     16      float, powers of two and zero
    ``E4M3_QTORCH``  e4m3-qtorch      8     480     float, ties away from zero
    ``E5M2_QTORCH``  e5m2-qtorch      8     114688  float, ties away from zero
    ``E2M1_QTORCH``  e2m1-qtorch      4     6       float, ties away from zero
    ``E3M0_QTORCH``  e3m0-qtorch      4     16      float, ties away from zero
    ``INT8``         int8             8     127     symmetric integer, codes are ``int8``
    ``INT4``         int4             4     7       symmetric integer
    ``INT8_ASYM``    int8-asym        8     255     asymmetric integer, codes are ``int8``
    ``INT4_ASYM``    int4-asym        4     15      asymmetric integer
    ``NF4``          nf4              4     1.375   sixteen values, densest where normal numbers are
    ===============  ===============  ====  ======  ==========================================

    Floats: a value is ``sign * 2**e * 1.f``, with subnormals. Rounding is to nearest and saturates. Ties go to the even
    code (in E3M0, which has no mantissa, the one with an even exponent field), and away from zero in the variants of
    the QTorch library, which the authors of ZeroQuant-FP used.

    Integers: symmetric ones are signed, from ``-max`` to ``max``. Asymmetric ones are the levels 0 to ``max``, counted
    from a zero point that is stored with the scale. Ties go to the even integer.

    NF4 has the values of NormalFloat4 times 1.4, each rounded to E4M3, so that it multiplies in FP8 as E2M1 does. Ties
    go to the lower value. Weights are near to normal numbers, and those it rounds with a fifth less squared error than
    E2M1.

    Sources: the OCP specifications of FP8 and of MX; ZeroQuant-FP (Wu et al., 2023, arXiv 2307.09782), section 3;
    ZeroQuant-V2 (Yao et al., 2023, arXiv 2303.08302) for the integers; QLoRA (Dettmers et al., 2023, arXiv 2305.14314),
    appendix E, for NF4.

    Attributes:
        name: the name in recipes, for instance ``"e2m1"``.
        bits: size of one code.
        max: the largest value (of an asymmetric integer, the highest level).
        dtype: name of the JAX type of the codes, or None for uint8 codes. Codes of 4 bits are stored two to a byte.
        table: float32 ``[2**bits]``, the value of each uint8 code, NaN for a code that is no number; None with a JAX
            type.
        grid: float32, all values of the format in ascending order.

    Example:
        >>> fpq.E2M1.grid
        array([-6. , -4. , -3. , -2. , -1.5, -1. , -0.5,  0. ,  0.5,  1. ,  1.5,
                2. ,  3. ,  4. ,  6. ], dtype=float32)
        >>> fpq.E4M3.bits, fpq.E4M3.max, fpq.E4M3.dtype
        (8, 448.0, 'float8_e4m3fn')
        >>> fpq.QuantSpec(format="int4-asym").format is fpq.INT4_ASYM
        True
    """

    name: str
    bits: int
    max: float
    dtype: str | None
    table: np.ndarray | None = field(compare=False)
    grid: np.ndarray = field(compare=False)

    @property
    def packed(self) -> bool:
        """Whether codes are stored two to a byte."""
        return self.bits == 4

    @property
    def asymmetric(self) -> bool:
        """Whether values are counted from a zero point."""
        return False

    @property
    def is_float8(self) -> bool:
        """Whether codes are a JAX 8-bit float type."""
        return self.dtype is not None and self.dtype.startswith("float8")

    @functools.cached_property
    def exact_shifts(self) -> tuple[int, int]:
        """The range (low, high) of integers j with which every value times ``2**j`` is exact in ``float8_e4m3fn``.

        It is (0, -1) where there is no such j.
        """
        if self.table is None or self.asymmetric:
            return 0, -1
        e4m3, finite = set(E4M3.grid.tolist()), self.table[np.isfinite(self.table)].astype(np.float64)
        fits = [j for j in range(-32, 33) if set((finite * 2.0**j).tolist()) <= e4m3]
        return (min(fits), max(fits)) if fits else (0, -1)

    @property
    def expands(self) -> bool:
        """Whether codes are 8-bit floats, or become 8-bit floats without rounding."""
        return self.is_float8 or self.exact_shifts[0] <= self.exact_shifts[1]

    @abc.abstractmethod
    def cast(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Rounds to the format's values; see ``fpq_jax.cast``.

        Args:
            x: ``[...]``, any float type.

        Returns:
            ``[...]`` in the dtype of ``x``.
        """

    @abc.abstractmethod
    def encode(self, x: Float[Array, "..."]) -> Shaped[Array, "..."]:
        """Encodes values; see ``fpq_jax.encode``.

        Args:
            x: ``[...]``, any float type.

        Returns:
            ``[...]`` codes, of the format's ``dtype`` or uint8.
        """

    def decode(self, codes: Shaped[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
        """Decodes codes; see ``fpq_jax.decode``.

        Args:
            codes: ``[...]`` as ``encode`` gives them.
            dtype: of the result.

        Returns:
            ``[...]`` values.
        """
        if self.table is None:
            return codes.astype(dtype)
        return jnp.asarray(self.table, dtype)[codes]

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, repr=False)
class FloatFormat(Format):
    """A small floating-point format; codes have the sign in their highest bit."""

    exponent_bits: int
    mantissa_bits: int
    ties: Literal["even", "away"]

    @classmethod
    def make(
        cls, name: str, exponent_bits: int, mantissa_bits: int, max: float, dtype: str | None = None, ties: Any = "even"
    ) -> "FloatFormat":
        bias = 2 ** (exponent_bits - 1) - 1
        code = np.arange(2 ** (exponent_bits + mantissa_bits))
        exponent, fraction = code >> mantissa_bits, (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        normal = (1 + fraction) * 2.0 ** (exponent.astype(np.float64) - bias)
        values = np.where(exponent > 0, normal, fraction * 2.0 ** (1 - bias)).astype(np.float32)
        values = np.where(values <= max, values, np.nan)
        finite = values[np.isfinite(values)]
        return cls(
            name=name,
            bits=1 + exponent_bits + mantissa_bits,
            max=max,
            dtype=dtype,
            table=None if dtype else np.concatenate([values, -values]),
            grid=np.concatenate([-finite[:0:-1], finite]),
            exponent_bits=exponent_bits,
            mantissa_bits=mantissa_bits,
            ties=ties,
        )

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

    def cast(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        sign, magnitude = _split(x)
        rounded = jax.lax.bitcast_convert_type(self._round(magnitude), jnp.uint32)
        value = jax.lax.bitcast_convert_type(rounded | sign, jnp.float32)
        return jnp.where(jnp.isnan(x), jnp.nan, value).astype(x.dtype)

    def encode(self, x: Float[Array, "..."]) -> Shaped[Array, "..."]:
        if self.dtype is not None:
            # clipped first: a bare cast of more than the maximum gives NaN or inf
            limit = jnp.asarray(self.max, x.dtype)
            return jnp.clip(x, -limit, limit).astype(self.dtype)
        sign, magnitude = _split(x)
        value = self._round(magnitude)
        bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
        normal = (bits >> (23 - self.mantissa_bits)) - jnp.uint32((127 - self.bias) << self.mantissa_bits)
        subnormal = (value * (1 / self.min_step)).astype(jnp.uint32)
        code = jnp.where(value < self.min_normal, subnormal, normal)
        return (code | (sign >> (32 - self.bits))).astype(jnp.uint8)

    def _round(self, magnitude: Array) -> Array:
        """Round float32 magnitude bits to the format; returns float32 magnitudes. NaN in, anything finite out."""
        dropped = 23 - self.mantissa_bits
        value = jax.lax.bitcast_convert_type(magnitude, jnp.float32)
        steps = value * (1 / self.min_step)
        if self.ties == "even":
            below_half = jnp.uint32(2 ** (dropped - 1) - 1) + ((magnitude >> dropped) & 1)
            whole_steps = jnp.round(steps)
        else:
            below_half = jnp.uint32(2 ** (dropped - 1))
            whole_steps = jnp.floor(steps) + (steps - jnp.floor(steps) >= 0.5)
        rounded = (magnitude + below_half) & jnp.uint32(0x100000000 - 2**dropped)
        # compared as integers: inf and what rounds past float32's range must saturate too
        limit = int(np.float32(self.max).view(np.uint32))
        normal = jnp.where(rounded > limit, self.max, jax.lax.bitcast_convert_type(rounded, jnp.float32))
        return jnp.where(value < self.min_normal, whole_steps * self.min_step, normal)


@dataclass(frozen=True, repr=False)
class IntFormat(Format):
    """An integer format. ``offset`` is what the native codes lack to the levels: INT8 levels of 0 to 255 are stored
    from -128 on, so that they are operands of an int8 product."""

    offset: int
    lowest: int

    @classmethod
    def make(cls, name: str, bits: int, *, asymmetric: bool = False) -> "IntFormat":
        highest = 2**bits - 1 if asymmetric else 2 ** (bits - 1) - 1
        lowest = 0 if asymmetric else -highest
        code = np.arange(2**bits)
        values = code if asymmetric else np.where(code > highest, code - 2**bits, code)
        return cls(
            name=name,
            bits=bits,
            max=float(highest),
            dtype="int8" if bits == 8 else None,
            table=None if bits == 8 else values.astype(np.float32),
            grid=np.arange(lowest, highest + 1, dtype=np.float32),
            offset=2 ** (bits - 1) if asymmetric else 0,
            lowest=lowest,
        )

    @property
    def asymmetric(self) -> bool:
        return self.lowest == 0

    def cast(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.clip(jnp.round(x), self.lowest, self.max)

    def encode(self, x: Float[Array, "..."]) -> Shaped[Array, "..."]:
        value = self.cast(x.astype(jnp.float32)).astype(jnp.int32)
        if self.dtype is not None:
            return (value - self.offset).astype(self.dtype)
        return (value & 15).astype(jnp.uint8)

    def decode(self, codes: Shaped[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
        if self.dtype is not None:
            return codes.astype(dtype) + jnp.asarray(self.offset, dtype)
        return super().decode(codes, dtype)

    def int8_codes(self, codes: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Codes as int8, which are the values less ``offset``."""
        return codes if self.dtype is not None else (self.decode(codes, jnp.float32) - self.offset).astype(jnp.int8)


@dataclass(frozen=True, repr=False)
class TableFormat(Format):
    """Sixteen values, zero among them, the lowest and the highest as far from it. Codes count up from zero and go on
    with the lowest value, as those of two's complement do."""

    @classmethod
    def make(cls, name: str, values: np.ndarray) -> "TableFormat":
        grid = np.asarray(values, np.float32)
        zero = int(np.flatnonzero(grid == 0)[0])
        return cls(
            name=name, bits=4, max=float(grid[-1]), dtype=None, table=np.roll(grid, -zero).astype(np.float32), grid=grid
        )

    def cast(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        # exact: values and their differences have few bits. A gather is slower than sixteen steps
        above = self._above(x)
        value = self.grid[0] + sum(step * one for step, one in zip(np.diff(self.grid), above, strict=True))
        return jnp.where(jnp.isnan(x), jnp.nan, value).astype(x.dtype)

    def encode(self, x: Float[Array, "..."]) -> Shaped[Array, "..."]:
        zero = int(np.flatnonzero(self.grid == 0)[0])
        index = functools.reduce(jnp.add, self._above(x)).astype(jnp.int32)
        return ((index - zero) & 15).astype(jnp.uint8)

    def _above(self, x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
        """Of each midpoint between neighbours, 1 where x is above it."""
        midpoints = (self.grid[1:] + self.grid[:-1]) / 2
        return [(x.astype(jnp.float32) > midpoint).astype(jnp.float32) for midpoint in midpoints]


#: The 8-bit float with 4 exponent and 3 mantissa bits, up to 448; codes are ``float8_e4m3fn``.
E4M3 = FloatFormat.make("e4m3", 4, 3, 448.0, "float8_e4m3fn")
#: The 8-bit float with 5 exponent and 2 mantissa bits, up to 57344; codes are ``float8_e5m2``.
E5M2 = FloatFormat.make("e5m2", 5, 2, 57344.0, "float8_e5m2")
#: The 4-bit float with 2 exponent bits and 1 mantissa bit, up to 6.
E2M1 = FloatFormat.make("e2m1", 2, 1, 6.0)
#: The 4-bit float with 3 exponent bits and no mantissa, up to 16.
E3M0 = FloatFormat.make("e3m0", 3, 0, 16.0)
#: E4M3 as in the QTorch library, up to 480, with ties away from zero.
E4M3_QTORCH = FloatFormat.make("e4m3-qtorch", 4, 3, 480.0, ties="away")
#: E5M2 as in the QTorch library, up to 114688, with ties away from zero.
E5M2_QTORCH = FloatFormat.make("e5m2-qtorch", 5, 2, 114688.0, ties="away")
#: E2M1 as in the QTorch library, with ties away from zero.
E2M1_QTORCH = FloatFormat.make("e2m1-qtorch", 2, 1, 6.0, ties="away")
#: E3M0 as in the QTorch library, with ties away from zero.
E3M0_QTORCH = FloatFormat.make("e3m0-qtorch", 3, 0, 16.0, ties="away")
#: The symmetric 8-bit integer, -127 to 127.
INT8 = IntFormat.make("int8", 8)
#: The symmetric 4-bit integer, -7 to 7.
INT4 = IntFormat.make("int4", 4)
#: The asymmetric 8-bit integer, levels 0 to 255 counted from a zero point.
INT8_ASYM = IntFormat.make("int8-asym", 8, asymmetric=True)
#: The asymmetric 4-bit integer, levels 0 to 15 counted from a zero point.
INT4_ASYM = IntFormat.make("int4-asym", 4, asymmetric=True)

#: The values of NormalFloat4 times 1.4, each rounded to E4M3.
NF4 = TableFormat.make("nf4", np.array([-88, -64, -48, -36, -26, -16, -8, 0, 7, 14, 22, 30, 40, 52, 64, 88]) / 64)

_FLOATS = (E4M3, E5M2, E2M1, E3M0, E4M3_QTORCH, E5M2_QTORCH, E2M1_QTORCH, E3M0_QTORCH)
FORMATS: dict[str, Format] = {f.name: f for f in (*_FLOATS, INT8, INT4, INT8_ASYM, INT4_ASYM, NF4)}


def get_format(name: Any) -> Format:
    """The format of a name such as "e2m1", or the format itself; FpqError lists the names when there is none."""
    if isinstance(name, Format):
        return name
    if not isinstance(name, str) or name not in FORMATS:
        raise FpqError(f"There is no format {name!r}; the formats are {', '.join(FORMATS)}.")
    return FORMATS[name]


def cast(x: Float[Array, "..."], fmt: Format) -> Float[Array, "..."]:
    """Rounds each number to the nearest value of a format.

    Numbers beyond the largest value saturate, NaN stays NaN, and floats keep the sign of zero. For asymmetric integers
    the result is the level, counted from 0.

    Args:
        x: ``[...]``, any float type.
        fmt: the format.

    Returns:
        ``[...]`` in the dtype of ``x``.

    Example:
        >>> fpq.cast(jnp.array([0.2, 2.4, 2.5, -100.0]), fpq.E2M1)
        Array([ 0.,  2.,  2., -6.], dtype=float32)
    """
    return fmt.cast(x)


def encode(x: Float[Array, "..."], fmt: Format) -> Shaped[Array, "..."]:
    """Encodes each number as the code of the nearest value of a format, rounded as ``cast`` does.

    NaN stays NaN in the formats with a JAX type of their own. The others have no NaN, and its code is unspecified
    there.

    Args:
        x: ``[...]``, any float type.
        fmt: the format.

    Returns:
        ``[...]`` codes of the format's ``dtype``, uint8 where it has none. Floats have the sign in the highest bit;
        codes of 4 bits are not packed yet (see ``pack``).

    Example:
        >>> fpq.encode(jnp.array([0.5, -0.5, 6.0]), fpq.E2M1)
        Array([1, 9, 7], dtype=uint8)
        >>> fpq.encode(jnp.array([0.5, 1000.0]), fpq.E4M3)
        Array([0.5, 448], dtype=float8_e4m3fn)
    """
    return fmt.encode(x)


def decode(codes: Shaped[Array, "..."], fmt: Format, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """Decodes codes to the values that they stand for.

    Args:
        codes: ``[...]`` as ``encode`` gives them, not packed.
        fmt: the format.
        dtype: of the result. Values are exact in float32 and bfloat16, and those of 4-bit formats also in
            ``float8_e4m3fn``.

    Returns:
        ``[...]`` values.

    Example:
        >>> fpq.decode(jnp.array([1, 9, 7], jnp.uint8), fpq.E2M1)
        Array([ 0.5, -0.5,  6. ], dtype=float32)
    """
    return fmt.decode(codes, dtype)


def pack(codes: UInt8[Array, "*rows n"]) -> UInt8[Array, "*rows half"]:
    """Packs 4-bit codes two to a byte along the last axis.

    Args:
        codes: uint8 ``[..., n]``, each below 16.

    Returns:
        uint8 ``[..., ceil(n / 2)]``. The code with the even index is in the low four bits; an odd end is filled with 0.

    Example:
        >>> fpq.pack(jnp.array([1, 2, 3], jnp.uint8))  # 0x21 and 0x03
        Array([33,  3], dtype=uint8)
    """
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: UInt8[Array, "*rows half"], size: int) -> UInt8[Array, "*rows n"]:
    """Unpacks the 4-bit codes that ``pack`` packed.

    Args:
        packed: uint8 ``[..., ceil(size / 2)]``.
        size: how many codes there are along the last axis.

    Returns:
        uint8 ``[..., size]``, each below 16.

    Example:
        >>> fpq.unpack(jnp.array([33, 3], jnp.uint8), 3)
        Array([1, 2, 3], dtype=uint8)
    """
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :size]


def _split(x: Array) -> tuple[Array, Array]:
    """Sign bit and magnitude bits of float32 values, as uint32."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return bits & jnp.uint32(0x80000000), bits & jnp.uint32(0x7FFFFFFF)
