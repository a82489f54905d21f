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
from jaxtyping import Array, Float

from fpq_jax._calibration import Seen, Together
from fpq_jax._errors import FpqError
from fpq_jax._gptq import GptqStats, column_errors, gptq_with_stats
from fpq_jax._layerwise import divided
from fpq_jax._lorc import lorc
from fpq_jax._mesh import AXES
from fpq_jax._qtensor import QTensor, dequantize, quantize_array
from fpq_jax._recipe import LinearRecipe
from fpq_jax._scales import Scale
from fpq_jax._spec import QuantSpec
from fpq_jax._tree import Flat

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
    weights: Flat, todo: dict[str, LinearRecipe], names: dict[str, str], seen: Seen, mesh: Mesh, seed: int, timer: Timer
) -> dict[str, tuple[QTensor, LinearResult]]:
    """QTensor and result of each kernel in ``todo``, in its order. ``weights``: by path, on the host.

    QTensors' outputs are divided over the mesh where they divide evenly.
    """
    done: dict[str, tuple[QTensor, LinearResult]] = {}
    for unit in solved_together(todo, seen.hessians, weights):
        hessian = next(h for paths, h in seen.hessians.items() if unit[0] in paths)
        done |= _quantize_unit(unit, weights, todo[unit[0]], names, hessian, seen.fixed, mesh, seed, timer)
    return {path: done[path] for path in todo}


def solved_together(todo: dict[str, LinearRecipe], sharing: Iterable[Together], weights: Flat) -> list[Together]:
    """The kernels of each run of GPTQ; ``sharing``: those that see one input. ``weights`` may be shapes alone."""
    units: list[Together] = []
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
    """q, and by output, on every device: mean squares of what rounding and q (before LoRC) lose, and of the outputs."""

    q: QTensor
    rounding: Float[Array, " out"]
    lost: Float[Array, " out"]
    total: Float[Array, " out"]
    stats: GptqStats


def _quantize_unit(
    unit: Together,
    weights: Flat,
    recipe: LinearRecipe,
    names: dict[str, str],
    hessian: Float[Array, "in in"],
    fixed: dict[str, Scale],
    mesh: Mesh,
    seed: int,
    timer: Timer,
) -> dict[str, tuple[QTensor, LinearResult]]:
    began = time.perf_counter()
    if not bool(jnp.all(jnp.isfinite(hessian))):
        raise FpqError(f"The inputs of {names[unit[0]]} overflow during calibration; use --dtype float32 or bfloat16.")
    unseen = not bool(jnp.any(jnp.diagonal(hessian) > 0))
    method = "round" if unseen else recipe.method
    kernels = [np.asarray(weights[path]) for path in unit]
    sizes = [kernel.shape[1] for kernel in kernels]
    w = on_outputs(kernels[0] if len(unit) == 1 else np.concatenate(kernels, axis=1), mesh, recipe.spec)
    solved = jax.block_until_ready(solve(w, hessian, recipe.spec, method, recipe.damping, mesh))
    ran = time.perf_counter() - began
    timer("gptq", ran)

    results: dict[str, tuple[QTensor, LinearResult]] = {}
    ends = np.cumsum(sizes).tolist()
    for path, kernel, end in zip(unit, kernels, ends, strict=True):
        began = time.perf_counter()
        columns = slice(end - kernel.shape[1], end)
        q = solved.q if len(unit) == 1 else _part(solved.q, columns, mesh)
        if recipe.lorc is not None:
            assert recipe.lorc.rank != "auto", "Recipe.with_lorc_rank comes first"
            own = w if len(unit) == 1 else on_outputs(kernel, mesh, recipe.spec)
            rank, dtype = recipe.lorc.rank, recipe.lorc.dtype
            q, corrected = _lorc(own, q, hessian, rank, dtype, NamedSharding(mesh, P()), seed)
        else:
            corrected = solved.lost[columns]
        if path in fixed:
            q = _with_static_scale(q, fixed[path])
        rounding_error, before, error = (
            _share(part, solved.total[columns]) for part in (solved.rounding[columns], solved.lost[columns], corrected)
        )
        damping, notes = _notes(recipe, unseen, solved.stats, before > rounding_error * _TOLERANCE, kernel)
        seconds = time.perf_counter() - began
        timer("lorc", seconds)
        seconds += ran * kernel.shape[1] / sum(sizes)
        shape = (kernel.shape[0], kernel.shape[1])
        fell_back = unseen and recipe.method == "gptq"
        results[path] = (
            q,
            LinearResult(names[path], shape, rounding_error, error, damping, round(seconds, 3), notes, fell_back),
        )
    return results


def _share(part: Float[Array, " out"], total: Float[Array, " out"]) -> float:
    part_sum, total_sum = (float(np.asarray(values, np.float64).sum()) for values in (part, total))
    return part_sum / total_sum if total_sum > 0 else 0.0


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
    solved = divided(local, mesh, (P(None, AXES), P()), _Solved(P(AXES), P(), P(), P(), P()))(w, hessian)
    return solved._replace(q=replace(solved.q, shape=w.shape))


def _part(q: QTensor, rows: slice, mesh: Mesh) -> QTensor:
    """Some outputs of a QTensor, divided over the mesh like the whole."""
    shape = (q.shape[0], rows.stop - rows.start)
    sharding = NamedSharding(mesh, P(AXES) if _divides(shape[1], mesh, q.spec) else P())
    cut = lambda leaf: _rows(leaf, rows.start, rows.stop, sharding)
    return replace(jax.tree.map(cut, q), shape=shape)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _rows(leaf: Array, start: int, stop: int, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(leaf[start:stop], sharding)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _lorc(
    w: Float[Array, "in out"], q: QTensor, hessian: Array, rank: int, dtype: Any, everywhere: NamedSharding, seed: int | Array
) -> tuple[QTensor, Float[Array, " out"]]:
    """(q with its correction, what is still lost of each output)."""
    q = lorc(w, q, rank=rank, dtype=dtype, seed=seed)
    return q, jax.lax.with_sharding_constraint(column_errors(w, dequantize(q), hessian), everywhere)


def _with_static_scale(q: QTensor, fixed: Scale) -> QTensor:
    asymmetric = q.spec.activation is not None and q.spec.activation.asymmetric
    return replace(q, input_scale=fixed.scale, input_zero=fixed.zero.astype(jnp.uint8) if asymmetric else None)


def _notes(
    recipe: LinearRecipe, unseen: bool, stats: GptqStats, above_rounding: bool, kernel: np.ndarray
) -> tuple[float | None, tuple[str, ...]]:
    """The damping, and what a person should know."""
    damping, notes = None, []
    if recipe.method == "gptq" and unseen:
        notes.append("its inputs were all zero during calibration: rounded to nearest instead of GPTQ")
    elif recipe.method == "gptq":
        damping = float(f"{float(stats.damping):.6g}")  # float32's digits are noise to a reader
        if damping > recipe.damping * 1.5:
            notes.append(f"damping raised to {damping:g} until Cholesky succeeded")
        if int(stats.dead):
            notes.append(f"{int(stats.dead)} inputs were zero throughout calibration: their weights are zero now")
        if above_rounding:
            notes.append("GPTQ's error is above plain rounding's")
    if zeros := int(np.sum(np.all(kernel == 0, axis=0))):
        notes.append(f"{zeros} output rows are all zero")
    return damping, tuple(notes)
