"""Quantize the Linears of a layer: GPTQ or rounding, then LoRC, and the errors of both.

Linears that share their input (q, k and v; gate and up) share the Hessian. GPTQ treats outputs independently, so one
run with their outputs side by side is what a run for each would give, with one factorization. On several devices the
outputs are divided over all of them.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fpq_jax._algorithms.gptq import GptqStats, gptq_with_stats
from fpq_jax._algorithms.lorc import lorc
from fpq_jax._algorithms.output_error import column_errors
from fpq_jax._algorithms.recipe import LinearRecipe
from fpq_jax._algorithms.statistics import CalibrationStats, SharedInput
from fpq_jax._errors import FpqError
from fpq_jax._numerics.qtensor import QTensor, dequantize, quantize_array
from fpq_jax._numerics.scales import Scale
from fpq_jax._numerics.spec import QuantSpec
from fpq_jax._support.mesh import AXES
from fpq_jax._support.placement import abstract, broadcast_from, per_device, replicate
from fpq_jax._support.trees import Flat

_TOLERANCE = 1.001  # GPTQ's error may exceed rounding's by this factor of float noise
Timer = Callable[[str, float], None]  # is told of a stage and seconds


@dataclass(frozen=True)
class LinearResult:
    """What became of one Linear. Errors are relative output errors; see ``output_error``.

    shape: [in, out]. rounding_error: of plain rounding under the same scales rule. error: of the final weight, GPTQ
    and LoRC done. damping: None where GPTQ did not run. seconds: where Linears were solved together, its share by
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


def quantize_linears(
    weights: Flat,
    todo: dict[str, LinearRecipe],
    names: dict[str, str],
    seen: CalibrationStats,
    mesh: Mesh,
    seed: int,
    timer: Timer,
) -> dict[str, tuple[QTensor, LinearResult]]:
    """QTensor and result of each kernel in ``todo``, in its order. ``weights``: by path, on the host.

    QTensors' outputs are divided over the mesh where they divide evenly.
    """
    solved: dict[str, _Solved] = {}
    seconds: dict[str, float] = {}
    for unit in solved_together(todo, seen.hessians, weights):
        began = time.perf_counter()
        hessian = _hessian_of(unit[0], seen)
        if not bool(jnp.all(jnp.isfinite(hessian))):
            name = names[unit[0]]
            raise FpqError(f"The inputs of {name} overflow during calibration; use --dtype float32 or bfloat16.")
        solved |= _solve_unit(unit, weights, hessian, todo[unit[0]], mesh)
        spent = time.perf_counter() - began
        outputs = sum(weights[path].shape[1] for path in unit)
        seconds |= {path: spent * weights[path].shape[1] / outputs for path in unit}
        timer("gptq", spent)
    began = time.perf_counter()
    tensors = jax.block_until_ready(_with_lorc({p: s.q for p, s in solved.items()}, weights, todo, mesh, seed))
    spent = time.perf_counter() - began
    timer("lorc", spent)
    size = sum(weights[path].size for path in todo)
    done = {}
    began = time.perf_counter()
    for path, recipe in todo.items():
        q, found = tensors[path], solved[path]
        lost = found.lost if recipe.lorc is None else _column_errors(weights[path], q, _hessian_of(path, seen), mesh)
        if path in seen.fixed:
            q = _with_static_scale(q, seen.fixed[path])
        taken = seconds[path] + spent * weights[path].size / size
        done[path] = q, _result(names[path], weights[path], recipe, found, lost, taken)
    timer("errors", time.perf_counter() - began)
    return done


def _hessian_of(path: str, seen: CalibrationStats) -> Float[Array, "in in"]:
    return next(hessian for paths, hessian in seen.hessians.items() if path in paths)


def solved_together(todo: dict[str, LinearRecipe], sharing: Iterable[SharedInput], weights: Flat) -> list[SharedInput]:
    """The kernels of each run of GPTQ; ``sharing``: those that see one input. ``weights`` may be shapes alone."""
    units: list[SharedInput] = []
    for path in todo:
        if not any(path in unit for unit in units):
            others = next(paths for paths in sharing if path in paths)
            units.append(tuple(p for p in todo if p in others and (p == path or _side_by_side(path, p, weights, todo))))
    return units


