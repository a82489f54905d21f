import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpq_jax.models.layers import Embedding, LayerNorm, Linear, RMSNorm
from fpq_jax.models.rotary import rotate


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))
    frequencies = jnp.asarray([1.0, 0.3, 0.1, 0.01])
    at = lambda x, p: np.asarray(rotate(x, jnp.array([[p]]), frequencies)).ravel()
    assert np.linalg.norm(at(q, 5)) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)
    assert at(q, 9) @ at(k, 4) == pytest.approx(at(q, 25) @ at(k, 20), rel=1e-4)
    np.testing.assert_allclose(at(q, 0), np.asarray(q).ravel())


def test_norm_linear_and_embedding():
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
