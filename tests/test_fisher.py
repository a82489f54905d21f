"""The Fisher information in the place of a Hessian, and what it says an error costs."""

import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax._algorithms.fisher import Fisher, blended, expected_losses, fisher_of


def some(seed=0, windows=6):
    gradients = np.random.default_rng(seed).standard_normal((windows, 10, 4)) * np.linspace(0.2, 2, 10)[:, None]
    every = [fisher_of(jnp.asarray(g, jnp.float32), 32) for g in gradients]
    return gradients, Fisher(*(sum(parts) for parts in zip(*every, strict=True)))


def test_a_blend_has_the_hessians_trace_and_the_share_of_each():
    _, fisher = some()
    h = jnp.diag(jnp.arange(1.0, 11))
    half = np.asarray(blended(h, fisher, 0.5))
    assert np.trace(half) == pytest.approx(55)
    of_fisher = np.asarray(fisher.inputs) * 55 / np.trace(fisher.inputs)
    np.testing.assert_allclose(half, 0.5 * np.asarray(h) + 0.5 * of_fisher, rtol=1e-5)
    np.testing.assert_array_equal(blended(h, fisher, 0.0), h)
    nothing = Fisher(*(0 * part for part in fisher))
    np.testing.assert_array_equal(blended(h, nothing, 0.5), h)
    assert not np.any(expected_losses(jnp.ones((10, 4)), nothing))


def test_the_expected_loss_is_exact_for_gradients_that_are_a_product():
    """Of rank one, with the signs drawn for each window."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(10), np.array([0.0, 0.0, 3.0, 0.0])
    gradients = [sign * np.outer(a, b) for sign in (1, -1, 1)]
    every = [fisher_of(jnp.asarray(g, jnp.float32), 8) for g in gradients]
    fisher = Fisher(*(sum(parts) for parts in zip(*every, strict=True)))
    error = rng.standard_normal((10, 4))
    expected = 0.5 * np.mean([np.sum(g * error) ** 2 for g in gradients]) / 8
    assert float(expected_losses(jnp.asarray(error, jnp.float32), fisher).sum()) == pytest.approx(expected, rel=1e-4)
