"""GPTQ per Linear beside a torch implementation of the published algorithm, and the quantization of a whole LLaMA-7B,
extrapolated from a few of its layers."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from bench_gptq import torch_gptq
from h100.common import (
    DATASHEET,
    Clock,
    Sizes,
    floor_seconds,
    free_memory,
    markdown,
    on_gpu,
    ratio_text,
    seconds_of,
    time_text,
    torch_on_gpu,
)
from h100.generation import config_of
from safetensors.numpy import save_file

from fpq_jax import QuantSpec, Recipe, gptq, hessian, make_mesh
from fpq_jax._checkpoints.huggingface import HfCheckpoint  # private: a checkpoint read and written tensor by tensor
from fpq_jax._pipeline.quantize_layers import quantize_checkpoint  # private: times the pipeline's stages
from fpq_jax.models.llama import Llama
from fpq_jax.models.parameters import abstract_model, params_of, to_hf_tensors


def shapes(sizes: Sizes) -> list[tuple[str, tuple[int, int]]]:
    """(model, [in, out]) of the Linears of the two smaller models."""
    models = list(sizes.models.items())[:2]
    return [(m, shape) for m, (h, f, _, _) in models for shape in ((h, h), (h, f), (f, h))]


def _floor(shape: tuple[int, int], ceilings: dict[str, float]) -> float:
    # a Cholesky factorization and one triangular pass over the weight, in float32
    k, n = shape
    return floor_seconds(4 * (k * k + 2 * k * n), {"fp32": 1e-12 * (k**3 / 3 + k * k * n)}, ceilings)


def predictions(sizes: Sizes) -> list[dict[str, Any]]:
    return [
        {"model": model, "shape": list(shape), "floor_seconds": _floor(shape, DATASHEET), "seconds": None}
        for model, shape in shapes(sizes)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    header = ["model", "in", "out", "floor", "fpq_jax", "torch", "torch / fpq_jax", "first call", "note"]
    cells = [
        [
            row["model"],
            *map(str, row["shape"]),
            time_text(row["floor_seconds"]),
            time_text(row["seconds"]),
            time_text(row.get("torch_seconds")),
            ratio_text(row.get("torch_seconds"), row["seconds"]),
            time_text(row.get("first_call_seconds")),
            row.get("note", ""),
        ]
        for row in rows
    ]
    return markdown(header, cells)


def pipeline_table(rows: list[dict[str, Any]]) -> str:
    layers = lambda row: ", ".join(map(time_text, row.get("seconds_per_layer", ()))) or "-"
    cells = [[layers(row), time_text(row["seconds"]), row["note"]] for row in rows]
    return markdown(["layers as measured", "whole model", "note"], cells)


def run(sizes: Sizes, clock: Clock, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for i, (model, shape) in enumerate(shapes(sizes)):
        row: dict[str, Any] = {"model": model, "shape": list(shape), "floor_seconds": _floor(shape, DATASHEET)}
        if clock.left() < 15 and on_gpu():
            rows.append(row | {"seconds": None, "note": "out of time"})
            continue
        try:
            rows.append(row | _one_linear(shape, sizes, i))
        except Exception as error:  # out of memory: the others go on
            rows.append(row | {"seconds": None, "note": f"{type(error).__name__}: {str(error)[:200]}"})
        free_memory()
    return rows


def _one_linear(shape: tuple[int, int], sizes: Sizes, seed: int) -> dict[str, Any]:
    k, n = shape
    key = jax.random.key(seed)
    w = 0.02 * jax.random.normal(key, (k, n), jnp.float32)
    x = jax.random.normal(jax.random.fold_in(key, 1), (2 * k, k), jnp.float32)
    h = jax.jit(hessian)(x + 0.5 * jnp.roll(x, 1, axis=1))
    spec = QuantSpec(group_size=sizes.group_size)
    quantize = jax.jit(lambda w, h: gptq(w, h, spec))
    began = time.perf_counter()
    jax.block_until_ready(quantize(w, h))
    first = time.perf_counter() - began
    seconds = seconds_of(lambda: quantize(w, h), min(3, sizes.repeats))
    row: dict[str, Any] = {"first_call_seconds": first, "seconds": seconds}
    if (torch := torch_on_gpu()) is None:
        return row | {"torch_seconds": None, "note": "no torch with a GPU"}
    torch.backends.cuda.matmul.allow_tf32 = False
    w_torch = torch.tensor(np.asarray(w).T.copy(), device="cuda")
    h_torch = torch.tensor(np.asarray(h), device="cuda")
    best = float("inf")
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch_gptq(w_torch, h_torch, sizes.group_size)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return row | {"torch_seconds": best, "torch_over_fpq_jax": best / row["seconds"]}


def run_pipeline(sizes: Sizes, clock: Clock, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Seconds for each layer of a checkpoint with random weights, by the library's own pipeline."""
    config = config_of(sizes)
    layers, (samples, length) = sizes.pipeline_layers, sizes.calibration
    if clock.left() < 90 and on_gpu():
        return [{"layers_measured": 0, "seconds": None, "note": "out of time"}]
    rng = np.random.default_rng(0)
    windows = rng.integers(0, config.vocab_size, (samples, length))
    recipe = Recipe.load("w4a8-fp-m2-lorc").with_group_size(sizes.group_size).with_lorc_rank(8)
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = HfCheckpoint(_write_random_checkpoint(Path(folder), config, layers, rng))
        began = time.perf_counter()
        for part in quantize_checkpoint(checkpoint, recipe, windows, jnp.bfloat16, make_mesh()):
            if part.results:
                ends.append(time.perf_counter() - began)
                stages = part.seconds
    seconds = np.diff([0.0, *ends]).tolist()
    # the last layer runs no forward behind it, and the first compiles
    later = seconds[1:-1] or seconds[-1:]
    total = config.num_hidden_layers
    return [
        {
            "calibration_tokens": samples * length,
            "layers_measured": layers,
            "seconds_per_layer": seconds,
            "last_layers_stages": stages,
            "seconds": seconds[0] + (total - 1) * sum(later) / len(later),
            "note": f"extrapolated from {layers} layers to {total}: the first as measured, others as the middle ones",
        }
    ]


def _write_random_checkpoint(folder: Path, config: Any, layers: int, rng: np.random.Generator) -> Path:
    values = config.to_hf() | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    small = Llama.Config.from_hf(values)
    tensors = {}
    for path, leaf in params_of(abstract_model(Llama, small)).items():
        # random signs and mantissas at 2**-6
        bits = rng.integers(0, 2**16, leaf.shape, np.uint16) & 0x807F | (121 << 7)
        tensors |= to_hf_tensors(Llama, {path: bits.view(ml_dtypes.bfloat16)})
    save_file(tensors, folder / "model.safetensors")
    return folder
