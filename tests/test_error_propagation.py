"""The corrected target against least squares in float64 NumPy, and what it brings on inputs that it has not seen."""

import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax._algorithms.error_propagation import propagated
from fpq_jax._algorithms.metric import factorize
from fpq_jax._algorithms.statistics import input_stats


def streams(rows, inputs, seed, mixing):
    """What a quantized and an unquantized model see: errors that go with the inputs, and some that do not."""
    rng = np.random.default_rng(seed)
    full = rng.standard_normal((rows, inputs)) * np.linspace(0.3, 3, inputs)
    return (full + full @ mixing + 0.05 * rng.standard_normal(full.shape)).astype(np.float32), full.astype(np.float32)


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_a_full_share_is_the_ridge_regression(order):
    rng = np.random.default_rng(0)
    x, full = streams(300, 24, 1, 0.1 * rng.standard_normal((24, 24)))
    w = rng.standard_normal((24, 10)).astype(np.float32)
    stats = input_stats(jnp.asarray(x), reference=jnp.asarray(full))
    metric = factorize(stats.hessian, 0.01, order)
    got = propagated(jnp.asarray(w), metric, stats.cross, 1.0)
    x, full, w = (m.astype(np.float64) for m in (x, full, w))
    damping = 0.01 * np.mean(np.diag(x.T @ x)) * np.eye(24)
    # of what is to be added to w, so that damping draws towards w
    expected = w + np.linalg.solve(x.T @ x + damping, x.T @ (full @ w - x @ w))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    half = propagated(jnp.asarray(w, jnp.float32), metric, stats.cross, 0.5)
    np.testing.assert_allclose(half, (expected + w) / 2, rtol=1e-3, atol=1e-3)


def test_outputs_on_other_inputs_come_nearer_to_those_of_the_unquantized_model():
    rng = np.random.default_rng(2)
    mixing = 0.05 * rng.standard_normal((32, 32))
    x, full = streams(400, 32, 3, mixing)
    w = rng.standard_normal((32, 16)).astype(np.float32)
    stats = input_stats(jnp.asarray(x), reference=jnp.asarray(full))
    target = propagated(jnp.asarray(w), factorize(stats.hessian, 0.01, "natural"), stats.cross, 0.5)
    held_x, held_full = streams(400, 32, 4, mixing)
    error = lambda weight: np.linalg.norm(held_x @ np.asarray(weight) - held_full @ w)
    assert error(target) < 0.75 * error(w)


def test_inputs_never_seen_keep_their_weights():
    x = np.random.default_rng(5).standard_normal((64, 8)).astype(np.float32)
    x[:, 3] = 0
    stats = input_stats(jnp.asarray(x), reference=jnp.asarray(x * 1.1).at[:, 3].set(0))
    w = jnp.ones((8, 2))
    got = propagated(w, factorize(stats.hessian, 0.01, "activation"), stats.cross, 0.5)
    np.testing.assert_allclose(got[3], 1.0)
    np.testing.assert_allclose(got[4], 1.05, rtol=0.01)
