"""The files that a model folder's tensors are in: safetensors, or those that torch.save writes (pytorch_model.bin).

A tensor's values are read when asked for, from a file that is still the one that was opened. torch's files are
memory-mapped for as long as one is read: pages that were touched count as the process's memory until then.
"""

import abc
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from fpq_jax._errors import FpqError
from fpq_jax._storage.native_safetensors import STEM
from fpq_jax._storage.safetensors_writer import DTYPES
from fpq_jax._support.files import read_json_object

_TORCH_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SHOWN = 20  # names listed in a message


class TensorFile(abc.ABC):
    """A file of tensors by name, each with its shape and dtype. FORMAT: what the file is called in messages."""

    FORMAT: ClassVar[str]
    metadata: dict[str, str]
    _facts: dict[str, tuple[tuple[int, ...], str]]

    def __init__(self, path: Path):
        self.path = path
        self._version = self._now()

    def _now(self) -> tuple[int, ...]:
        """What is another when the file is."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise FpqError(f"{self.path} cannot be read: {error.strerror}.") from error
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def names(self) -> list[str]:
        return list(self._facts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._facts[name][0]

    def dtype(self, name: str) -> str:
        """As safetensors calls it, "F32", "F16", "BF16", ...; of what safetensors has not, as torch does."""
        return self._facts[name][1]

    def read(self, name: str) -> np.ndarray:
        """A tensor's values. FpqError if the file has changed."""
        values = self._read(name)
        if self._now() != self._version:
            raise FpqError(f"{self.path} has changed since it was opened; start again when it is complete.")
        return values

    @abc.abstractmethod
    def _read(self, name: str) -> np.ndarray: ...


class SafetensorsFile(TensorFile):
    """A safetensors file. Raises FpqError where it is damaged."""

    FORMAT = "safetensors"

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            with safe_open(path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                self._facts = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
                self.metadata = file.metadata() or {}
            # the library has checked it; where values are, it does not say
            with path.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(length))
        except (SafetensorError, OSError) as error:
            raise FpqError(f"{path} is truncated or no safetensors file ({error}); download it again.") from error
        self._places = {name: [8 + length + at for at in header[name]["data_offsets"]] for name in self._facts}

    def _read(self, name: str) -> np.ndarray:
        begin, end = self._places[name]
        try:
            values = np.fromfile(self.path, np.uint8, end - begin, offset=begin)
        except OSError as error:
            raise FpqError(f"{name} cannot be read from {self.path}: {error}.") from error
        if len(values) < end - begin:
            raise FpqError(f"{name} cannot be read from {self.path}, which has become shorter.")
        return values.view(DTYPES[self.dtype(name)]).reshape(self.shape(name))


class TorchFile(TensorFile):
    """A dict of tensors that torch.save wrote, read by torch, which must be installed.

    Raises FpqError, also for a file that holds anything else: pickles can run code, so only tensors are unpickled.
    """

    FORMAT = "torch"

    def __init__(self, path: Path):
        super().__init__(path)
        self.metadata = {}
        self._facts = {name: (tuple(x.shape), _torch_dtype(x)) for name, x in self._open().items()}

    def _open(self) -> dict[str, Any]:
        """The tensors, mapped."""
        path = self.path
        try:
            import torch
        except ImportError as error:
            raise FpqError(
                f"{path} is read by torch, which is not installed; "
                f"install it (pip install torch) or convert the checkpoint to safetensors."
            ) from error
        if torch.__version__ < "2.6":  # CVE-2025-32434; no plain string, it compares as versions do
            raise FpqError(f"{path} could run code in torch {torch.__version__}; upgrade torch to 2.6 or newer.")
        try:
            with path.open("rb") as file:
                legacy = file.read(1) == pickle.PROTO  # a bare pickle, where newer files are zip archives
            if not legacy and any(record.compress_type for record in zipfile.ZipFile(path).infolist()):
                raise FpqError(f"{path} is a compressed archive, of which torch would read noise; save it again.")
            tensors = {} if legacy else torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except FpqError:
            raise
        except pickle.UnpicklingError as error:
            raise FpqError(
                f"{path} is refused: it holds objects that are no tensors and could run code as they are read; "
                f"name a checkpoint in safetensors."
            ) from error
        except Exception as error:  # damage is met in torch's archive reader, in its unpickler or beyond
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise FpqError(
                f"{path} is truncated or no torch file ({type(error).__name__}: {reason}); download it again."
            ) from error
        if legacy:
            raise FpqError(
                f"{path} has the format that torch wrote before 1.6; "
                f"load and save it with a newer torch, or convert the checkpoint to safetensors."
            )
        if not isinstance(tensors, dict):
            raise FpqError(f"{path} holds a {type(tensors).__name__} instead of a dict of tensors; save a state_dict.")
        plain = lambda x: isinstance(x, torch.Tensor) and x.layout is torch.strided and not (x.is_meta or x.is_nested)
        if others := [str(name) for name, x in tensors.items() if not (isinstance(name, str) and plain(x))]:
            raise FpqError(f"{path} holds what are no plain tensors: {listed(others)}; save a state_dict alone.")
        return tensors

    def _read(self, name: str) -> np.ndarray:
        import torch

        tensor = self._open()[name].detach()
        if tensor.dtype == torch.bfloat16:  # torch gives NumPy none
            return tensor.view(torch.int16).numpy().view(jnp.dtype(jnp.bfloat16))
        return tensor.numpy(force=True)


def _torch_dtype(tensor: Any) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _TORCH_DTYPES.get(dtype, dtype)


_KINDS: tuple[tuple[str, type[SafetensorsFile] | type[TorchFile]], ...] = (
    ("model.safetensors", SafetensorsFile),
    (f"{STEM}.safetensors", SafetensorsFile),
    ("pytorch_model.bin", TorchFile),
)


def open_files(folder: Path) -> dict[str, TensorFile]:
    """Name of each tensor in the folder -> its file. As Transformers has it, safetensors come before torch's files, and
    a single file before an index of several. Raises FpqError."""
    for single, kind in _KINDS:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            files: list[TensorFile] = [kind(folder / single)]
        elif index.is_file():
            files = [kind(path) for path in _shards(index, kind.FORMAT)]
        else:
            continue
        return _by_tensor(files)
    known = " or ".join(single for single, _ in _KINDS if not single.startswith(STEM))
    raise FpqError(f"{folder} lacks {known}; download the checkpoint again.")


def _by_tensor(files: list[TensorFile]) -> dict[str, TensorFile]:
    found: dict[str, TensorFile] = {}
    for file in files:
        for name in file.names():
            if name in found:
                raise FpqError(
                    f"Two shards, {found[name].path} and {file.path.name}, hold the tensor {name}, and which of them "
                    "counts cannot be known; download the checkpoint again."
                )
            found[name] = file
    return found


def listed(names: list[str]) -> str:
    """Names for a message, which too many of them do not flood."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _shards(index: Path, kind: str) -> list[Path]:
    """The files that an index names, each there and beside the index."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FpqError(f"{index} is not a {kind} index; download it again.")
    names = sorted(set(weight_map.values()))
    if strange := [name for name in names if Path(name).name != name]:
        raise FpqError(f"{index} names {listed(strange)}, not a file of its own folder; download the checkpoint again.")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise FpqError(f"{index.parent} lacks {listed(absent)}; download the checkpoint again.")
    return [index.parent / name for name in names]
