"""The Fisher information of a job's kernels, measured before anything is quantized and kept with the run's progress."""

import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from fpq_jax._algorithms.fisher import Fisher
from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._checkpoints.run_progress import RunProgress
from fpq_jax._pipeline.backward import fisher_windows, layer_fishers
from fpq_jax._pipeline.batches import Batches, batch_size
from fpq_jax._pipeline.job import Job
from fpq_jax._pipeline.quantize_layers import linears
from fpq_jax._support.console import progress_bar
from fpq_jax._support.files import folder_digests
from fpq_jax._support.mesh import barrier, is_first
from fpq_jax._support.placement import replicate
from fpq_jax._support.trees import Flat, below


def measure_fishers(job: Job, recipe: Recipe, progress: RunProgress) -> None:
    """Measure the Fisher information of the kernels, if the recipe needs it, once with ``progress``."""
    if not recipe.needs_fisher or progress.measured("fisher") == folder_digests(progress.fisher):
        return
    config, every = job.checkpoint.model_config, linears(job.checkpoint)
    chosen = recipe.for_linears(every.values())
    wanted = {path: None for path, name in every.items() if (what := chosen[name]) is not None and what.fisher > 0}
    kernels = [list(below(wanted, f"layers.{i}.")) for i in range(config.num_hidden_layers)]
    windows = job.calibration.windows
    windows = windows[: fisher_windows(len(windows))]
    size = batch_size(len(windows), windows.shape[1], job.mesh, job.options.batch_tokens)

    def read(name: str) -> Flat:
        part = replicate(job.checkpoint.read_dense_part(name, job.dtype), job.mesh)
        return below(part, f"{name}.") if name.startswith("layers.") else part

    if is_first():
        shutil.rmtree(progress.fisher, ignore_errors=True)
        progress.fisher.mkdir()
    barrier("there is a folder for the Fisher information")
    with (
        tempfile.TemporaryDirectory(prefix="fpq-", dir=progress.folder) as states,
        progress_bar(f"Fisher information of {len(windows)} windows", 2 * config.num_hidden_layers) as advance,
    ):
        batches = Batches.of(windows, job.mesh, size)
        for i, found in layer_fishers(
            job.model_spec, read, kernels, batches, Path(states), seed=job.options.seed, advance=advance
        ):
            if is_first():
                host = jax.device_get(found)
                arrays = {f"{path}:{field}": a for path, one in host.items() for field, a in one._asdict().items()}
                np.savez(progress.fisher / f"{i}.npz", **arrays)
    barrier("the Fisher information is there")
    progress.keep("fisher", folder_digests(progress.fisher))


def read_fisher(folder: Path, layer: int) -> dict[str, Fisher]:
    """What ``measure_fishers`` kept of a layer."""
    with np.load(folder / f"{layer}.npz") as file:
        paths = dict.fromkeys(name.rpartition(":")[0] for name in file.files)
        return {path: Fisher(*(file[f"{path}:{field}"] for field in Fisher._fields)) for path in paths}
