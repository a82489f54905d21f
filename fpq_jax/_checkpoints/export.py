"""Quantized models in the layouts of other tools, written part by part.

What a format cannot hold exactly is refused beforehand. What a reader would make of each Linear's tensors is compared
with the weight, bit for bit, before they are written; but in bf16, whose name says that it rounds.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._checkpoints.model_folder import QuantizedCheckpoint, sidecars
from fpq_jax._errors import FpqError
from fpq_jax._numerics.formats import E4M3
from fpq_jax._numerics.qtensor import QTensor, dequantize, quantize_array
from fpq_jax._storage.compressed_tensors import CompressedScheme, can_hold, scheme_for
from fpq_jax._storage.config_json import QUANTIZATION_KEYS
from fpq_jax._storage.digests import write_digests
from fpq_jax._storage.lora_adapter import FOLDER, AdapterWriter
from fpq_jax._storage.native_safetensors import NativeScheme
from fpq_jax._storage.safetensors_writer import DTYPES, TensorsWriter
from fpq_jax._storage.scheme import DenseScheme, StorageScheme
from fpq_jax._support.console import size_text
from fpq_jax._support.machine import free_disk
from fpq_jax._support.trees import Flat
from fpq_jax.models.parameters import is_kernel, linear_name, part_names, tensor_name

FormatName = Literal["fp8", "mxfp4", "int4", "bf16", "safetensors"]
_OURS = ("recipe.yaml", "report.json")  # what only fpq_jax reads
_EXACT: tuple[FormatName, ...] = ("fp8", "mxfp4", "int4")


@dataclass(frozen=True)
class Export:
    """A model about to be exported; made by ``prepare_export``, which has found that it can be."""

    checkpoint: QuantizedCheckpoint | HfCheckpoint
    leaves: Flat  # every parameter's shape, by path in the order in which they are read
    name: FormatName
    scheme: StorageScheme
    merge_lorc: bool
    max_shard_size: int

    @cached_property
    def rank(self) -> int:
        """Of the adapter beside the weights; 0 where there is none."""
        return self._adapter(Path()).rank

    def _adapter(self, folder: Path) -> AdapterWriter:
        beside = isinstance(self.scheme, CompressedScheme) and not self.merge_lorc
        return AdapterWriter(folder / FOLDER, self.weights if beside else {})

    @cached_property
    def weights(self) -> dict[str, QTensor]:
        """Every quantized Linear's shapes, by its name."""
        return _weights(self.checkpoint.model_class, self.leaves, self.name)

    def _tensors(self) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
        """Name, shape and dtype of all there is to write, in the order in which it is read."""
        for path, leaf in self.leaves.items():
            if self._in_scheme(path, leaf):
                linear = self._linear(path)
                for suffix, expected in self.scheme.expected(linear, leaf.shape).items():
                    dtype = DTYPES[expected.dtypes[0]]
                    yield f"{linear}.{suffix}", jax.ShapeDtypeStruct(expected.shapes[0], dtype)
            else:
                dense = jax.eval_shape(partial(self._dense, path), leaf)
                shape = dense.shape[::-1] if is_kernel(path) else dense.shape
                yield self._tensor(path), jax.ShapeDtypeStruct(shape, self.scheme.dtype or dense.dtype)

    def _in_scheme(self, path: str, leaf: Any) -> bool:
        """Whether it is written as quantized."""
        return isinstance(leaf, QTensor) and _is_written_quantized(path, self.name)

    def _dense(self, path: str, leaf: Any) -> Any:
        """As other tools have it; the values of an embedding or head in FP8 are exact in 16 bits."""
        if not isinstance(leaf, QTensor):
            return leaf
        w = dequantize(leaf, self.checkpoint.dtype)
        return w if is_kernel(path) else w.T

    def _tensor(self, path: str) -> str:
        return tensor_name(self.checkpoint.model_class, path)

    def _linear(self, path: str) -> str:
        return linear_name(self.checkpoint.model_class, path)

    def write(self, folder: Path, advance: Callable[[], None] = lambda: None) -> TensorsWriter:
        """Write the model to an empty folder, config.json last; ``advance`` is called behind each part."""
        writer = TensorsWriter(
            folder,
            dict(self._tensors()),
            stem=self.scheme.stem,
            max_shard_size=self.max_shard_size,
            metadata=self.scheme.metadata,
        )
        adapter = self._adapter(folder)
        if (needed := writer.nbytes + adapter.nbytes) > (free := free_disk(folder)):
            raise FpqError(f"The export takes {size_text(needed)} and {size_text(free)} are free; make room there.")
        for part in part_names(self.checkpoint.model_config):
            params = self.checkpoint.read_part(part)
            for path in list(params):
                self._write(path, jax.tree.map(jnp.asarray, params.pop(path)), writer, adapter)
            advance()
        writer.close()
        adapter.close()
        source = self.checkpoint.folder
        for file in sidecars(source):
            if file.name != "config.json":
                shutil.copyfile(file, folder / file.name)
        for name in _OURS:
            if isinstance(self.scheme, NativeScheme) and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        (folder / "config.json").write_text(json.dumps(self._config(), indent=2) + "\n", encoding="utf-8")
        if isinstance(self.scheme, NativeScheme):
            write_digests(folder)
        return writer

    def _write(self, path: str, leaf: Any, writer: TensorsWriter, adapter: AdapterWriter) -> None:
        if not self._in_scheme(path, leaf):
            leaf, name = self._dense(path, leaf), self._tensor(path)
            values = leaf if self.scheme.dtype is None else leaf.astype(self.scheme.dtype)
            _check_finite(name, jnp.isfinite(leaf).all(), jnp.isfinite(values).all())
            writer.write(name, np.asarray(values.T if is_kernel(path) else values))
            return
        linear = self._linear(path)
        if self.merge_lorc and leaf.low_rank is not None:
            leaf = _merged(leaf)
        _check_finite(linear, *_finite(leaf, self.scheme.dtype))
        if isinstance(self.scheme, CompressedScheme) and not _holds(self.scheme, leaf):
            raise FpqError(f"{linear} cannot be held exactly in {self.name}; its scales are outside of what that has.")
        for suffix, values in self.scheme.tensors(leaf).items():
            writer.write(f"{linear}.{suffix}", np.asarray(values))
        adapter.write(linear, leaf)

    def _config(self) -> dict[str, Any]:
        config = {key: value for key, value in self.checkpoint.config.items() if key not in QUANTIZATION_KEYS}
        dtype = str(jnp.dtype(self.scheme.arithmetic or self.checkpoint.dtype))
        # transformers 5 says dtype, older ones torch_dtype, which all read
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": dtype}
        merged, _ = self._merged_by_engines()
        quantization = self.scheme.config([*self._unquantized, *merged])
        return config if quantization is None else config | {"quantization_config": quantization}

    @cached_property
    def _unquantized(self) -> list[str]:
        """Linears that are not quantized; a tied head is one to others."""
        kernels = [self._linear(path) for path in self.leaves if is_kernel(path)]
        head = [] if "lm_head" in kernels else ["lm_head"]
        return [name for name in kernels if name not in self.weights] + head

    def _merged_by_engines(self) -> tuple[list[str], list[str]]:
        """What engines make of Linears of one input: the names where none is quantized, by which some look for what to
        ignore, and those where some are, which most refuse."""
        none: list[str] = []
        some: list[str] = []
        for block in self.checkpoint.model_class.BLOCKS:
            for merged, (first, *others) in block.MERGED.items():
                for name in (name for name in [*self._unquantized, *self.weights] if name.endswith(f".{first}")):
                    where = name.removesuffix(first)
                    quantized = {f"{where}{part}" in self.weights for part in (first, *others)}
                    if quantized != {True}:
                        (some if True in quantized else none).append(f"{where}{merged}")
        return none, some

    @property
    def torn(self) -> list[str]:
        """Of Linears that engines merge, those of which some are quantized."""
        return self._merged_by_engines()[1]


