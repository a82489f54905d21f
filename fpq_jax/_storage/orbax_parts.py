"""Parameters in parts, each an Orbax checkpoint of its own: what is written and read one layer at a time.

    params/embedding, params/layers.0, ..., params/head

Each holds {path: {part of the leaf: array}}; what arrays cannot say (a QTensor's spec and shape, every array's shape
and dtype) is an entry in JSON beside them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fpq_jax._errors import FpqError
from fpq_jax._numerics.qtensor import Axes, LowRank, QTensor
from fpq_jax._numerics.spec import QuantSpec
from fpq_jax._support.trees import Flat

PARAMS = "params"
MANIFEST = "fpq.json"
VERSION = 2  # of what is written, in MANIFEST
_REMEDY = "see to it, for instance make room there, and start the same command again"
Entry = dict[str, Any]  # {"quantized": {path: facts}, "arrays": {path: {part: {"shape", "dtype"}}}}
Sharding = Callable[[str, str], jax.sharding.Sharding]  # of an array, by its path and its name in the leaf


class PartsWriter:
    """Writes parts in the background: ``write`` returns when the arrays may be let go, ``wait`` when all is written."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self._folder = folder.absolute() / PARAMS
        self._checkpointer: Any = ocp.StandardCheckpointer()

    def write(self, name: str, params: Flat) -> Entry:
        """Begin to write a part; the entry that describes it."""
        arrays = {path: arrays_of(leaf) for path, leaf in params.items()}
        with _said(f"{name} cannot be written to {self._folder}", _REMEDY):
            self._checkpointer.wait_until_finished()
            if arrays:
                self._checkpointer.save(self._folder / name, jax.tree.map(jnp.asarray, arrays))
            else:
                (self._folder / name).mkdir(parents=True, exist_ok=True)
        return entry_of(params)

    def wait(self) -> None:
        """Until everything is on the disk."""
        with _said(f"{self._folder} cannot be written", _REMEDY):
            self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """End the background's threads."""
        self._checkpointer.close()


def read_part(folder: Path, name: str, entry: Entry, sharding: Sharding) -> Flat:
    """A part as it was written, each array restored straight onto its sharding. FpqError if it is damaged."""
    if not entry["arrays"]:
        return {}
    import orbax.checkpoint as ocp

    try:
        target = {
            path: {
                part: jax.ShapeDtypeStruct(tuple(a["shape"]), jnp.dtype(a["dtype"]), sharding=sharding(path, part))
                for part, a in parts.items()
            }
            for path, parts in entry["arrays"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise FpqError(f"What {folder} says of {name} is damaged ({type(error).__name__}: {error}).") from error
    with (
        _said(f"The arrays in {folder / PARAMS / name} cannot be read", "the directory is damaged"),
        ocp.StandardCheckpointer() as checkpointer,
    ):
        arrays = checkpointer.restore(folder.absolute() / PARAMS / name, target)
    return _leaves(arrays, entry)


def abstract_part(entry: Entry) -> Flat:
    """A part's leaves without values: ShapeDtypeStructs, and QTensors of such."""
    arrays = {
        path: {part: jax.ShapeDtypeStruct(tuple(a["shape"]), jnp.dtype(a["dtype"])) for part, a in parts.items()}
        for path, parts in entry["arrays"].items()
    }
    return _leaves(arrays, entry)


def entry_of(params: Flat) -> Entry:
    """What a part's arrays cannot say."""
    return {
        "quantized": {path: _facts(q) for path, q in params.items() if isinstance(q, QTensor)},
        "arrays": {
            path: {part: {"shape": list(a.shape), "dtype": str(a.dtype)} for part, a in arrays_of(leaf).items()}
            for path, leaf in params.items()
        },
    }


@contextmanager
def _said(what: str, remedy: str) -> Iterator[None]:
    """Errors of Orbax and tensorstore, of many kinds, as one sentence; a device's own are not told here."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FpqError(f"{what}; {remedy} ({reason}).") from error


_ARRAYS = [f.name for f in dataclasses.fields(QTensor) if not f.metadata.get("static") and f.name != "low_rank"]


def arrays_of(leaf: Any) -> dict[str, Any]:
    """The arrays of a parameter by name; a plain array is called "value"."""
    if not isinstance(leaf, QTensor):
        return {"value": leaf}
    parts = {name: getattr(leaf, name) for name in _ARRAYS}
    if leaf.low_rank is not None:
        parts |= {f"low_rank_{f.name}": getattr(leaf.low_rank, f.name) for f in dataclasses.fields(LowRank)}
    return {name: array for name, array in parts.items() if array is not None}


def _leaves(arrays: dict[str, dict[str, Any]], entry: Entry) -> Flat:
    """The inverse of ``arrays_of`` for each path."""
    try:
        quantized = {path: _from_facts(facts) for path, facts in entry["quantized"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise FpqError(f"What is said of quantized parameters is damaged ({type(error).__name__}: {error}).") from error
    return {path: _leaf(parts, quantized.get(path)) for path, parts in arrays.items()}


def _leaf(parts: dict[str, Any], make: Callable[..., QTensor] | None) -> Any:
    if make is None:
        return parts["value"]
    return with_arrays(make(codes=None), parts)


def with_arrays(q: QTensor, parts: Mapping[str, Any]) -> QTensor:
    """A QTensor with these arrays, named as ``arrays_of`` does, and no others."""
    low_rank = None
    if "low_rank_a" in parts:
        low_rank = LowRank(parts["low_rank_a"], parts["low_rank_b"], parts.get("low_rank_scale"))
    arrays: Any = {name: parts.get(name) for name in _ARRAYS}
    return dataclasses.replace(q, low_rank=low_rank, **arrays)


def _facts(q: QTensor) -> dict[str, Any]:
    """A QTensor's static facts as JSON."""
    axes = (
        {}
        if q.axes is None
        else {"axes": {"kinds": list(q.axes.kinds), "sizes": list(q.axes.sizes), "dtype": q.axes.dtype}}
    )
    return {"shape": list(q.shape), **axes, **q.spec.to_dict()}


def _from_facts(facts: dict[str, Any]) -> Callable[..., QTensor]:
    facts = dict(facts)
    shape, axes = tuple(facts.pop("shape")), facts.pop("axes", None)
    if axes is not None:
        axes = Axes(tuple(axes["kinds"]), tuple(axes["sizes"]), axes["dtype"])
    spec = QuantSpec(**facts)
    return lambda **arrays: QTensor(spec=spec, shape=shape, axes=axes, **arrays)