def _side_by_side(path: str, other: str, weights: Flat, todo: dict[str, LinearRecipe]) -> bool:
    """Whether two kernels of one Hessian can be solved as one: no scale may reach from one into the other."""
    recipe = todo[path]
    rows = recipe.spec.compute_rows
    return (
        todo[other] == recipe
        and recipe.spec.group_size != "tensor"
        and all(weights[p].shape[1] % rows == 0 for p in (path, other))
    )


class _Solved(NamedTuple):
    """q without LoRC, and by output, on every device: mean squares of what rounding and q lose, and of the outputs."""

    q: QTensor
    rounding: Any
    lost: Any
    total: Any
    stats: GptqStats


def _solve_unit(
    unit: SharedInput, weights: Flat, hessian: Float[Array, "in in"], recipe: LinearRecipe, mesh: Mesh
) -> dict[str, _Solved]:
    """Kernels that are solved side by side, each for itself again."""
    unseen = not bool(jnp.any(jnp.diagonal(hessian) > 0))
    kernels = [np.asarray(weights[path]) for path in unit]
    whole = kernels[0] if len(unit) == 1 else np.concatenate(kernels, axis=1)
    solved = solve(
        on_outputs(whole, mesh, recipe.spec),
        hessian,
        recipe.spec,
        "round" if unseen else recipe.method,
        recipe.damping,
        mesh,
    )
    q, stats = jax.block_until_ready((solved.q, solved.stats))
    rounding, lost, total = (np.asarray(v) for v in (solved.rounding, solved.lost, solved.total))
    if len(unit) == 1:
        return {unit[0]: _Solved(q, rounding, lost, total, stats)}
    parts, end = {}, 0
    for path, kernel in zip(unit, kernels, strict=True):
        columns = slice(end, end := end + kernel.shape[1])
        own = _part(q, columns.start, columns.stop, mesh)
        parts[path] = _Solved(own, rounding[columns], lost[columns], total[columns], stats)
    return parts


def _result(
    name: str, weight: np.ndarray, recipe: LinearRecipe, solved: _Solved, lost: np.ndarray, seconds: float
) -> LinearResult:
    total = float(solved.total.sum(dtype=np.float64))
    share = lambda part: float(part.sum(dtype=np.float64)) / total if total > 0 else 0.0
    unseen = recipe.method == "gptq" and float(solved.stats.damping) == 0  # it did not run
    rounding_error = share(solved.rounding)
    damping, notes = None, []
    if unseen:
        notes.append("its inputs were all zero during calibration: rounded to nearest instead of GPTQ")
    elif recipe.method == "gptq":
        damping = float(f"{float(solved.stats.damping):.6g}")  # float32's digits are noise to a reader
        if damping > recipe.damping * 1.5:
            notes.append(f"damping raised to {damping:g} until Cholesky succeeded")
        if int(solved.stats.dead):
            notes.append(
                f"{int(solved.stats.dead)} inputs were zero throughout calibration: their weights are zero now"
            )
        if share(solved.lost) > rounding_error * _TOLERANCE:
            notes.append("GPTQ's error is above plain rounding's")
    if zeros := int(np.sum(np.all(weight == 0, axis=0))):
        notes.append(f"{zeros} output rows are all zero")
    shape = (weight.shape[0], weight.shape[1])
    return LinearResult(name, shape, rounding_error, share(lost), damping, round(seconds, 3), tuple(notes), unseen)


def abstract_solve(shape: tuple[int, int], dtype: DTypeLike, recipe: LinearRecipe, mesh: Mesh) -> Any:
    """The lowered program of ``solve`` for a weight of this shape."""
    spec = P(None, AXES) if _divides(shape[1], mesh, recipe.spec) else P()
    w = abstract(jax.ShapeDtypeStruct(shape, dtype), mesh, spec)
    hessian = abstract(jax.ShapeDtypeStruct((shape[0], shape[0]), jnp.float32), mesh, P())
    return solve.lower(w, hessian, recipe.spec, recipe.method, recipe.damping, mesh)


def on_outputs(w: np.ndarray, mesh: Mesh, spec: QuantSpec) -> Float[Array, "in out"]:
    """A weight [in, out] on the mesh, its outputs divided where that is even and no scale is shared between them."""
    sharding = NamedSharding(mesh, P(None, AXES) if _divides(w.shape[1], mesh, spec) else P())
    return jax.make_array_from_callback(w.shape, sharding, lambda index: w[index])