def prepare_export(
    checkpoint: QuantizedCheckpoint | HfCheckpoint, name: FormatName, *, merge_lorc: bool, max_shard_size: int
) -> Export:
    """What exporting the model in the format takes. FpqError for what the format cannot hold, with one that can."""
    parts = part_names(checkpoint.model_config)
    leaves: Flat = {path: leaf for part in parts for path, leaf in checkpoint.abstract_part(part).items()}
    weights = _weights(checkpoint.model_class, leaves, name)
    if not weights:
        raise FpqError(f"{checkpoint.folder} is not quantized; name a directory that quantize wrote.")
    has_lorc = any(q.low_rank is not None for q in weights.values())
    if merge_lorc and name != "fp8":
        raise FpqError(
            "--merge-lorc is for fp8: bf16 has LoRC in its weights always, safetensors keeps it, and in 4 bits "
            "rounding again would lose what it gives."
        )
    if merge_lorc and not has_lorc:
        raise FpqError(f"{checkpoint.folder} has no LoRC to merge; leave out --merge-lorc.")
    scheme = _scheme(name, weights)
    stored = _merged_shapes(weights) if merge_lorc else weights
    problems = {linear: why for linear, q in stored.items() if (why := scheme.unsupported_reason(q)) is not None}
    if problems:
        linear, why = next(iter(problems.items()))
        others = f" (and {len(problems) - 1} other Linears)" if len(problems) > 1 else ""
        raise FpqError(f"{name} cannot hold {linear}{others} exactly: it has {why}. {_instead(weights)}")
    return Export(checkpoint, leaves, name, scheme, merge_lorc, max_shard_size)


