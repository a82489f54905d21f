"""Exports as their readers see them: Hugging Face's torch models with compressed-tensors and PEFT."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_CONFIG, random_tensors, write_checkpoint

import fpq_jax as fpq
from fpq_jax import FpqError, QTensor, QuantSpec, export
from fpq_jax._checkpoints.sources import open_model
from fpq_jax._support.files import folder_digests
from fpq_jax.models.parameters import linear_name, params_of, with_params

# of stories260K's shape: float32, shared key-value heads, 172 inputs, which groups of 32 do not divide; a real model
# of a LLaMA's kind takes its place where this names one
OTHER = os.environ.get("FPQ_TEST_MODEL")
TEXT = os.environ.get("FPQ_TEST_TEXT", "demo")  # that is like what the models were trained on
STORIES = {**TINY_CONFIG, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 8,
           "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}  # fmt: skip
MODELS = ("demo-llama", "demo-opt", "stories")
M2 = QuantSpec(group_size=64, constraint="m2")
M1 = QuantSpec(group_size=64, constraint="m1")
W8 = QuantSpec(format="e4m3", group_size="channel")
INT4 = QuantSpec(format="int4", group_size=64, activation=None)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    stories = Path(OTHER) if OTHER else tmp_path_factory.mktemp("models") / "stories"
    if not OTHER:
        write_checkpoint(stories, STORIES, random_tensors(STORIES, scale=1.5))
    return {"demo-llama": "demo-llama", "demo-opt": "demo-opt", "stories": stories}


@pytest.fixture(scope="module")
def quantized(originals, tmp_path_factory):
    """quantized(name, spec, rank, but=): the folder of a model with every Linear rounded so, but for those whose path
    ends with one of ``but``."""
    made = {}

    def make(name, spec, rank=0, but=("nothing",)):
        key = (name, spec, rank, but)
        if key not in made:
            model = fpq.load(originals[name])
            params = {path: leaf if path.removesuffix(".kernel").endswith(but) else _quantized(path, leaf, spec, rank)
                      for path, leaf in params_of(model).items()}  # fmt: skip
            made[key] = tmp_path_factory.mktemp("quantized") / "model"
            fpq.save(made[key], with_params(model, params))
            write_sidecars(originals[name], made[key])
        return made[key]

    return make


def write_sidecars(original, folder):
    from fpq_jax._checkpoints.model_folder import copy_sidecars
    from fpq_jax._checkpoints.sources import resolve_model

    copy_sidecars(resolve_model(original), folder)


def _quantized(path, leaf, spec, rank):
    if not (path.startswith("layers.") and path.endswith(".kernel")):
        return leaf
    q = _rounded(leaf, spec, rank)
    return q if spec.activation_scale == "token" else replace(q, input_scale=jnp.full((1,), 0.03, jnp.float32))


@partial(jax.jit, static_argnums=(1, 2))
def _rounded(w, spec, rank):
    q = fpq.quantize_array(w, spec)
    return fpq.lorc(w, q, rank=rank) if rank else q


def run(folder, form, output, **options):
    export.main(export.Options(model=str(folder), format=form, output=output, **options))
    return output


def torch_model(folder, dequantize=False):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    import transformers

    config = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)


def linears_of(folder):
    model = fpq.load(folder, dtype=jnp.float32)
    return {
        linear_name(type(model), path): leaf for path, leaf in params_of(model).items() if isinstance(leaf, QTensor)
    }


def without_quantized_activations(oracle):
    for module in oracle.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False


def tokens_for(oracle, shape):
    return np.random.default_rng(0).integers(3, oracle.config.vocab_size, shape)


def logits_of(oracle, tokens):
    import torch

    with torch.no_grad():
        return oracle(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()


KEYS = ("weight", "base_layer.weight")  # without and with PEFT


def assert_same_weights(oracle, weights, dtype=jnp.float32, low_rank=False):
    """Bit for bit; the oracle has run, so that its weights are dequantized."""
    state = oracle.state_dict()
    assert weights
    for name, q in weights.items():
        expected = np.asarray(fpq.dequantize(q, dtype, low_rank=low_rank).astype(jnp.float32)).T
        found = next(state[f"{name}.{key}"] for key in KEYS if f"{name}.{key}" in state).float().numpy()
        assert found.shape == expected.shape and found.tobytes() == expected.tobytes(), name


def assert_same_logits(oracle, folder, dtype=jnp.float32):
    """As ours with the dequantized weights, LoRC added, all rounded to ``dtype``, and activations left alone."""
    model = fpq.load(folder, dtype=jnp.float32)
    dense = {path: (fpq.dequantize(leaf) if isinstance(leaf, QTensor) else leaf).astype(dtype).astype(jnp.float32)
             for path, leaf in params_of(model).items()}  # fmt: skip
    tokens = tokens_for(oracle, (2, 40))
    expected = np.asarray(jax.jit(lambda t: with_params(model, dense)(t))(jnp.asarray(tokens)))
    np.testing.assert_allclose(logits_of(oracle, tokens), expected, atol=1e-5 * np.abs(expected).max())


def assert_same_with_fp8_activations(oracle, folder):
    """Each Linear to rounding, and the model's perplexity.

    Sums in another order move some activation to its neighbouring code, which over the layers comes to the noise of the
    codes themselves: logits differ by it, and perplexity on 20,000 tokens by about a two-thousandth.
    """
    import torch

    length = min(256, oracle.config.max_position_embeddings)
    windows = tokens_for(oracle, (8, length))
    if oracle.config.vocab_size > STORIES["vocab_size"]:  # it has been trained
        from transformers import AutoTokenizer

        windows = fpq.text_windows(TEXT, AutoTokenizer.from_pretrained(folder), length=length)[: 320 if OTHER else 80]
    ours = fpq.perplexity(lambda p, t: p(t), fpq.load(folder, dtype=jnp.float32), windows).value
    logits, following = torch.tensor(logits_of(oracle, windows)), torch.tensor(np.asarray(windows, np.int64))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), following[:, 1:].flatten())
    theirs = float(loss.exp())
    assert abs(ours - theirs) < 1.5e-3 * theirs, (ours, theirs)

    weights = linears_of(folder)
    modules = {name.removeprefix("base_model.model."): module for name, module in oracle.named_modules()}
    for i, name in enumerate(list(weights)[:7]):
        q, module = replace(weights[name], low_rank=None), modules[name]
        x = np.random.default_rng(i).standard_normal((1, 3, q.shape[0]), np.float32)
        with torch.no_grad():
            found = getattr(module, "base_layer", module)(torch.tensor(x))
        bias = 0 if module.bias is None else module.bias.numpy()
        expected = np.asarray(fpq.linear(jnp.asarray(x), q)) + bias
        np.testing.assert_allclose(found.numpy(), expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_fp8_with_its_adapter(name, quantized, tmp_path):
    peft = pytest.importorskip("peft", reason="the torch extra is not installed")
    folder = quantized(name, M2, 4)
    out = run(folder, "fp8", tmp_path / "out")
    oracle = peft.PeftModel.from_pretrained(torch_model(out), out / "lorc")
    assert_same_with_fp8_activations(oracle, folder)
    without_quantized_activations(oracle)
    assert_same_logits(oracle, folder)
    assert_same_weights(oracle.get_base_model(), linears_of(folder))


@pytest.mark.full
@pytest.mark.parametrize(
    ("spec", "activations"),
    [
        (W8, {"strategy": "token", "dynamic": True}),
        (QuantSpec(group_size=32, constraint="m2", compute_rows=4), {"strategy": "token", "dynamic": True}),
        (QuantSpec(format="e3m0", group_size=20, constraint="m1"), {"strategy": "token", "dynamic": True}),
        (QuantSpec(format="int4", group_size="channel"), {"strategy": "token", "dynamic": True}),
        (QuantSpec(format="e4m3", group_size="tensor"), {"strategy": "token", "dynamic": True}),
        (replace(W8, activation_scale="static"), {"strategy": "tensor", "dynamic": False}),
        (replace(M2, activation=None), None),
    ],
    ids=["w8a8", "m2-rows", "e3m0", "int4-channel", "tensor", "static", "weight-only"],
)
def test_everything_that_expands_to_fp8(spec, activations, quantized, tmp_path):
    folder = quantized("stories", spec)
    out = run(folder, "fp8", tmp_path / "out")
    told = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert activations == (told["input_activations"] and {k: told["input_activations"][k] for k in activations})
    assert not (out / "lorc").exists()
    oracle = torch_model(out)
    assert_same_with_fp8_activations(oracle, folder)
    without_quantized_activations(oracle)
    assert_same_logits(oracle, folder)
    assert_same_weights(oracle, linears_of(folder))


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_mxfp4_with_its_adapter(name, quantized, tmp_path):
    peft = pytest.importorskip("peft", reason="the torch extra is not installed")
    folder = quantized(name, M1, 4, ("down_proj",) if name == "stories" else ("nothing",))
    out = run(folder, "mxfp4", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    oracle = torch_model(out, dequantize=True)
    assert_same_weights(oracle, linears_of(folder))
    assert_same_logits(peft.PeftModel.from_pretrained(oracle, out / "lorc"), folder)
    weights = np.asarray(_tensor(out, "weight_packed"))
    assert weights.dtype == np.uint8


def _tensor(folder, suffix):
    from fpq_jax._storage.tensor_files import open_files

    name, file = next((n, f) for n, f in open_files(folder).items() if n.endswith(suffix))
    return file.read(name)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_int4(name, quantized, tmp_path):
    folder = quantized(name, INT4, 0, ("down_proj",) if name == "stories" else ("nothing",))
    out = run(folder, "int4", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]["weights"][
        "group_size"
    ] == 64  # fmt: skip
    oracle = torch_model(out)
    assert_same_logits(oracle, folder)
    assert_same_weights(oracle, linears_of(folder))


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_bf16(name, quantized, tmp_path):
    folder = quantized(name, M2, 4)
    out = run(folder, "bf16", tmp_path / "out", max_shard_size="100KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    oracle = torch_model(out)
    assert oracle.config.dtype is not None and "quantization_config" not in (out / "config.json").read_text()
    assert_same_weights(oracle, linears_of(folder), jnp.bfloat16, low_rank=True)
    assert_same_logits(oracle, folder, jnp.bfloat16)


def test_merged_lorc_is_rounded_again_and_its_cost_printed(quantized, tmp_path, capsys, text_file):
    folder, text = quantized("stories", M2, 4), str(text_file)
    run(folder, "fp8", tmp_path / "out", merge_lorc=True, eval=(text,), max_windows=8)
    value, merged = map(
        float, re.search(r"with LoRC +merged +tokens\n\S+ +([\d.]+) +([\d.]+)", capsys.readouterr().out).groups()
    )
    from fpq_jax import evaluate

    for model, expected in ((folder, value), (tmp_path / "out", merged)):
        report = tmp_path / "r.json"
        evaluate.main(evaluate.Options(model=str(model), eval=(text,), max_windows=8, report=report))
        assert json.loads(report.read_text())["perplexity"][text]["quantized"] == pytest.approx(expected, abs=1e-4)
    assert value != merged and abs(merged / value - 1) < 0.05
    before, after = linears_of(folder), linears_of(tmp_path / "out")
    for name, q in before.items():
        w, found = fpq.dequantize(q), fpq.dequantize(after[name])
        error = jnp.abs(found - w).max() / jnp.abs(w).max()
        assert 0 < error < 0.04 and after[name].low_rank is None
        # what was rounded is the weight with LoRC, and not the one without
        assert jnp.linalg.norm(found - w) < jnp.linalg.norm(found - fpq.dequantize(q, low_rank=False))


@pytest.mark.parametrize(
    ("form", "spec"), [("fp8", M2), ("mxfp4", M1), ("int4", INT4), ("bf16", M2), ("safetensors", M2)]
)
def test_twice_is_byte_identical(form, spec, quantized, tmp_path):
    folder = quantized("stories", spec, 4, ("down_proj",) if form in ("mxfp4", "int4") else ("nothing",))
    one = run(folder, form, tmp_path / "one", max_shard_size="100KB")
    two = run(folder, form, tmp_path / "two", max_shard_size="100KB")
    assert folder_digests(one) == folder_digests(two) and len(folder_digests(one)) > 5


@pytest.mark.parametrize(
    ("spec", "form", "said"),
    [
        (QuantSpec(group_size=32), "fp8", r"under a scale of its own for each group\. Export it as bf16, which rounds"),
        (M2, "mxfp4", r"mxfp4 cannot hold model\.layers\.0\.mlp\.down_proj \(and \d+ other Linears\) exactly: .* m2"),
        (M1, "mxfp4", "172 inputs, which groups of 32 do not divide. Export it as fp8, which can"),
        (QuantSpec(group_size=20, constraint="m1"), "mxfp4", "172 inputs"),
        (QuantSpec(format="int8", group_size="channel", activation="int8"), "fp8", "int8 codes"),
        (QuantSpec(format="e5m2", group_size="channel"), "fp8", "e5m2 codes"),
        (QuantSpec(format="int4", group_size=32, constraint="m2", activation="int8"), "fp8", "int8 activations"),
        (QuantSpec(format="int4-asym", group_size=32), "int4", "int4-asym codes"),
        (W8, "int4", r"e4m3 codes\. Export it as fp8, which can"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_with_one_that_can(spec, form, said, quantized, tmp_path):
    with pytest.raises(FpqError, match=said):
        run(quantized("stories", spec), form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(quantized, originals, tmp_path):
    folder = quantized("stories", M2)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    for model, form, options, said in (
        (folder, "fp8", {"max_shard_size": "0GB"}, "'0GB' is no size; write it as 5GB"),
        (folder, "fp8", {"max_shard_size": "many"}, "'many' is no size"),
        (folder, "fp8", {"merge_lorc": True}, "has no LoRC to merge"),
        (folder, "bf16", {"merge_lorc": True}, "--merge-lorc is for fp8"),
        (folder, "fp8", {"eval": ("demo",)}, "--eval and --max-windows are for --merge-lorc"),
        (originals["stories"], "bf16", {}, "is not quantized; name a directory that quantize wrote"),
        (tmp_path / "nothing", "fp8", {}, "There is no model folder"),
    ):
        with pytest.raises(FpqError, match=said):
            run(model, form, tmp_path / "out", **options)
    with pytest.raises(FpqError, match="exists and is not empty"):
        run(folder, "fp8", tmp_path / "there")


@pytest.mark.full
def test_an_export_is_a_model_with_its_lorc(quantized, tmp_path):
    """Exported again it has lost nothing, and what it is evaluated to is what the original is."""
    folder = quantized("stories", M2, 4)
    fp8 = run(folder, "fp8", tmp_path / "fp8")
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 250, (2, 30)))
    forward = jax.jit(lambda params, t: with_params(abstract, params)(t))
    abstract, logits = fpq.load(folder), lambda folder: np.asarray(forward(params_of(fpq.load(folder)), tokens))
    expected = logits(folder)
    np.testing.assert_array_equal(logits(fp8), expected)
    assert folder_digests(run(fp8, "fp8", tmp_path / "again")) == folder_digests(fp8)
    one, two = (run(source, "bf16", tmp_path / f"bf16-{source.name}") for source in (folder, fp8))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    packed = run(fp8, "safetensors", tmp_path / "packed")
    np.testing.assert_array_equal(logits(packed), expected)
    dense = open_model(fp8).read_dense_part("layers.0", jnp.float32)
    q = params_of(fpq.load(folder))["layers.0.mlp.up_proj.kernel"]
    np.testing.assert_array_equal(dense["layers.0.mlp.up_proj.kernel"], fpq.dequantize(q))
    (fp8 / "lorc" / "adapter_config.json").unlink()
    with pytest.raises(FpqError, match=r"adapter_config\.json is no adapter's configuration"):
        fpq.load(fp8)

    mxfp4 = run(quantized("stories", M1, 4, ("down_proj",)), "mxfp4", tmp_path / "mxfp4")
    assert folder_digests(run(mxfp4, "mxfp4", tmp_path / "mxfp4-again")) == folder_digests(mxfp4)


@pytest.mark.full
def test_linears_that_engines_merge(quantized, tmp_path, capsys):
    ignored = lambda out: json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    but = lambda layer, *names: tuple(f"layers.{layer}.{name}" for name in names)
    merged = "model.layers.0.self_attn.qkv_proj"
    out = run(quantized("stories", M2, 0, but(0, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")), "fp8",
              tmp_path / "whole")  # fmt: skip
    qkv = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert sorted(ignored(out)) == sorted([*qkv, "lm_head", merged]) and "merge" not in capsys.readouterr().out
    out = run(quantized("stories", M2, 0, but(0, "self_attn.k_proj")), "fp8", tmp_path / "torn")
    assert sorted(ignored(out)) == sorted(["model.layers.0.self_attn.k_proj", "lm_head"])
    assert (
        f"vLLM and SGLang merge Linears of one input, and cannot load {merged}, quantized in part"
        in capsys.readouterr().out
    )


@pytest.mark.full
@pytest.mark.parametrize("form", ["fp8", "bf16", "safetensors"])
def test_values_that_are_no_numbers_are_not_written(form, quantized, tmp_path):
    model = fpq.load(quantized("stories", M2, 4))
    params = params_of(model)
    path = "layers.1.mlp.up_proj.kernel"
    scale = params[path].row_scale.at[3, 0].set(jnp.nan)
    for i, bad in enumerate(({path: replace(params[path], row_scale=scale)}, {"norm.scale": jnp.full((64,), jnp.inf)})):
        fpq.save(tmp_path / f"bad{i}", with_params(model, params | bad))
        name = ("model.layers.1.mlp.up_proj", "model.norm.weight")[i]
        with pytest.raises(FpqError, match=rf"{name} holds NaN or infinite values"):
            run(tmp_path / f"bad{i}", form, tmp_path / "out")
    if form == "bf16":
        fpq.save(tmp_path / "big", with_params(model, params | {"norm.scale": jnp.full((64,), 3.4e38)}))
        with pytest.raises(FpqError, match=r"model\.norm\.weight holds values beyond bfloat16's range"):
            run(tmp_path / "big", form, tmp_path / "out")


def test_a_static_scale_that_is_missing_is_named(quantized, tmp_path):
    model = fpq.load(quantized("stories", replace(W8, activation_scale="static")))
    params = {p: replace(q, input_scale=None) if isinstance(q, QTensor) else q for p, q in params_of(model).items()}
    fpq.save(tmp_path / "bad", with_params(model, params))
    with pytest.raises(FpqError, match="it has static activations without their scale"):
        run(tmp_path / "bad", "fp8", tmp_path / "out")


def test_a_full_disk_is_said_before_anything_is_written(quantized, tmp_path, monkeypatch):
    import fpq_jax._checkpoints.export as module

    monkeypatch.setattr(module, "free_disk", lambda place: 1000)
    with pytest.raises(FpqError, match=r"The export takes [\d.]+ KiB and 1000 B are free; make room there"):
        run(quantized("stories", M2), "fp8", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_scales_beyond_a_format_are_found_as_they_are_written(quantized, tmp_path):
    model = fpq.load(quantized("stories", M1, 0, ("down_proj",)))
    params = params_of(model)
    path = next(path for path, leaf in params.items() if isinstance(leaf, QTensor))
    odd = replace(params[path], row_scale=params[path].row_scale * 1.5)
    fpq.save(tmp_path / "odd", with_params(model, params | {path: odd}))
    with pytest.raises(FpqError, match="cannot be held exactly in mxfp4"):
        run(tmp_path / "odd", "mxfp4", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "odd"]


KILLED = """
import os, signal, sys
import fpq_jax._storage.safetensors_writer as s
from fpq_jax import export
write, left = s.TensorsWriter.write, [int(sys.argv[3])]
def dying(self, name, values):
    left[0] -= 1
    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, values)
s.TensorsWriter.write = dying
export.main(export.Options(model=sys.argv[1], format="fp8", output=export.Path(sys.argv[2])))
"""


@pytest.mark.full
def test_a_killed_export_leaves_nothing_that_loads(quantized, tmp_path):
    folder, out = quantized("stories", M2, 4), tmp_path / "out"
    for tensors in (3, 30):
        line = [sys.executable, "-c", KILLED, str(folder), str(out), str(tensors)]
        assert subprocess.run(line, capture_output=True, check=False).returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".out.unfinished-") and not out.exists()
        with pytest.raises(FpqError, match=r"has no config\.json"):
            open_model(left)
        os.utime(left, (0, 0))  # what has just been made is not taken for abandoned
    run(folder, "fp8", out)
    assert list(tmp_path.iterdir()) == [out]
    assert folder_digests(out) == folder_digests(run(folder, "fp8", tmp_path / "other"))
