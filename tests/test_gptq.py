"""GPTQ against the published algorithm, column by column in float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_full

from fpq_jax import QuantSpec, dequantize, gptq, gptq_with_stats, hessian, quantize_array


def problem(inputs, outputs, seed=0, dead=()):
    """Correlated inputs [2 * in, in] with a few large channels, a weight [in, out] and the Hessian, float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * inputs, inputs)) @ (np.eye(inputs) + 0.1 * rng.standard_normal((inputs, inputs)))
    x[:, ::17] *= 5
    x[:, list(dead)] = 0
    w = rng.standard_normal((inputs, outputs)).astype(np.float32)
    return w, (x.T @ x).astype(np.float32)


def published(w, hessian, spec, damping=0.01, act_order=False):
    """(dequantized [in, out], distance of each rounding to the nearest tie as a share of the grid's step).

    Group scales are taken from the updated weights, as the project decided; with act-order from the weights as given.
    """
    w, h, fmt = w.astype(np.float64).T.copy(), hessian.astype(np.float64).copy(), spec.format
    n = len(h)
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(n)
    h[np.diag_indices(n)] += damping * np.mean(np.diag(h))
    given, w, h = w.copy(), w[:, order], h[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    grid = fmt.grid.astype(np.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    length = spec.group_length(n)
    largest = np.abs(w).max(axis=1) / fmt.max
    largest[largest == 0] = 1
    out, margin = np.zeros_like(w), np.zeros_like(w)
    for i in range(n):
        if i % length == 0 or act_order:
            start = order[i] // length * length
            group = (given if act_order else w)[:, start : start + length]
            absmax, zero = np.abs(group).max(axis=1), np.zeros(len(w))
            if fmt.asymmetric:
                low, high = np.minimum(group.min(axis=1), 0), np.maximum(group.max(axis=1), 0)
                absmax = high - low
                zero = np.clip(np.round(-low / (absmax / fmt.max)), 0, fmt.max)
            scale = np.where(absmax > 0, absmax / fmt.max, largest if spec.constraint else 1)
            if spec.constraint == "m1":
                scale = 2.0 ** np.ceil(np.log2(scale))
            elif spec.constraint == "m2":
                power = np.log2(largest / scale)
                scale = largest / 2.0 ** (np.round(power) if spec.exponent_rounding == "nearest" else np.floor(power))
        x = w[:, i] / scale + zero
        out[:, i] = (grid[np.abs(x[:, None] - grid).argmin(axis=1)] - zero) * scale
        margin[:, i] = np.abs(x[:, None] - middles).min(axis=1) / np.maximum(np.abs(x), 1e-9)
        error = (w[:, i] - out[:, i]) / upper[i, i]
        w[:, i:] -= np.outer(error, upper[i, i:])
    back = np.argsort(order)
    return out.T[back], margin.T


def relative_error(w, approximation, h):
    w, d, h = w.astype(np.float64), w.astype(np.float64) - approximation, h.astype(np.float64)
    return np.sum(d * (h @ d)) / np.sum(w * (h @ w))


CASES = [
    (512, 256, None, "e2m1", "up"),
    (512, 256, "m2", "e2m1", "up"),
    (700, 256, "m2", "e2m1", "up"),
    (300, 64, "m1", "e2m1", "up"),
    (300, 64, "m2", "e2m1", "nearest"),
    (333, 100, "m2", "e3m0", "up"),
    (640, 320, None, "e3m0", "up"),
    (200, 3, "m2", "e2m1", "up"),
    (70, 1000, "m1", "e2m1", "up"),
    (300, "channel", None, "e4m3", "up"),
    (600, "channel", None, "e2m1", "up"),
    (260, 128, None, "e5m2", "up"),
    (512, 256, None, "int4-asym", "up"),
    (333, 100, None, "int4-asym", "up"),
    (300, 64, "m2", "int4", "up"),
    (300, "channel", None, "int8-asym", "up"),
    (260, 128, None, "int8", "up"),
]


@pytest.mark.parametrize(("inputs", "group", "constraint", "fmt", "rounding"), mostly_full(CASES, 3))
def test_codes_equal_the_published_algorithms_except_behind_ties(inputs, group, constraint, fmt, rounding):
    w, h = problem(inputs, 24, seed=inputs)
    spec = QuantSpec(format=fmt, group_size=group, constraint=constraint, exponent_rounding=rounding)
    expected, margin = published(w, h, spec)
    got = np.asarray(dequantize(gptq(jnp.asarray(w), jnp.asarray(h), spec)), np.float64)
    same = np.isclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(w).max())
    for row in range(w.shape[1]):
        if not same[:, row].all():
            # what follows a turned tie differs by right; the first difference must be one
            assert margin[np.argmin(same[:, row]), row] < 1e-4
    assert same.mean() > 0.97
    error = relative_error(w, got, h)
    assert error == pytest.approx(relative_error(w, expected, h), rel=1e-3)
    rounded = np.asarray(dequantize(quantize_array(jnp.asarray(w), spec)), np.float64)
    assert error < 0.8 * relative_error(w, rounded, h)


@pytest.mark.parametrize(
    ("inputs", "group", "constraint", "fmt"),
    mostly_full([(300, 64, "m2", "e2m1"), (333, 100, None, "int4-asym"), (600, "channel", None, "e4m3")], 1),
)
def test_act_order_with_static_groups_equals_the_published_algorithm_except_behind_ties(inputs, group, constraint, fmt):
    w, h = problem(inputs, 24, seed=inputs, dead=(5,))
    spec = QuantSpec(format=fmt, group_size=group, constraint=constraint)
    expected, margin = published(w, h, spec, act_order=True)
    got = np.asarray(dequantize(gptq(jnp.asarray(w), jnp.asarray(h), spec, order="activation")), np.float64)
    same = np.isclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(w).max())
    order = np.argsort(-np.where(np.diag(h) == 0, 1, np.diag(h)), kind="stable")
    for row in range(w.shape[1]):
        if not same[:, row].all():
            assert margin[np.argmin(same[order, row]), row] < 1e-4  # margins are in the order of rounding
    assert same.mean() > 0.97
    assert relative_error(w, got, h) == pytest.approx(relative_error(w, expected, h), rel=1e-3)
    natural = np.asarray(dequantize(gptq(jnp.asarray(w), jnp.asarray(h), spec)), np.float64)
    assert relative_error(w, got, h) < relative_error(w, natural, h)


