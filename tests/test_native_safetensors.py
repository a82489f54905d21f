"""The safetensors format: what is loaded, and docs/checkpoint.md's own reader, against the model that was exported."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_CONFIG, random_tensors, write_checkpoint

import fpq_jax as fpq
from fpq_jax import FpqError, QTensor, QuantSpec, evaluate, export, generate, quantize
from fpq_jax._checkpoints.model_folder import copy_sidecars
from fpq_jax.models.parameters import linear_name, params_of, with_params

SPECS = (
    QuantSpec(group_size=32, constraint="m2"),
    QuantSpec(group_size=32),
    QuantSpec(format="e4m3", group_size="channel", activation_scale="static"),
    QuantSpec(format="e5m2", group_size="tensor"),
    QuantSpec(format="e3m0", group_size=20, constraint="m1"),
    QuantSpec(format="int4", group_size=32, activation="int8"),
    QuantSpec(format="int4-asym", group_size=7, activation="int8"),
    QuantSpec(format="int8", group_size="channel", activation="int8"),
    QuantSpec(format="int8-asym", group_size=16, activation=None),
    QuantSpec(format="e4m3-qtorch", group_size=48),
    QuantSpec(format="nf4", group_size="channel", constraint="m1"),
)


@pytest.fixture(scope="module")
def model_and_folder(tmp_path_factory):
    """A model with a Linear of each kind, and the folder where it is saved."""
    folder = tmp_path_factory.mktemp("packed")
    original = write_checkpoint(folder / "tiny", TINY_CONFIG, random_tensors(TINY_CONFIG))
    model = fpq.load(original)
    kernels = [path for path in params_of(model) if path.endswith("_proj.kernel")]
    ways = [(spec, i % 3 and 3, "int8" if i % 2 else "bfloat16") for i, spec in enumerate(SPECS)]
    new = {path: quantized(params_of(model)[path], *way) for path, way in zip(kernels, ways, strict=False)}
    assert len(new) == len(SPECS)
    model = with_params(model, params_of(model) | new)
    fpq.save(folder / "saved", model)
    copy_sidecars(original, folder / "saved")
    return model, folder / "saved"


@partial(jax.jit, static_argnums=(1, 2, 3))
def quantized(w, spec, rank, dtype):
    q = fpq.quantize_array(w, spec)
    if spec.activation_scale == "static":
        q = replace(q, input_scale=jnp.full((1,), 0.05, jnp.float32))
    return fpq.lorc(w, q, rank=rank, dtype=dtype) if rank else q


def write(folder, output, **options):
    export.main(export.Options(model=str(folder), format="safetensors", output=output, **options))
    return output


def test_every_array_comes_back_as_it_was(model_and_folder, tmp_path):
    model, folder = model_and_folder
    for size in ("5GB", "10KB"):
        out = write(folder, tmp_path / size, max_shard_size=size)
        before, after = params_of(model), params_of(fpq.load(out))
        assert jax.tree.structure(before) == jax.tree.structure(after)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert len(list((tmp_path / "10KB").glob("fpq-*-of-*.safetensors"))) > 5
    # and out of it again
    again = write(out, tmp_path / "again")
    assert (again / "fpq.safetensors").read_bytes() == (tmp_path / "5GB" / "fpq.safetensors").read_bytes()


def test_the_reader_in_the_docs(model_and_folder, tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "checkpoint.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 64 and "fpq_jax" not in code
    reader: dict = {}
    exec(code, reader)
    model, folder = model_and_folder
    tensors, quantized = reader["read"](write(folder, tmp_path / "out", max_shard_size="20KB"))
    params = params_of(model)
    linears = {linear_name(type(model), path): q for path, q in params.items() if isinstance(q, QTensor)}
    assert quantized.keys() == linears.keys()
    for name, q in linears.items():
        w, correction = reader["weight"](tensors, quantized, name)
        expected = np.asarray(fpq.dequantize(q, low_rank=False))
        assert w.dtype == np.float32 and (w == expected).all(), name
        assert (correction is None) == (q.low_rank is None)
        if correction is not None:
            np.testing.assert_allclose(correction, q.low_rank.product(), atol=1e-6)
    np.testing.assert_array_equal(tensors["model.norm.weight"], params["norm.scale"])
    np.testing.assert_array_equal(tensors["lm_head.weight"].T, params["lm_head.kernel"])


def test_the_commands_take_it(model_and_folder, text_file, tmp_path, capsys):
    shutil.copytree(model_and_folder[1], folder := tmp_path / "q")
    calibration = {"spec": str(text_file), "requested_samples": 8, "seq_len": 32, "max_windows": 4, "held_back": "tail"}
    report = {"perplexity": {"tail": {}}, "calibration": calibration}
    (folder / "report.json").write_text(json.dumps(report))
    out = write(folder, tmp_path / "out")
    found = []
    for model in (folder, out):
        # on the texts of the report, which has come along
        evaluate.main(evaluate.Options(model=str(model), report=tmp_path / "r.json"))
        found.append(json.loads((tmp_path / "r.json").read_text())["perplexity"])
    assert found[0] == found[1] and len(found[0]) == 1
    generate.main(generate.Options(model=str(out), prompt=("the",), max_new_tokens=3))
    assert "3 new tokens" in capsys.readouterr().out
    with pytest.raises(FpqError, match="already quantized; name the original"):
        quantize.main(quantize.Options(model=str(out), calibration=str(text_file)))


@pytest.mark.full
def test_no_other_tool_takes_it_for_a_model(model_and_folder, tmp_path):
    pytest.importorskip("torch", reason="the torch extra is not installed")
    import transformers

    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(write(model_and_folder[1], tmp_path / "out"))


def changed_header(folder, change):
    """A copy of a folder with its only file's header changed."""
    file = folder / "fpq.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    told = json.loads(header["__metadata__"]["fpq"])
    change(header, told)
    if "__metadata__" in header:
        header["__metadata__"]["fpq"] = json.dumps(told)
    text = json.dumps(header).encode()
    other = folder.with_name("damaged")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    (other / "fpq.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return other


NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header, told: told.update(version=2), "format version 2; this fpq_jax reads 1"),
        (lambda header, told: header.pop("__metadata__"), "metadata of the safetensors is damaged"),
        (lambda header, told: told["quantized"][NAME].update(format="e9m9"), "There is no format 'e9m9'"),
        (lambda header, told: told["quantized"][NAME].update(shape=[4, 4]), r"is \[4, 4\] and not \[80, 48\]"),
        (
            lambda header, told: header.update({f"{NAME}.other": header.pop(f"{NAME}.codes")}),
            rf"missing: {NAME}\.codes; unexpected: {NAME}\.other",
        ),
        (lambda header, told: told["quantized"].pop(NAME), "metadata of the safetensors is damaged"),
    ],
)
def test_damage_is_named(change, said, model_and_folder, tmp_path):
    out = write(model_and_folder[1], tmp_path / "out")
    with pytest.raises(FpqError, match=said):
        fpq.load(changed_header(out, change))
