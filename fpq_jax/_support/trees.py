"""Parameters as flat dicts: {"layers.0.mlp.up_proj.kernel": leaf}; nested ones only where a library wants them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import traverse_util

from fpq_jax._errors import FpqError

Flat = dict[str, Any]


def flatten(tree: Mapping[Any, Any]) -> Flat:
    """The leaves of nested dicts under their dotted paths."""
    flat = traverse_util.flatten_dict(tree)
    return {".".join(map(str, path)): value for path, value in flat.items()}


def unflatten(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse of ``flatten``; keys of digits become numbers, as NNX has them for lists."""
    key = lambda name: int(name) if name.isdigit() else name
    return traverse_util.unflatten_dict({tuple(map(key, path.split("."))): v for path, v in flat.items()})


def below(flat: Mapping[str, Any], prefix: str) -> Flat:
    """The entries whose path begins with ``prefix``, which is cut off."""
    return {path[len(prefix) :]: value for path, value in flat.items() if path.startswith(prefix)}


def stored_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of what shapes stand for."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def named_leaves(tree: Any, is_leaf: Any = None) -> tuple[list[tuple[str, Any]], Any]:
    """Each leaf of any pytree with its dotted path, and the tree's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    named = [(path_name(path), leaf) for path, leaf in leaves]
    if len(known := {path for path, _ in named}) < len(named):
        twice = next(path for path in known if sum(path == other for other, _ in named) > 1)
        raise FpqError(f"Two leaves of the tree have the path {twice}; name them otherwise.")
    return named, structure


def path_name(path: Any) -> str:
    """A key path as a name: ``params.layers.0.kernel``. An NNX variable's ``value`` is left out."""
    of_variable = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(path[:-1] if of_variable else path, simple=True, separator=".")


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def split_arrays(leaves: Sequence[Any], belongs: Callable[[Any], bool] = is_array) -> tuple[list[Any], tuple[Any, ...]]:
    """(the leaves that ``belongs`` says are arrays, the others with a mark in their places)."""
    return [leaf for leaf in leaves if belongs(leaf)], tuple(_ARRAY if belongs(leaf) else leaf for leaf in leaves)


def merge_arrays(arrays: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The inverse of ``split_arrays``."""
    values = iter(arrays)
    return [next(values) if other is _ARRAY else other for other in others]


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit`` of a function whose arguments may have leaves that are no arrays, as Equinox's models do; such leaves
    have to be hashable."""

    @partial(jax.jit, static_argnums=1)
    def flat(arrays: list[Any], static: tuple[Any, tuple[Any, ...]]) -> Any:
        structure, others = static
        return function(*jax.tree.unflatten(structure, merge_arrays(arrays, others)))

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        arrays, others = split_arrays(leaves)
        return flat(arrays, (structure, others))

    return call


_ARRAY = object()


@dataclass(frozen=True, eq=False)
class ByIdentity:
    """A function that is equal to nothing but itself, whatever it is, so that it can be a static argument."""

    function: Callable[..., Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self.function is other.function

    def __hash__(self) -> int:
        return id(self.function)
