import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fpq_jax import (
    E2M1,
    E3M0,
    E4M3,
    E5M2,
    INT4,
    INT4_ASYM,
    INT8,
    INT8_ASYM,
    NF4,
    cast,
    decode,
    encode,
    pack,
    unpack,
)
from fpq_jax._errors import FpqError
from fpq_jax._numerics.formats import FORMATS, get_format

ALL_BFLOAT16 = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
REFERENCE = [(E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2), (E2M1, ml_dtypes.float4_e2m1fn)]
EAGER_AND_JITTED = [lambda f: f, lambda f: jax.jit(f, static_argnums=1)]


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.mark.parametrize("transform", EAGER_AND_JITTED, ids=["eager", "jit"])
@pytest.mark.parametrize(("fmt", "dtype"), REFERENCE, ids=str)
def test_cast_and_encode_equal_ml_dtypes_on_every_bfloat16(fmt, dtype, transform):
    nan = np.isnan(ALL_BFLOAT16.astype(np.float32))
    expected = np.clip(np.where(nan, 0, ALL_BFLOAT16.astype(np.float32)), -fmt.max, fmt.max).astype(dtype)
    got = transform(cast)(jnp.asarray(ALL_BFLOAT16), fmt)
    assert got.dtype == jnp.bfloat16
    got = np.asarray(got).astype(np.float32)
    np.testing.assert_array_equal(bits(got)[~nan], bits(expected.astype(np.float32))[~nan])
    assert np.isnan(got[nan]).all()
    codes = np.asarray(transform(encode)(jnp.asarray(ALL_BFLOAT16), fmt))
    np.testing.assert_array_equal(codes.view(np.uint8)[~nan], expected.view(np.uint8)[~nan])
    if fmt.dtype is not None:
        assert np.isnan(codes.astype(np.float32)[nan]).all()


@pytest.mark.parametrize("transform", EAGER_AND_JITTED, ids=["eager", "jit"])
def test_e3m0_equals_an_enumeration_with_ties_to_the_even_code(transform):
    grid = np.array([0, 0.25, 0.5, 1, 2, 4, 8, 16])
    finite = np.isfinite(ALL_BFLOAT16.astype(np.float32))
    x = ALL_BFLOAT16[finite].astype(np.float64)
    distance = np.abs(np.minimum(np.abs(x), 32)[:, None] - grid)
    nearest = distance == distance.min(axis=1, keepdims=True)
    even_first = np.where(nearest, np.arange(8) % 2, 9)
    code = even_first.argmin(axis=1)
    got = transform(cast)(jnp.asarray(ALL_BFLOAT16[finite]), E3M0)
    np.testing.assert_array_equal(np.asarray(got).astype(np.float64), np.copysign(grid[code], x))
    codes = np.asarray(transform(encode)(jnp.asarray(ALL_BFLOAT16[finite]), E3M0))
    np.testing.assert_array_equal(codes, code + 8 * np.signbit(x))


@pytest.mark.parametrize("name", [name for name in FORMATS if name.endswith("qtorch")])
@pytest.mark.parametrize("transform", EAGER_AND_JITTED, ids=["eager", "jit"])
def test_qtorch_variants_equal_an_enumeration_with_ties_away_from_zero(name, transform):
    fmt = get_format(name)
    largest, step, mantissa = {"e4m3": (480, 2.0**-9, 3), "e5m2": (114688, 2.0**-16, 2), "e2m1": (6, 0.5, 1),
                               "e3m0": (16, 0.25, 0)}[name[:4]]  # fmt: skip
    x = ALL_BFLOAT16[np.isfinite(ALL_BFLOAT16.astype(np.float32))].astype(np.float64)
    spacing = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 1e-40))) - mantissa), step)
    nearest = np.minimum(np.floor(np.abs(x) / spacing + 0.5) * spacing, largest)
    got = transform(cast)(jnp.asarray(x, jnp.float32), fmt)
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.copysign(nearest, x))
    codes = transform(encode)(jnp.asarray(x, jnp.float32), fmt)
    assert codes.dtype == jnp.uint8 and len(np.unique(codes)) == len(fmt.grid) + 1  # -0 has a code too
    np.testing.assert_array_equal(decode(codes, fmt), got)
    # a float32 just below a tie goes down
    tie = (fmt.grid[-1] + fmt.grid[-2]) / 2
    assert cast(jnp.float32(tie), fmt) == fmt.grid[-1] and cast(jnp.nextafter(tie, 0.0), fmt) == fmt.grid[-2]


