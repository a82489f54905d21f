"""Safetensors files written tensor by tensor, in shards of a given size: none but the tensor at hand is in memory.

The library's own functions want all tensors of a file at once, and in NumPy know no 8-bit floats. A file is the length
of its header in 8 bytes, little-endian; the header, JSON: name -> dtype, shape and data_offsets, and strings of one's
own under __metadata__; the values, row-major and little-endian. Source: https://github.com/huggingface/safetensors.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from fpq_jax._errors import FpqError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
_ALIGNMENT = 8  # of the values' beginning

Metadata = Callable[[list[str]], dict[str, str]]


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB. FpqError for anything else."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise FpqError(f"{text!r} is no size; write it as 5GB, 500MB or 2GiB.")
    return size


class TensorsWriter:
    """Writes ``tensors``, whose shapes and dtypes are known beforehand, one after the other.

    stem: of the files' names: STEM.safetensors, or several and STEM.safetensors.index.json as Hugging Face has them.
    max_shard_size: bytes of values in a file; a larger tensor has a file of its own. None: one file. metadata: of a
    file, by the names of its tensors. ``write`` each tensor once, then ``close``.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Any],
        *,
        stem: str = "model",
        max_shard_size: int | None = None,
        metadata: Metadata = lambda names: {"format": "pt"},
    ):
        self._folder, self._stem = folder, stem
        self._tensors = {name: (tuple(t.shape), np.dtype(t.dtype)) for name, t in tensors.items()}
        shards = self._shards(max_shard_size or self.nbytes or 1)
        count = len(shards)
        names = [f"{stem}.safetensors" if count == 1 else f"{stem}-{i:05}-of-{count:05}.safetensors"
                 for i in range(1, count + 1)]  # fmt: skip
        self._files = [_File(folder / name, {n: self._tensors[n] for n in shard}, metadata(shard))
                       for name, shard in zip(names, shards, strict=True)]  # fmt: skip
        self._file_of = {name: file for file, shard in zip(self._files, shards, strict=True) for name in shard}

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return sum(map(_nbytes, self._tensors.values()))

    @property
    def files(self) -> int:
        """How many there will be."""
        return len(self._files)

    def _shards(self, limit: int) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        size = 0
        for name, facts in self._tensors.items():
            if shards[-1] and size + _nbytes(facts) > limit:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += _nbytes(facts)
        return shards

    def write(self, name: str, values: Any) -> None:
        """Write a tensor; a file is on the disk when its last one is there."""
        shape, dtype = self._tensors[name]
        assert (values.shape, np.dtype(values.dtype)) == (shape, dtype), (name, values.shape, values.dtype)
        self._file_of[name].write(name, np.ascontiguousarray(values))

    def close(self) -> None:
        """Write the index, where there are several files."""
        assert not any(file.missing for file in self._files), [sorted(file.missing)[:3] for file in self._files]
        if len(self._files) == 1:
            return
        weight_map = {name: self._file_of[name].path.name for name in sorted(self._file_of)}
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        path = self._folder / f"{self._stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _File:
    """One file; every tensor has its place, whatever the order in which they come."""

    def __init__(self, path: Path, tensors: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], metadata: dict[str, str]):
        self.path = path
        self.missing = set(tensors)
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        end = 0
        # large items first keeps all of them aligned
        for name in sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name)):
            (shape, dtype), begin = tensors[name], end
            end += _nbytes(tensors[name])
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._head = len(text).to_bytes(8, "little") + text
        self._begins = {name: len(self._head) + header[name]["data_offsets"][0] for name in tensors}
        self._file: IO[bytes] | None = None

    def write(self, name: str, values: np.ndarray) -> None:
        if self._file is None:
            self._file = self.path.open("wb")
            self._file.write(self._head)
        self._file.seek(self._begins[name])
        self._file.write(values.reshape(-1).view(np.uint8).data)
        self.missing.remove(name)
        if not self.missing:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _nbytes(facts: tuple[tuple[int, ...], np.dtype[Any]]) -> int:
    shape, dtype = facts
    return math.prod(shape) * dtype.itemsize
