"""Single Linears of LLaMA's shapes: bf16, W8A8 and W4A8 in JAX, beside torch on the same GPU.

A timed program multiplies as many (input, weight) pairs as it takes to read more than a cache holds, and its time is
divided by their number. The quantization of the activations is in it, for torch once with and once without.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from h100.common import (
    DATASHEET,
    Clock,
    Sizes,
    compiled_in_parallel,
    compiler_options,
    filled,
    floor_seconds,
    free_memory,
    markdown,
    on_gpu,
    ratio_text,
    seconds_of,
    time_text,
    torch_on_gpu,
    torch_seconds_of,
)

from fpq_jax import QuantSpec, linear, quantize_array
from fpq_jax._matmul.fp4_kernel.matmul import matmul  # private: the GPU kernel alone
from fpq_jax._matmul.weight_layouts import to_layout  # private: one kernel in each layout
from fpq_jax.debug import Program

_PACKED = dict.fromkeys(("W4A8 packed", "W4A8 fragments", "W4A8 fragments alone"), 0.5)  # bytes a weight
_LAYOUTS = {"W4A8 packed": "packed", "W4A8 fragments": "fragments", "W4A8 fragments alone": "fragments"}
VARIANTS = ("bf16", "W8A8", "W4A8 fp8", "W4A8 packed")
TORCH_VARIANTS = ("torch bf16", "torch scaled_mm", "torch scaled_mm + quantize")


@dataclass(frozen=True)
class Case:
    """One Linear and a number of tokens."""

    model: str
    linear: str
    shape: tuple[int, int]
    tokens: int
    variant: str
    route: str

    def row(self, seconds: float | None, ceilings: dict[str, float], **more: Any) -> dict[str, Any]:
        (k, n), m = self.shape, self.tokens
        weight = k * n * (2 if "bf16" in self.variant else _PACKED.get(self.variant, 1))
        bytes_, kind = weight + 2 * m * (k + n), "bf16" if "bf16" in self.variant else "fp8"
        floor = lambda c: floor_seconds(bytes_, {kind: 2e-12 * m * k * n}, c)
        row = {
            "model": self.model,
            "linear": self.linear,
            "shape": list(self.shape),
            "tokens": m,
            "variant": self.variant,
            "route": self.route,
            "floor_seconds": floor(DATASHEET),
            "seconds": seconds,
        }
        if seconds is not None:
            row |= {
                "tflops": 2e-12 * m * k * n / seconds,
                "gbs": bytes_ / seconds / 1e9,
                "share_of_measured_ceiling": floor(ceilings) / seconds,
            }
        return row | more


def shapes_of(sizes: Sizes) -> dict[str, dict[str, tuple[int, int]]]:
    """Inputs and outputs of each Linear of each model."""
    return {
        model: {
            "qkv": (hidden, 3 * hidden),
            "o": (hidden, hidden),
            "gate_up": (hidden, 2 * ffn),
            "down": (ffn, hidden),
        }
        for model, (hidden, ffn, _, _) in sizes.models.items()
    }


def cases(sizes: Sizes) -> list[Case]:
    """Everything to measure, what matters most first: the first model by cuBLAS, the ends and the middle of the others
    and of the second route, and then the rest."""
    found = []
    for i, (model, linears) in enumerate(shapes_of(sizes).items()):
        sample = sizes.tokens[:: max(1, len(sizes.tokens) // 3)]
        for route in sizes.routes:
            variants = (*VARIANTS, *(TORCH_VARIANTS if route == "cublas" else ()))
            for name, shape in linears.items():
                for m in sizes.tokens:
                    first = i == 0 and route == "cublas"
                    sampled = m in sample and (i == 0 or name in ("gate_up", "down"))
                    rank = 0 if first else 1 + i + (route == "triton") if sampled else 9 + i
                    found += [(rank, Case(model, name, shape, m, variant, route)) for variant in variants]
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def predictions(sizes: Sizes) -> list[dict[str, Any]]:
    return [case.row(None, DATASHEET) for case in cases(sizes)]


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each Linear, number of tokens and route: the time of each variant, with W8A8's floor before them."""
    lines: dict[Any, dict[str, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["linear"], row["tokens"], row["route"]), {})[row["variant"]] = row
    header = ["model", "linear", "tokens", "route", "floor FP8", *VARIANTS, *TORCH_VARIANTS]
    header += ["bf16 / W8A8", "scaled_mm / W8A8", "W8A8 of ceiling"]
    cells = []
    for at, found in lines.items():
        seconds = {variant: found.get(variant, {}).get("seconds") for variant in (*VARIANTS, *TORCH_VARIANTS)}
        w8a8 = found["W8A8"]
        share = w8a8.get("share_of_measured_ceiling")
        cells.append(
            [
                *map(str, at),
                time_text(w8a8["floor_seconds"]),
                *map(time_text, seconds.values()),
                ratio_text(seconds["bf16"], seconds["W8A8"]),
                ratio_text(seconds["torch scaled_mm"], seconds["W8A8"]),
                "-" if share is None else f"{100 * share:.0f} %",
            ]
        )
    return markdown(header, cells)


