"""A run: one recipe on a job, step by step, each step's outcome kept with the run's progress.

Nothing of it is seen under the output's name until ``publish``, which is the last step.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml

from fpq_jax._algorithms.quantize_linears import LinearResult
from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._checkpoints.model_folder import copy_sidecars, write_manifest
from fpq_jax._checkpoints.run_progress import RunProgress
from fpq_jax._pipeline.batches import windows_at_once
from fpq_jax._pipeline.choose_bits import choose_bits
from fpq_jax._pipeline.estimate import Estimate, estimate
from fpq_jax._pipeline.evaluation import Evaluation, Original, Reader, perplexities
from fpq_jax._pipeline.fisher_pass import measure_fishers, read_fisher
from fpq_jax._pipeline.job import Job
from fpq_jax._pipeline.perplexity import Perplexity
from fpq_jax._pipeline.quantize_layers import linears, quantize_checkpoint
from fpq_jax._pipeline.report import ROW_TITLE, make_report, row_text
from fpq_jax._storage.digests import write_digests
from fpq_jax._support.compile_cache import kept_programs
from fpq_jax._support.console import console, progress_bar
from fpq_jax._support.files import write_json
from fpq_jax._support.mesh import barrier, from_first, is_first
from fpq_jax._support.placement import replicated
from fpq_jax._support.trees import Flat
from fpq_jax.models.parameters import part_names


@contextmanager
def run_progress(job: Job, recipe: Recipe, output: Path | None) -> Iterator[RunProgress]:
    """Where the run's parts are kept: the progress towards ``output``, or a folder that vanishes."""
    with ExitStack() as stack:
        if output is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fpq-")))
            progress = RunProgress(folder / "model", {})
        else:
            progress = RunProgress(output, job.facts(recipe))
            stack.enter_context(kept_programs(progress.programs))
        stack.callback(progress.close)
        yield progress


def check_estimate(job: Job, recipe: Recipe, progress: RunProgress) -> Estimate:
    """What the run takes of memory and disk; FpqError, with what would fit, if there is not so much."""
    recipe = job.recipe_for_model(recipe)
    windows, length = job.calibration.windows.shape, job.calibration.windows.shape[1]
    evaluated = sum(len(windows) for windows in job.evaluation.values())

    def of(batch_tokens: int) -> Estimate:
        at_once = windows_at_once(evaluated, length, job.model_spec, job.mesh, batch_tokens)
        names, place, written = linears(job.checkpoint), progress.model, progress.written()
        return estimate(
            job.model_spec, recipe, names, windows, at_once, job.mesh, place, written, batch_tokens, evaluated
        )

    found = of(job.options.batch_tokens)
    found.check(progress.model, lambda: of(length), length)
    return found


class OriginalResult(NamedTuple):
    """Perplexity of the unquantized model on each evaluation text, and the folder with its last hidden states."""

    perplexity: dict[str, Perplexity]
    states: Path


def measure_original(job: Job, states: Path) -> OriginalResult:
    """Measure the unquantized model; its last hidden states are kept in the new folder ``states``."""
    if is_first():
        states.mkdir()
    barrier("there is a folder for the original's states")
    return OriginalResult(_measure(job, "original", _read_original(job), read_ahead=True, keep=states).values, states)


def _measured_once(job: Job, progress: RunProgress) -> OriginalResult:
    kept = progress.measured("original")
    if kept is not None and from_first(_sizes(progress.original) == kept["files"]):
        return OriginalResult(
            {spec: Perplexity(*value) for spec, value in kept["perplexity"].items()}, progress.original
        )
    if is_first():
        shutil.rmtree(progress.original, ignore_errors=True)
    found = measure_original(job, progress.original)
    barrier("the original is measured")
    values = {spec: list(value) for spec, value in found.perplexity.items()}
    progress.keep("original", {"perplexity": values, "files": _sizes(progress.original)})
    return found


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*"))}


def measure_quantized(job: Job, progress: RunProgress, states: Path) -> Evaluation:
    """Perplexity of the model whose parts are there, on each evaluation text, and its divergence from the original,
    whose last hidden states are in the folder ``states``."""
    read = lambda name: progress.read(name, replicated(job.mesh))
    original = Original(job.model_spec, _read_original(job), states)
    # a barrier of Orbax beside the layers' programs could be met in another order by another process
    return _measure(job, "quantized", read, read_ahead=jax.process_count() == 1, original=original)


