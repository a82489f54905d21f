"""A Hugging Face model folder, read part by part, whether its Linears are quantized or not."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fpq_jax._errors import FpqError
from fpq_jax._numerics.qtensor import QTensor, dequantize
from fpq_jax._storage.config_json import quantization_config, read_config
from fpq_jax._storage.digests import Digests
from fpq_jax._storage.lora_adapter import FOLDER, low_rank_of, read_rank, tensor_names
from fpq_jax._storage.native_safetensors import METHOD, NativeScheme
from fpq_jax._storage.quantization_config import scheme_of
from fpq_jax._storage.safetensors_writer import DTYPES
from fpq_jax._storage.scheme import Expected, ReadableScheme
from fpq_jax._storage.tensor_files import SafetensorsFile, TensorFile, listed, open_files
from fpq_jax._support.trees import Flat
from fpq_jax.models.parameters import HEAD_KERNEL, TABLE, is_kernel, parameter_shapes, part_of, tensor_name
from fpq_jax.models.registry import model_class_of

_BLOCK = 2**22  # values looked at together
_LAYERS = 1000  # no model has more
_READERS = 2  # threads, each with a tensor in memory
_FLOATS = ("F32", "F16", "BF16")


class _Parameter(NamedTuple):
    """Where a parameter is: the names of its tensors in a whole model, by part ("" for all of it); ``linear``: the
    Linear's name, if it is quantized."""

    names: dict[str, str]
    expected: dict[str, Expected]
    linear: str | None = None


