"""Between Hugging Face checkpoints and our parameters.

A model class has a table NAMES from parameter paths ("layers.0.mlp.up_proj.kernel") to tensor names; kernels are
transposed on the way, since torch stores Linear weights [out, in]. Tensors are memory-mapped and read when asked for.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from fpq_jax.models._files import TensorFile, listed, open_files
from jax.typing import DTypeLike

from fpq_jax._errors import FpqError
from fpq_jax._tree import Flat, flatten, unflatten

EMBEDDING, HEAD = "embedding", "head"  # the parts before and behind the layers
_BLOCK = 2**22  # values looked at together
_READERS = 2  # threads, each with a tensor in memory
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


class HfCheckpoint:
    """A Hugging Face model folder, opened and checked: every tensor there, none unknown, shapes as config.json says.

    shapes: path of each parameter -> its shape. dtype: what most weights are stored in.
    Raises FpqError, with all mismatches at once. Values are checked as they are read.
    """

    def __init__(self, folder: Path, architectures: Mapping[str, Any]):
        self.folder = folder
        self.config = read_config(folder)
        self.model_class = find_architecture(self.config, architectures)
        self.model_config = self.model_class.Config.from_hf(self.config)
        self._where = _by_name(open_files(folder))
        stored = [file.dtype(name) for file, name in self._where.values()]
        self.dtype = jnp.dtype(_DTYPES.get(max(set(stored), key=stored.count, default="F32"), jnp.float32))
        self.shapes = parameter_shapes(self.model_class, self.model_config)
        self._names = {tensor_name(self.model_class, path): (path, shape) for path, shape in self.shapes.items()}
        self._check()

    def _check(self) -> None:
        ignored = re.compile("|".join(self.model_class.IGNORED) or "(?!)")
        missing = sorted(set(self._names) - set(self._where))
        unexpected = sorted(self._where[n][1] for n in set(self._where) - set(self._names) if not ignored.fullmatch(n))
        problems = []
        if missing:
            problems.append(f"missing: {listed(missing)}")
        if unexpected:
            problems.append(f"unexpected: {listed(unexpected)}")
        wrong = []
        for name, (path, shape) in self._names.items():
            if name not in self._where:
                continue
            file, stored = self._where[name]
            expected = tuple(reversed(shape)) if _is_kernel(path) else shape
            if file.shape(stored) != expected:
                wrong.append(f"{stored} {list(file.shape(stored))} instead of {list(expected)}")
            if file.dtype(stored) not in _DTYPES:
                wrong.append(f"{stored} stored as {file.dtype(stored)}")
        if wrong:
            problems.append(f"not as config.json says: {listed(wrong)}")
        if problems:
            raise FpqError(f"The tensors in {self.folder} do not fit its config.json; {'; '.join(problems)}.")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the model uses, as stored."""
        sizes = {"F32": 4, "F16": 2, "BF16": 2}
        used = (self._where[name] for name in self._names)
        return sum(math.prod(file.shape(stored)) * sizes[file.dtype(stored)] for file, stored in used)

    def read(self, dtype: DTypeLike, *prefixes: str) -> Flat:
        """The parameters whose path begins with one of ``prefixes`` (all, if there is none), under their full paths."""
        return self._read(dtype, lambda path: not prefixes or path.startswith(prefixes))

    def read_part(self, name: str, dtype: DTypeLike) -> Flat:
        """The parameters of a part (see ``part_names``) under their full paths."""
        return self._read(dtype, lambda path: part_of(self.model_class, path) == name)

    def _read(self, dtype: DTypeLike, wanted: Callable[[str], bool]) -> Flat:
        chosen = ((name, path) for name, (path, _) in self._names.items() if wanted(path))
        return {path: self._tensor(name, path, dtype) for name, path in chosen}

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
            digests = list(threads.map(one, sorted(self._names)))
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode() + b"".join(digests)).hexdigest()

    def _checked(self, name: str) -> np.ndarray:
        """A tensor as stored. FpqError if it holds values that are not finite."""
        file, stored = self._where[name]
        value = file.read(stored)
        if not _all_finite(value):
            kind = "NaN" if np.isnan(value).any() else "infinite"
            raise FpqError(f"Tensor {stored} in {file.path} holds {kind} values; the checkpoint is damaged.")
        return value

    def _tensor(self, name: str, path: str, dtype: DTypeLike) -> np.ndarray:
        value, stored = self._checked(name), self._where[name][1]
        with np.errstate(over="ignore"):  # told below
            converted = value.astype(dtype)
        if dtype == jnp.float16 and not np.isfinite(converted).all():
            raise FpqError(f"Tensor {stored} does not fit float16; use --dtype bfloat16 or float32.")
        return np.ascontiguousarray(converted.T) if _is_kernel(path) else converted