def _read_original(job: Job) -> Reader:
    return lambda name: job.checkpoint.read_part(name, job.dtype)


def _measure(job: Job, which: str, read: Reader, **options: Any) -> Evaluation:
    return perplexities(
        job.model_spec,
        read,
        job.evaluation,
        job.mesh,
        title=f"{which}: ",
        batch_tokens=job.options.batch_tokens,
        **options,
    )


def quantize_parts(job: Job, recipe: Recipe, progress: RunProgress, *, rows: bool = True) -> list[LinearResult]:
    """Quantize what is not there yet, with a bar over the layers and, with ``rows``, a line for each Linear.

    Every Linear's result, those of parts that were finished before among them.
    """
    samples, length = job.calibration.windows.shape
    spec, config = job.calibration.spec, job.checkpoint.model_config
    what = f"{job.model_name} with {recipe.name}"
    console.print(f"Quantizing {what}: {samples} windows of {length} tokens of {spec}")
    finished = list(progress.parts)
    if finished:
        console.print(f"{len(finished)} of {len(part_names(config))} parts are there already.")
    if rows:
        console.print(ROW_TITLE)
    with progress_bar("layers", config.num_hidden_layers) as advance:
        advance(sum(name.startswith("layers.") for name in finished))
        for part in quantize_checkpoint(
            job.checkpoint,
            job.recipe_for_model(recipe),
            job.calibration.windows,
            job.dtype,
            job.mesh,
            seed=job.options.seed,
            batch_tokens=job.options.batch_tokens,
            finished={name: partial(progress.read, name, replicated(job.mesh)) for name in finished},
            first_layer=job.first_layer,
            fishers=partial(read_fisher, progress.fisher) if recipe.needs_fisher else None,
        ):
            for result in part.results if rows else ():
                console.print(row_text(result))
            results = [asdict(result) for result in part.results]
            progress.write(part.name, part.params, results=results, seconds=part.seconds)
            if part.name.startswith("layers."):
                advance()
            del part  # its arrays are not needed while the next is made
        progress.wait()
    every = [result for name in part_names(config) for result in progress.recorded(name, "results")]
    return [LinearResult(**{**r, "shape": tuple(r["shape"]), "notes": tuple(r["notes"])}) for r in every]


class RunResult(NamedTuple):
    """What a run came to. params: of the quantized model, without values."""

    report: dict[str, Any]
    results: list[LinearResult]
    params: Flat


def run_recipe(
    job: Job,
    recipe: Recipe,
    progress: RunProgress,
    *,
    began: float,
    original: OriginalResult | None = None,
    rows: bool = True,
) -> RunResult:
    """Measure, quantize, measure again; what is there already is not done again.

    began: ``time.perf_counter`` at the start, for the report. original: of the unquantized model, if it is measured.
    rows: whether a line for each Linear is printed.
    """
    original = original or _measured_once(job, progress)
    recipe = job.recipe_for_model(recipe)
    losses = measure_fishers(job, recipe, progress)
    if recipe.bits is not None:
        recipe = choose_bits(job.checkpoint, recipe, losses)
    results = quantize_parts(job, recipe, progress, rows=rows)
    quantized = measure_quantized(job, progress, original.states)
    report = make_report(job, recipe, progress, results, original.perplexity, quantized, time.perf_counter() - began)
    return RunResult(report, results, progress.abstract())


def publish(job: Job, report: dict[str, Any], progress: RunProgress, output: Path | None, copy: Path | None) -> None:
    """Make the result visible: the model under the output's name, if it has one, and the report at ``copy``, if it is
    asked for. Until here a run leaves nothing but its progress."""
    if output is not None:
        if is_first():
            copy_sidecars(job.checkpoint.folder, progress.model)
            recipe_yaml = yaml.safe_dump(report["recipe"], sort_keys=False)
            (progress.model / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
            write_json(progress.model / "report.json", report)
            write_manifest(progress.model, progress.entries())
            write_digests(progress.model, progress.digests())
        progress.finish()
    if copy is not None:
        copy_report(report, output, copy)


def copy_report(report: dict[str, Any] | None, output: Path | None, copy: Path) -> None:
    """Write a report, that of a finished ``output`` where there is one, to a place of its own."""
    if not is_first():
        return
    if output is None:
        write_json(copy, report)
    else:
        shutil.copyfile(output / "report.json", copy)
