"""Any tree in and out: the arrays of its leaves in an Orbax checkpoint, under their paths.

    params/tree   the arrays
    fpq.json      version, "tree", each QTensor's spec, shape and axes, every array's shape and dtype
    digests.json  of all other files

Leaves that are no arrays are not written; the tree that is loaded into has them.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fpq_jax._errors import FpqError
from fpq_jax._matmul.fp4_kernel.fragments import of_fragments
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._numerics.qtensor import QTensor
from fpq_jax._numerics.qtensor_sharding import shardings_like
from fpq_jax._storage.digests import Digests, write_digests
from fpq_jax._storage.orbax_parts import MANIFEST, PARAMS, VERSION, PartsWriter, abstract_part, arrays_of, read_part
from fpq_jax._support.files import read_json_object, write_json
from fpq_jax._support.trees import Flat, merge_arrays, named_leaves, split_arrays
from fpq_jax._transform.quantized import axes_of, is_traced

_TREE = "tree"


def write_tree(folder: Path, tree: Any) -> None:
    """Write a tree's arrays and what they cannot say; what is laid out for our kernel is written as it was before."""
    named, _ = named_leaves(tree, is_quantized)
    params = {path or "value": leaf for path, leaf in named if is_traced(leaf)}
    params = {path: of_fragments(leaf) if is_quantized(leaf) else leaf for path, leaf in params.items()}
    for path, leaf in params.items():
        if any(isinstance(array, jax.ShapeDtypeStruct) or 0 in array.shape for array in arrays_of(leaf).values()):
            raise FpqError(f"{path} has no values, and cannot be saved.")
        if not is_quantized(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise FpqError(f"{path} is a random key, which cannot be saved; save the parameters alone.")
    if not params:
        raise FpqError("There is nothing to save: the tree has no arrays.")
    writer = PartsWriter(folder)
    try:
        entry = writer.write(_TREE, params)
        writer.wait()
    finally:
        writer.close()
    write_json(folder / MANIFEST, {"version": VERSION, _TREE: entry})
    write_digests(folder)


def is_tree_dir(folder: Path) -> bool:
    """Whether ``write_tree`` wrote this folder."""
    return (folder / MANIFEST).is_file() and (folder / PARAMS / _TREE).is_dir()


def read_tree(folder: Path, like: Any, *, verify: bool = True) -> Any:
    """The tree that ``write_tree`` wrote, in the structure of ``like``, each array straight onto its sharding there.

    ``like``: the tree before or after it was quantized, of arrays or shapes, or a function that makes it. ``verify``:
    FpqError if a file is not what was written.
    """
    Digests(folder, verify=verify).check(lambda name: True)
    if callable(like) and jax.tree.leaves(like) == [like]:  # an Equinox module is callable too
        like = _made_by(like)
    manifest = read_json_object(folder / MANIFEST)
    if manifest.get("version") != VERSION:
        raise FpqError(f"{folder} has format version {manifest.get('version')}; this fpq_jax reads version {VERSION}.")
    entry = manifest[_TREE]
    try:
        stored = abstract_part(entry)
    except (KeyError, TypeError, AttributeError, FpqError) as error:
        raise FpqError(f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}).") from error
    named, structure = named_leaves(like, is_quantized)
    wanted = {path or "value": leaf for path, leaf in named if is_traced(leaf)}
    _check(folder, stored, wanted)
    where = {path: arrays_of(_shardings(stored[path], leaf)) for path, leaf in wanted.items()}
    leaves = read_part(folder, _TREE, entry, lambda path, part: where[path][part])
    return jax.tree.unflatten(structure, [leaves[path or "value"] if is_traced(leaf) else leaf for path, leaf in named])


def _check(folder: Path, stored: Flat, wanted: Flat) -> None:
    """FpqError that names what differs between a checkpoint and the tree it is to be loaded into."""
    problems = [f"{path} is not in it" for path in wanted if path not in stored]
    problems += [f"it has {path}, which the tree has not" for path in stored if path not in wanted]
    for path in wanted.keys() & stored.keys():
        if (have := _shape(stored[path])) != (asked := _shape(wanted[path])):
            problems.append(f"{path} has shape {have} there and {asked} in the tree")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise FpqError(f"{folder} does not fit the tree: {'; '.join(sorted(problems)[:3])}{more}.")


def _shape(leaf: Any) -> tuple[int, ...]:
    return axes_of(leaf).shape(leaf.stack) if is_quantized(leaf) else tuple(leaf.shape)


def _shardings(stored: Any, like: Any) -> Any:
    """Where each array of a leaf goes."""
    same = str(jax.tree.structure(like)) == str(jax.tree.structure(stored))
    if isinstance(like, QTensor) and same:
        return jax.tree.map(_sharding, like)
    sharding = _sharding(None if is_quantized(like) else like)
    if not isinstance(stored, QTensor):
        return sharding
    if isinstance(sharding, NamedSharding):
        return shardings_like(stored, sharding)
    return jax.tree.map(lambda _: sharding, stored)


def _made_by(init: Any) -> Any:
    """The shapes of what a function makes, whose leaves that are no arrays are as it made them."""
    kept: list[Any] = []

    def arrays() -> list[Any]:
        leaves, structure = jax.tree.flatten(init(), is_leaf=is_quantized)
        found, others = split_arrays(leaves, is_traced)
        kept[:] = structure, others
        return found

    shapes = jax.eval_shape(arrays)
    structure, others = kept
    return jax.tree.unflatten(structure, merge_arrays(shapes, others))


def _sharding(array: Any) -> jax.sharding.Sharding:
    own = getattr(array, "sharding", None)
    return own if own is not None else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
