"""The key-value cache, and attention to it, against their definition in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fpq_jax.models.kv_cache import LayerCache, attend

H, K, C = 4, 2, 8


def operands(batch=2, tokens=5, seed=1):
    rng = np.random.default_rng(seed)
    shapes = ((batch, tokens, H, C), (batch, tokens, K, C), (batch, tokens, K, C))
    return tuple(
        jnp.asarray(rng.standard_normal(shape) * (1 + 20 * rng.random(shape[-1])), jnp.float32) for shape in shapes
    )


def definition(q, k, v, first):
    """Query t is at position first + t of the keys."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    seen = np.arange(k.shape[1])[None, :] <= first + np.arange(q.shape[1])[:, None]
    for head in range(H):
        scores = np.einsum("btc,bsc->bts", q[:, :, head], k[:, :, head // 2]) / np.sqrt(C)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, :, head] = np.einsum("bts,bsc->btc", weights, v[:, :, head // 2])
    return out.reshape(*q.shape[:2], -1)


def positions(starts, tokens):
    return jnp.asarray(starts)[:, None] + jnp.arange(tokens)


def test_attention_without_a_cache_equals_its_definition_with_grouped_heads():
    q, k, v = operands()
    out, cache = attend(q, k, v, positions([0, 0], 5), None)
    assert cache is None
    np.testing.assert_allclose(out, definition(q, k, v, 0), rtol=1e-5, atol=1e-5)


def test_rows_of_different_lengths_attend_to_their_own_keys_alone():
    q, k, v = operands(tokens=9)
    lengths = [6, 3]
    cache = LayerCache.zeros(2, 12, K, C, jnp.float32)
    # prompts of 6 and 3 tokens, the second filled up; then three more tokens each
    prompt = [a[:, :6] for a in (q, k, v)]
    out, cache = attend(*prompt, positions([0, 0], 6), cache, fresh=True)
    for row, length in enumerate(lengths):
        alone = [a[row : row + 1, :length] for a in (q, k, v)]
        np.testing.assert_allclose(out[row, :length], definition(*alone, 0)[0], rtol=1e-5, atol=1e-5)
    for step in range(3):
        at = [length + step for length in lengths]
        new = [jnp.stack([a[row, p] for row, p in enumerate(at)])[:, None] for a in (q, k, v)]
        out, cache = jax.jit(attend)(*new, positions(at, 1), cache)
        for row, p in enumerate(at):
            alone = [new[0][row : row + 1], *(a[row : row + 1, : p + 1] for a in (k, v))]
            np.testing.assert_allclose(out[row], definition(*alone, p)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fresh", [True, False])
def test_an_fp8_cache_holds_codes_with_a_scale_per_head_and_token(fresh):
    q, k, v = operands()
    cache = LayerCache.zeros(2, 5, K, C, jnp.float8_e4m3fn)
    out, cache = attend(q, k, v, positions([0, 0], 5), cache, fresh=fresh)
    assert cache.key.dtype == cache.value.dtype == jnp.float8_e4m3fn and cache.key_scale.shape == (2, K, 5)

    def rounded(a):
        a = np.asarray(a)
        scale = np.abs(a).max(axis=-1, keepdims=True) * np.float32(1 / 448)
        return (a / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale

    np.testing.assert_allclose(out, definition(q, rounded(k), rounded(v), 0), rtol=1e-5, atol=1e-5)
    assert np.abs(out - definition(q, k, v, 0)).max() > 1e-3
