"""Our own kernel, W4A8 for few tokens: is it right, how fast is it, and what does it make of a whole model?

All of it runs in a process of its own, which writes down each result as it is there: a kernel that no GPU had run
before may hang or end its process's GPU context, and the other parts are to be measured all the same.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from h100 import generation, linears
from h100.common import (
    DATASHEET,
    Clock,
    Sizes,
    compiled_in_parallel,
    filled,
    floor_seconds,
    markdown,
    on_gpu,
    ratio_text,
    seconds_of,
    time_text,
)

from fpq_jax import QTensor, QuantSpec, dequantize, quantize_array
from fpq_jax._matmul.fp4_kernel.fragments import (  # private: the GPU kernel alone
    Fragments,
    fragments,
    group_length,
    of_fragments,
)
from fpq_jax._matmul.fp4_kernel.matmul import matmul  # private: the GPU kernel alone
from fpq_jax._matmul.fp4_kernel.schedule import schedule_for  # private: the GPU kernel alone

LINEARS = ("bf16", "W4A8 fp8", "W4A8 fragments", "W4A8 fragments alone", "torch bf16", "torch scaled_mm")
MODELS = ("W4A8 fragments", "bf16")  # the others are in the part generation
TILES = ((2, 8), (2, 4), (4, 4), (4, 3))  # (warpgroups, steps in flight) to choose from for schedule.py
_FORMATS = ("e2m1", "e3m0", "int4")
_GROUPS = (256, 64, 32, 128, 512, 96, "channel")
_BOUND = 2**-10  # of the sum of magnitudes; the tensor core drops what is below 2^-13 of the largest that it adds
_ENDS = 10  # seconds that a process is given to end by itself
Write = Callable[[list[dict[str, Any]]], None]


def run(sizes: Sizes, clock: Clock, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        file.touch()
        inside = replace(clock, part_ends=time.perf_counter() + clock.left() - _ENDS) if on_gpu() else clock
        process = multiprocessing.get_context("spawn").Process(
            target=_process, args=(_inside, file, sizes, inside, ceilings)
        )
        process.start()
        process.join(clock.left() if on_gpu() else None)
        note = f"its process ended with {process.exitcode}"
        if process.is_alive():
            process.kill()
            process.join(_ENDS)
            note = "it did not come to its end, and was stopped"
        *rows, last = file.read_text().split("\n")
    found = [json.loads(row) for row in rows]  # one that was being written does not count
    if note != "its process ended with 0" or last:
        found.append({"check": "the kernel", "value": None, "passed": False, "note": note})
    return found


def _process(inside: Callable[..., None], file: Path, *arguments: Any) -> None:
    """In a process of its own; a row for each result, and one for what goes wrong."""

    def write(rows: list[dict[str, Any]]) -> None:
        with file.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)

    try:
        inside(write, *arguments)
    except Exception as error:
        write(
            [{"check": "the kernel", "value": None, "passed": False, "note": f"{type(error).__name__}: {error}"[:500]}]
        )


def predictions(sizes: Sizes) -> list[dict[str, Any]]:
    rows = [case.row(None, DATASHEET) for case in _linear_cases(sizes)]
    return rows + [case.row(generation.config_of(sizes), None, DATASHEET) for case in _model_cases(sizes)]


def table(rows: list[dict[str, Any]]) -> str:
    parts = []
    if checks := [row for row in rows if "check" in row]:
        failed = [row for row in checks if not row["passed"]]
        worst = max((row["value"] for row in checks if row["value"] is not None), default=float("nan"))
        parts.append(f"{len(checks)} checks, {len(failed)} failed; largest difference {worst:.2g}")
        parts += [f"FAILED {row['check']}: {row.get('note', row['value'])}" for row in failed]
    if products := [row for row in rows if "linear" in row and "variant" in row]:
        parts.append(_linears_table(products))
    if tiles := [row for row in rows if "tiles" in row]:
        parts.append(_tiles_table(tiles))
    if models := [row for row in rows if "phase" in row]:
        parts.append(generation.table(models))
    return "\n\n".join(parts)


def _linears_table(rows: list[dict[str, Any]]) -> str:
    lines: dict[Any, dict[str, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["linear"], row["tokens"]), {})[row["variant"]] = row
    header = ["model", "linear", "tokens", "floor, packed", *LINEARS, "fp8 / fragments", "bf16 / fragments"]
    header.append("alone, of bandwidth")
    cells = []
    for at, found in lines.items():
        seconds = {variant: found.get(variant, {}).get("seconds") for variant in LINEARS}
        alone = found.get("W4A8 fragments alone", {})
        share = alone.get("share_of_measured_ceiling")
        cells.append(
            [
                *map(str, at),
                time_text(alone.get("floor_seconds")),
                *map(time_text, seconds.values()),
                ratio_text(seconds["W4A8 fp8"], seconds["W4A8 fragments"]),
                ratio_text(seconds["bf16"], seconds["W4A8 fragments"]),
                "-" if share is None else f"{100 * share:.0f} %",
            ]
        )
    return markdown(header, cells)


def _linear_cases(sizes: Sizes) -> list[linears.Case]:
    """What matters most first: the first model's, with one token and sixteen, and then the rest."""
    found = []
    for i, (model, shapes) in enumerate(linears.shapes_of(sizes).items()):
        for name, shape in shapes.items():
            for tokens in sizes.few_tokens:
                first = tokens in (1, 16)
                rank = 2 * i + (not first)
                found += [(rank, linears.Case(model, name, shape, tokens, v, "cublas")) for v in LINEARS]
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def _model_cases(sizes: Sizes) -> list[generation.Case]:
    return [
        generation.Case(variant, batch, 1, slots) for variant in MODELS for batch, slots in sizes.decode if batch <= 16
    ]


