"""Parameters as flat dicts: {"layers.0.mlp.up_proj.kernel": leaf}; nested ones only where a library wants them."""

from collections.abc import Mapping
from typing import Any

import jax

Flat = dict[str, Any]


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Flat:
    """The leaves of nested dicts under their dotted paths."""
    flat: Flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse of ``flatten``; keys of digits become numbers, as NNX has them for lists."""
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def below(flat: Mapping[str, Any], prefix: str) -> Flat:
    """The entries whose path begins with ``prefix``, which is cut off."""
    return {path[len(prefix) :]: value for path, value in flat.items() if path.startswith(prefix)}


def stored_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of what shapes stand for."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
