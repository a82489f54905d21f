"""Files written tensor by tensor, as the library reads them."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from fpq_jax import FpqError
from fpq_jax._storage.safetensors_writer import DTYPES, NAMES, TensorsWriter, parse_size
from fpq_jax._storage.tensor_files import SafetensorsFile, open_files

SHAPES = ((), (0,), (1,), (3,), (5, 7), (2, 3, 4), (64, 33))


def random_tensors(seed: int) -> dict[str, np.ndarray]:
    """A tensor of every dtype and shape, of random bits."""
    rng = np.random.default_rng(seed)
    return {
        f"t.{name}.{i}": np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate(SHAPES)
    }


def write(folder, tensors, order=None, **options):
    folder.mkdir(exist_ok=True)
    facts = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) if t.dtype.itemsize < 8 else t for name, t in tensors.items()}
    writer = TensorsWriter(folder, facts, **options)
    for name in order or tensors:
        writer.write(name, tensors[name])
    writer.close()
    return writer


@pytest.mark.parametrize("size", [None, 1, 2000, 10**9])
def test_what_was_written_is_read(size, tmp_path):
    tensors = random_tensors(0)
    order = list(np.random.default_rng(1).permutation(list(tensors)))
    writer = write(tmp_path / "m", tensors, order, max_shard_size=size)
    files = open_files(tmp_path / "m")
    assert writer.files == len(list((tmp_path / "m").glob("*.safetensors")))
    assert (writer.files == 1) == (size in (None, 10**9))
    assert files.keys() == tensors.keys() and writer.nbytes == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        file = files[name]
        assert file.shape(name) == tensor.shape and file.dtype(name) == NAMES[tensor.dtype]
        assert file.read(name).dtype == tensor.dtype and file.read(name).tobytes() == tensor.tobytes()
    if writer.files > 1:
        sizes = {f.path: sum(tensors[n].nbytes for n in f.names()) for f in set(files.values())}
        assert all(total <= size or len(SafetensorsFile(path).names()) == 1 for path, total in sizes.items())
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": writer.nbytes}


@pytest.mark.full
def test_the_library_reads_them(tmp_path):
    tensors = random_tensors(2)
    write(tmp_path, tensors, metadata=lambda names: {"format": "pt", "a": "b"})
    plain = {name: t for name, t in tensors.items() if ".F8" not in name}
    write(tmp_path, plain, stem="plain")
    loaded = load_file(tmp_path / "plain.safetensors")
    assert all(loaded[name].tobytes() == tensor.tobytes() for name, tensor in plain.items())
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert tuple(found.shape) == tensor.shape
            assert found.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == tensor.tobytes()


def test_every_tensor_is_aligned(tmp_path):
    write(tmp_path, random_tensors(3))
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    for tensor in header.values():
        assert (8 + length + tensor["data_offsets"][0]) % DTYPES[tensor["dtype"]].itemsize == 0
    ends = sorted(tensor["data_offsets"] for tensor in header.values())
    assert ends[0][0] == 0 and ends[-1][1] == len(data) - 8 - length
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ends))


def test_a_file_that_became_shorter_is_named(tmp_path):
    write(tmp_path, {"a": np.zeros(100, np.float32)})
    file = SafetensorsFile(tmp_path / "model.safetensors")
    with (tmp_path / "model.safetensors").open("r+b") as raw:
        raw.truncate(300)
    with pytest.raises(FpqError, match="which has become shorter"):
        file.read("a")


def test_a_tensor_of_another_shape_is_not_written(tmp_path):
    writer = TensorsWriter(tmp_path, {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32)})
    with pytest.raises(AssertionError):
        writer.write("a", np.zeros((3, 2), np.float32))
    with pytest.raises(AssertionError):
        writer.close()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2 * 2**30), ("1.5 kib", 1536), ("7", 7), ("1TB", 10**12)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "-5GB", "5 apples", "1e9", "nan"])
def test_no_sizes(text):
    with pytest.raises(FpqError, match="is no size; write it as 5GB"):
        parse_size(text)
