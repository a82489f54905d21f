import json
import os
import sys
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, random_tensors, write_checkpoint
from safetensors.numpy import save_file

from fpq_jax import FpqError
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._storage.tensor_files import SafetensorsFile, TorchFile, open_files

BIN = "pytorch_model.bin"
INDEX = f"{BIN}.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the torch extra is not installed")


def to_torch(tensors):
    import torch

    as_torch = lambda t: (
        torch.from_numpy(t.view(np.int16)).view(torch.bfloat16)
        if t.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(t.copy())
    )
    return OrderedDict((name, as_torch(t)) for name, t in tensors.items())


def write_bin(folder, config, tensors):
    """The checkpoint with its tensors in pytorch_model.bin."""
    import torch

    write_checkpoint(folder, config, tensors)
    (folder / "model.safetensors").unlink()
    torch.save(to_torch(tensors), folder / BIN)
    return folder


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].shape == b[path].shape
        assert a[path].tobytes() == b[path].tobytes()


@pytest.mark.full
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_bin_equals_safetensors_bit_for_bit(tmp_path, torch, dtype):
    tensors = {name: t.astype(dtype) for name, t in random_tensors(TINY_CONFIG).items()}
    one = HfCheckpoint(write_checkpoint(tmp_path / "safetensors", TINY_CONFIG, tensors))
    other = HfCheckpoint(write_bin(tmp_path / "bin", TINY_CONFIG, tensors))
    assert one.dtype == other.dtype == dtype and one.nbytes == other.nbytes
    assert_same_bits(one.read(dtype), other.read(dtype))


