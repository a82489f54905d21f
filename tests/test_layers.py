import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fpq_jax.models._layers import Embedding, LayerCache, LayerNorm, Linear, RMSNorm, attend, rotate


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))
    frequencies = jnp.asarray([1.0, 0.3, 0.1, 0.01])
    at = lambda x, p: np.asarray(rotate(x, jnp.array([[p]]), frequencies)).ravel()
    assert np.linalg.norm(at(q, 5)) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)
    assert at(q, 9) @ at(k, 4) == pytest.approx(at(q, 25) @ at(k, 20), rel=1e-4)
    np.testing.assert_allclose(at(q, 0), np.asarray(q).ravel())


def test_attention_equals_its_definition_with_grouped_heads():
    rng = np.random.default_rng(1)
    q = rng.standard_normal((2, 5, 4, 8))
    k, v = rng.standard_normal((2, 2, 5, 2, 8))
    expected = np.zeros((2, 5, 4, 8))
    for head in range(4):
        scores = np.einsum("btc,bsc->bts", q[:, :, head], k[:, :, head // 2]) / np.sqrt(8)
        scores = np.where(np.tril(np.ones((5, 5))) > 0, scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        expected[:, :, head] = np.einsum("bts,bsc->btc", weights, v[:, :, head // 2])
    got = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), None)
    np.testing.assert_allclose(got, expected.reshape(2, 5, 32), atol=1e-5)


def test_norm_linear_embedding_and_cache():
    norm = RMSNorm(4, epsilon=0.0, dtype=jnp.float32)
    x = jnp.array([[1.0, -2.0, 3.0, 4.0]])
    np.testing.assert_allclose(norm(x), x / np.sqrt(7.5), rtol=1e-6)
    norm = LayerNorm(4, affine=True, dtype=jnp.float32)
    norm.scale.set_value(jnp.arange(4.0))
    norm.bias.set_value(jnp.full(4, 2.0))
    expected = (x - 1.5) / np.sqrt(np.var([1, -2, 3, 4]) + 1e-5)
    np.testing.assert_allclose(norm(x), expected * np.arange(4) + 2, rtol=1e-6)
    np.testing.assert_allclose(LayerNorm(4, affine=False, dtype=jnp.float32)(x), expected, rtol=1e-6)
    layer = Linear(4, 3, use_bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.bias.set_value(jnp.arange(3.0))
    np.testing.assert_allclose(layer(x), x @ layer.kernel.get_value() + np.arange(3), rtol=1e-6)
    embedding = Embedding(7, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    row = embedding(jnp.array([[5]]))[0, 0]
    np.testing.assert_allclose(embedding.attend(row)[5], row @ row, rtol=1e-5)
    cache = LayerCache.zeros(1, 6, 2, 3, jnp.bfloat16).write(
        jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 2, 3)) * 2, jnp.int32(3)
    )
    assert cache.key.dtype == jnp.bfloat16
    assert np.asarray(cache.value, np.float32).sum(axis=(0, 2, 3)).tolist() == [0, 0, 0, 12, 12, 0]
