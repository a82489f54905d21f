import fnmatch
import json
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPT_CONFIG, random_tensors, write_checkpoint

from fpq_jax import FpqError, QuantSpec, load, lorc, quantize_array, save
from fpq_jax._checkpoints.sources import resolve_model
from fpq_jax._support.new_directory import check_output, new_directory
from fpq_jax._support.trees import stored_bytes
from fpq_jax.models.parameters import params_of, with_params

SPECS = {
    "m2": QuantSpec(group_size=32, constraint="m2"),
    "free": QuantSpec(group_size=32),
    "w8": QuantSpec(format="e4m3", group_size="channel"),
    "e5m2": QuantSpec(format="e5m2", group_size="tensor", activation="e5m2"),
    "e3m0": QuantSpec(format="e3m0", group_size=20, constraint="m1"),
    "w4a16": QuantSpec(group_size=32, activation=None),
}


@pytest.fixture
def quantized(tiny_llama):
    """A model with every kind of leaf in it."""
    model = load(tiny_llama)
    kernels = [path for path in params_of(model) if path.endswith("_proj.kernel")]
    new = {}
    for i, path in enumerate(kernels):
        spec, rank = list(SPECS.values())[i % len(SPECS)], 3 if i % 3 else 0
        new[path] = rounded(params_of(model)[path], spec, rank, "int8" if i % 2 else "bfloat16")
    return with_params(model, new)


@partial(jax.jit, static_argnums=(1, 2, 3))
def rounded(w, spec, rank, dtype):
    q = quantize_array(w, spec)
    return lorc(w, q, rank=rank, dtype=dtype) if rank else q


def test_a_fresh_process_gives_bit_identical_logits(tmp_path, quantized):
    save(tmp_path / "out", quantized)
    tokens = np.arange(40).reshape(2, 20)
    np.save(tmp_path / "expected.npy", quantized(jnp.asarray(tokens)))
    code = (
        "import sys, numpy as np, jax.numpy as jnp, fpq_jax as fpq\n"
        "model = fpq.load(sys.argv[1] + '/out')\n"
        "logits = np.asarray(model(jnp.arange(40).reshape(2, 20)))\n"
        "np.testing.assert_array_equal(logits, np.load(sys.argv[1] + '/expected.npy'))\n"
        "print('identical')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "identical\n", done.stderr


def test_every_leaf_comes_back_as_it_was(tmp_path, quantized):
    save(tmp_path / "out", quantized)
    before, after = params_of(quantized), params_of(load(tmp_path / "out"))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.full
def test_expanded_is_the_same_model_without_unpacking(tmp_path, quantized):
    save(tmp_path / "out", quantized)
    tokens = jnp.arange(20)[None]
    model = load(tmp_path / "out", weights="fp8")
    np.testing.assert_array_equal(model(tokens), load(tmp_path / "out")(tokens))
    assert stored_bytes(params_of(model)) > stored_bytes(params_of(quantized))


def test_the_unquantized_dtype_can_be_chosen(tmp_path, quantized):
    save(tmp_path / "out", quantized)
    params = params_of(load(tmp_path / "out", dtype="bfloat16"))
    assert params["norm.scale"].dtype == jnp.bfloat16
    assert params["layers.0.mlp.up_proj.kernel"].spec in SPECS.values()


@pytest.mark.parametrize("damage", ["manifest", "version", "arrays", "part"])
def test_a_damaged_directory_is_said(tmp_path, quantized, damage):
    out = tmp_path / "out"
    save(out, quantized)
    manifest = json.loads((out / "fpq.json").read_text())
    if damage == "manifest":
        (out / "fpq.json").write_text(json.dumps(manifest)[:-40])
    elif damage == "version":
        (out / "fpq.json").write_text(json.dumps({**manifest, "version": 99}))
    elif damage == "arrays":
        shutil.rmtree(out / "params")
    else:
        for file in (out / "params").rglob("*"):
            if file.is_file() and "d/" in str(file):
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(FpqError, match=r"damaged|version 99"):
        load(out)


def test_outputs_are_refused_or_appear_whole(tmp_path, quantized):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    with pytest.raises(FpqError, match="not empty"):
        save(full, quantized)
    with pytest.raises(FpqError, match="not empty"):
        check_output(full / "thesis.tex")
    with pytest.raises(FpqError, match="no writable folder"):
        check_output(full / "thesis.tex" / "below")
    assert (full / "thesis.tex").read_text() == "years of work"
    with pytest.raises(RuntimeError), new_directory(tmp_path / "new") as folder:
        (folder / "half").write_text("done")
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "tiny"]
    (tmp_path / "new").mkdir()
    with new_directory(tmp_path / "new") as folder:
        (folder / "file").write_text("done")
    assert (tmp_path / "new" / "file").read_text() == "done"


