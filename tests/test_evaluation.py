"""Perplexity of a model that is read layer by layer is that of the model in memory."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, forward, random_tensors, write_checkpoint

from fpq_jax import load, make_mesh
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._pipeline.evaluation import perplexities
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
