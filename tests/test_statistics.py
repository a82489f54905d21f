"""Sums over calibration tokens."""

import jax.numpy as jnp
import numpy as np

from fpq_jax import hessian
from fpq_jax._algorithms.statistics import input_stats


def test_hessian_accumulates_in_float32_and_leaves_padding_out():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 50, 20)) * 100, jnp.bfloat16)
    mask = rng.integers(0, 2, (3, 50))
    h = hessian(x, jnp.asarray(mask, jnp.float32))
    assert h.dtype == jnp.float32
    rows = np.asarray(x, np.float64).reshape(-1, 20)[mask.ravel() == 1]
    np.testing.assert_allclose(h, rows.T @ rows, rtol=1e-5, atol=1e-2)
    # a masked position may hold anything
    poisoned = jnp.where(mask[..., None] == 1, x, jnp.nan)
    np.testing.assert_array_equal(hessian(poisoned, jnp.asarray(mask, jnp.float32)), h)


def test_stats_count_the_rows_and_compare_them_with_a_references():
    rng = np.random.default_rng(1)
    x, r = (jnp.asarray(rng.standard_normal((3, 50, 20)), jnp.float32) for _ in range(2))
    mask = rng.integers(0, 2, (3, 50))
    found = input_stats(x, jnp.asarray(mask), r)
    rows, others = (np.asarray(a, np.float64).reshape(-1, 20)[mask.ravel() == 1] for a in (x, r))
    assert found.count == mask.sum() and found.count.dtype == jnp.int32
    np.testing.assert_allclose(found.hessian, rows.T @ rows, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.cross, rows.T @ (others - rows), rtol=1e-5, atol=1e-4)
    assert input_stats(x).count == 150 and input_stats(x).cross is None
