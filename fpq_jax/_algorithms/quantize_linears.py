"""Quantize the kernels of a layer: GPTQ or rounding, then LoRC, and the errors of both.

Kernels that share their input (q, k and v; gate and up) share the Hessian. GPTQ treats outputs independently, so one
run with their outputs side by side is what a run for each would give, with one factorization. On several devices the
outputs are divided over all of them. Weights are on the devices when they come, and codes stay there.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fpq_jax._algorithms.error_propagation import propagated
from fpq_jax._algorithms.fisher import Fisher, blended, expected_losses
from fpq_jax._algorithms.gptq import gptq_with_stats
from fpq_jax._algorithms.joint import Columns, quantize_jointly
from fpq_jax._algorithms.linear_recipe import LinearRecipe, Lorc
from fpq_jax._algorithms.lorc import lorc
from fpq_jax._algorithms.metric import GptqStats, factorize
from fpq_jax._algorithms.output_error import column_errors
from fpq_jax._algorithms.statistics import CalibrationStats, InputStats, SharedInput
from fpq_jax._errors import FpqError
from fpq_jax._numerics.qtensor import LowRank, QTensor, dequantize, quantize_array
from fpq_jax._numerics.scales import Scale
from fpq_jax._numerics.spec import QuantSpec
from fpq_jax._support.mesh import AXES
from fpq_jax._support.placement import abstract, broadcast_from, per_device, replicate
from fpq_jax._support.trees import Flat

_RANKS = 32  # weighted corrections of up to so many ranks are made by one program
_TOLERANCE = 1.001  # GPTQ's error may exceed rounding's by this factor of float noise
Timer = Callable[[str, float], None]  # takes a stage and seconds


@dataclass(frozen=True)
class LinearResult:
    """What became of one Linear. Errors are relative output errors; see ``output_error``.

    shape: [in, out]. rounding_error: of plain rounding under the same scales rule. error: of the final weight, GPTQ
    and LoRC done. damping: None where GPTQ did not run. seconds: where kernels were quantized together, its share by
    outputs. notes: what a person should know. fell_back: GPTQ was asked for and rounding was done.
    """

    name: str
    shape: tuple[int, int]
    rounding_error: float
    error: float
    damping: float | None
    seconds: float
    notes: tuple[str, ...] = ()
    fell_back: bool = False


Done = dict[str, tuple[QTensor, LinearResult]]  # by path


def quantize_linears(
    weights: Flat,
    recipes: dict[str, LinearRecipe],
    names: dict[str, str],
    stats: CalibrationStats,
    mesh: Mesh,
    seed: int,
    timer: Timer,
    fishers: dict[str, Fisher] | None = None,
) -> Done:
    """QTensor and result of each kernel in ``recipes``, in its order.

    weights: by path, on every device of the mesh; so are the ``fishers`` of recipes that need them. QTensors' outputs
    are divided over the mesh where they divide evenly.
    """
    quantized: dict[str, _Quantized] = {}
    seconds: dict[str, float] = {}
    for paths in side_by_side(recipes, stats.inputs, weights):
        began = time.perf_counter()
        seen = stats.of(paths[0])
        if not bool(jnp.all(jnp.isfinite(seen.hessian))):
            name = names[paths[0]]
            raise FpqError(f"The inputs of {name} overflow during calibration; use --dtype float32 or bfloat16.")
        quantized |= _quantize_together(
            paths, weights, seen, recipes[paths[0]], mesh, seed, (fishers or {}).get(paths[0])
        )
        spent = time.perf_counter() - began
        outputs = sum(weights[path].shape[1] for path in paths)
        seconds |= {path: spent * weights[path].shape[1] / outputs for path in paths}
        timer("gptq", spent)
    began = time.perf_counter()
    tensors = {path: found.q for path, found in quantized.items()}
    corrections = {path: r.lorc for path, r in recipes.items() if r.lorc is not None and tensors[path].low_rank is None}
    tensors = jax.block_until_ready(_with_lorc(tensors, weights, corrections, mesh, seed))
    spent = time.perf_counter() - began
    timer("lorc", spent)
    size = sum(weights[path].size for path in recipes)
    done: Done = {}
    began = time.perf_counter()
    for path, recipe in recipes.items():
        q, found = tensors[path], quantized[path]
        lost = found.outputs.lost if path not in corrections else _column_errors(weights[path], q, stats.of(path), mesh)
        if path in stats.static_scales:
            q = _with_static_scale(q, stats.static_scales[path])
        taken = seconds[path] + spent * weights[path].size / size
        shape = (weights[path].shape[0], weights[path].shape[1])
        done[path] = q, _result(names[path], shape, recipe, found, lost, taken)
    timer("errors", time.perf_counter() - began)
    return done


def side_by_side(
    recipes: dict[str, LinearRecipe], sharing: Iterable[SharedInput], weights: Flat
) -> list[tuple[str, ...]]:
    """The kernels of each run of GPTQ; ``sharing``: those that see one input. ``weights`` may be shapes alone."""
    runs: list[tuple[str, ...]] = []
    for path in recipes:
        if not any(path in run for run in runs):
            others = next(paths for paths in sharing if path in paths)
            runs.append(
                tuple(p for p in recipes if p in others and (p == path or _may_join(path, p, weights, recipes)))
            )
    return runs


def _may_join(path: str, other: str, weights: Flat, recipes: dict[str, LinearRecipe]) -> bool:
    """Whether two kernels of one Hessian can be quantized as one: no scale may reach from one into the other."""
    recipe = recipes[path]
    rows = recipe.spec.compute_rows
    return (
        recipes[other] == recipe
        and not recipe.corrects_jointly  # a correction is of one kernel, and so is the Fisher information
        and not recipe.fisher
        and recipe.spec.group_size != "tensor"
        and all(weights[p].shape[1] % rows == 0 for p in (path, other))
    )


def _mean(hessian: Float[Array, "in in"], count: Int[Array, ""]) -> Float[Array, "in in"]:
    """Of x x^T over the tokens; zero where there were none."""
    return hessian / jnp.maximum(count, 1)


class _ByOutput(NamedTuple):
    """Of each output: mean squares of what rounding loses, of what the QTensor loses, and of the output itself; by how
    much the QTensor raises the loss of a token, zero without Fisher information; whether all its weights are zero."""

    rounding: Any
    lost: Any
    total: Any
    expected: Any
    zero: Any


class _Quantized(NamedTuple):
    """q, without a correction that is not weighted; the rest is on every device."""

    q: QTensor
    gptq: GptqStats
    outputs: _ByOutput


def _quantize_together(
    paths: tuple[str, ...],
    weights: Flat,
    seen: InputStats,
    recipe: LinearRecipe,
    mesh: Mesh,
    seed: int,
    fisher: Fisher | None,
) -> dict[str, _Quantized]:
    """Kernels that are quantized side by side, each for itself again."""
    unseen = not bool(jnp.any(jnp.diagonal(seen.hessian) > 0))
    found = quantize_kernel(
        [weights[path] for path in paths],
        seen,
        recipe if not unseen else LinearRecipe(spec=recipe.spec, method="round"),
        mesh,
        seed,
        fisher,
    )
    outputs = _ByOutput(*map(np.asarray, jax.block_until_ready(found).outputs))
    if len(paths) == 1:
        return {paths[0]: found._replace(outputs=outputs)}
    parts, end = {}, 0
    for path in paths:
        columns = slice(end, end := end + weights[path].shape[1])
        own = _ByOutput(*(values[columns] for values in outputs))
        parts[path] = _Quantized(_part(found.q, columns.start, columns.stop, mesh), found.gptq, own)
    return parts


def _result(
    name: str, shape: tuple[int, int], recipe: LinearRecipe, found: _Quantized, lost: np.ndarray, seconds: float
) -> LinearResult:
    total = float(found.outputs.total.sum(dtype=np.float64))
    share = lambda part: float(part.sum(dtype=np.float64)) / total if total > 0 else 0.0
    unseen = recipe.method == "gptq" and float(found.gptq.damping) == 0  # it did not run
    rounding_error = share(found.outputs.rounding)
    damping, notes = None, []
    if unseen:
        notes.append("its inputs were all zero during calibration: rounded to nearest instead of GPTQ")
    elif recipe.method == "gptq":
        damping = float(f"{float(found.gptq.damping):.6g}")  # float32's digits are noise to a reader
        if damping > recipe.damping * 1.5:
            notes.append(f"damping raised to {damping:g} until Cholesky succeeded")
        if int(found.gptq.dead):
            notes.append(f"{int(found.gptq.dead)} inputs were zero throughout calibration: their weights are zero now")
        # with these, what is least is not this error alone
        least = not (recipe.fisher or recipe.error_propagation)
        if least and share(found.outputs.lost) > rounding_error * _TOLERANCE:
            notes.append("GPTQ's error is above plain rounding's")
    if zeros := int(np.sum(found.outputs.zero)):
        notes.append(f"{zeros} output rows are all zero")
    return LinearResult(name, shape, rounding_error, share(lost), damping, round(seconds, 3), tuple(notes), unseen)


def abstract_quantize(shape: tuple[int, int], dtype: DTypeLike, recipe: LinearRecipe, mesh: Mesh) -> Any:
    """The lowered program of ``quantize_kernel`` for a weight of this shape."""
    w = jax.ShapeDtypeStruct(shape, dtype, sharding=_by_outputs(shape[1], mesh, recipe.spec))
    square = jax.ShapeDtypeStruct((shape[0], shape[0]), jnp.float32)
    cross = square if recipe.error_propagation else None
    seen = InputStats(square, jax.ShapeDtypeStruct((), jnp.int32), cross)
    outputs = jax.ShapeDtypeStruct((shape[1],), jnp.float32)
    fisher = Fisher(square, outputs, jax.ShapeDtypeStruct((), jnp.int32)) if recipe.fisher else None
    one_for_all, rank = _of_any_rank(recipe)
    return _quantize_kernel.lower(
        w, *abstract((seen,), mesh, P()), one_for_all, mesh, 0, abstract(fisher, mesh, P()), rank
    )


def _divides(outputs: int, mesh: Mesh, spec: QuantSpec) -> bool:
    return spec.group_size != "tensor" and outputs % (mesh.size * spec.compute_rows) == 0


def _by_outputs(outputs: int, mesh: Mesh, spec: QuantSpec) -> NamedSharding:
    """The sharding of a weight [in, out] over its outputs, where that is even and no scale is shared between them."""
    return NamedSharding(mesh, P(None, AXES) if _divides(outputs, mesh, spec) else P())


@partial(jax.jit, static_argnums=1)
def _side_by_side(weights: list[Float[Array, "in _"]], sharding: NamedSharding) -> Float[Array, "in out"]:
    return jax.lax.with_sharding_constraint(jnp.concatenate(weights, axis=1), sharding)


def quantize_kernel(
    weights: Sequence[Float[Array, "in _"]],
    seen: InputStats,
    recipe: LinearRecipe,
    mesh: Mesh,
    seed: int | Array,
    fisher: Fisher | None = None,
) -> _Quantized:
    """Quantize weights side by side, their outputs divided over the mesh; statistics are on every device."""
    width = sum(w.shape[1] for w in weights)
    w = _side_by_side(list(weights), _by_outputs(width, mesh, recipe.spec))
    one_for_all, rank = _of_any_rank(recipe)
    found = _quantize_kernel(w, seen, one_for_all, mesh, seed, fisher, rank)
    return found if rank is None else found._replace(q=_with_rank(found.q, min(rank, *w.shape)))


def _of_any_rank(recipe: LinearRecipe) -> tuple[LinearRecipe, int | None]:
    """The recipe whose program is that of all which differ in the rank of a weighted correction, and the rank."""
    if not recipe.corrects_jointly:
        return recipe, None
    assert recipe.lorc is not None and recipe.lorc.rank != "auto", "Recipe.with_lorc_rank comes first"
    rank = recipe.lorc.rank
    return replace(recipe, lorc=replace(recipe.lorc, rank=-(-rank // _RANKS) * _RANKS)), rank


@partial(jax.jit, static_argnums=1)
def _with_rank(q: QTensor, rank: int) -> QTensor:
    """Without the zeros behind the rank."""
    low = q.low_rank
    assert low is not None
    return replace(q, low_rank=LowRank(low.a[:, :rank], low.b[:rank], None if low.scale is None else low.scale[:rank]))


@partial(jax.jit, static_argnums=(2, 3))
def _quantize_kernel(
    w: Float[Array, "in out"],
    seen: InputStats,
    recipe: LinearRecipe,
    mesh: Mesh,
    seed: int | Array,
    fisher: Fisher | None,
    rank: int | Array | None,
) -> _Quantized:
    spec = recipe.spec

    def local(
        w: Array, seen: InputStats, seed: Array, fisher: Any, rank: Any, gather: Columns = _whole, own: Columns = _whole
    ) -> _Quantized:
        mean = _mean(seen.hessian, seen.count)
        rounded = quantize_array(w, spec)
        if recipe.method == "round":
            q, stats = rounded, GptqStats(jnp.float32(0), jnp.int32(0))
        elif recipe.static_groups:
            metric = factorize(mean, recipe.damping, recipe.order)
            target = w.astype(jnp.float32)
            if recipe.error_propagation:
                target = propagated(target, metric, _mean(seen.cross, seen.count), recipe.error_propagation)
            if recipe.fisher:
                metric = factorize(blended(mean, fisher, recipe.fisher), recipe.damping, recipe.order)
            q = quantize_jointly(target, metric, recipe, seed=seed, rank=rank, gather=gather, own=own)
            stats = metric.stats
        else:
            q, stats = gptq_with_stats(w, mean, spec, damping=recipe.damping)
        rounding, total = column_errors(w, dequantize(rounded), mean), column_errors(w, jnp.zeros_like(w), mean)
        lost = rounding if recipe.method == "round" else column_errors(w, dequantize(q), mean)
        expected = jnp.zeros_like(lost)
        if fisher is not None:
            of_own = fisher._replace(outputs=own(fisher.outputs[None])[0])
            expected = expected_losses(dequantize(q) - w.astype(jnp.float32), of_own)
        outputs = _ByOutput(rounding, lost, total, expected, jnp.all(w == 0, axis=0))
        return _Quantized(q, stats, jax.tree.map(lambda values: gather(values[None])[0], outputs))

    seed = jnp.asarray(seed)
    if not _divides(w.shape[1], mesh, spec):
        return local(w, seen, seed, fisher, rank)
    columns = w.shape[1] // mesh.size
    gather = lambda m: jax.lax.all_gather(m, AXES, axis=1, tiled=True)
    own = lambda m: jax.lax.dynamic_slice_in_dim(m, jax.lax.axis_index(AXES) * columns, columns, axis=1)

    def of_device(w: Array, seen: InputStats, seed: Array, fisher: Any, rank: Any) -> tuple[_Quantized, LowRank | None]:
        found = local(w, seen, seed, fisher, rank, gather, own)
        return found._replace(q=replace(found.q, low_rank=None)), found.q.low_rank

    axes: Any = P(AXES), P(), P()
    out = _Quantized(*axes), LowRank(P(), P(None, AXES), P()) if recipe.corrects_jointly else P()
    found, low_rank = per_device(of_device, mesh, (P(None, AXES), *[P()] * 4), out)(w, seen, seed, fisher, rank)
    return found._replace(q=replace(found.q, shape=w.shape, low_rank=low_rank))


def _whole(columns: Array) -> Array:
    """Of outputs that are not divided."""
    return columns


@partial(jax.jit, static_argnums=(1, 2, 3))
def _part(q: QTensor, start: int, stop: int, mesh: Mesh) -> QTensor:
    """Some outputs of a QTensor, divided over the mesh like the whole."""
    sharding = NamedSharding(mesh, P(AXES) if _divides(stop - start, mesh, q.spec) else P())
    rows = lambda leaf: jax.lax.with_sharding_constraint(leaf[start:stop], sharding)
    return replace(jax.tree.map(rows, q), shape=(q.shape[0], stop - start))


def _with_lorc(
    tensors: dict[str, QTensor], weights: Flat, corrections: dict[str, Lorc], mesh: Mesh, seed: int
) -> dict[str, QTensor]:
    """The QTensors with their corrections, each computed by one of the devices, as one device alone would."""
    devices = mesh.devices.ravel()
    factors = {}
    for i, (path, correction) in enumerate(corrections.items()):
        device = devices[i % len(devices)]
        assert correction.rank != "auto", "Recipe.with_lorc_rank comes first"
        whole = replicate((weights[path], tensors[path]), mesh)
        own = lambda leaf, device=device: next((s.data for s in leaf.addressable_shards if s.device == device), None)
        if device.process_index == jax.process_index():
            factors[path] = _factors(*jax.tree.map(own, whole), correction.rank, correction.dtype, seed)
        else:
            factors[path] = None
    result = dict(tensors)
    for path, found in factors.items():
        q, correction = tensors[path], corrections[path]
        of = partial(_factors, rank=correction.rank, dtype=correction.dtype)
        shapes = jax.eval_shape(of, weights[path], q, seed=seed)
        result[path] = replace(q, low_rank=broadcast_from(found, shapes, mesh))
    return result


@partial(jax.jit, static_argnums=(2, 3), static_argnames=("rank", "dtype"))
def _factors(w: Float[Array, "in out"], q: QTensor, rank: int, dtype: Any, seed: int | Array) -> Any:
    return lorc(w, q, rank=rank, dtype=dtype, seed=seed).low_rank


def _column_errors(w: Float[Array, "in out"], q: QTensor, seen: InputStats, mesh: Mesh) -> np.ndarray:
    """What q loses of each output."""
    by_outputs, everywhere = _by_outputs(w.shape[1], mesh, q.spec), NamedSharding(mesh, P())
    return np.asarray(_errors(w, q, seen.hessian, seen.count, by_outputs, everywhere))


@partial(jax.jit, static_argnums=(4, 5))
def _errors(
    w: Array, q: QTensor, hessian: Array, count: Array, by_outputs: NamedSharding, everywhere: NamedSharding
) -> Float[Array, " out"]:
    w = jax.lax.with_sharding_constraint(w, by_outputs)
    return jax.lax.with_sharding_constraint(column_errors(w, dequantize(q), _mean(hessian, count)), everywhere)


def _with_static_scale(q: QTensor, scale: Scale) -> QTensor:
    asymmetric = q.spec.activation is not None and q.spec.activation.asymmetric
    return replace(q, input_scale=scale.scale, input_zero=scale.zero.astype(jnp.uint8) if asymmetric else None)
