"""What a way to store quantized Linears in a Hugging Face folder has to say.

Those of ``compressed_tensors`` are for other tools, that of ``native_safetensors`` is our own.
"""

import abc
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from fpq_jax._numerics.qtensor import QTensor, dequantize

Tensors = dict[str, Any]  # of a Linear, by what stands behind its name


class Expected(NamedTuple):
    """What a tensor may be: shapes and dtypes (safetensors' names), first what is written here.

    nan: a code that is no number. positive: whether all values must be. values: what they must be.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    nan: int | None = None
    positive: bool = False
    values: tuple[int, ...] | None = None


class StorageScheme(abc.ABC):
    """A way to write quantized Linears; ``linear`` is one's name, ``shape`` its [in, out].

    dtype: of all else, None to leave it as it is. arithmetic: what its readers compute in, None for any. stem: of the
    files' names.
    """

    dtype: DTypeLike | None = None
    arithmetic: DTypeLike | None = None
    stem = "model"

    @abc.abstractmethod
    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        """The tensors of a Linear. FpqError if it cannot have this shape."""

    @abc.abstractmethod
    def unsupported_reason(self, q: QTensor) -> str | None:
        """What such a weight (its shapes are enough) has that this scheme cannot hold; None if it can."""

    @abc.abstractmethod
    def tensors(self, q: QTensor) -> Tensors:
        """The tensors of a weight of which ``unsupported_reason`` says nothing. Jittable."""

    @abc.abstractmethod
    def config(self, ignored: list[str]) -> dict[str, Any] | None:
        """quantization_config of a checkpoint whose Linears are in this scheme, but for those ``ignored``."""

    def metadata(self, names: list[str]) -> dict[str, str]:
        """Of a file with tensors of these names."""
        return {"format": "pt"}


class ReadableScheme(StorageScheme):
    """One that is read, too, and gives back the weights it was given."""

    @abc.abstractmethod
    def stores(self, linear: str, names: Container[str]) -> bool:
        """Whether a checkpoint with tensors of these names has the Linear in this scheme."""

    @abc.abstractmethod
    def qtensor(self, linear: str, tensors: Mapping[str, Any], shape: tuple[int, int]) -> QTensor:
        """What such tensors stand for. Jittable."""


class DenseScheme(StorageScheme):
    """The bfloat16 weights that quantized Linears stand for, LoRC added: rounded, and read by every tool."""

    dtype = arithmetic = jnp.bfloat16

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        return {"weight": Expected((shape[::-1],), ("BF16",))}

    def unsupported_reason(self, q: QTensor) -> str | None:
        return None

    def tensors(self, q: QTensor) -> Tensors:
        return {"weight": dequantize(q, jnp.bfloat16).T}

    def config(self, ignored: list[str]) -> dict[str, Any] | None:
        return None
