"""Losses and divergences by blocks of tokens, against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_CONFIG

from fpq_jax._pipeline.predictions import LastLayer, _blocks, divergences, losses, predictions
from fpq_jax._support.mesh import make_mesh
from fpq_jax.models.llama import Llama, LlamaConfig
from fpq_jax.models.parameters import params_of
from fpq_jax.models.spec import ModelSpec


def reference(ours: np.ndarray, theirs: np.ndarray, following: np.ndarray) -> tuple[np.ndarray, ...]:
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (theirs, ours))
    loss = -np.take_along_axis(log_q, following[..., None], -1)[..., 0]
    return loss, (np.exp(log_p) * (log_p - log_q)).sum(-1), ours.argmax(-1) == theirs.argmax(-1)


def test_divergences_and_losses_of_logits():
    rng = np.random.default_rng(0)
    ours = rng.normal(0, 3, (2, 9, 50)).astype(np.float32)
    theirs = (ours + rng.normal(0, 1, ours.shape)).astype(np.float32)
    ours[0, 0, [7, 3]] = theirs[0, 0, [7, 9]] = 20  # ties: the first one is what a greedy decoder takes
    tokens = rng.integers(0, 50, (2, 9))
    loss, kl, same = reference(ours.astype(np.float64), theirs.astype(np.float64), np.roll(tokens, -1, 1))
    got = divergences(jnp.asarray(ours), jnp.asarray(theirs))
    np.testing.assert_allclose(got[0], kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got[1], same)
    assert not same[0, 0] and 0 < same.mean() < 1
    np.testing.assert_allclose(losses(jnp.asarray(ours), jnp.asarray(tokens)), loss[:, :-1], rtol=1e-5)


@pytest.mark.parametrize(("windows", "length"), [(1, 7), (2, 100), (3, 128), (2, 130)])
def test_predictions_are_those_of_whole_windows(windows, length):
    config = LlamaConfig.from_hf({**TINY_CONFIG, "vocab_size": 37, "hidden_size": 16, "tie_word_embeddings": False})
    models, logits, rng = [], [], np.random.default_rng(length)
    for _ in range(2):
        spec = ModelSpec(Llama, config, jnp.float32)
        params = {
            path: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
            for path, leaf in params_of(spec.without_layers()).items()
        }
        hidden = rng.normal(size=(windows, length, 16)).astype(np.float32)
        models.append(LastLayer(spec, params, hidden))
        scale = np.asarray(params["norm.scale"], np.float64)
        x = hidden.astype(np.float64)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale
        logits.append(x @ np.asarray(params["lm_head.kernel"], np.float64))
    tokens = rng.integers(0, 37, (windows, length)).astype(np.int32)
    loss, kl, same = (part[:, :-1] for part in reference(*logits, np.roll(tokens, -1, 1)))
    mesh = make_mesh()
    alone, found = predictions(models[0], tokens, mesh), predictions(models[0], tokens, mesh, models[1])
    assert alone.shape == (windows, length - 1, 1) and found.shape == (windows, length - 1, 3)
    np.testing.assert_allclose(alone[..., 0], loss, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(alone[..., 0], found[..., 0])
    np.testing.assert_allclose(found[..., 1], kl, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found[..., 2], same)


def test_blocks_hold_all_tokens_in_order():
    rows = np.arange(2 * 100 * 3).reshape(2, 100, 3)
    blocks = np.asarray(_blocks(jnp.asarray(rows)))
    assert blocks.shape == (2, 128, 3)
    np.testing.assert_array_equal(blocks.reshape(-1, 3)[:200], rows.reshape(-1, 3))
    assert _blocks(jnp.asarray(rows[:1, :7])).shape == (1, 7, 3)
