import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax import E2M1, E3M0, NF4, QuantSpec, dequantize, quantize_array
from fpq_jax._numerics.scales import free_scale, group_scale, power_of_two, row_reference


def weights(seed, shape, spread=1.5):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(spread * rng.standard_normal(shape))).astype(np.float32)


def stored_scales(q):
    return np.asarray(q.row_scale) * 2.0 ** np.asarray(q.exponents, np.float64)


def free_scales(w, group, fmt):
    pad = -len(w) % group
    groups = np.abs(np.pad(w, ((0, pad), (0, 0)))).reshape(-1, group, w.shape[1]).max(axis=1)
    return (groups.astype(np.float32) / np.float32(fmt.max)).T.astype(np.float64)


@pytest.mark.parametrize("fmt", [E2M1, E3M0, NF4], ids=str)
def test_m1_and_m2_up_are_the_papers_formulas(fmt):
    w = weights(0, (300, 40), spread=0.5)
    s = free_scales(w, 64, fmt)
    m1 = quantize_array(jnp.asarray(w), QuantSpec(format=fmt, group_size=64, constraint="m1"))
    np.testing.assert_array_equal(stored_scales(m1), 2.0 ** np.ceil(np.log2(s)))
    m2 = quantize_array(jnp.asarray(w), QuantSpec(format=fmt, group_size=64, constraint="m2"))
    largest = s.max(axis=1, keepdims=True)
    np.testing.assert_allclose(stored_scales(m2), largest / 2.0 ** np.floor(np.log2(largest / s)), rtol=3e-7)
    assert (stored_scales(m2) >= s * (1 - 3e-7)).all()


def test_m2_over_a_block_of_rows_shares_the_rows_largest_scale():
    w = weights(1, (256, 10), spread=0.5)
    q = quantize_array(jnp.asarray(w), QuantSpec(group_size=64, constraint="m2", compute_rows=4))
    rows = np.asarray(q.row_scale).ravel()
    assert len(set(rows[:4])) == len(set(rows[4:8])) == len(set(rows[8:])) == 1
    ratio = np.log2(stored_scales(q) / stored_scales(q)[:4].max())
    np.testing.assert_array_equal(ratio[:4], np.round(ratio[:4]))
    assert free_scales(w, 64, E2M1)[:4].max() == pytest.approx(stored_scales(q)[:4].max())


def test_nearest_is_nearest_in_log2():
    w = weights(2, (300, 40), spread=0.5)
    s = free_scales(w, 64, E2M1)
    q = quantize_array(jnp.asarray(w), QuantSpec(group_size=64, constraint="m1", exponent_rounding="nearest"))
    np.testing.assert_array_equal(stored_scales(q), 2.0 ** np.round(np.log2(s)))


def test_search_finds_the_exponent_of_least_weighted_error():
    w, importance = weights(3, (64, 20)), np.random.default_rng(3).exponential(size=64).astype(np.float32)
    importance[::7] = 0
    spec = QuantSpec(group_size=32, constraint="m2", exponent_rounding="search")
    reference = row_reference(jnp.asarray(w), spec)
    found = group_scale(jnp.asarray(w[:32]), reference, jnp.asarray(importance[:32]), spec, 64).exponent
    grid = E2M1.grid.astype(np.float64)
    errors = []
    for exponent in range(-8, 7):
        scale = np.asarray(reference.scale, np.float64) * 2.0**exponent
        x = w[:32] / scale
        rounded = grid[np.abs(x[..., None] - grid).argmin(axis=-1)]
        errors.append((importance[:32, None] * (w[:32] - rounded * scale) ** 2).sum(axis=0))
    best = np.min(errors, axis=0)
    chosen = np.array([errors[e + 8][i] for i, e in enumerate(np.asarray(found))])
    np.testing.assert_allclose(chosen, best, rtol=1e-5)


