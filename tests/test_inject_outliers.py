"""The script that injects activation outliers: the same logits, larger channels, refusals in one sentence."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, mostly_full, random_tensors, write_checkpoint
from safetensors import safe_open

from fpq_jax import FpqError, load, save
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._pipeline.tokenizer import load_tokenizer
from fpq_jax.models.parameters import build_model

SCRIPT = Path(__file__).parents[1] / "scripts" / "inject_outliers.py"
CONFIGS = {"llama": TINY_CONFIG, "opt": OPT_CONFIG}
VARIANTS = {
    "llama": TINY_CONFIG,
    "llama_biases_tied": {**TINY_CONFIG, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "opt": OPT_CONFIG,
    "opt_untied": {**OPT_CONFIG, "enable_bias": False, "tie_word_embeddings": False, "word_embed_proj_dim": 24},
}
# in each layer: a norm, and the Linears behind it
BEHIND = {
    "llama": {
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    },
    "opt": {
        "self_attn_layer_norm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "final_layer_norm": ["fc1"],
    },
}
TOKENS = np.random.default_rng(1).integers(2, 256, (2, 40))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("inject_outliers")


@pytest.fixture(params=CONFIGS)
def architecture(request):
    return request.param


@pytest.fixture
def original(request, architecture):
    return request.getfixturevalue(f"tiny_{architecture}")


def assert_equal_logits(got, expected):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("variant", mostly_full(VARIANTS, 1))
def test_the_copy_has_the_same_logits(script, tmp_path, capsys, variant):
    original = write_checkpoint(tmp_path / "model", VARIANTS[variant], random_tensors(VARIANTS[variant]))
    script.main(script.Options(model=str(original), output=tmp_path / "out", factor=50))
    assert_equal_logits(load(tmp_path / "out")(jnp.asarray(TOKENS)), load(original)(jnp.asarray(TOKENS)))
    printed = capsys.readouterr().out
    assert "2 of 48 channels times 50" in printed
    before, after = (float(word) for word in printed.split() if word.replace(".", "").isdigit() and "." in word)
    assert before < 5 and after > 20


@pytest.mark.full
def test_the_copy_has_the_same_logits_in_torch(script, tmp_path, architecture, original):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    import transformers

    script.main(script.Options(model=str(original), output=tmp_path / "out", factor=50))
    logits = []
    for folder in (original, tmp_path / "out"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        with torch.no_grad():
            logits.append(model(torch.tensor(TOKENS)).logits.numpy())
    assert model.dtype == torch.float32
    assert_equal_logits(logits[1], logits[0])


def test_parameters_are_scaled_where_norms_and_linears_meet(script, architecture, original):
    checkpoint = HfCheckpoint(original)
    params = checkpoint.read(np.float32)
    untouched = {path: value.copy() for path, value in params.items()}
    channels = np.array([3, 17, 40])
    got = script.with_outliers(checkpoint.model_class, params, channels, 7.0)
    expected = {path: value.copy() for path, value in params.items()}
    for layer in ("layers.0.", "layers.1."):
        for norm, behind in BEHIND[architecture].items():
            for part in {"llama": ("scale",), "opt": ("scale", "bias")}[architecture]:
                expected[f"{layer}{norm}.{part}"][channels] *= 7
            for linear in behind:
                expected[f"{layer}{linear}.kernel"][channels] /= 7
    for path in params:
        np.testing.assert_array_equal(got[path], expected[path], err_msg=path)
        np.testing.assert_array_equal(params[path], untouched[path], err_msg=path)
        assert got[path].dtype == np.float32


def test_norms_give_larger_channels(script, architecture, original):
    checkpoint = HfCheckpoint(original)
    params = checkpoint.read(np.float32)
    channels = np.array([5, 47])
    expected = np.ones(48)
    expected[channels] = 50
    changed = script.with_outliers(checkpoint.model_class, params, channels, 50.0)
    before, after = (build_model(checkpoint.model_class, checkpoint.model_config, p) for p in (params, changed))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 48)), jnp.float32)
    for old, new in zip(before.layers, after.layers, strict=True):
        for norm in BEHIND[architecture]:
            np.testing.assert_allclose(getattr(new, norm)(x), getattr(old, norm)(x) * expected, rtol=1e-5, atol=1e-6)


def test_share_and_seed_choose_the_same_channels_in_every_layer(script, tmp_path, tiny_llama):
    def chosen(name, **options):
        script.main(script.Options(model=str(tiny_llama), output=tmp_path / name, factor=2, **options))
        norms = ((path, value) for path, value in HfCheckpoint(tmp_path / name).read(np.float32).items())
        gains = [value / before[path] for path, value in norms if "layernorm" in path]
        assert len(gains) == 4 and all((g == gains[0]).all() for g in gains)
        return np.flatnonzero(gains[0] == 2).tolist()

    before = HfCheckpoint(tiny_llama).read(np.float32)
    first = chosen("a", share=0.25)
    assert len(first) == 12 and chosen("b", share=0.25) == first
    assert chosen("c", share=0.25, seed=1) != first
    assert len(chosen("d", share=0.001)) == 1
    assert chosen("e", share=1.0) == list(range(48))


def test_the_command_writes_a_float32_hugging_face_folder(tmp_path):
    config = {**OPT_CONFIG, "torch_dtype": "bfloat16"}
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in random_tensors(config).items()}
    original, out = write_checkpoint(tmp_path / "model", config, tensors), tmp_path / "deep" / "out"
    (original / "generation_config.json").write_text("{}")
    line = [sys.executable, SCRIPT, "--model", original, "--output", out, "--factor", "3", "--share", "0.1"]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    assert "5 of 48 channels times 3" in done.stdout and str(out) in done.stdout
    written = json.loads((out / "config.json").read_text())
    assert written == {**config, "torch_dtype": "float32", "dtype": "float32"}
    assert {file.name for file in out.iterdir()} == {file.name for file in original.iterdir()}
    assert load_tokenizer(out)("a word")["input_ids"] == load_tokenizer(original)("a word")["input_ids"]
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}
    assert_equal_logits(load(out)(jnp.asarray(TOKENS)), load(original, dtype=jnp.float32)(jnp.asarray(TOKENS)))

    again = subprocess.run(line, check=False, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr == f"error: The output {out} exists and is not empty; remove it or choose another --output.\n"


@pytest.mark.parametrize("factor", [0.0, -2.0, math.inf, math.nan, 1e39])
def test_a_factor_is_positive_and_finite(script, tmp_path, tiny_llama, factor):
    assert_refused(script, tmp_path, tiny_llama, "--factor is", factor=factor)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, math.nan])
def test_a_share_is_part_of_the_channels(script, tmp_path, tiny_llama, share):
    assert_refused(script, tmp_path, tiny_llama, "--share is", share=share)


@pytest.mark.parametrize("key", ["do_layer_norm_before", "layer_norm_elementwise_affine"])
def test_norms_that_cannot_be_scaled_are_refused(script, tmp_path, key):
    config = {**OPT_CONFIG, key: False}
    original = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    assert_refused(script, tmp_path, original, f"{key} is false")


def test_a_quantized_directory_is_refused(script, tmp_path, tiny_llama):
    save(tmp_path / "saved", load(tiny_llama))
    assert_refused(script, tmp_path, tmp_path / "saved", "already quantized")


def test_a_missing_model_is_refused(script, tmp_path):
    assert_refused(script, tmp_path, tmp_path / "absent", "no model folder")


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_copy_with_other_logits_is_not_written(script, tmp_path, tiny_llama):
    assert_refused(script, tmp_path, tiny_llama, "The logits differ", factor=3e38)


def assert_refused(script, tmp_path, model, said, **options):
    options = {"model": str(model), "output": tmp_path / "out", "factor": 50.0, **options}
    with pytest.raises(FpqError, match=said):
        script.main(script.Options(**options))
    assert not list(tmp_path.glob("*out*"))