@pytest.mark.parametrize("transform", EAGER_AND_JITTED, ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("fmt", "low", "high"), [(INT8, -127, 127), (INT4, -7, 7), (INT8_ASYM, 0, 255), (INT4_ASYM, 0, 15)]
)
def test_integers_round_saturate_and_come_back(fmt, low, high, transform):
    x = ALL_BFLOAT16[np.isfinite(ALL_BFLOAT16.astype(np.float32))].astype(np.float32)
    expected = np.clip(np.rint(x), low, high)
    np.testing.assert_array_equal(transform(cast)(jnp.asarray(x), fmt), expected)
    codes = transform(encode)(jnp.asarray(x), fmt)
    assert codes.dtype == (jnp.int8 if fmt.bits == 8 else jnp.uint8)
    assert fmt.bits == 8 or int(codes.max()) == 15
    np.testing.assert_array_equal(decode(codes, fmt), expected)
    np.testing.assert_array_equal(fmt.int8_codes(codes).astype(np.int32) + fmt.offset, expected)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1, E3M0], ids=str)
def test_infinity_saturates_and_float32_neighbours_of_midpoints_round_to_their_side(fmt):
    assert float(cast(jnp.float32(np.inf), fmt)) == fmt.max
    assert float(cast(jnp.float32(-3e38), fmt)) == -fmt.max
    grid = fmt.grid[fmt.grid >= 0]
    middle = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    np.testing.assert_array_equal(cast(jnp.asarray(np.nextafter(middle, np.float32(0))), fmt), grid[:-1])
    np.testing.assert_array_equal(cast(jnp.asarray(np.nextafter(middle, np.float32(np.inf))), fmt), grid[1:])


@pytest.mark.parametrize("fmt", [E2M1, E3M0, INT4_ASYM], ids=str)
@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_decode_and_packing_are_inverses(fmt, size):
    codes = np.random.default_rng(size).integers(0, 16, (3, size)).astype(np.uint8)
    packed = pack(jnp.asarray(codes))
    assert packed.shape == (3, (size + 1) // 2)
    np.testing.assert_array_equal(unpack(packed, size), codes)
    np.testing.assert_array_equal(np.asarray(packed)[:, 0] & 15, codes[:, 0])
    np.testing.assert_array_equal(encode(decode(jnp.asarray(codes), fmt), fmt), codes)


def test_the_largest_values_and_the_exact_shifts_are_the_papers():
    assert [f.grid.max() for f in (E4M3, E5M2, E2M1, E3M0)] == [448, 57344, 6, 16]
    assert E2M1.exact_shifts == (-8, 6)
    assert E3M0.exact_shifts == (-7, 4)
    assert INT4.exact_shifts == (-9, 5)
    assert {name for name, f in FORMATS.items() if f.expands} == {
        "e4m3", "e5m2", "e2m1", "e3m0", "e2m1-qtorch", "e3m0-qtorch", "int4", "nf4"
    }  # fmt: skip


def test_an_unknown_format_is_named_with_the_known_ones():
    with pytest.raises(FpqError, match=r"'e9m9'.*e4m3, e5m2, e2m1, e3m0"):
        get_format("e9m9")


# NormalFloat4 as bitsandbytes has it (QLoRA, appendix E)
NORMAL_FLOAT = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.mark.parametrize("transform", EAGER_AND_JITTED, ids=["eager", "jit"])
def test_nf4_is_normal_float_in_e4m3_and_rounds_to_nearest(transform):
    values = (1.4 * np.asarray(NORMAL_FLOAT)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(NF4.grid, values)
    low, high = NF4.exact_shifts
    for shift in range(low, high + 1):
        shifted = values * 2.0**shift
        np.testing.assert_array_equal(shifted.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), shifted)
    assert (low, high) == (-3, 8)
    x = ALL_BFLOAT16[np.isfinite(ALL_BFLOAT16.astype(np.float32))]
    distance = np.abs(np.clip(x.astype(np.float64), -4, 4)[:, None] - values)
    expected = values[distance.argmin(axis=1)]  # the first, the lower, of two as near
    got = transform(cast)(jnp.asarray(x), NF4)
    assert got.dtype == jnp.bfloat16 and bool(jnp.isnan(cast(jnp.float32(jnp.nan), NF4)))
    np.testing.assert_array_equal(np.asarray(got).astype(np.float32), expected)
    codes = np.asarray(transform(encode)(jnp.asarray(x), NF4))
    np.testing.assert_array_equal(decode(jnp.asarray(codes), NF4), expected)
    assert NF4.table[0] == 0 and codes.max() == 15


def test_nf4_rounds_normal_numbers_with_a_fifth_less_error_than_e2m1():
    x = np.random.default_rng(0).standard_normal(100_000)

    def error(fmt):
        scales = np.linspace(0.3, 1.2, 50) * 3 / fmt.max
        return min(
            np.mean((x - s * np.asarray(cast(jnp.asarray(x / s, jnp.float32), fmt), np.float64)) ** 2) for s in scales
        )

    assert error(NF4) < 0.8 * error(E2M1) and error(NF4) < 0.85 * error(INT4)
