"""Models in and out: our own directories (Orbax and sidecars), and Hugging Face folders and ids.

A directory that quantize wrote holds

    params/       the arrays, an Orbax checkpoint for each part: embedding, layers.0, ..., head
    fpq.json      what arrays cannot say: version, each QTensor's spec and shape, every array's shape and dtype
    config.json   the model's, with the tokenizer's files, recipe.yaml and report.json

and appears under its name only when all of it is written.
"""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fpq_jax._atomic import write_json
from fpq_jax._demo import demo_model_path, is_demo
from fpq_jax._errors import FpqError
from fpq_jax._layerwise import arithmetic_dtype
from fpq_jax._output import new_directory
from fpq_jax._packed import STEM
from fpq_jax._parts import MANIFEST, VERSION, Entry, PartsWriter, Sharding, abstract_part, arrays_of, read_part
from fpq_jax._qtensor import QTensor
from fpq_jax._residency import Residency, check_any_for_kernel, check_residency
from fpq_jax._tree import Flat
from fpq_jax._tree_checkpoint import is_tree_dir, read_tree, write_tree
from fpq_jax._unfinished import is_unfinished, unfinished_folder
from fpq_jax.models import (
    QUANTIZATION_KEYS,
    Decoder,
    HfCheckpoint,
    build_model,
    check_division,
    model_class_of,
    on_mesh,
    open_checkpoint,
    params_of,
    part_names,
    part_of,
    prepare_in_place,
    read_config,
    shardings,
    to_hf_config,
)

_SIDECARS = ("config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt", "chat_template.jinja")
_HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]


def resolve_model(model: str | Path | None) -> Path:
    """The folder of a model: a local one, a hub id's snapshot (fetched), or a demo model."""
    if model is None or is_demo(model):
        return demo_model_path(model)
    if Path(model).exists():
        if is_unfinished(Path(model)):
            raise FpqError(f"{model} is an unfinished run; start its quantize command again to finish it.")
        return Path(model)
    name = str(model)
    if is_unfinished(unfinished_folder(Path(model))):
        raise FpqError(f"{model} is not finished; start its quantize command again to finish it.")
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
        found = any(any(folder.glob(f"{stem}.safetensors*")) for stem in ("model", STEM))
        return folder if found else fetch("pytorch_model*.bin")
    except Exception as error:  # network, authorization and missing repositories each have kinds of their own
        raise FpqError(
            f"There is no model folder {name}, and no such model could be fetched from the hub "
            f"({type(error).__name__}); check the name and the network."
        ) from error


def is_quantized_dir(folder: Path) -> bool:
    """Whether quantize (or ``save``) wrote this directory."""
    return (folder / MANIFEST).is_file()


def _one_device(path: str, part: str) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


class QuantizedCheckpoint:
    """A directory that quantize (or ``save``) wrote, to be read part by part. FpqError if it is damaged."""

    quantized = True

    def __init__(self, folder: Path):
        if is_tree_dir(folder):
            raise FpqError(
                f"{folder} holds a tree of another model; load it in Python, with fpq_jax.load(folder, like=...)."
            )
        self.folder = folder
        self.config = read_config(folder)
        self.model_class = model_class_of(self.config)
        self.model_config = self.model_class.Config.from_hf(self.config)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version = manifest["version"]
            if version != VERSION:
                raise FpqError(f"{folder} has format version {version}; this fpq_jax reads version {VERSION}.")
            self.entries: dict[str, Entry] = {name: manifest["parts"][name] for name in part_names(self.model_config)}
            parts = [abstract_part(entry) for entry in self.entries.values()]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise FpqError(f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}).") from error
        plain = [str(leaf.dtype) for part in parts for leaf in part.values() if not isinstance(leaf, QTensor)]
        self.dtype = jnp.dtype(max(set(plain), key=plain.count))

    def abstract_part(self, name: str) -> Flat:
        """The parameters of a part without values."""
        return abstract_part(self.entries[name])

    def read_part(self, name: str, dtype: Any = None, sharding: Sharding = _one_device) -> Flat:
        """The parameters of a part, what is not quantized in ``dtype``, by default as stored."""
        params = read_part(self.folder, name, self.entries[name], sharding)
        if dtype is None:
            return params
        return {path: v if isinstance(v, QTensor) else v.astype(dtype) for path, v in params.items()}


def open_original(folder: Path) -> HfCheckpoint:
    """A checkpoint to quantize, opened and checked; FpqError for what fpq_jax has quantized already."""
    if not is_quantized_dir(folder):
        checkpoint = open_checkpoint(folder)
        if not checkpoint.is_packed:
            return checkpoint
    raise FpqError(f"{folder} is already quantized; name the original checkpoint.")


def open_model(folder: Path) -> QuantizedCheckpoint | HfCheckpoint:
    """A model's folder of either kind, opened and checked."""
    return QuantizedCheckpoint(folder) if is_quantized_dir(folder) else open_checkpoint(folder)


def abstract_leaves(checkpoint: QuantizedCheckpoint | HfCheckpoint) -> Iterator[Any]:
    """All parameters of a checkpoint, without values."""
    for name in part_names(checkpoint.model_config):
        yield from checkpoint.abstract_part(name).values()


