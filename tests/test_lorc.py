import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_full

from fpq_jax import QuantSpec, dequantize, lorc, quantize_array
from fpq_jax._algorithms.lorc import truncated_svd


def decaying(n, k, power, seed=0):
    """A matrix with singular values 1 / (i + 1) ** power."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((m, min(n, k))))[0] for m in (n, k))
    return ((u / (np.arange(min(n, k)) + 1) ** power) @ v.T).astype(np.float32)


@pytest.mark.parametrize("power", mostly_full([0.5, 0.0, 0.1, 1.0, 2.0], 1))
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (20, 500)])
def test_truncated_svd_is_within_a_percent_of_the_exact_one(shape, power):
    m = decaying(*shape, power)
    u, s, vt = truncated_svd(jnp.asarray(m), 8, seed=0)
    lost = np.linalg.norm(m - np.asarray(u * s) @ np.asarray(vt))
    best = np.sqrt((np.linalg.svd(m.astype(np.float64), compute_uv=False)[8:] ** 2).sum())
    assert lost <= 1.01 * best
    np.testing.assert_allclose(np.asarray(u).T @ np.asarray(u), np.eye(8), atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("rank", mostly_full([8, 1, 32], 1))
def test_the_correction_is_the_best_of_its_rank(rank, dtype):
    rng = np.random.default_rng(rank)
    w = (rng.standard_normal((300, 180)) * np.exp(rng.standard_normal(300))[:, None]).astype(np.float32)
    q = quantize_array(jnp.asarray(w), QuantSpec(group_size=64, constraint="m2"))
    corrected = lorc(jnp.asarray(w), q, rank=rank, dtype=dtype)
    assert corrected.low_rank.a.dtype == dtype and corrected.low_rank.a.shape == (300, rank)
    singular = np.linalg.svd((w - np.asarray(dequantize(q))).astype(np.float64), compute_uv=False)
    best = np.sqrt((singular[rank:] ** 2).sum())
    lost = np.linalg.norm(w - np.asarray(dequantize(corrected)))
    assert best <= lost * (1 + 1e-6) and lost <= 1.01 * best
    assert lost < np.sqrt((singular**2).sum())
    np.testing.assert_array_equal(dequantize(corrected, low_rank=False), dequantize(q))


def test_a_seed_gives_the_same_factors_and_a_rank_too_large_is_cut():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((90, 70)), jnp.float32)
    q = quantize_array(w, QuantSpec(group_size=16))
    first, again, other = (lorc(w, q, rank=4, seed=seed).low_rank.a for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    whole = lorc(w, q, rank=500)
    assert whole.low_rank.a.shape == (90, 70)
    assert np.linalg.norm(np.asarray(dequantize(whole) - w)) < 0.01 * np.linalg.norm(w)


@pytest.mark.full
def test_no_error_gives_zero_factors_and_vmap_works():
    w = jnp.ones((40, 30))
    q = quantize_array(w, QuantSpec(group_size=8))
    for dtype in ("bfloat16", "int8"):
        np.testing.assert_allclose(dequantize(lorc(w, q, rank=2, dtype=dtype)), w, atol=1e-6)
    stack = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, 30)), jnp.float32)
    spec = QuantSpec(group_size=8)
    batched = jax.vmap(lambda m: dequantize(lorc(m, quantize_array(m, spec), rank=2)))(stack)
    single = np.stack([dequantize(lorc(m, quantize_array(m, spec), rank=2)) for m in stack])
    np.testing.assert_allclose(batched, single, atol=2e-2)
