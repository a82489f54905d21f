"""Which parameters of a tree a recipe is about, and what their axes are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from fpq_jax._algorithms.linear_recipe import LinearRecipe
from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._errors import FpqError
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._numerics.qtensor import Axes

_UNKNOWN_AXES = (
    "which of its {} axes are inputs is not known; say it in a rule (axes: in out out), or give what "
    "find_kernels or collect_hessians found"
)


@dataclass(frozen=True)
class ParamUse:
    """Describes what a function does with a parameter of two or more axes.

    Attributes:
        axes: what each axis is, if the parameter is the kernel of a product; otherwise None.
        reason: why it is not one, or not only one; ``""`` for a kernel.

    Example:
        >>> apply = lambda params, x: x @ params["w"] + params["w"].sum()
        >>> params = {"w": jnp.ones((8, 4))}
        >>> fpq.find_kernels(apply, params, jnp.ones((2, 8)))["w"].reason
        'it is also used by reduce_sum'
    """

    axes: Axes | None
    reason: str = ""


class Chosen(NamedTuple):
    """A kernel, and what is to be done to it."""

    recipe: LinearRecipe
    axes: Axes


class Selection(NamedTuple):
    """chosen: by path. left: of other parameters of two or more axes, why they stay as they are."""

    chosen: dict[str, Chosen]
    left: dict[str, str]


def is_parameter(leaf: Any) -> bool:
    """Whether a leaf is an array that could be a kernel."""
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    return leaf.dtype.itemsize > 1 and len(leaf.shape) > 1 and 0 not in leaf.shape


def select(
    recipe: Recipe,
    leaves: Mapping[str, Any],
    uses: Mapping[str, ParamUse] | None = None,
    prefix: str = "",
    lenient: bool = False,
) -> Selection:
    """What the recipe does to each parameter; a rule that fits none, or only what cannot be quantized, is an error.

    ``uses``, as ``find_kernels`` says, or None: then parameters called "kernel" of two axes are [in, out], and of
    others rules have to say the axes. ``prefix`` stands before each path in the recipe. ``lenient``: it
    may leave everything.
    """
    of_models = [key for key in ("bits", "embedding", "head") if getattr(recipe, key) is not None]
    if of_models:
        raise FpqError(
            f"Recipe {recipe.name} has {of_models[0]}, which is for python -m fpq_jax.quantize and the models that it "
            "knows; give a rule to what is to be in another format."
        )
    arrays = {path: leaf for path, leaf in leaves.items() if is_parameter(leaf)}
    if uses is not None and (missing := [path for path in arrays if path not in uses]):
        raise FpqError(
            f"Nothing is known of {missing[0]}: the Hessians or uses are of another tree, or of one that was quantized "
            "further; collect them with these parameters."
        )
    found = {path: _unseen(path, leaf) if uses is None else uses[path] for path, leaf in arrays.items()}
    axes = {path: use.axes for path, use in found.items() if use.axes is not None and not use.reason}
    left = {path: use.reason for path, use in found.items() if use.reason}
    chosen = dict.fromkeys(axes, recipe.default)
    for rule in recipe.rules:
        names = [prefix + path for path in leaves]
        fitting = [name.removeprefix(prefix) for name in recipe.fitting(rule, names, "parameter")]
        if rule.change is None:
            for path in fitting:
                if chosen.pop(path, None):
                    left[path] = f"the recipe's rule {rule.match!r} leaves it"
            continue
        meant = [path for path in fitting if path in axes]
        if rule.axes is not None:
            meant = [path for path in fitting if path in arrays]
            axes |= {path: _axes(path, arrays[path], rule.axes) for path in meant}
        elif not meant:
            # parameters that are also used otherwise, if they are asked for
            meant = [path for path in fitting if path in found and found[path].axes is not None]
            axes |= {path: known for path in meant if (known := found[path].axes) is not None}
        if not meant and all(is_quantized(leaves[path]) for path in fitting):
            continue  # it was done before
        if not meant:
            path = fitting[0]
            reason = left.get(path) or _reason(leaves[path])
            raise FpqError(f"Recipe {recipe.name}: {path}, which {rule.match!r} means, cannot be quantized: {reason}.")
        chosen |= dict.fromkeys(meant, rule.change)
        left = {path: why for path, why in left.items() if path not in meant}
    if not chosen and not lenient and not any(is_quantized(leaf) for leaf in leaves.values()):
        raise FpqError(f"Recipe {recipe.name} leaves every parameter as it is{_example(left)}.")
    return Selection({path: Chosen(what, axes[path]) for path, what in chosen.items()}, left)


def _unseen(path: str, leaf: Any) -> ParamUse:
    """A parameter of which only the name is known."""
    if path.rpartition(".")[2] != "kernel":
        return ParamUse(None, "it is not called kernel, and no rule says its axes")
    if len(leaf.shape) == 2:
        return ParamUse(Axes.of(("in", "out"), leaf.shape, leaf.dtype))
    return ParamUse(None, _UNKNOWN_AXES.format(len(leaf.shape)))


def _axes(path: str, leaf: Any, kinds: Sequence[Any]) -> Axes:
    if len(kinds) != len(leaf.shape):
        raise FpqError(f"{path} has shape {tuple(leaf.shape)}, but a rule says axes {' '.join(kinds)}.")
    return Axes.of(kinds, leaf.shape, leaf.dtype)


def _reason(leaf: Any) -> str:
    if is_quantized(leaf):
        return "it is quantized already"
    if not hasattr(leaf, "dtype"):
        return f"it is no array, but of type {type(leaf).__name__}"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"its dtype is {leaf.dtype}"
    return f"its shape is {tuple(leaf.shape)}, and a kernel has two axes or more"


def _example(left: dict[str, str]) -> str:
    return "".join(f": {path}, for instance, because {reason}" for path, reason in list(left.items())[:1])