class HfCheckpoint:
    """A Hugging Face model folder, opened and checked: every tensor there, none unknown, shapes as config.json says.

    shapes: path of each parameter -> its shape. dtype: what most unquantized weights are stored in. scheme: how
    quantized Linears are stored, None in an unquantized checkpoint.
    Raises FpqError, with all mismatches at once. Values are checked as they are read, and, to ``verify``, files that
    have digests.
    """

    def __init__(self, folder: Path, *, verify: bool = True):
        self.folder = folder
        self._digests = Digests(folder, verify=verify)
        self._digests.check(lambda name: not name.endswith(".safetensors"))
        self.config = read_config(folder)
        self.model_class = model_class_of(self.config)
        self.model_config = self.model_class.Config.from_hf(self.config)
        files = open_files(folder)
        self.scheme = _scheme(self.config, set(files.values()))
        self._where = _by_name(files)
        layers = self.model_config.num_hidden_layers
        if layers > max(_LAYERS, len(files)):  # before so many are looked for
            raise FpqError(f"config.json: num_hidden_layers is {layers}, but {folder} has only {len(files)} tensors.")
        self._tied_head = self._take_tied_head()
        self._rank = self._open_adapter()
        self.shapes = parameter_shapes(self.model_class, self.model_config)
        self._parameters = {path: self._parameter(path, shape) for path, shape in self.shapes.items()}
        self._expected = {p.names[part]: e for p in self._parameters.values() for part, e in p.expected.items()}
        self._check()
        plain = [self._stored_dtype(p.names[""]) for p in self._parameters.values() if not p.linear]
        self.dtype = DTYPES[max(set(plain), key=plain.count)]

    @property
    def quantized(self) -> bool:
        """Whether there are quantized Linears."""
        return any(p.linear for p in self._parameters.values())

    @property
    def is_packed(self) -> bool:
        """Whether it is one that export wrote with all there is to know."""
        return isinstance(self.scheme, NativeScheme)

    def _parameter(self, path: str, shape: tuple[int, ...]) -> _Parameter:
        name = tensor_name(self.model_class, path)
        linear = name.removesuffix(".weight")
        if self.scheme is not None and _may_be_quantized(path) and self.scheme.stores(linear, self._where):
            shape = _in_out(path, shape)
            expected = self.scheme.expected(linear, shape)
            names = {part: f"{linear}.{part}" for part in expected}
            if (factors := tensor_names(linear))["lora_A"] in self._where:
                names |= factors
                sides = {"lora_A": (self._rank, shape[0]), "lora_B": (shape[1], self._rank)}
                expected |= {side: Expected((size,), _FLOATS) for side, size in sides.items()}
            return _Parameter(names, expected, linear)
        stored = shape[::-1] if is_kernel(path) else shape
        return _Parameter({"": name}, {"": Expected((stored,), _FLOATS)})

    def _open_adapter(self) -> int:
        """Take the tensors of the adapter that an export has beside its weights in; its rank, 0 if there is none."""
        folder = self.folder / FOLDER
        if self.scheme is None or not folder.is_dir():
            return 0
        file = SafetensorsFile(folder / "adapter_model.safetensors")
        self._where |= {name: (file, name) for name in file.names()}
        return read_rank(folder)

    def _take_tied_head(self) -> str | None:
        """The name of a tied model's head, if it is stored beside the embedding; alone, it is the embedding."""
        head, embedding = (tensor_name(self.model_class, path) for path in (HEAD_KERNEL, TABLE))
        if not self.model_config.tie_word_embeddings or self.scheme is not None or head not in self._where:
            return None
        if embedding in self._where:
            return head
        self._where[embedding] = self._where.pop(head)
        return None

    def _check(self) -> None:
        ignored = re.compile("|".join(self.model_class.IGNORED) or "(?!)")
        missing = sorted(set(self._expected) - set(self._where))
        unexpected = sorted(
            self._where[n][1] for n in set(self._where) - set(self._expected) if not ignored.fullmatch(n)
        )
        problems = []
        if missing:
            problems.append(f"missing: {listed(missing)}")
        if unexpected:
            problems.append(f"unexpected: {listed(unexpected)}")
        wrong = []
        for name, expected in self._expected.items():
            if name not in self._where:
                continue
            file, stored = self._where[name]
            if file.shape(stored) not in expected.shapes:
                wrong.append(f"{stored} {list(file.shape(stored))} instead of {list(expected.shapes[0])}")
            if file.dtype(stored) not in expected.dtypes:
                wrong.append(f"{stored} stored as {file.dtype(stored)}")
        if wrong:
            problems.append(f"not as config.json says: {listed(wrong)}")
        if problems:
            raise FpqError(f"The tensors in {self.folder} do not fit its config.json; {'; '.join(problems)}.")

    def _stored_dtype(self, name: str) -> str:
        file, stored = self._where[name]
        return file.dtype(stored)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the model uses, as stored."""
        used = ((self._where[name], self._stored_dtype(name)) for name in self._expected)
        return sum(math.prod(file.shape(stored)) * DTYPES[dtype].itemsize for (file, stored), dtype in used)

    def abstract_part(self, name: str) -> Flat:
        """The parameters of a part without values."""

        def one(path: str) -> Any:
            shapes = {part: self._abstract(tensor) for part, tensor in self._parameters[path].names.items()}
            if self._parameters[path].linear:
                return jax.eval_shape(lambda tensors: self._quantized(path, tensors), shapes)
            return jax.ShapeDtypeStruct(self.shapes[path], shapes[""].dtype)

        return {path: one(path) for path in self._of_part(name)}

    def _abstract(self, tensor: str) -> jax.ShapeDtypeStruct:
        file, stored = self._where[tensor]
        return jax.ShapeDtypeStruct(file.shape(stored), DTYPES[file.dtype(stored)])

    def read(self, dtype: DTypeLike, *prefixes: str) -> Flat:
        """The parameters whose path begins with one of ``prefixes`` (all, if there is none), under their full paths.

        What is quantized is QTensors; all else is in ``dtype``.
        """
        chosen = (path for path in self.shapes if not prefixes or path.startswith(prefixes))
        return {path: self._leaf(path, dtype) for path in chosen}

    def read_part(self, name: str, dtype: DTypeLike | None = None) -> Flat:
        """``read`` of a part (see ``part_names``); dtype None: as stored."""
        return {path: self._leaf(path, dtype) for path in self._of_part(name)}

    def read_dense_part(self, name: str, dtype: DTypeLike) -> Flat:
        """``read_part`` with what is quantized dequantized."""

        def dense(leaf: Any) -> np.ndarray:
            if not isinstance(leaf, QTensor):
                return leaf
            return np.asarray(dequantize(jax.tree.map(jnp.asarray, leaf), dtype))

        return {path: dense(leaf) for path, leaf in self.read_part(name, dtype).items()}

    def _of_part(self, name: str) -> list[str]:
        return [path for path in self.shapes if part_of(self.model_class, path) == name]

    def digest(self, advance: Callable[[], None] = lambda: None) -> str:
        """Of the names, types and values of all tensors that the model uses, and of its configuration.

        Reads all of them once, several at a time, and raises FpqError for values that are not finite. ``advance`` is
        called behind each tensor.
        """

        def one(name: str) -> bytes:
            value = self._checked(name)
            facts = f"{name} {value.dtype} {value.shape}".encode()
            found = hashlib.sha256(facts + hashlib.sha256(np.ascontiguousarray(value).view(np.uint8).data).digest())
            advance()
            return found.digest()

        with ThreadPoolExecutor(_READERS) as threads:
            digests = list(threads.map(one, sorted(self._expected)))
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode() + b"".join(digests)).hexdigest()

    @property
    def tensor_count(self) -> int:
        """How many tensors ``digest`` reads."""
        return len(self._expected)

    def _checked(self, name: str) -> np.ndarray:
        """A tensor as stored. FpqError if it holds values that are not finite."""
        file, stored = self._where[name]
        self._digests.check(lambda path: path == file.path.name)
        value = file.read(stored)
        expected, wrong = self._expected[name], ""
        if not _all_finite(value):
            wrong = "NaN values" if np.isnan(value).any() else "infinite values"
        elif expected.nan is not None and (value == expected.nan).any():
            wrong = "NaN values"
        elif expected.positive and not (value > 0).all():
            wrong = "a scale that is not above 0"
        elif expected.values is not None and tuple(value.tolist()) != expected.values:
            wrong = f"{value.tolist()} instead of {list(expected.values)}"
        if wrong:
            raise FpqError(f"Tensor {stored} in {file.path} holds {wrong}; the checkpoint is damaged.")
        if self._tied_head is not None and name == tensor_name(self.model_class, TABLE):
            self._check_tied(self._tied_head, value)
        return value

    def _check_tied(self, name: str, embedding: np.ndarray) -> None:
        file, stored = self._where[name]
        head = file.read(stored)
        as_bytes = lambda values: np.ascontiguousarray(values).view(np.uint8)
        if head.dtype != embedding.dtype or not np.array_equal(as_bytes(head), as_bytes(embedding)):
            raise FpqError(
                f"config.json says tie_word_embeddings, but {file.path} has a {stored} that is not the embedding; set "
                "tie_word_embeddings to false to use it, or remove it."
            )

    def _leaf(self, path: str, dtype: DTypeLike | None) -> Any:
        parameter = self._parameters[path]
        if parameter.linear:
            return self._quantized(path, {part: self._checked(name) for part, name in parameter.names.items()})
        name = parameter.names[""]
        value = self._checked(name)
        dtype = value.dtype if dtype is None else dtype
        with np.errstate(over="ignore"):  # told below
            converted = value.astype(dtype)
        if dtype == jnp.float16 and not np.isfinite(converted).all():
            raise FpqError(f"Tensor {self._where[name][1]} does not fit float16; use --dtype bfloat16 or float32.")
        return np.ascontiguousarray(converted.T) if is_kernel(path) else converted

    def _quantized(self, path: str, tensors: Mapping[str, Any]) -> QTensor:
        linear = self._parameters[path].linear
        assert self.scheme is not None and linear is not None
        q = self.scheme.qtensor(linear, tensors, _in_out(path, self.shapes[path]))
        return replace(q, low_rank=low_rank_of(tensors)) if "lora_A" in tensors else q


def _may_be_quantized(path: str) -> bool:
    return is_kernel(path) or path == TABLE


def _in_out(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """A quantized parameter's logical shape; the outputs of a table are its tokens."""
    first, second = shape
    return (first, second) if is_kernel(path) else (second, first)


