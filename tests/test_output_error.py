"""The relative error of outputs."""

import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax._algorithms.output_error import output_error


def problem(inputs, outputs, seed=0, dead=()):
    """Correlated inputs [2 * in, in] with a few large channels, a weight [in, out] and the Hessian, float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * inputs, inputs)) @ (np.eye(inputs) + 0.1 * rng.standard_normal((inputs, inputs)))
    x[:, ::17] *= 5
    x[:, list(dead)] = 0
    w = rng.standard_normal((inputs, outputs)).astype(np.float32)
    return w, (x.T @ x).astype(np.float32)


def relative_error(w, approximation, h):
    w, d, h = w.astype(np.float64), w.astype(np.float64) - approximation, h.astype(np.float64)
    return np.sum(d * (h @ d)) / np.sum(w * (h @ w))


def test_output_error_is_its_definition():
    w, h = problem(60, 7)
    d = w + np.random.default_rng(1).standard_normal(w.shape).astype(np.float32) * 0.1
    assert float(output_error(jnp.asarray(w), jnp.asarray(d), jnp.asarray(h))) == pytest.approx(
        relative_error(w, d.astype(np.float64), h), rel=1e-4
    )
    assert float(output_error(jnp.asarray(w), jnp.asarray(d), jnp.zeros_like(h))) == 0