def _inside(write: Write, sizes: Sizes, clock: Clock, ceilings: dict[str, float]) -> None:
    write(_checks(sizes.kernel_checks))
    config = generation.config_of(sizes)
    for variant in MODELS:
        cases = [case for case in _model_cases(sizes) if case.variant == variant]
        write(generation.measured(config, variant, cases, sizes, clock, ceilings))
    for rows in linears.measured(_linear_cases(sizes), sizes, clock, ceilings):
        write(rows)
    shapes = next(iter(linears.shapes_of(sizes).values()))
    for name in ("o", "gate_up"):  # the smallest and the largest
        write(_tiles(name, shapes[name], sizes, clock, ceilings))


def _tiles(
    name: str, shape: tuple[int, int], sizes: Sizes, clock: Clock, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """The kernel alone with tiles that are not those of the table, for the first of the models."""
    spec, rows = QuantSpec(constraint="m2", group_size=sizes.group_size), []
    stored = jax.eval_shape(lambda w: quantize_array(w, spec), jax.ShapeDtypeStruct(shape, jnp.float32))
    count = int(np.clip(sizes.cold_bytes // (shape[0] * shape[1]), 2, 16))
    weights = [fragments(filled(stored, 10 * i)) for i in range(count)]

    def compile_(job: tuple[int, tuple[int, int]]) -> Any:
        tokens, (warpgroups, stages) = job
        s = schedule_for(tokens, *shape, group_length(spec, shape[0]))
        s = replace(s, warpgroups=warpgroups, stages=min(stages, s.stages))
        one = jax.jit(lambda x, w: matmul(x, w, s))  # traced once for all pairs
        multiply = jax.jit(lambda xs, ws: [one(x, w) for x, w in zip(xs, ws, strict=True)])
        return multiply.lower([codes(tokens)] * count, weights).compile()

    codes = lambda tokens: filled(jax.ShapeDtypeStruct((tokens, shape[0]), jnp.float8_e4m3fn))
    jobs = [(tokens, tiles) for tokens in sizes.few_tokens if tokens in (1, 3, 16, 64) for tiles in TILES]
    if clock.left() < 10 and on_gpu():
        return [{"linear": name, "tokens": tokens, "tiles": tiles, "note": "out of time"} for tokens, tiles in jobs]
    for (tokens, tiles), program in compiled_in_parallel(jobs, compile_):
        row: dict[str, Any] = {"linear": name, "tokens": tokens, "tiles": tiles}
        try:
            if isinstance(program, Exception):
                raise program
            xs = [codes(tokens)] * count
            seconds = seconds_of(lambda program=program, xs=xs: program(xs, weights), sizes.repeats) / count
            floor = floor_seconds(shape[0] * shape[1] / 2, {}, ceilings)
            rows.append(row | {"seconds": seconds, "share_of_measured_ceiling": floor / seconds})
        except Exception as error:  # too much shared memory: the others go on
            rows.append(row | {"note": f"{type(error).__name__}: {str(error)[:200]}"})
    return rows


def _tiles_table(rows: list[dict[str, Any]]) -> str:
    lines: dict[Any, dict[Any, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["linear"], row["tokens"]), {})[tuple(row["tiles"])] = row
    header = ["linear", "tokens", *(f"{warpgroups} warpgroups, {stages} steps" for warpgroups, stages in TILES)]
    cells = [
        [*map(str, at), *(time_text(found.get(tiles, {}).get("seconds")) for tiles in TILES)]
        for at, found in lines.items()
    ]
    return markdown(header, cells)


def _checks(count: int) -> list[dict[str, Any]]:
    """Products of random shapes, formats, groups, codes and exponents against float64, on poisoned memory."""
    jobs = [_problem(seed) for seed in range(count)]
    rows = [_nothing_is_poisoned()] if on_gpu() else []
    for (x, f), program in compiled_in_parallel(jobs, lambda job: jax.jit(matmul).lower(*job).compile()):
        what = f"{len(x)} x {f.shape[0]} x {f.shape[1]}, {f.spec.format} in groups of {f.spec.group_size} "
        row: dict[str, Any] = {"check": what + (f.spec.constraint or "free"), "bound": _BOUND}
        if isinstance(program, Exception):
            rows.append(row | {"value": None, "passed": False, "note": f"{type(program).__name__}: {program}"[:200]})
            continue
        _poison()
        y = np.asarray(program(x, f), np.float64)
        q = of_fragments(jax.device_put(f, jax.devices("cpu")[0]))
        y = y if q.row_scale is None else y * np.asarray(q.row_scale, np.float64).T
        codes, weight = np.asarray(x, np.float64), np.asarray(dequantize(q), np.float64)
        worst = float(np.max(np.abs(y - codes @ weight) / (np.abs(codes) @ np.abs(weight)).clip(1e-30)))
        wrong = {} if np.isfinite(worst) else {"note": "not a number"}
        rows.append(row | {"value": None if wrong else worst, "passed": worst <= _BOUND} | wrong)
    return rows


def _problem(seed: int) -> tuple[jax.Array, Fragments]:
    rng = np.random.default_rng(seed)
    k, n = (int(size) for size in rng.integers(1, [3000, 1500]))
    constraint = [None, "m1", "m2"][seed % 3]
    group = _GROUPS[int(rng.integers(len(_GROUPS)))]
    spec = QuantSpec(format=_FORMATS[seed // 3 % 3], group_size=group, constraint=constraint)
    scale = lambda *shape: (0.01 * np.exp2(rng.uniform(-3, 3, shape))).astype(np.float32)
    parts: dict[str, Any] = {"row_scale": scale(n, 1)}
    if (groups := spec.num_groups(k)) > 1 and constraint:
        parts["exponents"] = rng.integers(-5, 4, (n, groups)).astype(np.int8)
    elif groups > 1:
        parts = {"group_scale": scale(n, groups)}
    packed = rng.integers(0, 256, (n, -(-k // 2))).astype(np.uint8)
    f = jax.jit(fragments)(QTensor(packed, **parts, spec=spec, shape=(k, n)))
    tokens = int(rng.choice([1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 50, 64, 100, 128, 200]))
    return jnp.asarray(rng.standard_normal((tokens, k)), jnp.float32).astype(jnp.float8_e4m3fn), f


def _poison() -> None:
    """NaN in what is free of the device's memory, from where results get theirs."""
    if on_gpu():
        jax.block_until_ready([_nans(2**i) for i in range(10, 28, 2)])


_nans = jax.jit(lambda size: jnp.full(size, jnp.nan, jnp.float32), static_argnums=0)


def _nothing_is_poisoned() -> dict[str, Any]:
    """A kernel that writes nothing finds the poison; otherwise the checks would not see what is left unwritten."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    nothing = plgpu.kernel(lambda out: None, out_type=jax.ShapeDtypeStruct((1000, 1000), jnp.float32))
    program = jax.jit(nothing).lower().compile()
    _poison()
    share = float(np.isnan(np.asarray(program())).mean())
    return {"check": "memory is poisoned", "value": 1 - share, "bound": 0.0, "passed": share == 1}