def _all_finite(value: np.ndarray) -> bool:
    """np.isfinite(value).all(), which is slow for 16 bits: there a bit pattern tells."""
    flat = value.reshape(-1)
    blocks = (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))  # which bounds the copies
    if value.dtype.itemsize != 2:
        return all(np.isfinite(block).all() for block in blocks)
    exponent = 0x7C00 if value.dtype == np.float16 else 0x7F80
    return not any(((block.view(np.uint16) & exponent) == exponent).any() for block in blocks)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise FpqError(f"There is no model folder {folder}.")
    if not path.is_file():
        raise FpqError(f"{folder} has no config.json; name the folder of a Hugging Face checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FpqError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise FpqError(f"{path} does not hold a JSON object.")
    return config


def check_counts(config: Mapping[str, Any], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """FpqError for keys of a config.json that are missing or no positive whole numbers; optional ones may be absent."""
    if missing := [key for key in required if config.get(key) is None]:
        raise FpqError(f"config.json lacks {', '.join(missing)}, which a {config.get('model_type')} model needs.")
    for key in (*required, *optional):
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise FpqError(f"config.json: {key} is {value!r}; it must be a positive whole number.")


def find_architecture(config: Mapping[str, Any], architectures: Mapping[str, Any]) -> Any:
    """The model class of a config.json."""
    kind = str(config.get("model_type"))
    if kind not in architectures:
        raise FpqError(f"config.json: model_type {kind!r} is not supported; supported: {', '.join(architectures)}.")
    if config.get("quantization_config"):
        raise FpqError("config.json has a quantization_config: the checkpoint is already quantized; name the original.")
    return architectures[kind]


def abstract_model(model_class: Any, config: Any, dtype: DTypeLike = jnp.float32) -> Any:
    """The model without memory: every parameter a ShapeDtypeStruct."""
    return nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=nnx.Rngs(0)))


def parameter_shapes(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Path of each parameter -> its shape."""
    return {path: leaf.shape for path, leaf in params_of(abstract_model(model_class, config)).items()}


def part_of(model_class: Any, path: str) -> str:
    """The name of the part that a parameter is in."""
    if path.startswith("layers."):
        return ".".join(path.split(".")[:2])
    return EMBEDDING if path.startswith(model_class.EMBEDDING) else HEAD


def part_names(config: Any) -> list[str]:
    """The parts of a model in order: what is before the layers, each layer, what is behind them."""
    return [EMBEDDING, *(f"layers.{i}" for i in range(config.num_hidden_layers)), HEAD]


def params_of(module: Any) -> Flat:
    """The parameters of a module by path."""
    return flatten(nnx.to_pure_dict(nnx.state(module)))


def with_params(module: Any, params: Flat) -> Any:
    """A copy of an (abstract) module that holds ``params``; kernels may be QTensors."""
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, unflatten(params))
    return nnx.merge(graph, state)


def build_model(model_class: Any, config: Any, params: Flat) -> Any:
    """A model that holds ``params`` on the default device."""
    return with_params(abstract_model(model_class, config), jax.tree.map(jnp.asarray, params))


def tensor_name(model_class: Any, path: str) -> str:
    """The Hugging Face name of the parameter at ``path``."""
    for pattern, name in model_class.NAMES:
        if match := re.fullmatch(pattern, path):
            return match.expand(name)
    raise KeyError(path)


def linear_name(model_class: Any, path: str) -> str:
    """The Hugging Face name of the Linear whose kernel is at ``path``."""
    return tensor_name(model_class, path).removesuffix(".weight")


def to_hf_tensors(model_class: Any, params: Flat) -> dict[str, np.ndarray]:
    """Unquantized parameters under Hugging Face's names and in its layout."""
    return {
        tensor_name(model_class, path): np.ascontiguousarray(np.asarray(leaf).T if _is_kernel(path) else leaf)
        for path, leaf in params.items()
    }


def _is_kernel(path: str) -> bool:
    return path.endswith(".kernel")


def _by_name(files: dict[str, TensorFile]) -> dict[str, tuple[TensorFile, str]]:
    """Each tensor's file and name there, by its name in a whole model.

    Those saved from a base model, as OPT's first, lack the "model." in front.
    """
    bare = not any(name.startswith("model.") for name in files)
    whole = lambda name: f"model.{name}" if bare and name != "lm_head.weight" else name
    return {whole(name): (file, name) for name, file in files.items()}