def test_inputs_never_seen_get_zero_weights_and_are_counted():
    w, h = problem(300, 10, dead=(3, 4, 299))
    spec = QuantSpec(group_size=64)
    q, stats = gptq_with_stats(jnp.asarray(w), jnp.asarray(h), spec)
    assert int(stats.dead) == 3
    got = np.asarray(dequantize(q))
    assert (got[[3, 4, 299]] == 0).all()
    np.testing.assert_allclose(got, published(w, h, spec)[0], rtol=1e-5)


@pytest.mark.full
def test_vmap_over_a_stack_equals_one_by_one():
    problems = [problem(130, 8, seed=s) for s in range(3)]
    w, h = (jnp.asarray(np.stack(part)) for part in zip(*problems, strict=True))
    spec = QuantSpec(group_size=32, constraint="m2")
    stacked = jax.vmap(dequantize)(jax.vmap(lambda a, b: gptq(a, b, spec))(w, h))
    single = np.stack([dequantize(gptq(a, b, spec)) for a, b in zip(w, h, strict=True)])
    assert (np.asarray(stacked) == single).mean() > 0.999


def test_damping_is_raised_until_cholesky_succeeds_and_reported():
    w, h = problem(96, 12)
    spec = QuantSpec(group_size=32)
    _, regular = gptq_with_stats(jnp.asarray(w), jnp.asarray(h), spec)
    assert float(regular.damping) == pytest.approx(0.01)
    x = np.ones((4, 96), np.float32)  # rank 1
    singular = x.T @ x
    singular[0, 0] *= 0.8  # and not positive definite: no float noise decides this
    q, stats = gptq_with_stats(jnp.asarray(w), jnp.asarray(singular), spec, damping=1e-4)
    assert float(stats.damping) > 1.5e-4
    assert np.isfinite(np.asarray(dequantize(q))).all()


@pytest.mark.parametrize("h", [np.zeros((40, 40), np.float32), np.full((40, 40), 2.5e-38, np.float32)])
def test_a_degenerate_hessian_gives_finite_weights(h):
    w, _ = problem(40, 6)
    q = gptq(jnp.asarray(w), jnp.asarray(h), QuantSpec(group_size=16, constraint="m2"))
    assert np.isfinite(np.asarray(dequantize(q))).all()


def test_compiled_size_does_not_grow_with_the_matrix():
    def lines(n):
        shapes = (jax.ShapeDtypeStruct((n, 64), jnp.float32), jax.ShapeDtypeStruct((n, n), jnp.float32))
        return gptq_with_stats.lower(*shapes, QuantSpec()).as_text().count("\n")

    assert lines(4096) <= lines(1024) + 5


def test_compute_groups_over_rows_hold_inside_gptq():
    w, h = problem(128, 8)
    q = gptq(jnp.asarray(w), jnp.asarray(h), QuantSpec(group_size=32, constraint="m2", compute_rows=8))
    assert len(set(np.asarray(q.row_scale).ravel().tolist())) == 1
    assert dataclasses.replace(q.spec, compute_rows=1) == QuantSpec(group_size=32, constraint="m2")


@pytest.mark.full
def test_double_precision_switched_on_changes_nothing():
    x, w = (jax.random.normal(jax.random.key(i), shape, jnp.float32) for i, shape in enumerate([(200, 64), (64, 24)]))
    spec = QuantSpec(group_size=24, constraint="m2")
    expected = gptq(w, hessian(x), spec)
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, gptq(w, hessian(x), spec), expected)