@pytest.mark.full
def test_shards_of_bins_equal_one(tmp_path, torch):
    tensors = random_tensors(TINY_CONFIG)
    one = write_bin(tmp_path / "one", TINY_CONFIG, tensors)
    many = write_bin(tmp_path / "many", TINY_CONFIG, tensors)
    (many / BIN).unlink()
    weight_map = {name: f"pytorch_model-0000{i % 3 + 1}-of-00003.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save(to_torch({n: t for n, t in tensors.items() if weight_map[n] == file}), many / file)
    (many / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert_same_bits(HfCheckpoint(one).read(jnp.float32), HfCheckpoint(many).read(jnp.float32))
    (many / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FpqError, match=r"many lacks pytorch_model-00002-of-00003\.bin"):
        HfCheckpoint(many)


@pytest.mark.full
def test_views_and_parameters_are_read_as_what_they_show(tmp_path, torch):
    base = torch.arange(24.0).reshape(4, 6)
    shown = {
        "transposed": base.T,
        "strided": base[1:, ::2],
        "expanded": base[0].expand(3, 6),
        "bfloat16": base.bfloat16().T[2:],
        "half": base.half()[:, 3],
        "parameter": torch.nn.Parameter(base.bfloat16()).T,
        "scalar": torch.tensor(7.0).bfloat16(),
        "integers": torch.arange(5)[1:3],
    }
    torch.save(shown, tmp_path / BIN)
    files = open_files(tmp_path)
    assert list(files) == list(shown)
    for name, tensor in shown.items():
        value = files[name].read(name)
        assert files[name].shape(name) == value.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(value.astype(np.float32), tensor.detach().float().numpy())
    assert [files[name].dtype(name) for name in ("strided", "half", "parameter", "integers")] == [
        *("F32", "F16", "BF16", "int64")
    ]
    assert files["parameter"].read("parameter").dtype == ml_dtypes.bfloat16


@pytest.mark.full
def test_both_kinds_tell_the_same_of_a_tensor(tmp_path, torch):
    tensors = {"a": np.ones((2, 3), np.float16), "b": np.ones(3, ml_dtypes.bfloat16), "c": np.ones((), np.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(to_torch(tensors), tmp_path / BIN)
    one, other = SafetensorsFile(tmp_path / "a.safetensors"), TorchFile(tmp_path / BIN)
    assert sorted(one.names()) == sorted(other.names()) == ["a", "b", "c"]
    for name in tensors:
        assert (one.shape(name), one.dtype(name)) == (other.shape(name), other.dtype(name))


def test_safetensors_win_and_need_no_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / BIN).write_bytes(b"never opened")
    with pytest.raises(FpqError, match=rf"{BIN} is read by torch.*pip install torch.*safetensors\.$"):
        open_files(tmp_path)
    save_file({"a": np.full(3, 5.0)}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(open_files(tmp_path)["a"].read("a"), np.full(3, 5.0))


@pytest.mark.full
def test_a_pickle_that_runs_code_is_refused_before_it_does(tmp_path, torch):
    mark = tmp_path / "mark"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    for zipped in (True, False):
        torch.save({"a": torch.ones(2), "b": Attack()}, tmp_path / BIN, _use_new_zipfile_serialization=zipped)
        with pytest.raises(FpqError, match=rf"{BIN} is refused: .*run code" if zipped else "before 1.6"):
            open_files(tmp_path)
        assert not mark.exists()
        torch.load(tmp_path / BIN, weights_only=False)
        mark.rmdir()  # the attack is a real one


@pytest.mark.full
def test_a_torch_whose_unpickler_is_not_safe_is_refused(tmp_path, torch, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / BIN)
    assert list(open_files(tmp_path)) == ["a"]
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.5.1+cpu"))
    with pytest.raises(FpqError, match=rf"{BIN} could run code in torch 2\.5\.1\+cpu; upgrade torch"):
        open_files(tmp_path)


@pytest.mark.full
def test_what_is_no_dict_of_tensors_is_refused_by_name(tmp_path, torch):
    tensor = torch.ones(2)
    for stored, message in (
        ([tensor], "a list instead of a dict of tensors"),
        ({"a": tensor, "epoch": 3, "b": {"c": tensor}}, "no plain tensors: epoch, b; save"),
        ({"a": tensor, 7: tensor}, "no plain tensors: 7; save"),
        ({"a": tensor.to_sparse(), "b": tensor, "c": tensor.to("meta")}, "no plain tensors: a, c; save"),
    ):
        torch.save(stored, tmp_path / BIN)
        with pytest.raises(FpqError, match=f"{BIN} holds .*{message}"):
            open_files(tmp_path)


@pytest.mark.full
def test_a_format_from_before_1_6_is_said(tmp_path, torch):
    torch.save({"a": torch.ones(2)}, tmp_path / BIN, _use_new_zipfile_serialization=False)
    with pytest.raises(FpqError, match=rf"{BIN} has the format that torch wrote before 1\.6"):
        open_files(tmp_path)


@pytest.mark.full
def test_damaged_bins_are_said(tmp_path, torch):
    torch.save({"a": torch.arange(1000.0)}, tmp_path / BIN)
    whole = (tmp_path / BIN).read_bytes()
    pickled = whole.index(b"torch._utils")
    sizes = (len(whole) - 1, len(whole) // 2, 100, 3, 1, 0)
    for data in (
        *(whole[:size] for size in sizes),
        b"version https://git-lfs.github.com/spec/v1",
        whole[:pickled] + b"\xff" * 40 + whole[pickled + 40 :],
    ):
        (tmp_path / BIN).write_bytes(data)
        with pytest.raises(FpqError, match=rf"{BIN} is truncated or no torch file \(\w+: .*\); download it again\.$"):
            open_files(tmp_path)


@pytest.mark.parametrize("single", ["model.safetensors", BIN])
def test_an_index_is_checked(tmp_path, single):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.ones(3)}, tmp_path / "outside")
    index = folder / f"{single}.index.json"
    for outside in ("../outside", str(tmp_path / "outside"), "below/../../outside"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(FpqError, match=rf"{index.name} names {outside}, not a file of its own folder"):
            open_files(folder)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}'):
        index.write_text(text)
        with pytest.raises(FpqError, match=rf"{index.name} is not a (safetensors|torch) index"):
            open_files(folder)
    for content, said in (
        (b"{", "is not valid JSON"),
        (b"[]", "does not hold a JSON object"),
        (b"\xff\xfe", "is not valid JSON"),
    ):
        index.write_bytes(content)
        with pytest.raises(FpqError, match=f"{index.name} {said}"):
            open_files(folder)
    index.write_text('{"weight_map": {"a": ".."}}')
    with pytest.raises(FpqError, match=r"lacks \.\."):
        open_files(folder)


def test_a_single_file_counts_before_an_index_of_others(tmp_path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "old.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for file in ("old.safetensors", "gone.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        (found,) = open_files(tmp_path).values()
        assert (found.read("a") == 1).all()


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for i in (1, 2):
        save_file({"a": np.ones(i, np.float32), f"b{i}": np.ones(1, np.float32)}, tmp_path / f"{i}.safetensors")
    weight_map = {"a": "1.safetensors", "b1": "1.safetensors", "b2": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FpqError, match=r"Two shards, .*1\.safetensors and 2\.safetensors, hold the tensor a,"):
        open_files(tmp_path)


def test_a_file_that_changes_is_not_read_on(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(3, np.float32)}, path)
    file = open_files(tmp_path)["a"]
    assert (file.read("a") == 1).all()
    save_file({"a": np.zeros(3, np.float32)}, path)
    os.utime(path, (1, 1))
    with pytest.raises(FpqError, match=r"model\.safetensors has changed since it was opened"):
        file.read("a")
    path.unlink()
    with pytest.raises(FpqError, match=r"cannot be read"):
        file.read("a")


@pytest.mark.full
def test_a_compressed_archive_is_no_torch_file(tmp_path, torch):
    path = tmp_path / BIN
    torch.save({"a": torch.ones(300)}, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as other:
        for record in plain.infolist():
            other.writestr(record.filename, plain.read(record))
    with pytest.raises(FpqError, match="is a compressed archive, of which torch would read noise"):
        open_files(tmp_path)


def test_a_folder_without_tensors_is_said(tmp_path):
    with pytest.raises(FpqError, match=rf"lacks model\.safetensors or {BIN}; download"):
        open_files(tmp_path)


@pytest.mark.full
def test_values_that_are_not_finite_name_their_tensor_in_a_bin(tmp_path, torch):
    tensors = random_tensors(TINY_CONFIG)
    tensors[NAME][3, 5] = np.nan
    checkpoint = HfCheckpoint(write_bin(tmp_path / "m", TINY_CONFIG, tensors))
    with pytest.raises(FpqError, match=f"Tensor {NAME} in .*{BIN} holds NaN"):
        checkpoint.read(jnp.float32)


@pytest.mark.full
def test_a_base_models_bin_is_read(tmp_path, torch):
    tensors = random_tensors(OPT_CONFIG)
    whole = HfCheckpoint(write_checkpoint(tmp_path / "whole", OPT_CONFIG, tensors))
    base = {name.removeprefix("model."): t for name, t in tensors.items()}
    assert "decoder.layers.0.fc1.weight" in base
    assert_same_bits(
        HfCheckpoint(write_bin(tmp_path / "base", OPT_CONFIG, base)).read(jnp.float32), whole.read(jnp.float32)
    )