def save(directory: str | Path, model: Any) -> None:
    """Write a model (quantized or not) to a new directory that ``load`` reads; refused if it holds anything.

    ``model``: one of our models, or any tree of arrays and QTensors.
    """
    if not isinstance(model, Decoder):
        with new_directory(Path(directory)) as folder:
            write_tree(folder, model)
        return
    if model.prepared:
        raise FpqError("A model that was prepared to be run cannot be saved; load it without expand, and save that.")
    config = to_hf_config(model)
    with new_directory(Path(directory)) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_params(folder, model)


def load(
    directory: str | Path,
    *,
    dtype: Any = None,
    expand: Residency | None = None,
    mesh: Mesh | None = None,
    like: Any = None,
) -> Any:
    """The model in a directory that quantize or ``save`` wrote, a Hugging Face folder, or a hub id.

    ``dtype`` is what the unquantized parameters are held in, by default as stored (float32 for float16 to be run on a
    CPU, which has no such products). ``expand`` prepares the model to be run (see ``prepare``): "load" turns packed
    4-bit codes into FP8 once, exactly, where their scales allow it; "step" leaves them packed, half the memory, and
    expands them in each product; "kernel" lays them out for our own kernel, which has not been measured on a GPU yet.
    None leaves everything as stored, for
    ``save``. ``mesh`` (see ``make_mesh``) divides the weights over its "model" axis as they are read; each
    device reads its own part. Raises FpqError.

    For any other tree that ``save`` wrote: ``like`` is the tree before or after it was quantized, of arrays or
    shapes, or a function that makes it, and says the structure, and with its shardings where each array goes; no other
    option applies (see ``expand_params``).
    """
    if expand is not None:
        check_residency(expand, None if mesh is None else mesh.size)
    folder = resolve_model(directory)
    if like is not None or is_tree_dir(folder):
        return _load_tree(folder, like, dtype=dtype, expand=expand, mesh=mesh)
    checkpoint = open_model(folder)
    if expand is not None:
        check_any_for_kernel(abstract_leaves(checkpoint), expand)
    if mesh is not None:
        check_division(checkpoint.model_class, checkpoint.model_config, mesh)
    if expand is not None and dtype is None and arithmetic_dtype(checkpoint.dtype) != checkpoint.dtype:
        dtype = arithmetic_dtype(checkpoint.dtype)
    if dtype is None and isinstance(checkpoint, HfCheckpoint):
        dtype = checkpoint.dtype
    params: Flat = {}
    for name in part_names(checkpoint.model_config):
        # on the devices part by part: the host holds one layer at a time
        params |= _read_onto(checkpoint, name, dtype, mesh)
    model = build_model(checkpoint.model_class, checkpoint.model_config, params)
    model = model if mesh is None else on_mesh(model, mesh)
    del params  # so that what preparing replaces is freed
    return model if expand is None else prepare_in_place(model, expand)


def _load_tree(folder: Path, like: Any, **options: Any) -> Any:
    if not is_tree_dir(folder):
        raise FpqError(f"{folder} is a model of fpq_jax's own and no other tree; load it without like.")
    if like is None:
        raise FpqError(
            f"{folder} holds a tree; say its structure: load(directory, like=params or a function that makes it)."
        )
    if given := [name for name, value in options.items() if value is not None]:
        raise FpqError(f"{folder} holds a tree, to which {given[0]} does not apply; load it with like alone.")
    return read_tree(folder, like)


def _distributed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _read_onto(checkpoint: QuantizedCheckpoint | HfCheckpoint, name: str, dtype: Any, mesh: Mesh | None) -> Flat:
    """A part's parameters on the default device, or divided over the mesh."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, checkpoint.read_part(name, dtype))
    place = partial(shardings, checkpoint.model_class, checkpoint.model_config, mesh=mesh)
    if isinstance(checkpoint, QuantizedCheckpoint):
        where = {path: arrays_of(leaf) for path, leaf in place(checkpoint.abstract_part(name)).items()}
        return checkpoint.read_part(name, dtype, lambda path, part: where[path][part])
    params = checkpoint.read_part(name, dtype)
    return jax.tree.map(_distributed, params, place(params))


def copy_sidecars(source: Path, folder: Path) -> None:
    """Copy config.json and the tokenizer's files, without which arrays are no model."""
    for file in sidecars(source):
        shutil.copyfile(file, folder / file.name)
    config = read_config(folder)
    # what was said of the source's own weights is not so of those to come
    if any([config.pop(key, None) for key in QUANTIZATION_KEYS]):
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def sidecars(folder: Path) -> list[Path]:
    """config.json and the tokenizer's files."""
    return sorted({f for pattern in _SIDECARS for f in folder.glob(pattern) if f.is_file()})


def write_params(folder: Path, model: Any) -> None:
    """Write params/ and fpq.json."""
    parts: dict[str, Flat] = {name: {} for name in part_names(model.config)}  # one may have no parameters
    for path, leaf in params_of(model).items():
        parts[part_of(type(model), path)][path] = leaf
    writer = PartsWriter(folder)
    try:
        entries = {name: writer.write(name, part) for name, part in parts.items()}
        writer.wait()
    finally:
        writer.close()
    write_manifest(folder, entries)


def write_manifest(folder: Path, entries: dict[str, Entry]) -> None:
    """Write fpq.json, which makes the folder a model."""
    write_json(folder / MANIFEST, {"version": VERSION, "parts": entries})
