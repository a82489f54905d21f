"""Against compressed-tensors itself: checkpoints that it wrote, and configurations that it wrote or might."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_CONFIG, random_tensors, write_checkpoint

import fpq_jax as fpq
from fpq_jax import FpqError, QTensor, evaluate, quantize
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._storage.compressed_tensors import Fp8, Int4, Mxfp4, scheme_for
from fpq_jax.models.parameters import params_of

pytestmark = pytest.mark.full

CONFIG = {**TINY_CONFIG, "hidden_size": 128, "intermediate_size": 256}
PRESETS = {"FP8_DYNAMIC": "float32", "FP8": "float32", "MXFP4A16": "bfloat16", "W4A16": "float32"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(preset): a folder that Hugging Face's model and compressed-tensors wrote, and that model."""
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    folder = tmp_path_factory.mktemp("theirs")
    write_checkpoint(folder / "original", CONFIG, random_tensors(CONFIG))

    def write(preset):
        out = folder / preset
        options = {"dtype": getattr(torch, PRESETS[preset])}
        if not out.exists():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder / "original", **options)
            groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
            config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="frozen")
            apply_quantization_config(model, config)
            for module in model.modules():
                scheme = getattr(module, "quantization_scheme", None)
                if scheme is None:
                    continue
                w = module.weight.data
                size = scheme.weights.group_size or w.shape[1]
                ranges = w.unflatten(1, (-1, size)).aminmax(dim=2)
                if scheme.weights.strategy == "tensor":
                    ranges = ranges[0].amin().reshape(1), ranges[1].amax().reshape(1)
                module.weight_scale.data = calculate_qparams(*ranges, scheme.weights)[0].to(module.weight_scale.dtype)
                if hasattr(module, "input_scale"):
                    module.input_scale.data.fill_(0.02)
            compressor = ModelCompressor.from_pretrained_model(model)
            compressor.compress_model(model)
            model.save_pretrained(out)
            compressor.update_config(out)
            for file in (folder / "original").glob("*token*"):
                (out / file.name).write_bytes(file.read_bytes())
        return out, transformers.AutoModelForCausalLM.from_pretrained(out, **options)

    return write


@pytest.mark.parametrize("preset", PRESETS)
def test_checkpoints_that_others_wrote_run_here(preset, written):
    import torch

    folder, oracle = written(preset)
    tokens = np.random.default_rng(0).integers(3, 250, (2, 30))
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.float().numpy()
    model = fpq.load(folder)
    quantized = {path: leaf for path, leaf in params_of(model).items() if isinstance(leaf, QTensor)}
    assert len(quantized) == 14
    state = oracle.state_dict()
    for path, q in quantized.items():
        w = np.asarray(fpq.dequantize(q)).T
        np.testing.assert_array_equal(state[f"model.{path.replace('.kernel', '.weight')}"].float().numpy(), w)
    found = np.asarray(jax.jit(lambda t: model(t))(jnp.asarray(tokens)), np.float32)
    # with FP8 activations, or in bfloat16, sums in another order show
    tolerance = 1e-5 if preset == "W4A16" else 0.06
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    assert np.abs(found - expected).mean() < tolerance / 6 * np.abs(expected).max()


@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "MXFP4A16"])
def test_quantize_and_evaluate_take_them(preset, written, tmp_path, text_file):
    folder, _ = written(preset)
    report, other = tmp_path / "q.json", tmp_path / "e.json"
    quantize.main(
        quantize.Options(
            model=str(folder),
            recipe="w4a8-fp-m2",
            calibration=str(text_file),
            num_samples=8,
            max_windows=4,
            eval=(str(text_file),),
            output=tmp_path / "out",
            report=report,
        )
    )
    evaluate.main(evaluate.Options(model=str(folder), eval=(str(text_file),), max_windows=4, report=other))
    original = json.loads(report.read_text())["perplexity"][str(text_file)]["original"]
    assert json.loads(other.read_text())["perplexity"][str(text_file)]["quantized"] == pytest.approx(original)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    # what was quantized are the weights that the checkpoint stands for
    recorded = {row["name"]: row["rounding_error"] for row in json.loads(report.read_text())["layers"]}
    assert len(recorded) == 14 and all(error > 0 for error in recorded.values())
    dense = HfCheckpoint(folder).read_dense_part("layers.0", jnp.float32)
    q = jax.tree.map(jnp.asarray, HfCheckpoint(folder).read_part("layers.0", jnp.float32))
    for path, w in dense.items():
        np.testing.assert_array_equal(w, fpq.dequantize(q[path]) if isinstance(q[path], QTensor) else q[path])


