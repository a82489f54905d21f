"""What activation outliers do to INT8 and to FP8 activations, and to INT4 and FP4 weights.

    python scripts/outlier_study.py --model demo-llama demo-opt --eval wiki.test.raw --output DIR

For each factor a copy of each model with outlier channels (see inject_outliers.py) is quantized: W8A8 with FP8 weights
and INT8 or FP8 activations, W4A8 with INT4 (asymmetric as in the paper, and symmetric) or FP4 weights and FP8
activations. Every finished run is kept in --output, and the same command started again goes on behind it.
Writes outliers.md, outliers.json and outliers.png.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import inject_outliers
from _runs import Runs, check, check_plots, model_title, prepare, table, text_title

from fpq_jax import FpqError, Recipe
from fpq_jax._pipeline.job import default_calibration  # private: many recipes on one opened model
from fpq_jax._support.console import console, run_command  # private: speaks as the commands do

_FP8 = {"format": "e4m3", "group_size": "channel"}
SCHEMES = {
    "W8A8, INT8 activations": Recipe.from_dict({"name": "w8a8-fp-int", "weight": _FP8, "activation": "int8-asym"}),
    "W8A8, FP8 activations": Recipe.load("w8a8-fp"),
    "W4A8, INT4 weights": Recipe.load("w4a8-int-fp"),
    "W4A8, symmetric INT4": Recipe.from_dict({"name": "w4a8-int-symmetric-fp", "weight": {"format": "int4"}}),
    "W4A8, FP4 weights": Recipe.load("w4a8-fp"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure what activation outliers do to each format."""

    model: tuple[str, ...]
    """Hugging Face folders or hub ids, demo-llama, demo-opt."""
    eval: tuple[str, ...]
    """Texts to measure on."""
    output: Path
    """Folder for the results and the finished runs; an existing one is gone on with."""
    factors: tuple[float, ...] = (1, 2, 5, 10, 20, 50, 100)
    """How many times larger the outlier channels are."""
    share: float = 1 / 32
    """Share of the channels that are outliers."""
    calibration: str | None = None
    """Text to calibrate on; c4 by default, demo for the demo models."""
    num_samples: int = 128
    """Calibration windows."""
    seq_len: int | None = None
    """Tokens per window; by default 2,048, or the model's longest if that is shorter."""
    max_windows: int | None = None
    """Evaluate on the first so many windows only."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Unquantized arithmetic."""
    seed: int = 0
    """Of the choice of channels, of calibration windows and of LoRC's random projection."""


def main(options: Options) -> None:
    """Run the script; FpqError for anything wrong with its input."""
    check(options.model, options.eval)
    check_plots()
    if not options.factors or not all(math.isfinite(factor) and factor > 0 for factor in options.factors):
        raise FpqError(f"--factors are {options.factors}; name at least one, all of them positive numbers.")
    for model in options.model:  # each is opened and checked before the first one is worked on
        inject_outliers.check_norms(prepare(options, model, list(SCHEMES.values())).checkpoint.model_config)
    results: dict[str, list[dict[str, Any]]] = {}
    for model in options.model:
        results[model_title(model)] = [measure(options, model, factor) for factor in options.factors]
    text = json.dumps({"texts": [text_title(spec) for spec in options.eval], "models": results}, indent=1)
    (options.output / "outliers.json").write_text(text + "\n", encoding="utf-8")
    (options.output / "outliers.md").write_text(markdown(options, results), encoding="utf-8")
    plot(options.output / "outliers.png", results)
    console.print(f"The results are in {options.output / 'outliers.md'}.")


def measure(options: Options, model: str, factor: float) -> dict[str, Any]:
    """Mean perplexity over the texts of the copy with ``factor``, unquantized and under each scheme."""
    mean = lambda values: sum(values) / len(values)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"{model_title(model)}-x{factor:g}"
        inject_outliers.main(
            inject_outliers.Options(model=model, output=copy, factor=factor, share=options.share, seed=options.seed)
        )
        calibration = options.calibration or default_calibration(model)
        job = prepare(options, str(copy), list(SCHEMES.values()), calibration=calibration, name=copy.name)
        runs = Runs(job, options.output / "runs" / copy.name)
        row = {"factor": factor, "original": mean(runs.original().values())}
        for scheme, recipe in SCHEMES.items():
            row[scheme] = mean([text["quantized"] for text in runs.report(recipe)["perplexity"].values()])
    return row


def markdown(options: Options, results: dict[str, list[dict[str, Any]]]) -> str:
    """A table for each model, and how much more the integers lose."""
    int8, fp8, *_ = SCHEMES
    lines = ["# Activation outliers", ""]
    lines += [
        f"Perplexity (mean over {', '.join(text_title(spec) for spec in options.eval)}); {options.share:.4g} of the "
        "channels of every norm's output are multiplied by the factor, and what reads them is divided by it. "
        "Last column: what INT8 activations lose over what FP8 ones lose.",
        "",
    ]
    for title, rows in results.items():
        header = ["factor", "original", *SCHEMES, "INT8 loss / FP8 loss"]
        body = []
        for row in rows:
            cells = [f"{row['factor']:g}", *(f"{row[name]:.3f}" for name in ("original", *SCHEMES))]
            lost = {name: row[name] - row["original"] for name in (int8, fp8)}
            body.append([*cells, f"{lost[int8] / lost[fp8]:.1f}" if lost[fp8] > 0 else "FP8 loses nothing"])
        lines += [f"## {title}", "", *table(header, body), ""]
    return "\n".join([*lines, "![perplexity against the factor](outliers.png)", ""])


def plot(path: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """Perplexity against the factor, a panel for each model and a line for each scheme."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 4.5), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        factors = [row["factor"] for row in rows]
        for scheme in SCHEMES:
            axes.plot(factors, [row[scheme] for row in rows], marker="o", label=scheme)
        axes.plot(factors, [row["original"] for row in rows], color="gray", linestyle="--", label="original")
        axes.set(title=title, xlabel="factor of the outlier channels", ylabel="perplexity", xscale="log")
        axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    run_command(main, Options)
