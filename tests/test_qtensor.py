import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax import E2M1, E4M3, FpqError, LowRank, QuantSpec, dequantize, expand, lorc, quantize_array
from fpq_jax._matmul.weight_layouts import to_layout

SPECS = [
    QuantSpec(group_size=32),
    QuantSpec(group_size=32, constraint="m1"),
    QuantSpec(group_size=32, constraint="m2"),
    QuantSpec(format="nf4", group_size=8, constraint="m2"),
    QuantSpec(format="e3m0", group_size=7, constraint="m2", exponent_rounding="nearest"),
    QuantSpec(group_size=1000, constraint="m1"),
    QuantSpec(group_size="channel"),
    QuantSpec(group_size="tensor"),
    QuantSpec(format="e4m3", group_size="channel"),
    QuantSpec(format="e5m2", group_size="tensor"),
    QuantSpec(format="e4m3", group_size=32),
    QuantSpec(format="e4m3-qtorch", group_size="channel"),
    QuantSpec(format="int8", group_size="channel"),
    QuantSpec(format="int8-asym", group_size="tensor"),
    QuantSpec(format="int4", group_size=32, constraint="m2"),
    QuantSpec(format="int4-asym", group_size=32),
]


def weights(seed=0, shape=(101, 9)):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)


def scales_of(q, length):
    """Scales and zero points, float64 [in, out], by the definition in QTensor's docstring."""

    def spread(s):
        s = np.repeat(s, length, axis=1)[:, : q.shape[0]] if s.shape[1] > 1 else s
        return np.broadcast_to(s, (q.shape[1], q.shape[0])).T

    s = np.asarray(q.group_scale if q.group_scale is not None else q.row_scale, np.float64)
    if q.exponents is not None:
        s = s * 2.0 ** np.asarray(q.exponents, np.float64)
    return spread(s), spread(np.zeros((1, 1)) if q.zero is None else np.asarray(q.zero, np.float64))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_weight_is_the_nearest_value_of_its_group(spec):
    w = weights()
    q = quantize_array(jnp.asarray(w), spec)
    scale, zero = scales_of(q, spec.group_length(101))
    grid = spec.format.grid.astype(np.float64)
    best = np.abs((w / scale + zero)[..., None] - grid).min(axis=-1)
    got = np.abs(w - np.asarray(dequantize(q), np.float64)) / scale
    # float32's rounding of w / scale may turn a near tie
    np.testing.assert_allclose(got, best, atol=4e-7 * spec.format.max)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_jit_gives_the_bits_that_eager_gives(spec):
    w = jnp.asarray(weights(3))
    eager, jitted = quantize_array(w, spec), jax.jit(quantize_array, static_argnums=1)(w, spec)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.format.expands and (s.num_groups(101) == 1 or s.constraint)], ids=str
)
def test_expansion_into_fp8_is_exact(spec):
    q = lorc(jnp.asarray(weights()), quantize_array(jnp.asarray(weights()), spec), rank=2)
    e = expand(q)
    assert e.codes.dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
    assert e.codes.shape == (9, 101) and e.exponents is None
    np.testing.assert_array_equal(dequantize(e), dequantize(q))
    np.testing.assert_array_equal(jax.jit(expand)(q).codes.view(jnp.uint8), e.codes.view(jnp.uint8))
    assert expand(e) is e


def test_what_does_not_expand_exactly_is_refused():
    free = quantize_array(jnp.asarray(weights()), QuantSpec(group_size=32))
    with pytest.raises(FpqError, match="free group scales"):
        expand(free)
    assert to_layout(free, "fp8") is free
    for name in ("int8", "int4-asym", "e4m3-qtorch"):
        with pytest.raises(FpqError, match=f"in {name} has no exact FP8 form"):
            expand(quantize_array(jnp.asarray(weights()), QuantSpec(format=name, group_size="channel")))
    q = quantize_array(jnp.asarray(weights()), QuantSpec(group_size=32, constraint="m2"))
    with pytest.raises(FpqError, match="outside -8 to 6"):
        expand(dataclasses.replace(q, exponents=q.exponents.at[0, 0].set(7)))


def test_storage_is_counted_as_stored():
    q = quantize_array(jnp.asarray(weights(shape=(512, 64))), QuantSpec(constraint="m2"))
    # 4-bit codes, a float32 per row, an int8 per group
    assert q.nbytes == 512 * 64 // 2 + 4 * 64 + 2 * 64
    assert q.bits_per_weight == pytest.approx(4 + 8 * 6 / 512)
    with_factors = lorc(jnp.asarray(weights(shape=(512, 64))), q, rank=8)
    assert with_factors.nbytes - q.nbytes == 2 * 8 * (512 + 64)
    free = quantize_array(jnp.asarray(weights(shape=(512, 64))), QuantSpec())
    assert free.bits_per_weight == pytest.approx(4 + 32 / 256)


def test_it_is_a_pytree_that_jit_and_vmap_take():
    w = jnp.asarray(np.stack([weights(seed) for seed in range(3)]))
    spec = QuantSpec(group_size=32, constraint="m2")
    stacked = jax.vmap(lambda m: quantize_array(m, spec))(w)
    got = jax.jit(jax.vmap(dequantize))(stacked)
    np.testing.assert_array_equal(dequantize(stacked), got)
    np.testing.assert_array_equal(dequantize(expand(stacked)), got)
    assert stacked.bits_per_weight == quantize_array(w[0], spec).bits_per_weight
    np.testing.assert_array_equal(got, np.stack([dequantize(quantize_array(m, spec)) for m in w]))
    leaves, structure = jax.tree.flatten(stacked)
    assert jax.tree.unflatten(structure, leaves).spec == spec


def test_int8_factors_multiply_out():
    low_rank = LowRank(jnp.array([[2], [4]], jnp.int8), jnp.array([[3, 5, 7]], jnp.int8), jnp.array([0.5]))
    np.testing.assert_array_equal(low_rank.product(), [[3, 5, 7], [6, 10, 14]])


def test_eight_bit_codes_stay_when_expanded():
    q = quantize_array(jnp.asarray(weights()), QuantSpec(format=E4M3, group_size="channel"))
    assert expand(q) is q
    assert quantize_array(jnp.asarray(weights()), QuantSpec(format=E2M1)).codes.dtype == jnp.uint8