def test_forms_give_back_what_they_are_given():
    w = jax.random.normal(jax.random.key(0), (96, 24)) * jnp.exp(jax.random.normal(jax.random.key(1), (1, 24)))
    for spec, scheme in (
        (fpq.QuantSpec(group_size=32, constraint="m1"), Mxfp4()),
        (fpq.QuantSpec(group_size=64, constraint="m1"), Mxfp4()),  # a shorter last group
        (fpq.QuantSpec(group_size="channel", constraint="m1"), Mxfp4()),
        (fpq.QuantSpec(format="int4", group_size=64), Int4(32)),
        (fpq.QuantSpec(format="int4", group_size="tensor"), Int4(32)),
        (fpq.QuantSpec(format="int4", group_size=32, constraint="m2"), Int4(32)),
        (fpq.QuantSpec(group_size=32, constraint="m2"), Fp8()),
        (fpq.QuantSpec(format="e3m0-qtorch", group_size=7, constraint="m1"), Fp8()),
    ):
        q = jax.jit(fpq.quantize_array, static_argnums=1)(w, spec)
        assert scheme.unsupported_reason(q) is None
        tensors = scheme.tensors(q)
        for part, expected in scheme.expected("", q.shape).items():
            assert tensors[part].shape == expected.shapes[0]
        back = np.asarray(fpq.dequantize(scheme.qtensor("", tensors, q.shape)))
        assert back.tobytes() == np.asarray(fpq.dequantize(q)).tobytes()


def test_e8m0_scales_at_the_ends_of_their_range():
    scales = np.array([[0, 1, 127, 254]], np.uint8)
    q = Mxfp4().qtensor("", {"weight_packed": np.full((1, 64), 0x22, np.uint8), "weight_scale": scales}, (128, 1))
    np.testing.assert_array_equal(np.asarray(q.group_scale, np.float64), 2.0 ** (scales.astype(np.float64) - 127))


def test_int4s_group_is_one_that_engines_know():
    spec = lambda size: fpq.QuantSpec(format="int4", group_size=size)
    of = lambda inputs, size: jax.eval_shape(
        lambda w: fpq.quantize_array(w, spec(size)), jax.ShapeDtypeStruct((inputs, 8), "float32")
    )
    assert scheme_for("int4", [of(512, 256), of(256, 256)]) == Int4(128)
    assert scheme_for("int4", [of(512, 256), of(192, 64), of(192, 64)]) == Int4(64)
    assert scheme_for("int4", [of(96, "channel")]) == Int4(32)


@pytest.mark.parametrize(
    ("preset", "part", "value", "said"),
    [
        ("FP8_DYNAMIC", "weight", b"\x7f", "NaN values"),
        ("MXFP4A16", "weight_scale", b"\xff", "NaN values"),
        ("FP8", "input_scale", b"\0\0\0\0", "a scale that is not above 0"),
        ("W4A16", "weight_shape", b"\1", r"\[257, 128\] instead of \[256, 128\]"),
    ],
)
def test_damaged_values_are_refused(preset, part, value, said, written, tmp_path):
    folder, _ = written(preset)
    data = bytearray((folder / "model.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    name = f"model.layers.1.mlp.up_proj.{part}"
    place = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[place : place + len(value)] = value
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(FpqError, match=f"{name} in .* holds {said}"):
        HfCheckpoint(tmp_path).digest()
