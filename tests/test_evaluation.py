"""Perplexity of a model that is read layer by layer is that of the model in memory."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, forward, random_tensors, write_checkpoint

from fpq_jax import load, make_mesh
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._pipeline.evaluation import Original, perplexities
from fpq_jax._pipeline.perplexity import perplexity
from fpq_jax.models.kv_cache import CacheShape
from fpq_jax.models.spec import ModelSpec

CONFIGS = {
    "llama": TINY_CONFIG,
    "tied llama": {**TINY_CONFIG, "tie_word_embeddings": True},
    "opt": OPT_CONFIG,
    "opt with projections, nothing behind the layers": {
        **OPT_CONFIG, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    "opt with no head of its own": {**OPT_CONFIG, "_remove_final_layer_norm": True},
}  # fmt: skip


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 300, (count, 32)).astype(np.int32) for name, count in (("a", 7), ("b", 4))}


def evaluate(folder, texts, **options):
    checkpoint = HfCheckpoint(folder)
    model_spec = ModelSpec(checkpoint.model_class, checkpoint.model_config, jnp.dtype("float32"))
    read = lambda name: checkpoint.read_part(name, jnp.float32)
    return perplexities(model_spec, read, texts, make_mesh(), **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_as_in_memory(tmp_path, texts, name):
    folder = write_checkpoint(tmp_path / "m", CONFIGS[name], random_tensors(CONFIGS[name]))
    found = evaluate(folder, texts)
    model = load(folder)
    for text, windows in texts.items():
        expected = perplexity(forward, model, windows)
        assert found.values[text].value == pytest.approx(expected.value, rel=2e-5)
        assert found.values[text].tokens == expected.tokens == windows.size - len(windows)
    assert found.weight_bytes == HfCheckpoint(folder).nbytes


def test_in_pieces_for_which_the_model_is_read_again(tiny_llama, texts, monkeypatch):
    import fpq_jax._pipeline.evaluation as evaluation

    whole = evaluate(tiny_llama, texts, batch_tokens=64)
    monkeypatch.setattr(evaluation, "windows_at_once", lambda *a: 4)
    reads = []
    monkeypatch.setattr(evaluation, "prefetch", lambda f, names: (reads.append(n) or f(n) for n in names))
    pieces = evaluate(tiny_llama, texts, batch_tokens=64)
    assert reads == ["layers.0", "layers.1"] * 3
    assert pieces.weight_bytes == whole.weight_bytes
    for text in texts:
        assert pieces.values[text].value == pytest.approx(whole.values[text].value, rel=1e-6)


def test_with_an_fp8_cache(tiny_llama, texts):
    plain = evaluate(tiny_llama, texts).values["a"].value
    cached = evaluate(tiny_llama, texts, cache=CacheShape(2, 12, jnp.dtype(jnp.float8_e4m3fn))).values["a"].value
    assert cached != plain and cached == pytest.approx(plain, rel=0.05)


def test_divergence_is_that_of_the_logits_in_float64(tmp_path, texts):
    tensors = random_tensors(TINY_CONFIG)
    folders = []
    for name, noise in (("original", 0.0), ("other", 0.05)):
        rng = np.random.default_rng(1)
        changed = {
            key: (t + noise * t.std() * rng.standard_normal(t.shape)).astype(t.dtype) for key, t in tensors.items()
        }
        folders.append(write_checkpoint(tmp_path / name, TINY_CONFIG, changed))
    states = tmp_path / "states"
    states.mkdir()
    evaluate(folders[0], texts, keep=states)
    checkpoint = HfCheckpoint(folders[0])
    model_spec = ModelSpec(checkpoint.model_class, checkpoint.model_config, jnp.dtype("float32"))
    original = Original(model_spec, lambda name: checkpoint.read_part(name, jnp.float32), states)
    same = evaluate(folders[0], texts, original=original).divergences
    found = evaluate(folders[1], texts, original=original).divergences
    models = [load(folder) for folder in folders]
    for text, windows in texts.items():
        assert same[text].kl == pytest.approx(0, abs=1e-7) and same[text].same_token == 1
        theirs, ours = (np.asarray(model(jnp.asarray(windows)), np.float64)[:, :-1] for model in models)
        log_p, log_q = (one - np.log(np.exp(one).sum(axis=-1, keepdims=True)) for one in (theirs, ours))
        kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()
        assert found[text].kl == pytest.approx(kl, rel=1e-4) and kl > 1e-3
        assert found[text].same_token == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean(), abs=1e-9)