def _divides(out: int, mesh: Mesh, spec: QuantSpec) -> bool:
    return spec.group_size != "tensor" and out % (mesh.size * spec.compute_rows) == 0


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def solve(
    w: Float[Array, "in out"], hessian: Float[Array, "in in"], spec: QuantSpec, method: str, damping: float, mesh: Mesh
) -> _Solved:
    """Quantize ``w``, its outputs divided over the mesh; the Hessian is on every device."""

    def local(w: Array, h: Array, everywhere: Callable[[Array], Array] = lambda values: values) -> _Solved:
        rounded = quantize_array(w, spec)
        if method == "gptq":
            q, stats = gptq_with_stats(w, h, spec, damping=damping)
        else:
            q, stats = rounded, GptqStats(jnp.float32(0), jnp.int32(0))
        rounding, total = column_errors(w, dequantize(rounded), h), column_errors(w, jnp.zeros_like(w), h)
        lost = rounding if method == "round" else column_errors(w, dequantize(q), h)
        return _Solved(q, everywhere(rounding), everywhere(lost), everywhere(total), stats)

    if not _divides(w.shape[1], mesh, spec):
        return local(w, hessian)
    local = partial(local, everywhere=lambda values: jax.lax.all_gather(values, AXES, tiled=True))
    out: Any = (P(AXES), P(), P(), P(), P())
    solved = per_device(local, mesh, (P(None, AXES), P()), _Solved(*out))(w, hessian)
    return solved._replace(q=replace(solved.q, shape=w.shape))


def _part(q: QTensor, start: int, stop: int, mesh: Mesh) -> QTensor:
    """Some outputs of a QTensor, divided over the mesh like the whole."""
    sharding = NamedSharding(mesh, P(AXES) if _divides(stop - start, mesh, q.spec) else P())
    return replace(jax.tree.map(lambda leaf: _rows(leaf, start, stop, sharding), q), shape=(q.shape[0], stop - start))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _rows(leaf: Array, start: int, stop: int, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(leaf[start:stop], sharding)


def _with_lorc(
    tensors: dict[str, QTensor], weights: Flat, todo: dict[str, LinearRecipe], mesh: Mesh, seed: int
) -> dict[str, QTensor]:
    """The QTensors with their corrections, each computed by one of the devices, as one device alone would."""
    devices = mesh.devices.ravel()
    factors = {}
    for i, path in enumerate(path for path in todo if todo[path].lorc is not None):
        recipe, device = todo[path].lorc, devices[i % len(devices)]
        assert recipe is not None and recipe.rank != "auto", "Recipe.with_lorc_rank comes first"
        whole = replicate(tensors[path], mesh)
        own = lambda leaf, device=device: next((s.data for s in leaf.addressable_shards if s.device == device), None)
        if device.process_index == jax.process_index():
            w = jax.device_put(weights[path], device)
            factors[path] = _factors(w, jax.tree.map(own, whole), recipe.rank, recipe.dtype, seed)
        else:
            factors[path] = None
    result = dict(tensors)
    for path, found in factors.items():
        recipe = todo[path].lorc
        assert recipe is not None
        q = tensors[path]
        shapes = jax.eval_shape(partial(_factors, rank=recipe.rank, dtype=recipe.dtype), weights[path], q, seed=seed)
        result[path] = replace(q, low_rank=broadcast_from(found, shapes, mesh))
    return result


@partial(jax.jit, static_argnums=(2, 3), static_argnames=("rank", "dtype"))
def _factors(w: Float[Array, "in out"], q: QTensor, rank: int, dtype: Any, seed: int | Array) -> Any:
    return lorc(w, q, rank=rank, dtype=dtype, seed=seed).low_rank


def _column_errors(w: np.ndarray, q: QTensor, hessian: Float[Array, "in in"], mesh: Mesh) -> np.ndarray:
    """What q loses of each output."""
    everywhere = NamedSharding(mesh, P())
    return np.asarray(_errors(on_outputs(w, mesh, q.spec), q, hessian, everywhere))


@partial(jax.jit, static_argnums=3)
def _errors(w: Array, q: QTensor, hessian: Array, everywhere: NamedSharding) -> Float[Array, " out"]:
    return jax.lax.with_sharding_constraint(column_errors(w, dequantize(q), hessian), everywhere)


def _with_static_scale(q: QTensor, fixed: Scale) -> QTensor:
    asymmetric = q.spec.activation is not None and q.spec.activation.asymmetric
    return replace(q, input_scale=fixed.scale, input_zero=fixed.zero.astype(jnp.uint8) if asymmetric else None)