def run(sizes: Sizes, clock: Clock, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    return [row for rows in measured(cases(sizes), sizes, clock, ceilings) for row in rows]


def measured(
    todo: list[Case], sizes: Sizes, clock: Clock, ceilings: dict[str, float]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one shape after the other, so that its weights are made once."""
    for _, group in itertools.groupby(todo, key=lambda c: (c.model, c.linear, c.route)):
        together = list(group)
        if clock.left() < 20 and on_gpu():
            yield [case.row(None, ceilings, note="out of time") for case in together]
            continue
        yield _run_shape(together, sizes, clock, ceilings)
        free_memory()


def _copies(shape: tuple[int, int], tokens: int, sizes: Sizes) -> int:
    return int(np.clip(sizes.cold_bytes // (shape[0] * shape[1]), 2, 16 if tokens <= 1024 else 4))


def _weights(variant: str, shape: tuple[int, int], count: int, group_size: int) -> list[Any]:
    if variant == "bf16":
        return [filled(jax.ShapeDtypeStruct(shape, jnp.bfloat16), i) for i in range(count)]
    w8 = QuantSpec(format="e4m3", group_size="channel")
    spec = w8 if variant == "W8A8" else QuantSpec(constraint="m2", group_size=group_size)
    stored = jax.eval_shape(lambda w: quantize_array(w, spec), jax.ShapeDtypeStruct(shape, jnp.float32))
    return [to_layout(filled(stored, 10 * i), _LAYOUTS.get(variant, "fp8")) for i in range(count)]


def _run_shape(together: list[Case], sizes: Sizes, clock: Clock, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    shape, route, rows = together[0].shape, together[0].route, []
    inputs = {
        m: [filled(jax.ShapeDtypeStruct((m, shape[0]), jnp.bfloat16), i) for i in range(_copies(shape, m, sizes))]
        for m in {case.tokens for case in together}
    }
    most = max(len(xs) for xs in inputs.values())
    ours = [case for case in together if case.variant not in TORCH_VARIANTS]
    weights = {v: _weights(v, shape, most, sizes.group_size) for v in dict.fromkeys(case.variant for case in ours)}

    def compile_(case: Case) -> Any:
        xs, product = inputs[case.tokens], linear
        if case.variant == "W4A8 fragments alone":
            xs, product = [x.astype(jnp.float8_e4m3fn) for x in xs], matmul
        one = jax.jit(product)  # traced once for all pairs
        multiply = jax.jit(lambda xs, ws: [one(x, w) for x, w in zip(xs, ws, strict=True)])
        return multiply.lower(xs, weights[case.variant][: len(xs)]).compile(compiler_options=compiler_options(route))

    for case, program in compiled_in_parallel(ours, compile_):
        if isinstance(program, Exception):
            rows.append(case.row(None, ceilings, note=f"{type(program).__name__}: {str(program)[:200]}"))
            continue
        if clock.left() < 5:
            rows.append(case.row(None, ceilings, note="out of time"))
            continue
        xs = inputs[case.tokens]
        if case.variant == "W4A8 fragments alone":
            xs = [x.astype(jnp.float8_e4m3fn) for x in xs]
        ws = weights[case.variant][: len(xs)]
        try:
            seconds = seconds_of(lambda program=program, xs=xs, ws=ws: program(xs, ws), sizes.repeats) / len(xs)
        except Exception as error:  # out of memory: the others go on
            rows.append(case.row(None, ceilings, note=f"{type(error).__name__}: {str(error)[:200]}"))
            continue
        rows.append(case.row(seconds, ceilings, **(_products(program, len(xs)) if on_gpu() else {})))
    weights.clear()
    inputs_copies = {m: len(xs) for m, xs in inputs.items()}
    inputs.clear()
    free_memory()
    torch = torch_on_gpu()
    for case in together:
        if case.variant not in TORCH_VARIANTS:
            continue
        if torch is None:
            rows.append(case.row(None, ceilings, note="no torch with a GPU"))
        elif clock.left() < 5:
            rows.append(case.row(None, ceilings, note="out of time"))
        else:
            count = inputs_copies[case.tokens]
            try:
                seconds = torch_seconds_of(_torch_run(torch, case, count), sizes.repeats) / count
            except Exception as error:  # a shape that torch refuses, or its memory: the others go on
                rows.append(case.row(None, ceilings, note=f"{type(error).__name__}: {str(error)[:200]}"))
                continue
            rows.append(case.row(seconds, ceilings))
    return rows


def _products(program: Any, count: int) -> dict[str, float]:
    """FP8 products of one Linear, and how many of all products are cuBLAS's."""
    inside = Program.of(program)
    products = [*inside.matmuls("fp8_matmul"), *inside.matmuls("matmul")]
    return {
        "fp8_products": len(inside.matmuls("fp8_matmul")) / count,
        "cublas_products": sum(kernel.op == "custom-call" for kernel in products) / count,
    }


def _torch_run(torch: Any, case: Case, count: int) -> Any:
    (k, n), m = case.shape, case.tokens
    make = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16)
    xs, ws = [make(m, k) for _ in range(count)], [make(n, k) for _ in range(count)]
    if case.variant == "torch bf16":
        return lambda: [x @ w.T for x, w in zip(xs, ws, strict=True)]

    def quantize(x: Any) -> Any:
        scale = x.abs().amax(dim=1, keepdim=True).float() / 448
        return (x.float() / scale).to(torch.float8_e4m3fn), scale

    codes = [quantize(w) for w in ws]
    ws.clear()

    def multiply(x: Any, scale: Any, i: int) -> Any:
        w, row = codes[i]
        return torch._scaled_mm(x, w.T, scale_a=scale, scale_b=row.T, out_dtype=torch.bfloat16, use_fast_accum=True)

    if case.variant == "torch scaled_mm":
        ready = [quantize(x) for x in xs]
        return lambda: [multiply(x, scale, i) for i, (x, scale) in enumerate(ready)]
    return lambda: [multiply(*quantize(x), i) for i, x in enumerate(xs)]
