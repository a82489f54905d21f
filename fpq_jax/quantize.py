"""Quantize a LLaMA checkpoint: python -m fpq_jax.quantize --model DIR --output DIR."""

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import yaml

from fpq_jax._checkpoint import check_output, is_quantized_dir, new_directory, resolve_model, stored_bytes, write_params
from fpq_jax._console import console, progress, run_command
from fpq_jax._errors import FpqError, check_at_least
from fpq_jax._perplexity import Perplexity, perplexity
from fpq_jax._pipeline import LinearResult, linears, quantize_checkpoint
from fpq_jax._qtensor import QTensor, expand_all
from fpq_jax._recipe import DEFAULT_RECIPE, Recipe
from fpq_jax._report import (
    ROW_TITLE,
    VERSION,
    bits_per_weight,
    environment,
    layer_row,
    row_text,
    shortened,
    size_text,
    write_report,
)
from fpq_jax._text import (
    CalibrationText,
    Windows,
    calibration_text,
    check_spec,
    evaluation_windows,
    load_tokenizer,
    tail_name,
    window_length,
)
from fpq_jax._tree import Flat
from fpq_jax.models import HfCheckpoint, build_model, open_checkpoint

_DEMO_OUTPUT = Path("fpq-demo")
_MAX_FALLBACKS = 0.1  # share of Linears for which GPTQ could not run before the command reports failure
_SIDECARS = ("config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Quantize a LLaMA checkpoint and measure what it costs."""

    model: str | None = None
    """Hugging Face folder or hub id; left out, the demo model."""
    recipe: str = DEFAULT_RECIPE
    """Name of a recipe in configs/, or a YAML file."""
    group_size: int | None = None
    """Weights per scale along the input, instead of the recipe's."""
    calibration: str | None = None
    """Text to calibrate on: wikitext2, ptb, c4, demo or a file; c4 by default, demo for the demo model."""
    num_samples: int = 128
    """Calibration windows."""
    seq_len: int | None = None
    """Tokens per window; by default 2,048, or the model's longest if that is shorter."""
    eval: tuple[str, ...] = ()
    """Texts to measure perplexity on; by default a tail held back from the calibration text."""
    max_windows: int | None = None
    """Evaluate on the first so many windows only."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Unquantized arithmetic; by default the checkpoint's own."""
    output: Path | None = None
    """Directory for the result; left out, nothing but the report is kept (fpq-demo for the demo model)."""
    report: Path | None = None
    """JSON file for the report."""
    seed: int = 0
    """Of the choice of calibration windows and of LoRC's random projection."""


@dataclass(frozen=True)
class _Job:
    """Everything checked and read before long work starts."""

    checkpoint: HfCheckpoint
    model_name: str
    recipe: Recipe
    dtype: jnp.dtype
    calibration_spec: str
    calibration: CalibrationText
    evaluation: dict[str, Windows]
    output: Path | None


def main(options: Options) -> None:
    """Run the command; FpqError for anything wrong with its input."""
    began = time.perf_counter()
    job = _prepare(options)
    with ExitStack() as stack:
        # made first: a folder that cannot be written is found before the work, not after it
        folder = stack.enter_context(new_directory(job.output)) if job.output else None
        original = _evaluate_all(job, job.checkpoint.read(job.dtype), "original")
        params, results = _quantize(job, options.seed)
        quantized = _evaluate_all(job, params, "quantized")
        report = _report(options, job, params, results, original, quantized, time.perf_counter() - began)
        if folder is not None:
            _write(folder, job, params, report)
    if options.report is not None:
        write_report(options.report, report)
    _print_summary(options, job, params, report)
    fallbacks = sum(result.fell_back for result in results)
    if fallbacks > _MAX_FALLBACKS * len(results):
        console.print(f"GPTQ could not run for {fallbacks} of {len(results)} Linears (see their notes): exit status 1.")
        raise SystemExit(1)


def _prepare(options: Options) -> _Job:
    recipe = Recipe.load(options.recipe)
    if options.group_size is not None:
        recipe = recipe.with_group_size(options.group_size)
    check_at_least(1, num_samples=options.num_samples, max_windows=options.max_windows)
    check_at_least(2, seq_len=options.seq_len)
    calibration_spec = options.calibration or ("demo" if options.model is None else "c4")
    for spec in (calibration_spec, *options.eval):
        check_spec(spec)
    output = options.output or (_DEMO_OUTPUT if options.model is None else None)
    if output is not None:
        check_output(output)
    if options.report is not None and (options.report.is_dir() or not options.report.absolute().parent.is_dir()):
        raise FpqError(f"The report {options.report} cannot be written; name a file in a folder that exists.")

    folder = resolve_model(options.model)
    if is_quantized_dir(folder):
        raise FpqError(f"{folder} is already quantized; name the original checkpoint.")
    checkpoint = open_checkpoint(folder)
    recipe.for_linears(linears(checkpoint).values())
    config = checkpoint.model_config
    length = window_length(options.seq_len, config.max_position_embeddings)
    tokenizer = load_tokenizer(folder)
    calibration = calibration_text(
        calibration_spec,
        tokenizer,
        num_samples=options.num_samples,
        length=length,
        seed=options.seed,
        hold_back=not options.eval,
        vocab_size=config.vocab_size,
    )
    evaluation = {
        spec: evaluation_windows(spec, tokenizer, length=length, vocab_size=config.vocab_size) for spec in options.eval
    }
    if calibration.tail is not None:
        evaluation[tail_name(calibration_spec)] = calibration.tail
    return _Job(
        checkpoint=checkpoint,
        model_name="demo" if options.model is None else options.model,
        recipe=recipe,
        dtype=jnp.dtype(options.dtype or checkpoint.dtype),
        calibration_spec=calibration_spec,
        calibration=calibration,
        evaluation={spec: windows[: options.max_windows] for spec, windows in evaluation.items()},
        output=output,
    )


def _evaluate_all(job: _Job, params: Flat, which: str) -> dict[str, Perplexity]:
    model = build_model(
        job.checkpoint.model_class, job.checkpoint.model_config, expand_all(jax.tree.map(jnp.asarray, params))
    )
    values = {}
    for spec, windows in job.evaluation.items():
        with progress(f"{which}: perplexity on {spec}", len(windows)) as advance:
            values[spec] = perplexity(model, windows, advance)
    return values


def _quantize(job: _Job, seed: int) -> tuple[Flat, list[LinearResult]]:
    samples, length = job.calibration.windows.shape
    what = f"{job.model_name} with {job.recipe.name}"
    console.print(f"Quantizing {what}: {samples} windows of {length} tokens of {job.calibration_spec}", markup=False)
    console.print(ROW_TITLE)
    with progress("layers", job.checkpoint.model_config.num_hidden_layers) as advance:
        return quantize_checkpoint(
            job.checkpoint,
            job.recipe,
            job.calibration.windows,
            job.dtype,
            seed=seed,
            on_linear=lambda result: console.print(row_text(result), markup=False),
            on_layer=advance,
        )


def _report(
    options: Options,
    job: _Job,
    params: Flat,
    results: list[LinearResult],
    original: dict[str, Perplexity],
    quantized: dict[str, Perplexity],
    seconds: float,
) -> dict[str, Any]:
    samples, length = job.calibration.windows.shape
    return {
        "version": VERSION,
        "model": job.model_name,
        "recipe": job.recipe.to_dict(),
        "calibration": {
            "spec": job.calibration_spec,
            "num_samples": samples,
            "requested_samples": options.num_samples,
            "seq_len": length,
            "max_windows": options.max_windows,
        },
        "dtype": str(job.dtype),
        "seed": options.seed,
        "perplexity": {
            spec: {
                "original": original[spec].value,
                "quantized": quantized[spec].value,
                "tokens": original[spec].tokens,
            }
            for spec in job.evaluation
        },
        "layers": [layer_row(result) for result in results],
        "bits_per_weight": bits_per_weight(params),
        "bytes": {"original": job.checkpoint.nbytes, "quantized": stored_bytes(params)},
        "seconds": round(seconds, 2),
        **environment(),
    }


def _write(folder: Path, job: _Job, params: Flat, report: dict[str, Any]) -> None:
    source = job.checkpoint.folder
    for pattern in _SIDECARS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    (folder / "recipe.yaml").write_text(_recipe_yaml(job.recipe), encoding="utf-8")
    write_params(folder, params)
    write_report(folder / "report.json", report)


def _recipe_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False)