@pytest.mark.parametrize(("name", "levels"), [("int8-asym", 255), ("int4-asym", 15)])
def test_asymmetric_integers_are_the_papers_formula(name, levels):
    """Q(x) = round((x - Z) / S) with S = (max - min) / levels and Z = -S round(-min / S) of each group, whose range
    contains 0; the last group is short."""
    w = weights(6, (150, 12))
    w[64:128, :3] += 30  # all positive
    w[128:, 3:6] -= 30
    q = quantize_array(jnp.asarray(w), QuantSpec(format=name, group_size=64))
    got = np.asarray(dequantize(q), np.float64)
    for start, end in ((0, 64), (64, 128), (128, 150)):
        x = w[start:end].astype(np.float64)
        low, high = np.minimum(x.min(axis=0), 0), np.maximum(x.max(axis=0), 0)
        s = (high - low) / levels
        z = np.round(-low / s)
        expected = (np.clip(np.round((x + s * z) / s), 0, levels) - z) * s
        near_tie = np.abs((x / s) % 1 - 0.5) < 1e-4
        np.testing.assert_allclose(np.where(near_tie, 0, got[start:end] - expected), 0, atol=1e-5 * np.abs(x).max())
        assert near_tie.mean() < 0.01
        assert q.zero.dtype == jnp.uint8
        np.testing.assert_array_equal(np.asarray(q.zero)[:, start // 64], z)
        np.testing.assert_allclose(np.asarray(q.group_scale)[:, start // 64], s, rtol=1e-6)
    zeros = quantize_array(jnp.asarray(np.where(np.arange(64)[:, None] % 2, w[:64], 0)), QuantSpec(format=name))
    assert (np.asarray(dequantize(zeros))[::2] == 0).all()
    constant = quantize_array(jnp.full((64, 3), -2.5), QuantSpec(format=name, group_size=64))
    np.testing.assert_allclose(dequantize(constant), np.full((64, 3), -2.5), rtol=1e-6)


@pytest.mark.parametrize("constraint", ["m1", "m2"])
@pytest.mark.parametrize("fmt", [E2M1, E3M0, NF4], ids=str)
def test_groups_far_apart_stay_in_the_exact_range(fmt, constraint):
    w = weights(4, (128, 8)) * (10.0 ** np.repeat([-9.0, 0, -3, -12], 32))[:, None].astype(np.float32)
    q = quantize_array(jnp.asarray(w), QuantSpec(format=fmt, group_size=32, constraint=constraint))
    low, high = fmt.exact_shifts
    exponents = np.asarray(q.exponents)
    assert low <= exponents.min() < exponents.max() <= high
    assert exponents.min() == low


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-30, 1e30, 1e38])
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(group_size=8),
        QuantSpec(group_size=8, constraint="m1"),
        QuantSpec(group_size=8, constraint="m2"),
        QuantSpec(format="e4m3", group_size="channel"),
        QuantSpec(format="int8-asym", group_size="channel"),
    ],
    ids=["free", "m1", "m2", "w8", "int8-asym"],
)
def test_extreme_weights_stay_finite(scale, spec):
    w = (np.random.default_rng(5).uniform(-1, 1, (24, 6)) * scale).astype(np.float32)
    w[:8, 2] = 0
    for f in (quantize_array, jax.jit(quantize_array, static_argnums=1)):
        got = np.asarray(dequantize(f(jnp.asarray(w), spec)))
        assert np.isfinite(got).all()
        assert (got[:8, 2] == 0).all()
        if 1e-29 < scale:
            assert np.abs(got - w).max() <= 0.26 * np.abs(w).max()


def test_a_zero_group_does_not_inflate_its_row():
    w = np.full((16, 2), 1e-3, np.float32)
    w[:8] = 0
    q = quantize_array(jnp.asarray(w), QuantSpec(group_size=8, constraint="m2"))
    np.testing.assert_allclose(dequantize(q), w, rtol=1e-6)
    assert float(free_scale(jnp.float32(0), E2M1)) == 1.0


def test_power_of_two_is_exact_over_the_normal_range():
    exponents = np.arange(-126, 128)
    np.testing.assert_array_equal(power_of_two(jnp.asarray(exponents)), np.ldexp(np.float32(1), exponents))
