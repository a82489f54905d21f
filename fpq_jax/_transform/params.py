"""Quantize the parameters of any tree: GPTQ where there are Hessians, rounding where there are none."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fpq_jax._algorithms.linear_recipe import LinearRecipe
from fpq_jax._algorithms.lorc import lorc
from fpq_jax._algorithms.quantize_linears import LinearResult, quantize_linears
from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._algorithms.statistics import CalibrationStats, InputStats
from fpq_jax._errors import FpqError
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._numerics.qtensor import QTensor, dequantize, quantize_array
from fpq_jax._numerics.qtensor_sharding import shard_like
from fpq_jax._support.mesh import make_mesh
from fpq_jax._support.placement import replicate
from fpq_jax._support.trees import Flat, named_leaves
from fpq_jax._transform.axis_layout import to_kernel
from fpq_jax._transform.hessians import Hessians, check_seen
from fpq_jax._transform.selection import Chosen, ParamUse, Selection, select

_AUTO_RANK = 8  # of LoRC, where a recipe leaves it to the size of one of the paper's models


@dataclass(frozen=True)
class TreeReport:
    """Reports what became of each parameter of a tree.

    Attributes:
        results: of each quantized kernel in order, and of a stack of each index: its ``name``, its ``shape`` (in, out),
            the relative squared errors ``rounding_error`` (of plain rounding) and ``error`` (of the final weight), the
            ``damping`` that GPTQ needed, its ``seconds``, and ``notes``. Errors are those of the outputs where there
            are Hessians, otherwise those of the weight.
        left: the reason why each other parameter of two or more axes stays as it is, by path.

    Example:
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 32)), "table": jnp.ones((4, 16))}
        >>> params, report = fpq.quantize_params_with_report(params, fpq.Recipe.load("w4a8-fp-m2"))
        >>> [(result.name, result.shape) for result in report.results]
        [('kernel', (16, 32))]
        >>> report.left
        {'table': 'it is not called kernel, and no rule says its axes'}
    """

    results: tuple[LinearResult, ...]
    left: dict[str, str]


def quantize_params(
    params: Any,
    recipe: Recipe,
    hessians: Mapping[str, Any] | None = None,
    *,
    uses: Mapping[str, ParamUse] | None = None,
    seed: int = 0,
) -> Any:
    """Quantizes the kernels of a tree of parameters: GPTQ with Hessians, rounding to nearest without, then LoRC.

    Rules of the recipe fit paths, such as ``"layers.0.q.kernel"``. Which axes of a parameter are inputs is known from
    the Hessians or from ``uses``; without them a parameter called kernel with two axes is [in, out], and rules give the
    ``axes`` of others. What is a QTensor already stays, and so does what has no Hessian where those are of a part of
    the model. Inside of ``jax.jit`` and ``jax.eval_shape`` it only rounds, and reports nothing.

    Args:
        params: a tree of arrays.
        recipe: which kernels are quantized, and how.
        hessians: what ``collect_hessians`` gave, or ``[*stack, in, in]`` by path; None to round.
        uses: what ``find_kernels`` gave; known already where ``hessians`` are from ``collect_hessians``.
        seed: of LoRC's randomized singular value decomposition.

    Returns:
        The tree, with QTensors in the refs of the kernels.

    Raises:
        FpqError: a rule fits nothing or a parameter that cannot be quantized, a weight is not finite, or a Hessian is
            missing, zero or of another shape.

    Example:
        >>> apply = lambda params, x: jnp.tanh(x @ params["kernel"])
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 32))}
        >>> batches = list(jax.random.normal(jax.random.key(2), (3, 32, 16)))
        >>> recipe = fpq.Recipe.load("w4a8-fp-m2-lorc")
        >>> hessians = fpq.collect_hessians(apply, params, batches, recipe)
        >>> small = fpq.quantize_params(params, recipe, hessians)
        >>> small["kernel"].spec.format, small["kernel"].low_rank.a.shape
        (e2m1, (16, 8))
        >>> fpq.quantized(apply)(small, batches[0]).shape
        (32, 32)
    """
    return quantize_params_with_report(params, recipe, hessians, uses=uses, seed=seed)[0]


def quantize_params_with_report(
    params: Any,
    recipe: Recipe,
    hessians: Mapping[str, Any] | None = None,
    *,
    uses: Mapping[str, ParamUse] | None = None,
    seed: int = 0,
) -> tuple[Any, TreeReport]:
    """Quantizes the kernels of a tree as ``quantize_params`` does, and reports what became of each parameter.

    Args:
        params: a tree of arrays.
        recipe: which kernels are quantized, and how.
        hessians: what ``collect_hessians`` gave, or ``[*stack, in, in]`` by path; None to round.
        uses: what ``find_kernels`` gave; known already where ``hessians`` are from ``collect_hessians``.
        seed: of LoRC's randomized singular value decomposition.

    Returns:
        The tree with QTensors, and the report.

    Raises:
        FpqError: as in ``quantize_params``.

    Example:
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 32))}
        >>> x = jax.random.normal(jax.random.key(1), (64, 16))
        >>> recipe = fpq.Recipe.load("w4a8-fp-m2")
        >>> small, report = fpq.quantize_params_with_report(params, recipe, {"kernel": fpq.hessian(x)})
        >>> [(result.name, result.shape, result.error < 0.02) for result in report.results]
        [('kernel', (16, 32), True)]
    """
    if isinstance(hessians, Hessians) and uses is None:
        uses = hessians.uses
    return quantize_named(params, recipe, hessians, uses, seed)


def quantize_named(
    params: Any,
    recipe: Recipe,
    hessians: Mapping[str, Any] | None,
    uses: Mapping[str, ParamUse] | None,
    seed: int,
    prefix: str = "",
    lenient: bool = False,
) -> tuple[Any, TreeReport]:
    """``quantize_params_with_report`` for a recipe that knows the paths with ``prefix`` in front. ``lenient``: it may
    be about none of them."""
    recipe = recipe.with_lorc_rank(_AUTO_RANK)
    named, structure = named_leaves(params, is_quantized)
    leaves = dict(named)
    selection = select(recipe, leaves, uses, prefix, lenient)
    if hessians is not None:
        selection = _with_hessians(selection, hessians)
    for path, one in selection.chosen.items():
        _check(path, leaves[path], one, hessians, prefix)
    quantize = partial(_round, seed=seed) if hessians is None else partial(_quantize, hessians=hessians, seed=seed)
    done = quantize(leaves, selection.chosen)
    tensors = {path: shard_like(q, leaves[path]) for path, (q, _) in done.items()}
    tree = jax.tree.unflatten(structure, [tensors.get(path, leaf) for path, leaf in named])
    results = [replace(result, name=prefix + result.name) for _, results in done.values() for result in results]
    return tree, TreeReport(tuple(results), {prefix + path: why for path, why in selection.left.items()})


def _with_hessians(selection: Selection, hessians: Mapping[str, Any]) -> Selection:
    """What there are Hessians for, where they are of a part; otherwise all of it has to have one."""
    chosen, left = dict(selection.chosen), dict(selection.left)
    for path, one in selection.chosen.items():
        if path not in hessians:
            if isinstance(hessians, Hessians) and not hessians.complete:
                del chosen[path]
                left[path] = "the Hessians are of another part of the model"
            elif one.recipe.method == "gptq":
                raise FpqError(
                    f"There is no Hessian of {path}; collect it with the same recipe, or leave it with a rule."
                )
    return Selection(chosen, left)


def _check(path: str, leaf: Any, one: Chosen, hessians: Mapping[str, Any] | None, prefix: str) -> None:
    """FpqError for what cannot be solved, before anything is."""
    name = prefix + path
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise FpqError(f"{name} is a shape without values; quantize shapes inside of jax.eval_shape.")
    if isinstance(leaf, jax.core.Tracer):
        if hessians is not None:
            raise FpqError(f"{name} is traced, and GPTQ is not to be; inside of jit quantize_params only rounds.")
    elif not _finite(leaf):
        raise FpqError(f"{name} holds values that are not finite.")
    if hessians is None:
        if one.recipe.spec.activation_scale == "static":
            raise FpqError(
                f"The static activation scale of {name} needs calibration; give what collect_hessians found."
            )
        return
    if path not in hessians:
        return
    kernel = jax.eval_shape(partial(to_kernel, axes=one.axes), leaf)
    wanted = (*kernel.shape[:-1], kernel.shape[-2])
    if (shape := np.shape(hessians[path])) != wanted:
        raise FpqError(f"The Hessian of {name} has shape {shape}; it must be {wanted}.")
    if one.recipe.method == "gptq":
        check_seen(name, hessians[path])
    if one.recipe.fisher:
        raise FpqError(
            f"{name} has fisher, which is of a whole model's loss; python -m fpq_jax.quantize knows it, for the "
            "models that it reads."
        )
    if one.recipe.error_propagation and not (isinstance(hessians, Hessians) and hessians.compared):
        raise FpqError(
            f"{name} has error_propagation, which needs the unquantized model beside it; use quantize_blocks."
        )


def _finite(leaf: Any) -> bool:
    with jax.ensure_compile_time_eval():  # it may be a constant of a function that is being traced
        return bool(jnp.all(jnp.isfinite(leaf)))


Done = dict[str, tuple[QTensor, list[LinearResult]]]


def _round(leaves: Flat, chosen: dict[str, Chosen], *, seed: int) -> Done:
    done: Done = {}
    for path, one in chosen.items():
        began = time.perf_counter()
        w = to_kernel(jnp.asarray(leaves[path]), one.axes)
        q, rounding, error = jax.block_until_ready(_rounded(w, one.recipe, seed))
        q = replace(q, axes=one.axes)
        if isinstance(rounding, jax.core.Tracer):  # nothing is known of it yet
            done[path] = q, []
            continue
        shape, seconds = (int(w.shape[-2]), int(w.shape[-1])), time.perf_counter() - began
        results = [
            LinearResult(
                _indexed(path, index), shape, float(rounding[index]), float(error[index]), None, round(seconds, 3)
            )
            for index in np.ndindex(w.shape[:-2])
        ]
        done[path] = q, results
    return done


@partial(jax.jit, static_argnums=1)
def _rounded(w: Float[Array, "*stack in out"], recipe: LinearRecipe, seed: int | Array) -> tuple[QTensor, Array, Array]:
    if w.ndim > 2:
        return jax.vmap(lambda one: _rounded(one, recipe, seed))(w)
    q = quantize_array(w, recipe.spec)
    lost = lambda q: jnp.sum((w - dequantize(q)) ** 2) / jnp.maximum(jnp.sum(w.astype(jnp.float32) ** 2), 1e-37)
    rounding = lost(q)
    if recipe.lorc is None:
        return q, rounding, rounding
    assert recipe.lorc.rank != "auto"
    q = lorc(w, q, rank=recipe.lorc.rank, dtype=recipe.lorc.dtype, seed=seed)
    return q, rounding, lost(q)


def _quantize(leaves: Flat, chosen: dict[str, Chosen], *, hessians: Mapping[str, Any], seed: int) -> Done:
    mesh = make_mesh()
    if isinstance(hessians, Hessians):
        stats = hessians.stats
    else:
        given = {path: jnp.asarray(hessians[path]) for path in hessians}
        stats = CalibrationStats(
            {(path,): InputStats(h, jnp.ones(h.shape[:-2], jnp.int32)) for path, h in given.items()}, {}
        )
    done = _round(leaves, {path: one for path, one in chosen.items() if path not in hessians}, seed=seed)
    for paths, seen in stats.inputs.items():
        recipes = {path: chosen[path].recipe for path in paths if path in chosen}
        if not recipes:
            continue
        weights = {path: to_kernel(np.asarray(leaves[path]), chosen[path].axes) for path in recipes}
        stack = seen.count.shape
        parts: dict[str, list[tuple[QTensor, LinearResult]]] = {path: [] for path in recipes}
        for index in np.ndindex(stack):
            own = CalibrationStats(
                {tuple(recipes): replicate(jax.tree.map(lambda a, at=index: a[at], seen), mesh)},
                {path: scale for path, scale in stats.static_scales.items() if path in recipes},
            )
            names = {path: _indexed(path, index) for path in recipes}
            one = replicate({path: w[index] for path, w in weights.items()}, mesh)
            of_index = quantize_linears(one, recipes, names, own, mesh, seed, lambda stage, seconds: None)
            for path, found in of_index.items():
                parts[path].append(found)
        for path, every in parts.items():
            q = _stacked([q for q, _ in every], stack)
            done[path] = replace(q, axes=chosen[path].axes), [result for _, result in every]
    return {path: done[path] for path in chosen}


def _stacked(tensors: list[QTensor], stack: tuple[int, ...]) -> QTensor:
    if not stack:
        return tensors[0]
    return jax.tree.map(lambda *a: jnp.stack(a).reshape(*stack, *a[0].shape), *tensors)


def _indexed(path: str, index: tuple[int, ...]) -> str:
    """The name of one weight of a stack."""
    return f"{path}[{', '.join(map(str, index))}]" if index else path
