"""The pass back through a job's layers, before anything is quantized: the Fisher information of the kernels, and what
each candidate of those would cost whose bits the recipe leaves open. Kept layer by layer with the run's progress."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fpq_jax._algorithms.bit_allocation import expected_losses
from fpq_jax._algorithms.fisher import Fisher
from fpq_jax._algorithms.linear_recipe import LinearRecipe
from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._checkpoints.run_progress import RunProgress
from fpq_jax._pipeline.backward import LayerBehind, fisher_windows, layers_behind
from fpq_jax._pipeline.batches import Batches, batch_size
from fpq_jax._pipeline.calibration import Stream, calibrate, recorded_kernels
from fpq_jax._pipeline.job import Job
from fpq_jax._pipeline.quantize_layers import linears
from fpq_jax._support.console import progress_bar
from fpq_jax._support.files import file_digest
from fpq_jax._support.mesh import barrier, from_first, is_first
from fpq_jax._support.placement import replicate
from fpq_jax._support.trees import Flat, below

Losses = dict[str, list[float]]  # by kernel, of each of its candidates


def measure_fishers(job: Job, recipe: Recipe, progress: RunProgress) -> Losses:
    """What the candidates cost of the kernels whose bits are open. Nothing is measured if the recipe needs no Fisher
    information."""
    if not recipe.needs_fisher:
        return {}
    config = job.checkpoint.model_config
    layers = range(config.num_hidden_layers)
    finished = from_first(_finished(progress, len(layers)))
    if finished > 0:
        _measure(job, recipe, progress, finished)
    found: Losses = {}
    for i in layers:
        kept: Any = progress.measured(_record(i))
        found |= {f"layers.{i}.{path}": each for path, each in kept["losses"].items()}
    return found


def read_fisher(folder: Path, layer: int) -> dict[str, Fisher]:
    """What ``measure_fishers`` kept of a layer."""
    with np.load(_file(folder, layer)) as file:
        paths = dict.fromkeys(name.rpartition(":")[0] for name in file.files)
        return {path: Fisher(*(file[f"{path}:{field}"] for field in Fisher._fields)) for path in paths}


def _measure(job: Job, recipe: Recipe, progress: RunProgress, finished: int) -> None:
    config, every = job.checkpoint.model_config, linears(job.checkpoint)
    chosen = recipe.for_linears(every.values())
    wanted = {path: r for path, name in every.items() if (r := chosen[name]) is not None and (r.fisher or recipe.bits)}
    kernels = [below(wanted, f"layers.{i}.") for i in range(config.num_hidden_layers)]
    windows = job.calibration.windows
    windows = windows[: fisher_windows(len(windows))]
    size = batch_size(len(windows), windows.shape[1], job.mesh, job.options.batch_tokens)
    batches = Batches.of(windows, job.mesh, size)

    def read(name: str) -> Flat:
        part = replicate(job.checkpoint.read_dense_part(name, job.dtype), job.mesh)
        return below(part, f"{name}.") if name.startswith("layers.") else part

    if is_first():
        for folder in (progress.fisher, progress.backward):
            folder.mkdir(exist_ok=True)
    barrier("there are folders for the pass back")
    with progress_bar(f"Fisher information of {len(windows)} windows", 2 * config.num_hidden_layers) as advance:
        for behind in layers_behind(
            job.model_spec,
            read,
            [list(of_layer) for of_layer in kernels],
            batches,
            progress.backward,
            seed=job.options.seed,
            finished=finished,
            advance=advance,
        ):
            i = behind.number
            losses = {}
            if recipe.bits:
                open_bits = {path: r for path, r in kernels[i].items() if r is recipe.default}
                losses = _losses(job, behind, open_bits, batches)
            if is_first():
                host = {path: jax.device_get(one) for path, one in behind.fishers.items() if kernels[i][path].fisher}
                arrays = {f"{path}:{field}": a for path, one in host.items() for field, a in one._asdict().items()}
                np.savez(_file(progress.fisher, i), **arrays)
            barrier("the Fisher information of a layer is there")
            progress.keep(_record(i), {"digest": file_digest(_file(progress.fisher, i)), "losses": losses})
    barrier("the pass back is over")
    if is_first():
        shutil.rmtree(progress.backward)


def _losses(job: Job, behind: LayerBehind, recipes: dict[str, LinearRecipe], batches: Batches) -> Losses:
    kernels = recorded_kernels(recipes, behind.params)
    stats = calibrate(job.model_spec, Stream(behind.params, behind.hidden), kernels, batches)
    of = lambda path: (behind.params[path], stats.of(path), behind.fishers[path], recipes[path])
    return {path: expected_losses(*of(path), job.mesh, job.options.seed) for path in recipes}


def _finished(progress: RunProgress, layers: int) -> int:
    """The lowest of the layers that are there, from the last one on."""
    for i in reversed(range(layers)):
        known, file = progress.measured(_record(i)), _file(progress.fisher, i)
        if known is None or not file.is_file() or file_digest(file) != known["digest"]:
            return i + 1
    return 0


def _record(layer: int) -> str:
    return f"fisher.{layer}"


def _file(folder: Path, layer: int) -> Path:
    return folder / f"{layer}.npz"
