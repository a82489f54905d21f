"""Attention by head and block against the softmax in float64, with gradients against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax.models.causal_attention import causal_attention

attention = jax.jit(causal_attention)


def operands(length, heads, kv_heads, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = [(2, length, n, 8) for n in (heads, kv_heads, kv_heads)]
    return [2 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def exact(query, key, value):
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = np.einsum("blhc,bmhc->bhlm", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhlm,bmhc->blhc", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(1, 4, 2), (130, 6, 2), (257, 2, 2)])
def test_it_is_the_softmax_of_what_came_before(length, heads, kv_heads):
    qkv = operands(length, heads, kv_heads)
    np.testing.assert_allclose(attention(*qkv), exact(*qkv), rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_softmax_is_in_float32():
    qkv = operands(140, 4, 2, jnp.bfloat16)
    found = attention(*qkv)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact(*qkv), atol=0.03)


def test_gradients_are_those_of_xlas():
    qkv = operands(150, 4, 2)
    loss = lambda f: jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2)))
    ours = loss(causal_attention)(*qkv)
    theirs = loss(lambda *a: jax.nn.dot_product_attention(*a, is_causal=True))(*qkv)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_other_devices_have_xlas_own():
    qkv = operands(16, 4, 2)
    lowered = jax.jit(causal_attention).trace(*qkv).lower(lowering_platforms=("cuda",)).as_text()
    assert "while" not in lowered and "while" in jax.jit(causal_attention).lower(*qkv).as_text()
