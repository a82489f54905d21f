"""fpq_jax's own way to store a quantized model in safetensors: what a QTensor has, array by array.

Every array of a Linear's QTensor is a tensor LINEAR.PART in the QTensor's own layout; what arrays cannot say is JSON
under "fpq" in the metadata of the file that holds its codes, in the words of fpq.json (see docs/checkpoint.md).
"""

import json
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from fpq_jax._errors import FpqError
from fpq_jax._numerics.qtensor import QTensor
from fpq_jax._storage.orbax_parts import Entry, abstract_part, arrays_of, entry_of, with_arrays
from fpq_jax._storage.safetensors_writer import NAMES
from fpq_jax._storage.scheme import Expected, ReadableScheme, Tensors

METHOD = "fpq"  # quant_method in config.json; it and the files' name keep other tools from half reading the folder
STEM = "fpq"
_KEY = "fpq"
_VERSION = 1


class NativeScheme(ReadableScheme):
    """Linears as they are here. ``entry``: what their arrays cannot say, see ``entry_of``."""

    stem = STEM

    def __init__(self, entry: Entry):
        self._entry = entry
        self._weights: dict[str, QTensor] = abstract_part(entry)

    @classmethod
    def of(cls, weights: Mapping[str, QTensor]) -> "NativeScheme":
        """To write these, by name; their shapes are enough."""
        return cls(entry_of(dict(weights)))

    @classmethod
    def read(cls, metadata: Iterable[Mapping[str, str]]) -> "NativeScheme":
        """From the metadata of a checkpoint's files. FpqError if that is damaged or of another version."""
        whole: Entry = {"quantized": {}, "arrays": {}}
        try:
            for of_file in metadata:
                told = json.loads(of_file[_KEY])
                if told["version"] != _VERSION:
                    raise FpqError(f"The files have format version {told['version']}; this fpq_jax reads {_VERSION}.")
                for key in whole:
                    whole[key] |= told[key]
            return cls(whole)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise FpqError(f"The metadata of the safetensors is damaged ({type(error).__name__}: {error}).") from error

    def metadata(self, names: list[str]) -> dict[str, str]:
        """Of a file with tensors of these names."""
        own = [linear for linear in self._weights if f"{linear}.codes" in set(names)]
        part = {key: {linear: known[linear] for linear in own} for key, known in self._entry.items()}
        return {_KEY: json.dumps({"version": _VERSION, **part}, sort_keys=True)}

    def config(self, ignored: list[str]) -> dict[str, Any]:
        return {"quant_method": METHOD}

    def stores(self, linear: str, names: Container[str]) -> bool:
        return linear in self._weights

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        q = self._weights[linear]
        if q.shape != shape:
            raise FpqError(f"{linear} is {list(q.shape)} and not {list(shape)} as config.json says.")
        arrays = arrays_of(q)
        return {part: Expected((a.shape,), (NAMES[jnp.dtype(a.dtype)],)) for part, a in arrays.items()}

    def qtensor(self, linear: str, tensors: Mapping[str, Any], shape: tuple[int, int]) -> QTensor:
        return with_arrays(self._weights[linear], tensors)

    def tensors(self, q: QTensor) -> Tensors:
        return arrays_of(q)

    def unsupported_reason(self, q: QTensor) -> str | None:
        return None
