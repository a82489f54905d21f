"""Quantize a LLaMA or OPT checkpoint: python -m fpq_jax.quantize --model DIR --output DIR."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from fpq_jax._algorithms.recipe import DEFAULT_RECIPE, Recipe
from fpq_jax._checkpoints.run_progress import finished_layers, is_published, progress_folder, remove_progress
from fpq_jax._errors import FpqError
from fpq_jax._matmul.products import product_kind
from fpq_jax._numerics.qtensor import QTensor
from fpq_jax._pipeline.batches import BATCH_TOKENS
from fpq_jax._pipeline.job import Job, JobOptions, open_job
from fpq_jax._pipeline.run import RunResult, check_estimate, copy_report, publish, run_progress, run_recipe
from fpq_jax._storage.compressed_tensors import can_hold
from fpq_jax._support.console import console, join_processes, run_command, shortened, size_text
from fpq_jax._support.files import check_writable
from fpq_jax._support.mesh import parse_mesh
from fpq_jax._support.new_directory import check_output

_DEMO_OUTPUT = Path("fpq-demo")
_MUCH_LOST = 0.1  # share by which perplexity may rise before the command says what to do
_MAX_FALLBACKS = 0.1  # share of Linears for which GPTQ could not run before the command reports failure


@dataclass(frozen=True, kw_only=True)
class Options:
    """Quantize a LLaMA or OPT checkpoint and measure what it costs."""

    model: str | None = None
    """Hugging Face folder or hub id, or demo-llama or demo-opt; left out, demo-llama."""
    recipe: str = DEFAULT_RECIPE
    """Name of a recipe in configs/, or a YAML file."""
    group_size: int | None = None
    """Weights per scale along the input, instead of the recipe's."""
    bits: float | None = None
    """Bits of a weight on average, all that is stored counted: each Linear gets of them what lowers the loss most."""
    calibration: str | None = None
    """Text to calibrate on: wikitext2, ptb, c4, demo or a file; c4 by default, demo for the demo model."""
    num_samples: int | None = None
    """Calibration windows; by default 128, 64 for the demo models."""
    seq_len: int | None = None
    """Tokens per window; by default 2,048, or the model's longest if that is shorter."""
    eval: tuple[str, ...] = ()
    """Texts to measure perplexity on; by default a tail held back from the calibration text."""
    max_windows: int | None = None
    """Evaluate on the first so many windows only."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Unquantized arithmetic; by default the checkpoint's own."""
    batch_tokens: int = BATCH_TOKENS
    """Tokens of a batch on each device; fewer take less memory."""
    mesh: str | None = None
    """Devices to divide windows and outputs over, as data=4,model=2 (here their product counts); by default one."""
    distributed: bool = False
    """Join the same command's other processes; see docs/scale.md."""
    output: Path | None = None
    """Directory for the result; left out, nothing but the report is kept (fpq-demo if --model is left out too)."""
    report: Path | None = None
    """JSON file for the report."""
    seed: int = 0
    """Of the choice of calibration windows and of LoRC's random projection."""


def main(options: Options) -> None:
    """Run the command; FpqError for anything wrong with its input."""
    began = time.perf_counter()
    if options.distributed:
        join_processes()
        if options.output is None:
            raise FpqError("--distributed needs --output, a folder that all processes share.")
    mesh = parse_mesh(options.mesh)
    recipe = Recipe.load(options.recipe)
    if options.group_size is not None:
        recipe = recipe.with_group_size(options.group_size)
    if options.bits is not None:
        recipe = recipe.with_bits(options.bits)
    output = options.output or (_DEMO_OUTPUT if options.model is None else None)
    published = output is not None and is_published(output)
    if output is not None and not published:
        check_output(output)
    check_writable(options.report)
    job = open_job(
        JobOptions(
            model=options.model,
            calibration=options.calibration,
            num_samples=options.num_samples,
            seq_len=options.seq_len,
            eval=options.eval,
            max_windows=options.max_windows,
            dtype=options.dtype,
            seed=options.seed,
            mesh=mesh,
            batch_tokens=options.batch_tokens,
        ),
        [recipe],
    )
    if output is not None and published:
        if not remove_progress(output, job.facts(recipe)):
            check_output(output)
        console.print(f"{output} was finished already.")
        if options.report is not None:
            copy_report(None, output, options.report)
        return
    try:
        _run(options, job, recipe, output, began)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted; {_kept(output)}.") from None
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise FpqError(
            f"There is not enough memory ({reason}); with more of it {_kept(output)}, or use fewer --num-samples, "
            "fewer --batch-tokens or a shorter --seq-len and another --output."
        ) from error


def _run(options: Options, job: Job, recipe: Recipe, output: Path | None, began: float) -> None:
    with run_progress(job, recipe, output) as progress:
        console.print(str(check_estimate(job, recipe, progress)))
        result = run_recipe(job, recipe, progress, began=began)
        publish(job, result.report, progress, output, options.report)
    _print_summary(output, result)
    fallbacks = sum(linear.fell_back for linear in result.results)
    if fallbacks > _MAX_FALLBACKS * len(result.results):
        console.print(
            f"GPTQ could not run for {fallbacks} of {len(result.results)} Linears (see their notes): exit status 1."
        )
        raise SystemExit(1)


def _kept(output: Path | None) -> str:
    if output is None:
        return "without --output nothing is kept"
    folder = progress_folder(output)
    return f"the same command goes on behind {finished_layers(output)} finished layers, which are kept in {folder}"


def _print_summary(output: Path | None, result: RunResult) -> None:
    report, params = result.report, result.params
    title = f"{'original':>10} {'quantized':>10} {'tokens':>10} {'KL':>8} {'same token':>10}"
    console.print(f"\n{'perplexity':<40} {title}")
    for spec, row in report["perplexity"].items():
        numbers = f"{row['original']:>10.4f} {row['quantized']:>10.4f} {row['tokens']:>10,}"
        distance = f"{row['kl_divergence']:>8.4f} {row['same_token']:>10.1%}"
        console.print(f"{shortened(spec)} {numbers} {distance}")
    worst = max(row["quantized"] / row["original"] for row in report["perplexity"].values())
    if worst > 1 + _MUCH_LOST:
        console.print(
            f"Perplexity rose by {worst - 1:.0%}: give the weights more bits, as --bits 6 or the recipe w8a8-fp do."
        )
    size = report["bytes"]
    console.print(
        f"\n{report['bits_per_weight']:.3f} bits per quantized weight; "
        f"all parameters {size_text(size['original'])} -> {size_text(size['quantized'])}; {report['seconds']:.0f} s"
    )
    products = [product_kind(leaf) for leaf in params.values() if isinstance(leaf, QTensor)]
    if slow := sum(kind in ("codes", "dequantized") for kind in products):
        console.print(
            f"{slow} of {len(products)} Linears multiply in bfloat16: free group scales, or formats other than FP8, "
            "have no FP8 form. Recipes such as w4a8-mixed and w8a8-fp run in FP8."
        )
    if output is None:
        console.print("No --output was named, so the quantized model was measured and not kept.")
        return
    console.print(f"The quantized model is in {output}. Next:")
    quoted = shlex.quote(str(output))
    console.print(f"  python -m fpq_jax.evaluate --model {quoted}")
    console.print(f'  python -m fpq_jax.generate --model {quoted} --prompt "The"')
    if can_hold("fp8", [leaf for leaf in params.values() if isinstance(leaf, QTensor)]):
        console.print(
            f"  python -m fpq_jax.export --model {output} --format fp8 --output {output}-fp8   # for other engines",
        )


if __name__ == "__main__":
    run_command(main, Options, "quantize")