def test_models_that_are_nowhere_are_said(tmp_path, monkeypatch):
    import huggingface_hub

    for name in ("/nowhere/at/all", "./nowhere", "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(FpqError, match="There is no model folder"):
            resolve_model(name)

    def unreachable(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FpqError, match="no such model could be fetched from the hub"):
        resolve_model("someone/model")
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert resolve_model("someone/model") == tmp_path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "someone/model is gated: accept its terms at https://huggingface.co/someone/model, and log"),
        ("RepositoryNotFoundError", "no such model on the hub, or it is private; check the name, or log in"),
        ("LocalEntryNotFoundError", r"could be fetched from the hub \(LocalEntryNotFoundError\); check the name"),
    ],
)
def test_the_hubs_refusals_have_their_own_remedies(monkeypatch, kind, said):
    import huggingface_hub
    from huggingface_hub import errors

    def refused(name, allow_patterns):
        raise getattr(errors, kind).__new__(getattr(errors, kind))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(FpqError, match=said):
        resolve_model("someone/model")


def test_of_an_unknown_family_no_weights_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    def download(name, allow_patterns):
        assert allow_patterns == ["config.json"]
        (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FpqError, match="model_type 'whisper' is not supported"):
        resolve_model("someone/model")


HUB = {
    "both": ["model.safetensors", "pytorch_model.bin"],
    "shards_of_both": [
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        *("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
    ],
    "bin": ["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"],
    "shards_of_bin": [
        *("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
        *("rust_model.ot", "training_args.bin", "onnx/model.safetensors"),
    ],
}
SIDECARS = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt"]
UNNEEDED = [
    "README.md",
    "consolidated.safetensors",
    "original/params.json",
    "original/model.safetensors",
    "onnx/config.json",
]


@pytest.mark.parametrize(("kind", "weights"), [("both", 1), ("shards_of_both", 2), ("bin", 1), ("shards_of_bin", 2)])
def test_one_kind_of_weights_is_fetched_from_the_hub(tmp_path, monkeypatch, kind, weights):
    import huggingface_hub

    remote = [*HUB[kind], *SIDECARS, *UNNEEDED]

    def download(name, allow_patterns):
        for file in remote:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).write_text('{"model_type": "llama"}' if file == "config.json" else "")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("someone/model") == tmp_path
    fetched = {path.name for path in tmp_path.iterdir() if path.is_file()}
    suffix = ".bin" if kind.endswith("bin") else ".safetensors"
    assert sorted(name for name in fetched if not name.endswith((".json", ".txt", ".model"))) == sorted(
        name for name in HUB[kind] if name.endswith(suffix) and name.startswith(("model", "pytorch_model"))
    )
    assert len([name for name in fetched if name.endswith(suffix)]) == weights
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert fetched >= {*SIDECARS, *(name for name in HUB[kind] if name.endswith(".index.json"))}


@pytest.mark.parametrize("cached", ["model.safetensors", "pytorch_model.bin"])
def test_a_cached_model_is_found_without_a_network(tmp_path, monkeypatch, cached):
    from huggingface_hub import constants

    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / commit
    for path, text in {
        repository / "refs" / "main": commit,
        snapshot / "config.json": '{"model_type": "llama"}',
        snapshot / cached: "",
        # what the repository has: other weights that were never fetched, and are not asked for
        repository / "trees" / f"{commit}.json": json.dumps(
            {
                "format_version": 1,
                "files": {name: {"size": 1, "blob_id": "0"} for name in ("config.json", cached, "pytorch_model.bin")},
            }
        ),
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("someone/model") == snapshot
    with pytest.raises(FpqError, match="no such model could be fetched"):
        resolve_model("someone/other")


@pytest.mark.full
def test_a_model_with_nothing_behind_its_layers_is_saved_and_loaded(tmp_path):
    config = {**OPT_CONFIG, "_remove_final_layer_norm": True}
    model = load(write_checkpoint(tmp_path / "m", config, random_tensors(config)))
    save(tmp_path / "out", model)
    tokens = jnp.arange(20)[None]
    np.testing.assert_array_equal(load(tmp_path / "out")(tokens), model(tokens))