def _scheme(name: FormatName, weights: dict[str, QTensor]) -> StorageScheme:
    if name == "bf16":
        return DenseScheme()
    return NativeScheme.of(weights) if name == "safetensors" else scheme_for(name, list(weights.values()))


def _instead(weights: dict[str, QTensor]) -> str:
    """The nearest format that can."""
    for name in _EXACT:
        if can_hold(name, list(weights.values())):
            return f"Export it as {name}, which can."
    return "Export it as bf16, which rounds it to bfloat16, or as safetensors, which is exact and for fpq_jax alone."


def _weights(model_class: Any, leaves: Flat, name: FormatName) -> dict[str, QTensor]:
    """What is written as quantized, by the Linear's name."""
    quantized = {path: q for path, q in leaves.items() if isinstance(q, QTensor)}
    return {linear_name(model_class, path): q for path, q in quantized.items() if _is_written_quantized(path, name)}


def _is_written_quantized(path: str, name: FormatName) -> bool:
    """Other tools have no place for an embedding or a head that is quantized."""
    return name == "safetensors" or path.startswith("layers.")


def _merged_shapes(weights: dict[str, QTensor]) -> dict[str, QTensor]:
    return {name: q if q.low_rank is None else jax.eval_shape(_merged, q) for name, q in weights.items()}


@jax.jit
def _merged(q: QTensor) -> QTensor:
    """LoRC added to the weight, and that rounded to FP8 with a scale for each output."""
    spec = replace(q.spec, format=E4M3, group_size="channel", constraint=None, compute_rows=1, exponent_rounding="up")
    return replace(quantize_array(dequantize(q), spec), input_scale=q.input_scale)


def _check_finite(name: str, given: Any, written: Any) -> None:
    if not given:
        raise FpqError(f"{name} holds NaN or infinite values; the model is damaged.")
    if not written:
        raise FpqError(f"{name} holds values beyond bfloat16's range; export the model as safetensors.")


@partial(jax.jit, static_argnums=1)
def _finite(q: QTensor, dtype: DTypeLike | None) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the weight is, and whether it is in ``dtype``."""
    w = dequantize(q)
    return jnp.isfinite(w).all(), jnp.isfinite(w.astype(dtype or w.dtype)).all()


@partial(jax.jit, static_argnums=0)
def _holds(scheme: CompressedScheme, q: QTensor) -> Bool[Array, ""]:
    """Whether what is read back is the weight, bit for bit."""
    bits = lambda w: jax.lax.bitcast_convert_type(w, jnp.uint32)
    written = scheme.qtensor("", scheme.tensors(q), q.shape)
    return jnp.all(bits(dequantize(written)) == bits(dequantize(q, low_rank=False)))
