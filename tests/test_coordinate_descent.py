"""Coordinate descent against a plain loop in float64 NumPy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_full
from test_gptq import problem, relative_error

from fpq_jax import QuantSpec, dequantize, gptq, quantize_array
from fpq_jax._algorithms.coordinate_descent import descend
from fpq_jax._numerics.qtensor import group_scales
from fpq_jax._numerics.scales import of_inputs, weight_scales


def sweep(q, target, hessian, scale, zero, fmt, sweeps):
    """The levels [in, out] after so many sweeps, and the distance of each last choice to the next tie."""
    grid = fmt.grid.astype(np.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    q, margin = q.copy(), np.zeros_like(q)
    for _ in range(sweeps):
        for i in range(len(q)):
            best = q[i] - hessian[i] @ (q - target) / hessian[i, i]
            level = best / scale[i] + zero[i]
            q[i] = (grid[np.abs(level[:, None] - grid).argmin(axis=1)] - zero[i]) * scale[i]
            margin[i] = np.abs(level[:, None] - middles).min(axis=1)
    return q, margin


@pytest.mark.parametrize(
    ("inputs", "fmt", "group", "constraint"),
    mostly_full([(150, "e2m1", 32, "m2"), (64, "int4-asym", 64, None), (200, "e4m3", "channel", None)], 2),
)
def test_the_levels_are_those_of_the_plain_loop_except_behind_ties(inputs, fmt, group, constraint):
    w, h = problem(inputs, 12, seed=inputs)
    spec = QuantSpec(format=fmt, group_size=group, constraint=constraint)
    scales = of_inputs(weight_scales(jnp.asarray(w), jnp.ones(inputs), spec)[0], spec, inputs)
    start = scales.values(jnp.asarray(w), spec.format)
    got = descend(start, jnp.asarray(w), jnp.asarray(h), scales, spec.format, 2)
    got = np.asarray(scales.numbers(got, spec.format), np.float64)
    first = np.asarray(scales.numbers(start, spec.format), np.float64)
    scale, zero = np.asarray(scales.scale, np.float64), np.asarray(scales.zero, np.float64)
    expected, margin = sweep(first, w.astype(np.float64), h.astype(np.float64), scale, zero, spec.format, 2)
    same = np.isclose(got, expected, rtol=1e-5, atol=1e-7)
    assert same.mean() > 0.97
    assert relative_error(w, got, h) == pytest.approx(relative_error(w, expected, h), rel=1e-2)
    assert relative_error(w, got, h) < 0.9 * relative_error(w, first, h)
    turned = np.flatnonzero(~same.all(axis=0))
    assert all(margin[:, column].min() < 1e-2 for column in turned)


def test_the_loss_falls_with_each_sweep_behind_gptq_and_then_stays():
    w, h = problem(160, 16)
    spec = QuantSpec(group_size=32, constraint="m2")
    q = gptq(jnp.asarray(w), jnp.asarray(h), spec)
    per_input = jnp.repeat(group_scales(q).T, 32, axis=0)
    scales = weight_scales(jnp.asarray(w), jnp.ones(160), spec)[0]
    scales = of_inputs(scales, spec, 160)._replace(scale=per_input)
    values = scales.values(dequantize(q), spec.format)
    errors = [relative_error(w, np.asarray(dequantize(q)), h)]
    for _ in range(12):
        values = descend(values, jnp.asarray(w), jnp.asarray(h), scales, spec.format, 1)
        errors.append(relative_error(w, np.asarray(scales.numbers(values, spec.format)), h))
    assert errors[1] < 0.99 * errors[0]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(errors[-2], rel=1e-6)
    assert errors[-1] < relative_error(w, np.asarray(dequantize(quantize_array(jnp.asarray(w), spec))), h)