def _print_summary(options: Options, job: _Job, params: Flat, report: dict[str, Any]) -> None:
    console.print(f"\n{'perplexity':<40} {'original':>10} {'quantized':>10} {'tokens':>10}", markup=False)
    for spec, row in report["perplexity"].items():
        numbers = f"{row['original']:>10.4f} {row['quantized']:>10.4f} {row['tokens']:>10,}"
        console.print(f"{shortened(spec)} {numbers}", markup=False)
    size = report["bytes"]
    console.print(
        f"\n{report['bits_per_weight']:.3f} bits per quantized weight; "
        f"all parameters {size_text(size['original'])} -> {size_text(size['quantized'])}; {report['seconds']:.0f} s"
    )
    quantized = [leaf for leaf in params.values() if isinstance(leaf, QTensor)]
    if any(q.spec.activation is not None and not q.has_fp8_form for q in quantized):
        console.print(
            "Free group scales have no FP8 form: these Linears multiply in bfloat16. Recipes with m1 or m2 run in FP8."
        )
    if job.output is None:
        console.print("No --output was named, so the quantized model was measured and not kept.")
        return
    console.print(f"The quantized model is in {job.output}. Next:", markup=False)
    console.print(f"  python -m fpq_jax.evaluate --model {job.output}", markup=False)
    console.print(f'  python -m fpq_jax.generate --model {job.output} --prompt "The"', markup=False)


if __name__ == "__main__":
    run_command(main, Options, "quantize")
