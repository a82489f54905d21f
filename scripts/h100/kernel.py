"""Our own kernel, W4A8 for few tokens: is it right, how fast is it, and what does it make of a whole model?

All of it runs in a process of its own, which writes down each result as it is there: a kernel that no GPU had run
before may hang or end its process's GPU context, and the other parts are to be measured all the same.
"""

import json
import multiprocessing
import tempfile
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
    free_memory,
    markdown,
    on_gpu,
    ratio_text,
    seconds_of,
    time_text,
)

from fpq_jax import QuantSpec, dequantize, quantize_array
from fpq_jax.kernels import Fragments, fragments, matmul, of_fragments
from fpq_jax.kernels._fragments import group_length
from fpq_jax.kernels._schedule import schedule_for

LINEARS = ("bf16", "W4A8 load", "W4A8 kernel", "W4A8 kernel alone", "torch bf16", "torch scaled_mm")
MODELS = ("bf16", "W4A8 load", "W4A8 kernel")
TILES = ((2, 8), (2, 4), (4, 4), (4, 3))  # (warpgroups, steps in flight) to choose from for _schedule.py
_FORMATS = ("e2m1", "e3m0", "int4")
_GROUPS = (256, 64, 32, 128, 512, 96, "channel")
_BOUND = 2**-10  # of the sum of magnitudes; the tensor core drops what is below 2^-13 of the largest that it adds
_ENDS = 10  # seconds that a process is given to end by itself


def run(sizes: Sizes, clock: Clock, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        file.touch()
        arguments = (file, sizes, max(clock.left() - 2 * _ENDS, 1), ceilings)
        process = multiprocessing.get_context("spawn").Process(target=_inside, args=arguments)
        process.start()
        process.join(clock.left() - _ENDS if on_gpu() else None)
        note = f"its process ended with {process.exitcode}"
        if process.is_alive():
            process.kill()
            process.join()
            note = "it did not come to its end, and was stopped"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    if note != "its process ended with 0":
        rows.append({"check": "the kernel", "value": None, "passed": False, "note": note})
    return rows


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
    header = ["model", "linear", "tokens", "packed bytes", *LINEARS, "load / kernel", "bf16 / kernel"]
    header.append("alone, of bandwidth")
    cells = []
    for at, found in lines.items():
        seconds = {variant: found.get(variant, {}).get("seconds") for variant in LINEARS}
        alone = found.get("W4A8 kernel alone", {})
        share = alone.get("share_of_measured_ceiling")
        cells.append(
            [
                *map(str, at),
                time_text(alone.get("floor_seconds")),
                *map(time_text, seconds.values()),
                ratio_text(seconds["W4A8 load"], seconds["W4A8 kernel"]),
                ratio_text(seconds["bf16"], seconds["W4A8 kernel"]),
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


def _inside(file: Path, sizes: Sizes, seconds: float, ceilings: dict[str, float]) -> None:
    """In the process of its own."""
    clock = Clock(seconds)

    def write(rows: list[dict[str, Any]]) -> None:
        with file.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)

    for seed in range(sizes.kernel_checks):
        write([_check(seed)])
    clock.start_part(0.4 * seconds)
    config = generation.config_of(sizes)
    for variant in MODELS:
        cases = [case for case in _model_cases(sizes) if case.variant == variant]
        write(generation.measured(config, variant, cases, sizes, clock, ceilings))
    clock.start_part(seconds)
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
    stored = jax.eval_shape(lambda w: fragments(quantize_array(w, spec)), jax.ShapeDtypeStruct(shape, jnp.float32))
    count = int(np.clip(sizes.cold_bytes // (shape[0] * shape[1]), 2, 16))
    weights = [filled(stored, 10 * i) for i in range(count)]

    def compile_(job: tuple[int, tuple[int, int]]) -> Any:
        tokens, (warpgroups, stages) = job
        s = schedule_for(tokens, *shape, group_length(spec, shape[0]))
        s = replace(s, warpgroups=warpgroups, stages=min(stages, s.stages))
        multiply = jax.jit(lambda xs, ws: [matmul(x, w, s) for x, w in zip(xs, ws, strict=True)])
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


def _check(seed: int) -> dict[str, Any]:
    """One product of random shape, format, groups and exponents against float64, on poisoned memory."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.choice([1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 50, 64, 100, 128, 200]))
    k, n = (int(size) for size in rng.integers(1, [3000, 1500]))
    constraint = [None, "m1", "m2"][seed % 3]
    spec = QuantSpec(
        format=_FORMATS[seed // 3 % 3], group_size=_GROUPS[int(rng.integers(len(_GROUPS)))], constraint=constraint
    )
    w = rng.standard_normal((k, n)) * np.exp2(rng.integers(-5, 6, (k, 1)))
    f = jax.jit(lambda w: fragments(quantize_array(w, spec)))(jnp.asarray(w, jnp.float32))
    x = jnp.asarray(rng.standard_normal((tokens, k)), jnp.float32).astype(jnp.float8_e4m3fn)
    multiply = jax.jit(matmul).lower(x, f).compile()
    jax.block_until_ready((x, f))
    _poison()
    y = multiply(x, f)
    found = np.asarray(y if f.row_scale is None else y * f.row_scale.T, np.float64)
    weight = np.asarray(dequantize(of_fragments(_on_cpu(f))), np.float64)
    expected = np.asarray(x, np.float64) @ weight
    scale = np.abs(np.asarray(x, np.float64)) @ np.abs(weight)
    worst = float(np.max(np.abs(found - expected) / scale.clip(1e-30)))
    what = f"{tokens} x {k} x {n}, {spec.format} in groups of {spec.group_size} {constraint or 'free'}"
    if not np.isfinite(worst):
        return {"check": what, "value": None, "bound": _BOUND, "passed": False, "note": "not a number"}
    return {"check": what, "value": worst, "bound": _BOUND, "passed": worst <= _BOUND}


def _on_cpu(f: Fragments) -> Fragments:
    return jax.device_put(f, jax.devices("cpu")[0])


def _poison() -> None:
    """NaN in what is free of the device's memory, from where results get theirs."""
    if not on_gpu():
        return
    sizes = [2**i for i in range(8, 28)]
    full = jax.jit(lambda size: jnp.full(size, jnp.nan, jnp.float32), static_argnums=0)
    arrays = jax.block_until_ready([full(size) for size in sizes])
    del arrays
    free_memory()
