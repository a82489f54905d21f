"""Quantize the parameters of any tree: GPTQ where there are Hessians, rounding where there are none."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fpq_jax._algorithms.lorc import lorc
from fpq_jax._algorithms.quantize_linears import LinearResult, quantize_linears
from fpq_jax._algorithms.recipe import LinearRecipe, Recipe
from fpq_jax._algorithms.statistics import CalibrationStats, InputStats
from fpq_jax._errors import FpqError
from fpq_jax._matmul.fp4_kernel.fragments import of_fragments
from fpq_jax._matmul.weight_layouts import WeightLayout, check_any_for_fragments, check_layout, is_quantized, to_layout
from fpq_jax._numerics.qtensor import QTensor, dequantize, quantize_array
from fpq_jax._numerics.qtensor_sharding import shard_like
from fpq_jax._support.mesh import make_mesh
from fpq_jax._support.placement import replicate
from fpq_jax._support.trees import ByIdentity, Flat, jit, named_leaves
from fpq_jax._transform.axis_layout import Layout, laid_out, to_kernel
from fpq_jax._transform.hessians import Hessians, Mask, check_seen, collect_named
from fpq_jax._transform.quantized import axes_of, quantized
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


def quantize_blocks(
    blocks: Sequence[tuple[Callable[..., Any], Any]],
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    mask: Mask | None = None,
    seed: int = 0,
) -> Iterator[tuple[Any, TreeReport]]:
    """Quantizes a model block after block, each calibrated on the outputs of the quantized blocks before it.

    Between blocks the hidden states are on the host. Blocks of one function and of parameters alike are compiled once.

    Args:
        blocks: (function, params) of each block, called as ``function(params, *batch)``. The result is the first
            argument of the next block, which takes the other arguments as they are.
        batches: tuples of the first block's arguments after ``params``, or single ones.
        recipe: which kernels are quantized, and how. Paths begin with a block's number, ``"3.attention.kernel"``.
        mask: which positions count, see ``collect_hessians``.
        seed: of LoRC's randomized singular value decomposition.

    Yields:
        The params of each block, for ``quantized(function)``, and the report of what became of them, as soon as the
        block is done.

    Raises:
        FpqError: as in ``collect_hessians`` and ``quantize_params``, or the recipe leaves every parameter as it is.

    Example:
        >>> block = lambda params, x: x + jnp.tanh(x @ params["kernel"])
        >>> blocks = [(block, {"kernel": jax.random.normal(jax.random.key(i), (16, 16)) / 4}) for i in range(2)]
        >>> batches = list(jax.random.normal(jax.random.key(2), (3, 32, 16)))
        >>> for params, report in fpq.quantize_blocks(blocks, batches, fpq.Recipe.load("w4a8-fp-m2")):
        ...     print(report.results[0].name, params["kernel"].shape)
        0.kernel (16, 16)
        1.kernel (16, 16)
    """
    names = [
        [f"{i}.{path}" for path, _ in named_leaves(params, is_quantized)[0]] for i, (_, params) in enumerate(blocks)
    ]
    for rule in recipe.rules:
        recipe.fitting(rule, [path for block in names for path in block], "parameter")
    inputs = [batch if type(batch) is tuple else (batch,) for batch in batches]
    quantized_any = any(map(is_quantized, jax.tree.leaves([p for _, p in blocks], is_leaf=is_quantized)))
    following = {ByIdentity(function): jit(quantized(function)) for function, _ in blocks}
    for i, (function, params) in enumerate(blocks):
        own, prefix = recipe.about(names[i]), f"{i}."
        found = collect_named(function, params, inputs, own, mask=mask, prefix=prefix, lenient=True)
        done, report = quantize_named(params, own, found, found.uses, seed, prefix, lenient=True)
        if i + 1 < len(blocks):
            inputs = [(jax.device_get(following[ByIdentity(function)](done, *args)), *args[1:]) for args in inputs]
        quantized_any |= bool(report.results)
        yield done, report
    if not quantized_any:
        raise FpqError(f"Recipe {recipe.name} leaves every parameter of every block as it is.")


def dequantize_params(params: Any) -> Any:
    """Dequantizes a tree: QTensors become arrays of the shapes and dtypes that the parameters had.

    Args:
        params: a tree of arrays and QTensors.

    Returns:
        The tree of arrays.

    Example:
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 32), jnp.bfloat16)}
        >>> small = fpq.quantize_params(params, fpq.Recipe.load("w4a8-fp-m2"))
        >>> fpq.dequantize_params(small)["kernel"].dtype
        dtype(bfloat16)
    """

    def one(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        axes = axes_of(leaf)
        return laid_out(dequantize(of_fragments(leaf), axes.dtype), Layout.of(axes.shape(leaf.stack)), axes)

    return jax.tree.map(one, params, is_leaf=is_quantized)


def expand_params(params: Any, weights: WeightLayout = "fp8") -> Any:
    """Changes the layout of a tree's QTensors to the one in which they are multiplied.

    All layouts give the same weights. FP8 codes are padded with zeros to multiples of 16, which FP8 products need.

    Args:
        params: a tree of arrays and QTensors.
        weights: ``"fp8"`` expands 4-bit codes that have an FP8 form to FP8 once, exactly, a byte for each weight;
            ``"packed"`` leaves them packed; ``"fragments"`` lays them out for this library's own GPU kernel, which has
            not been measured on a GPU yet.

    Returns:
        The tree with its QTensors in that layout.

    Raises:
        FpqError: ``weights`` is none of these, or is ``"fragments"`` and the GPU kernel multiplies no weight of the
            tree.

    Example:
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 32))}
        >>> small = fpq.quantize_params(params, fpq.Recipe.load("w4a8-fp-m2"))
        >>> small["kernel"].codes.shape, fpq.expand_params(small)["kernel"].codes.shape  # [out, in]
        ((32, 8), (32, 16))
    """
    known = [leaf.sharding for leaf in jax.tree.leaves(params) if _has_device(leaf)]
    devices = max((len(sharding.device_set) for sharding in known), default=1)
    check_layout(weights, devices if devices > 1 else None)

    def one(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        make = partial(to_layout, layout=weights)
        for _ in leaf.stack:
            make = jax.vmap(make)
        return make(leaf)

    check_any_for_fragments(jax.tree.leaves(params, is_leaf=is_quantized), weights)
    return jax.tree.map(one, params, is_leaf=is_quantized)


def _has_device(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


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
