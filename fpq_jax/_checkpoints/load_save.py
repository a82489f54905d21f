"""Models and trees, from a folder and to one."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._checkpoints.model_folder import QuantizedCheckpoint, write_params
from fpq_jax._checkpoints.sources import abstract_leaves, open_model, resolve_model
from fpq_jax._checkpoints.tree_folder import is_tree_dir, read_tree, write_tree
from fpq_jax._errors import FpqError
from fpq_jax._matmul.weight_layouts import WeightLayout, check_any_for_fragments, check_layout
from fpq_jax._storage.digests import write_digests
from fpq_jax._storage.orbax_parts import arrays_of
from fpq_jax._support.machine import arithmetic_dtype
from fpq_jax._support.new_directory import new_directory
from fpq_jax._support.trees import Flat
from fpq_jax.models.decoder import Decoder
from fpq_jax.models.parameters import build_model, part_names
from fpq_jax.models.prepare import on_mesh, prepare_in_place
from fpq_jax.models.sharding import check_divisible, shardings


def save(directory: str | Path, model: Any) -> None:
    """Saves a model or a tree of parameters to a new directory, from which ``load`` loads it.

    The directory appears when it is complete.

    Args:
        directory: where to write; it must not exist or be empty.
        model: one of this library's models, quantized or not, or any tree of arrays and QTensors.

    Raises:
        FpqError: the directory is not empty or cannot be written, or the model was prepared (see ``prepare``).

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> params = {"kernel": fpq.quantize_array(w, fpq.QuantSpec(group_size=32)), "bias": jnp.zeros(32)}
        >>> fpq.save("model-w4a8", params)
        >>> fpq.load("model-w4a8", like=params)["kernel"].shape
        (64, 32)
    """
    if not isinstance(model, Decoder):
        with new_directory(Path(directory)) as folder:
            write_tree(folder, model)
        return
    if model.prepared:
        raise FpqError("A model that was prepared to be run cannot be saved; load it without weights, and save that.")
    config = model.config.to_hf()
    with new_directory(Path(directory)) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_params(folder, model)
        write_digests(folder, but=["config.json"])  # whose place the original's may take, with the tokenizer's files


def load(
    directory: str | Path,
    *,
    dtype: Any = None,
    weights: WeightLayout | None = None,
    mesh: Mesh | None = None,
    like: Any = None,
    verify: bool = True,
) -> Any:
    """Loads a model, or a tree of parameters that ``save`` wrote.

    Args:
        directory: what ``python -m fpq_jax.quantize`` or ``save`` wrote, a Hugging Face folder, a hub id, or a demo
            model (``"demo-llama"``, ``"demo-opt"``).
        dtype: of the parameters that are not quantized; by default as stored (float32 for float16 that is to run on a
            CPU, which has no such products).
        weights: the layout of quantized weights to run with (see ``prepare``). ``"fp8"`` expands packed 4-bit codes to
            FP8 once, exactly, where their scales allow it; ``"packed"`` leaves them packed, half the memory, and
            expands them in each product; ``"fragments"`` lays them out for this library's own GPU kernel, which has not
            been measured on a GPU yet. None leaves everything as stored, for ``save``.
        mesh: devices over whose "model" axis the weights are divided as they are read, each device reading its own part
            (see ``make_mesh``).
        like: for a tree that is not one of this library's models, the tree before or after it was quantized, of arrays
            or shapes, or a function that makes it. It gives the structure and, with its shardings, the place of each
            array. No other option but ``verify`` applies then (see ``expand_params``).
        verify: whether to look, by its digest, that each file is what ``quantize``, ``save`` or ``export`` wrote, which
            takes half a second for a gigabyte.

    Returns:
        The model, called as ``model(tokens [B, T])`` for logits [B, T, V], or the tree.

    Raises:
        FpqError: there is no such model or it cannot be read, a file is not what was written, it does not divide over
            the mesh, or an option does not apply.

    Example:
        >>> model = fpq.load("demo-llama", weights="fp8")
        >>> jax.eval_shape(model, jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 4096)
    """
    if weights is not None:
        check_layout(weights, None if mesh is None else mesh.size)
    folder = resolve_model(directory)
    if like is not None or is_tree_dir(folder):
        return _load_tree(folder, like, verify, dtype=dtype, weights=weights, mesh=mesh)
    checkpoint = open_model(folder, verify=verify)
    if weights is not None:
        check_any_for_fragments(abstract_leaves(checkpoint), weights)
    if mesh is not None:
        check_divisible(checkpoint.model_class, checkpoint.model_config, mesh)
    if weights is not None and dtype is None and arithmetic_dtype(checkpoint.dtype) != checkpoint.dtype:
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
    return model if weights is None else prepare_in_place(model, weights)


def _load_tree(folder: Path, like: Any, verify: bool, **options: Any) -> Any:
    if not is_tree_dir(folder):
        raise FpqError(f"{folder} is a model of fpq_jax's own and no other tree; load it without like.")
    if like is None:
        raise FpqError(
            f"{folder} holds a tree; say its structure: load(directory, like=params or a function that makes it)."
        )
    if given := [name for name, value in options.items() if value is not None]:
        raise FpqError(f"{folder} holds a tree, to which {given[0]} does not apply; load it with like alone.")
    return read_tree(folder, like, verify=verify)


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
