"""Models in and out: our own directories (Orbax and sidecars), and Hugging Face folders and ids.

A directory that quantize wrote holds

    params/       the arrays, an Orbax checkpoint of {path: {part: array}}
    fpq.json      what arrays cannot say: version, each QTensor's spec and shape, every array's shape and dtype
    config.json   the model's, with the tokenizer's files, recipe.yaml and report.json

and appears under its name only when all of it is written.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fpq_jax._demo import demo_model_path, is_demo
from fpq_jax._errors import FpqError
from fpq_jax._qtensor import LowRank, QTensor
from fpq_jax._residency import Residency, check_residency
from fpq_jax._spec import QuantSpec
from fpq_jax._tree import Flat
from fpq_jax.models import (
    build_model,
    check_division,
    model_class_of,
    on_mesh,
    open_checkpoint,
    params_of,
    prepare_in_place,
    read_config,
    shardings,
    to_hf_config,
)

VERSION = 1
_MANIFEST = "fpq.json"
_PARAMS = "params"
_SIDECARS = ("config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt", "chat_template.jinja")
_HUB_FILES = ["*.json", "tokenizer.model", "*.txt"]


def resolve_model(model: str | Path | None) -> Path:
    """The folder of a model: a local one, a hub id's snapshot (fetched), or a demo model."""
    if model is None or is_demo(model):
        return demo_model_path(model)
    if Path(model).exists():
        return Path(model)
    name = str(model)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FpqError(
            f"There is no model folder {name}; name a folder, a hub id such as "
            "facebook/opt-125m, or demo-llama or demo-opt."
        )
    import huggingface_hub

    fetch = lambda weights: Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_HUB_FILES, weights]))
    try:
        # asking twice, unlike listing the repository, needs no network for a cached one
        folder = fetch("*.safetensors")
        return folder if any(folder.glob("model.safetensors*")) else fetch("pytorch_model*.bin")
    except Exception as error:  # network, authorization and missing repositories each have kinds of their own
        raise FpqError(
            f"There is no model folder {name}, and no such model could be fetched from the hub "
            f"({type(error).__name__}); check the name and the network."
        ) from error


def is_quantized_dir(folder: Path) -> bool:
    """Whether quantize (or ``save``) wrote this directory."""
    return (folder / _MANIFEST).is_file()


def save(directory: str | Path, model: Any) -> None:
    """Write a model (quantized or not) to a new directory that ``load`` reads; refused if it holds anything."""
    if model.prepared:
        raise FpqError("A model that was prepared to be run cannot be saved; load it without expand, and save that.")
    config = to_hf_config(model)
    with new_directory(Path(directory)) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_params(folder, params_of(model))


def load(directory: str | Path, *, dtype: Any = None, expand: Residency | None = None, mesh: Mesh | None = None) -> Any:
    """The model in a directory that quantize or ``save`` wrote, a Hugging Face folder, or a hub id.

    ``dtype`` is what the unquantized parameters are held in, by default as stored. ``expand`` prepares the model to be
    run (see ``prepare``): "load" turns packed 4-bit codes into FP8 once, exactly, where their scales allow it; "step"
    leaves them packed, half the memory, and expands them in each product. None leaves everything as stored, for
    ``save``. ``mesh`` (see ``make_mesh``) divides the weights over its "model" axis as they are read; each
    device reads its own part. Raises FpqError.
    """
    if expand is not None:
        check_residency(expand)
    folder = resolve_model(directory)
    if is_quantized_dir(folder):
        config = read_config(folder)
        model_class = model_class_of(config)
        model_config = model_class.Config.from_hf(config)
        place = None if mesh is None else partial(shardings, model_class, model_config, mesh=mesh)
        params = read_params(folder, place)
        if dtype is not None:
            params = {p: v if isinstance(v, QTensor) else v.astype(dtype) for p, v in params.items()}
    else:
        checkpoint = open_checkpoint(folder)
        model_class, model_config = checkpoint.model_class, checkpoint.model_config
        if mesh is not None:
            check_division(model_class, model_config, mesh)
        params = checkpoint.read(jnp.dtype(dtype or checkpoint.dtype))
        if mesh is not None:
            params = jax.tree.map(_distributed, params, shardings(model_class, model_config, params, mesh))
    model = build_model(model_class, model_config, params)
    model = model if mesh is None else on_mesh(model, mesh)
    del params  # so that what preparing replaces is freed
    return model if expand is None else prepare_in_place(model, expand)


