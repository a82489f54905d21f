"""The scale search against trying every candidate in float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_full

from fpq_jax import QuantSpec
from fpq_jax._algorithms.scale_search import search_scales
from fpq_jax._numerics.qtensor import assemble, expand
from fpq_jax._numerics.scales import of_inputs, weight_scales

SHRINKS = 2.0 ** (-np.arange(8) / 8)


def lost(w, scales, importance, spec):
    each = of_inputs(scales, spec, len(w))
    rounded = np.asarray(each.numbers(each.values(jnp.asarray(w), spec.format), spec.format), np.float64)
    return importance[:, None] * (w.astype(np.float64) - rounded) ** 2


def example(inputs=96, outputs=20, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_t(4, (inputs, outputs)) * np.exp(rng.standard_normal((inputs // 16, 1))).repeat(16, axis=0)
    return w.astype(np.float32), np.exp(rng.standard_normal(inputs)).astype(np.float32)


def rounded_to(x, grid):
    return grid[np.abs(x[..., None] - grid).argmin(axis=-1)]


@pytest.mark.parametrize("rows", [1, 5])
def test_m2_has_the_best_reference_of_each_compute_group_with_the_best_exponents(rows):
    w, importance = example()
    spec = QuantSpec(group_size=16, constraint="m2", compute_rows=rows)
    scales, reference = search_scales(jnp.asarray(w), jnp.asarray(importance), spec)
    grid = spec.format.grid.astype(np.float64)
    groups, weights = w.astype(np.float64).reshape(6, 16, 20), importance.reshape(6, 16, 1).astype(np.float64)
    largest = np.abs(groups).max(axis=1) / 6
    row = np.repeat(largest.max(axis=0).reshape(-1, rows).max(axis=1), rows)
    best = np.full(20 // rows, np.inf)
    for shrink in SHRINKS:
        up = np.ceil(np.log2(largest / (row * shrink)))
        errors = []
        for exponent in (up, up - 1):
            scale = (row * shrink * 2.0**exponent)[:, None]
            errors.append((weights * (groups - rounded_to(groups / scale, grid) * scale) ** 2).sum(axis=1))
        best = np.minimum(best, np.minimum(*errors).sum(axis=0).reshape(-1, rows).sum(axis=1))
    found = lost(w, scales, importance, spec).sum(axis=0).reshape(-1, rows).sum(axis=1)
    np.testing.assert_allclose(found, best, rtol=1e-4)
    q = assemble(jnp.zeros(w.shape, jnp.uint8), scales, reference, spec)
    expand(q)  # raises where an exponent is out of the window
    np.testing.assert_allclose(
        np.asarray(q.row_scale * 2.0 ** q.exponents.astype(jnp.float32)).T, scales.scale, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("fmt", "group", "constraint"),
    mostly_full(
        [
            ("e2m1", 16, "m1"),
            ("int4-asym", 16, None),
            ("e2m1", "tensor", None),
            ("e2m1", 40, None),
            ("e3m0", "channel", "m2"),
            ("int4", 32, "m2"),
            ("int4", "channel", None),
        ],
        3,
    ),
)
def test_the_weighted_error_falls_and_never_rises(fmt, group, constraint):
    w, importance = example(seed=1)
    spec = QuantSpec(format=fmt, group_size=group, constraint=constraint)
    plain = lost(w, weight_scales(jnp.asarray(w), jnp.ones(96), spec)[0], importance, spec)
    searched = lost(w, search_scales(jnp.asarray(w), jnp.asarray(importance), spec)[0], importance, spec)
    assert searched.sum() < plain.sum()
    if group != "tensor":
        assert (searched.sum(axis=0) <= plain.sum(axis=0) * (1 + 1e-5)).all()


def test_weights_of_zero_have_a_scale_and_stay_zero():
    w = jnp.zeros((32, 3)).at[:16, 1].set(2.0)
    for constraint in (None, "m1", "m2"):
        spec = QuantSpec(group_size=16, constraint=constraint)
        scales, _ = search_scales(w, jnp.ones(32), spec)
        each = of_inputs(scales, spec, 32)
        np.testing.assert_array_equal(each.numbers(each.values(w, spec.format), spec.format), w)
