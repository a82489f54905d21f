"""Layer after layer: capture what each Linear sees, quantize it, go on behind the quantized layer.

Only one layer's weights and Hessians are alive at a time, and the next one's weights, which are read meanwhile; the
hidden states of the calibration windows stay on the host between layers.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int

from fpq_jax._algorithms.fisher import Fisher
from fpq_jax._algorithms.fp8_table import quantize_table
from fpq_jax._algorithms.linear_recipe import LinearRecipe
from fpq_jax._algorithms.quantize_linears import Done, LinearResult, quantize_linears
from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._algorithms.statistics import CalibrationStats
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._matmul.weight_layouts import to_layout
from fpq_jax._pipeline.batches import BATCH_TOKENS, Batches, batch_size
from fpq_jax._pipeline.calibration import Kernels, Stream, calibrate, recorded_kernels, stages
from fpq_jax._pipeline.layerwise import embed, forward
from fpq_jax._support.placement import replicate
from fpq_jax._support.prefetch import prefetch
from fpq_jax._support.trees import Flat, below
from fpq_jax.models.parameters import EMBEDDING, HEAD, HEAD_KERNEL, TABLE, linear_name, part_names, with_params
from fpq_jax.models.spec import ModelSpec


@dataclass
class Part:
    """Some parameters of the quantized model, by path, on the mesh; kernels are QTensors whose outputs may be divided.

    name: "embedding", "layers.0", ..., "head". results: of its Linears, in order. seconds: by stage.
    """

    name: str
    params: Flat
    results: list[LinearResult] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class _Stages(dict[str, float]):
    """Seconds by stage."""

    def add(self, stage: str, seconds: float) -> None:
        self[stage] = self.get(stage, 0.0) + seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - began)


def linears(checkpoint: HfCheckpoint) -> dict[str, str]:
    """Path of each decoder Linear's kernel -> the Linear's name in the Hugging Face checkpoint."""
    kernels = (path for path in checkpoint.shapes if path.startswith("layers.") and path.endswith(".kernel"))
    return {path: linear_name(checkpoint.model_class, path) for path in kernels}


def quantize_checkpoint(
    checkpoint: HfCheckpoint,
    recipe: Recipe,
    windows: Int[np.ndarray, "N L"],
    dtype: DTypeLike,
    mesh: Mesh,
    *,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    finished: Mapping[str, Callable[[], Flat]] | None = None,
    first_layer: dict[Kernels, CalibrationStats] | None = None,
    fishers: Callable[[int], dict[str, Fisher]] | None = None,
) -> Iterator[Part]:
    """Quantize part after part; each is yielded as soon as it is there.

    batch_tokens: of a calibration batch, on each device. finished: parts that are there already, and how each is read,
    onto the whole mesh; they are not yielded, and those behind them become what they would have. ``first_layer`` keeps
    what calibration saw in the first layer, for further recipes on the same windows: it depends on nothing quantized,
    only on the activations' formats. Deeper layers' Hessians are each recipe's own. ``fishers`` gives those of a
    layer's kernels, for a recipe that needs them.
    """
    finished = finished or {}
    config, model_class = checkpoint.model_config, checkpoint.model_class
    names = linears(checkpoint)
    what = recipe.for_linears(names.values())
    model_spec = ModelSpec(model_class, config, np.dtype(dtype))
    layer = model_spec.layer()
    batches = Batches.of(windows, mesh, batch_size(len(windows), windows.shape[1], mesh, batch_tokens))

    def read(name: str) -> tuple[Flat, float]:
        began = time.perf_counter()
        return checkpoint.read_dense_part(name, dtype), time.perf_counter() - began

    missing = [name for name in part_names(config) if name not in finished]
    reading = prefetch(read, [name for name in missing if name != EMBEDDING])
    original = replicate(read(EMBEDDING)[0], mesh)  # needed to begin with, even where it is finished
    params = with_fp8_tables(original, recipe)
    hidden = embed(model_spec, params, batches)
    # what the unquantized model has in its place
    reference = embed(model_spec, original, batches) if recipe.propagates else None
    del original
    if EMBEDDING in missing:
        yield Part(EMBEDDING, params)
    del params
    for i in range(config.num_hidden_layers):
        name, seconds = f"layers.{i}", _Stages()
        last = all(f"layers.{j}" in finished for j in range(i + 1, config.num_hidden_layers))
        if name in finished:
            if not last:
                forward(with_params(layer, _as_it_runs(below(finished[name](), f"{name}."))), hidden, mesh)
                if reference is not None:
                    forward(with_params(layer, replicate(below(read(name)[0], f"{name}."), mesh)), reference, mesh)
            continue
        weights, seconds["read"] = next(reading)
        weights = below(weights, f"{name}.")
        linear_names = {path: names[f"{name}.{path}"] for path in weights if f"{name}.{path}" in names}
        chosen = {path: what[linear] for path, linear in linear_names.items()}
        recipes = {path: r for path, r in chosen.items() if r is not None}
        weights = replicate(weights, mesh)
        of_layer = None if fishers is None else replicate(fishers(i), mesh)
        done: Done = {}
        for part in stages(model_spec, recipes) if recipe.sequential else [recipes]:
            with seconds.timed("hessians"):
                before = {path: q for path, (q, _) in done.items()}
                stream = Stream(weights | replicate(_as_it_runs(before), mesh), hidden)
                other = None if reference is None else Stream(weights, reference)
                stats = _calibrated(
                    model_spec, stream, part, batches, first_layer if i == 0 and not recipe.sequential else None, other
                )
                del before, stream, other
            done |= quantize_linears(weights, part, linear_names, stats, mesh, seed, seconds.add, of_layer)
            del stats
        done = {path: done[path] for path in recipes}
        del of_layer
        # written as they are sharded: each process its own part
        quantized = {path: q for path, (q, _) in done.items()}
        sharded = weights | quantized
        with seconds.timed("forward"):
            if not last:
                whole = weights | replicate(_as_it_runs(quantized), mesh)
                forward(with_params(layer, whole), hidden, mesh)
                del whole
                if reference is not None:
                    forward(with_params(layer, weights), reference, mesh)
        del weights
        part = {f"{name}.{path}": leaf for path, leaf in sharded.items()}
        del sharded, quantized
        results = [result for _, result in done.values()]
        del done
        yield Part(name, part, results, seconds)
        del part
    del hidden
    if HEAD in missing:
        yield Part(HEAD, with_fp8_tables(replicate(next(reading)[0], mesh), recipe))


def with_fp8_tables(params: Flat, recipe: Recipe) -> Flat:
    """The embedding and the head among some parameters in FP8, where the recipe says so."""
    params, activation = dict(params), recipe.head_activation
    if recipe.embedding is not None and TABLE in params:
        params[TABLE] = quantize_table(params[TABLE], activation)
    if recipe.head is not None and HEAD_KERNEL in params:
        params[HEAD_KERNEL] = quantize_table(params[HEAD_KERNEL].T, activation)
    return params


def _as_it_runs(params: Flat) -> Flat:
    """In the layout of most speed, which layers of whatever formats share, and with it their programs."""
    return {path: to_layout(leaf, "fp8", pad=False) for path, leaf in params.items()}


def _calibrated(
    model_spec: ModelSpec,
    stream: Stream,
    recipes: dict[str, LinearRecipe],
    batches: Batches,
    kept: dict[Kernels, CalibrationStats] | None,
    reference: Stream | None,
) -> CalibrationStats:
    kernels = recorded_kernels(recipes, stream.params)
    if kept is None:
        return jax.block_until_ready(calibrate(model_spec, stream, kernels, batches, reference=reference))
    if kernels not in kept:
        kept[kernels] = jax.device_get(calibrate(model_spec, stream, kernels, batches))
    return replicate(kept[kernels], batches.mesh)
