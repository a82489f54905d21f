import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fpq_jax import E2M1, E3M0, E4M3, E5M2, cast, decode, encode, pack, unpack
from fpq_jax._errors import FpqError
from fpq_jax._formats import get_format

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


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1, E3M0], ids=str)
def test_infinity_saturates_and_float32_neighbours_of_midpoints_round_to_their_side(fmt):
    assert float(cast(jnp.float32(np.inf), fmt)) == fmt.max
    assert float(cast(jnp.float32(-3e38), fmt)) == -fmt.max
    grid = fmt.values[np.isfinite(fmt.values)]
    middle = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    np.testing.assert_array_equal(cast(jnp.asarray(np.nextafter(middle, np.float32(0))), fmt), grid[:-1])
    np.testing.assert_array_equal(cast(jnp.asarray(np.nextafter(middle, np.float32(np.inf))), fmt), grid[1:])


@pytest.mark.parametrize("fmt", [E2M1, E3M0], ids=str)
@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_decode_and_packing_are_inverses(fmt, size):
    codes = np.random.default_rng(size).integers(0, 16, (3, size)).astype(np.uint8)
    packed = pack(jnp.asarray(codes))
    assert packed.shape == (3, (size + 1) // 2)
    np.testing.assert_array_equal(unpack(packed, size), codes)
    np.testing.assert_array_equal(np.asarray(packed)[:, 0] & 15, codes[:, 0])
    np.testing.assert_array_equal(encode(decode(jnp.asarray(codes), fmt), fmt), codes)


def test_the_largest_values_and_the_exact_shifts_are_the_papers():
    assert [f.values[np.isfinite(f.values)].max() for f in (E4M3, E5M2, E2M1, E3M0)] == [448, 57344, 6, 16]
    assert E2M1.exact_shifts == (-8, 6)
    assert E3M0.exact_shifts == (-7, 4)


def test_an_unknown_format_is_named_with_the_known_ones():
    with pytest.raises(FpqError, match=r"'e9m9'.*e4m3, e5m2, e2m1, e3m0"):
        get_format("e9m9")