def _distributed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def check_output(directory: Path) -> None:
    """FpqError if ``directory`` cannot become a new result."""
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise FpqError(f"The output {directory} exists and is not empty; remove it or choose another --output.")
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise FpqError(f"The output {directory} cannot be made: {parent} is no writable folder.")


@contextmanager
def new_directory(directory: Path):
    """A folder to fill that becomes ``directory`` by one rename when the block ends well, and vanishes if it fails."""
    check_output(directory)
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.unfinished-", dir=directory.parent))
    try:
        yield unfinished
        unfinished.chmod(0o777 & ~_umask())
        if directory.is_dir():
            directory.rmdir()  # empty, or this fails
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def copy_sidecars(source: Path, folder: Path) -> None:
    """Copy config.json and the tokenizer's files, without which arrays are no model."""
    for file in (f for pattern in _SIDECARS for f in source.glob(pattern) if f.is_file()):
        shutil.copyfile(file, folder / file.name)


def write_params(folder: Path, params: Flat) -> None:
    """Write params/ and fpq.json."""
    import orbax.checkpoint as ocp

    arrays = {path: _parts(leaf) for path, leaf in params.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / _PARAMS, jax.tree.map(jnp.asarray, arrays))
    manifest = {
        "version": VERSION,
        "quantized": {path: _facts(q) for path, q in params.items() if isinstance(q, QTensor)},
        "arrays": {
            path: {part: {"shape": list(a.shape), "dtype": str(a.dtype)} for part, a in parts.items()}
            for path, parts in arrays.items()
        },
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_params(folder: Path, place: Callable[[Flat], Flat] | None = None) -> Flat:
    """What ``write_params`` wrote, on the default device. FpqError for a directory that is damaged.

    ``place`` says where each array belongs instead, from parameters that are shapes (see ``models.shardings``).
    """
    import orbax.checkpoint as ocp

    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        version = manifest["version"]
        if version != VERSION:
            raise FpqError(f"{folder} has format version {version}; this fpq_jax reads version {VERSION}.")
        shapes = {
            path: {part: jax.ShapeDtypeStruct(tuple(a["shape"]), jnp.dtype(a["dtype"])) for part, a in parts.items()}
            for path, parts in manifest["arrays"].items()
        }
        quantized = {path: _from_facts(facts) for path, facts in manifest["quantized"].items()}
        leaves = {path: _leaf(parts, quantized.get(path)) for path, parts in shapes.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise FpqError(f"{folder / _MANIFEST} is damaged ({type(error).__name__}: {error}).") from error
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: device, leaves) if place is None else place(leaves)
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        {path: _parts(leaf) for path, leaf in where.items()},
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(folder.absolute() / _PARAMS, target)
    except Exception as error:  # orbax and tensorstore raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FpqError(
            f"The arrays in {folder / _PARAMS} cannot be read; the directory is damaged ({reason})."
        ) from error
    return {path: _leaf(parts, quantized.get(path)) for path, parts in arrays.items()}


def stored_bytes(params: Flat) -> int:
    """Bytes of all arrays."""
    return sum(array.nbytes for array in jax.tree.leaves(params))


_ARRAYS = [f.name for f in dataclasses.fields(QTensor) if not f.metadata.get("static") and f.name != "low_rank"]


def _parts(leaf: Any) -> dict[str, Any]:
    """The arrays of a parameter by name; a plain array is called "value"."""
    if not isinstance(leaf, QTensor):
        return {"value": leaf}
    parts = {name: getattr(leaf, name) for name in _ARRAYS}
    if leaf.low_rank is not None:
        parts |= {f"low_rank_{f.name}": getattr(leaf.low_rank, f.name) for f in dataclasses.fields(LowRank)}
    return {name: array for name, array in parts.items() if array is not None}


def _leaf(parts: dict[str, Any], make: Callable[..., QTensor] | None) -> Any:
    """The inverse of ``_parts``."""
    if make is None:
        return parts["value"]
    low_rank = None
    if "low_rank_a" in parts:
        low_rank = LowRank(parts["low_rank_a"], parts["low_rank_b"], parts.get("low_rank_scale"))
    return make(low_rank=low_rank, **{name: parts.get(name) for name in _ARRAYS})


def _facts(q: QTensor) -> dict[str, Any]:
    """A QTensor's static facts as JSON."""
    return {"shape": list(q.shape), **q.spec.to_dict()}


def _from_facts(facts: dict[str, Any]) -> Callable[..., QTensor]:
    facts = dict(facts)
    shape = tuple(facts.pop("shape"))
    spec = QuantSpec(**facts)
    return lambda **arrays: QTensor(spec=spec, shape=shape, **arrays)
