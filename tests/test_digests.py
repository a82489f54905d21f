"""Files of what was written, changed afterwards: each is named, whatever is done with the model."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_CONFIG, random_tensors, write_checkpoint

from fpq_jax import FpqError, QuantSpec, evaluate, export, generate, load, quantize, quantize_array, save
from fpq_jax._storage.digests import DIGESTS


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 255
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By layout a finished model, and its text."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    original = write_checkpoint(folder / "original", TINY_CONFIG, random_tensors(TINY_CONFIG))
    quantize.main(
        quantize.Options(
            model=str(original), calibration=str(folder / "text.txt"), num_samples=4, seq_len=32, max_windows=2,
            recipe="w4a8-fp-m2-lorc", output=folder / "orbax",
        )
    )  # fmt: skip
    export.main(
        export.Options(
            model=str(folder / "orbax"), format="safetensors", output=folder / "safetensors", max_shard_size="40KB"
        )
    )
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["orbax", "safetensors"])
def test_any_file_that_was_changed_is_named(written, tmp_path, layout):
    digests = json.loads((written / layout / DIGESTS).read_text())
    assert sorted(digests) == [str(path.relative_to(written / layout)) for path in files(written / layout)]
    load(written / layout)
    for path in files(written / layout):
        folder = tmp_path / "copy"
        shutil.copytree(written / layout, folder)
        flip(folder / path.relative_to(written / layout))
        with pytest.raises(FpqError, match=rf"{path.name} is not what was written: it is damaged or was changed"):
            load(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("layout", ["orbax", "safetensors"])
def test_the_commands_name_it_too(written, tmp_path, layout):
    folder = tmp_path / "copy"
    shutil.copytree(written / layout, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    for run in (
        lambda: evaluate.main(evaluate.Options(model=str(folder), eval=(str(written / "text.txt"),))),
        lambda: export.main(export.Options(model=str(folder), format="fp8", output=tmp_path / "out")),
        lambda: generate.main(generate.Options(model=str(folder), prompt=("a",))),
    ):
        with pytest.raises(FpqError, match=r"config\.json is not what was written"):
            run()
    (folder / "config.json").unlink()
    with pytest.raises(FpqError, match=r"config\.json cannot be read"):
        load(folder)
    assert load(written / layout, verify=False) is not None


def test_who_wants_to_may_load_what_was_changed_and_add_files(written, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written / "orbax", folder)
    (folder / "README.md").write_text("mine")
    load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert load(folder, verify=False).config.rms_norm_eps == 1e-3
    (folder / DIGESTS).unlink()
    assert load(folder).config.rms_norm_eps == 1e-3
    (folder / DIGESTS).write_text('{"config.json": 3}')
    with pytest.raises(FpqError, match=r"digests\.json is damaged"):
        load(folder)


def test_a_tree_has_them_too(tmp_path):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)
    params = {"kernel": quantize_array(w, QuantSpec(constraint="m2")), "bias": jnp.zeros(32)}
    save(tmp_path / "tree", params)
    load(tmp_path / "tree", like=params)
    flip(max(files(tmp_path / "tree"), key=lambda path: path.stat().st_size))
    with pytest.raises(FpqError, match="is not what was written"):
        load(tmp_path / "tree", like=params)