def _scheme(config: Mapping[str, Any], files: set[TensorFile]) -> ReadableScheme | None:
    """How quantized Linears are stored."""
    told = quantization_config(config)
    if not told:
        return None
    if not isinstance(told, Mapping):
        raise FpqError("config.json: quantization_config is no JSON object.")
    if told.get("quant_method") == METHOD:
        return NativeScheme.read([file.metadata for file in sorted(files, key=lambda file: file.path)])
    return scheme_of(told)


def _all_finite(value: np.ndarray) -> bool:
    """np.isfinite(value).all(), which is slow for 16 bits: there a bit pattern tells."""
    flat = value.reshape(-1)
    blocks = (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))  # which bounds the copies
    if value.dtype.itemsize != 2:
        return all(np.isfinite(block).all() for block in blocks)
    exponent = 0x7C00 if value.dtype == np.float16 else 0x7F80
    return not any(((block.view(np.uint16) & exponent) == exponent).any() for block in blocks)


def _by_name(files: dict[str, TensorFile]) -> dict[str, tuple[TensorFile, str]]:
    """Each tensor's file and name there, by its name in a whole model.

    Those saved from a base model, as OPT's first, lack the "model." in front.
    """
    bare = not any(name.startswith("model.") for name in files)
    whole = lambda name: f"model.{name}" if bare and name != "lm_head.weight" else name
    return {whole(name): (file, name) for name, file in files.items()}
