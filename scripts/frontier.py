"""Stored bits against what is lost: many recipes on one model, and other tools beside them.

    python scripts/frontier.py --model DIR --eval wikitext2 c4 ptb --output DIR

Each recipe runs on the same calibration windows and is measured on the same texts: perplexity, divergence from the
original's predictions, and how often the most likely token is the same. Every finished run is kept in --output, and the
same command started again goes on behind it. With --llm-compressor its GPTQ runs on the same windows.
Writes frontier.json, frontier.md and frontier.png.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from _runs import Runs, check, check_plots, model_title, prepare, table, text_title

from fpq_jax import FpqError, Recipe
from fpq_jax._pipeline.job import Job  # private: its windows are another tool's too
from fpq_jax._support.console import console, run_command  # private: speaks as the commands do
from fpq_jax._support.files import write_json  # private: written whole, as the commands' reports

PEERS = Path(__file__).with_name("frontier_peers.py")
GRID = Path(__file__).with_name("frontier.yaml")
Grid = dict[str, list[dict[str, Any]]]  # by series what is different from a recipe that ships, a line for each recipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure stored bits against what is lost."""

    model: str
    """Hugging Face folder or hub id, demo-llama or demo-opt."""
    eval: tuple[str, ...]
    """Texts to measure on."""
    output: Path
    """Folder for the result and the finished runs; an existing one is gone on with."""
    grid: Path = GRID
    """YAML file of the recipes; frontier_options.yaml has each option's."""
    series: tuple[str, ...] | None = None
    """Which series of the grid to run; by default all."""
    llm_compressor: Path | None = None
    """Python of an environment that has llm-compressor (see frontier_peers.py), which runs beside us."""
    calibration: str | None = None
    """Text to calibrate on; c4 by default, demo for the demo models."""
    num_samples: int = 128
    """Calibration windows."""
    seq_len: int | None = None
    """Tokens per window; by default 2,048, or the model's longest if that is shorter."""
    max_windows: int | None = 128
    """Evaluate on the first so many windows of each text only."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Unquantized arithmetic; by default the checkpoint's own."""
    seeds: tuple[int, ...] = (0,)
    """Of the choice of calibration windows; each recipe runs with every one."""


class Point(NamedTuple):
    """A recipe, or another tool's scheme, on one seed. texts: by name, perplexity, kl_divergence and same_token."""

    series: str
    name: str
    seed: int
    bits: float
    seconds: float | None
    texts: dict[str, dict[str, float]]


def main(options: Options) -> None:
    """Run the script; FpqError for anything wrong with its input."""
    check([options.model], options.eval)
    check_plots()
    grid = read_grid(options.grid)
    if options.llm_compressor is not None and not options.llm_compressor.is_file():
        raise FpqError(f"There is no Python {options.llm_compressor}; --llm-compressor names one that has it.")
    series = options.series or tuple(grid)
    if unknown := [name for name in series if name not in grid]:
        raise FpqError(f"There is no series {unknown[0]}; {options.grid.name} has {', '.join(grid)}.")
    if not options.seeds:
        raise FpqError("Name at least one of --seeds.")
    named = [(one, name, recipe) for one in series for name, recipe in recipes(grid, one)]
    points: list[Point] = []
    original: dict[str, float] = {}
    for seed in options.seeds:
        job = prepare(options, options.model, [recipe for *_, recipe in named], seed=seed)
        runs = Runs(job, options.output / "runs" / str(seed))
        original = {text_title(spec): value for spec, value in runs.original().items()}
        points += [point(series, name, seed, runs.report(recipe)) for series, name, recipe in named]
        if options.llm_compressor is not None:
            points += peers(options.llm_compressor, job, runs.folder, seed)
    result = {
        "model": model_title(options.model),
        "calibration": {"windows": options.num_samples, "seq_len": options.seq_len, "seeds": list(options.seeds)},
        "max_windows": options.max_windows,
        "original": original,
        "points": [one._asdict() for one in points],
    }
    write_json(options.output / "frontier.json", result)
    (options.output / "frontier.md").write_text("\n".join(markdown(result, points)) + "\n", encoding="utf-8")
    plot(options.output / "frontier.png", original, points)
    console.print(f"The table is in {options.output / 'frontier.md'}.")


def read_grid(path: Path) -> Grid:
    """A grid's file. FpqError if it cannot be read or is none."""
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not all("recipe" in line for lines in grid.values() for line in lines):
            raise KeyError("recipe")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise FpqError(f"{path} is no grid of recipes as {GRID.name} ({type(error).__name__}: {error}).") from error
    return grid


def recipes(grid: Grid, series: str) -> Iterator[tuple[str, Recipe]]:
    """Those of a series by name: each line says one that ships, and what is different, as a recipe's file has it."""
    for line in grid[series]:
        changed = Recipe.load(line["recipe"]).to_dict()
        for key, value in line.get("with", {}).items():
            changed[key] = changed[key] | value if isinstance(changed[key], dict) else value
        name = line.get("name", line["recipe"])
        yield name, replace(Recipe.from_dict(changed), name=f"{series}, {name}")


def point(series: str, name: str, seed: int, report: dict[str, Any]) -> Point:
    """What a run came to."""
    keys = {"quantized": "perplexity", "kl_divergence": "kl_divergence", "same_token": "same_token"}
    texts = {
        text_title(spec): {name: row[key] for key, name in keys.items()} for spec, row in report["perplexity"].items()
    }
    return Point(series, name, seed, report["bits_per_weight"], report["seconds"], texts)


def peers(python: Path, job: Job, folder: Path, seed: int) -> list[Point]:
    """What llm-compressor reaches on the windows of a job, which it finds in a file of the folder."""
    windows = folder / "windows.npz"
    texts = {f"eval {text_title(spec)}": tokens for spec, tokens in job.evaluation.items()}
    np.savez(windows, calibration=job.calibration.windows, **texts)
    line = [python, PEERS, "--model", job.checkpoint.folder, "--windows", windows, "--output", folder / "peers"]
    if subprocess.run(list(map(str, line)), check=False).returncode != 0:
        raise FpqError(f"llm-compressor failed, as it says above; it ran by {' '.join(map(str, line))}.")
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "peers").glob("*.json"))]
    return [Point(seed=seed, **one) for one in kept]


def markdown(result: dict[str, Any], points: list[Point]) -> list[str]:
    """The table: for each recipe the means over seeds, and in brackets the range where there are several."""
    texts = list(result["original"])
    values = ", ".join(f"{name} {value:.3f}" for name, value in result["original"].items())
    header = ["series", "recipe", "bits"]
    for text in texts:
        header += [f"{text}: perplexity", "KL", "same token"]
    rows = []
    for series, name in dict.fromkeys((one.series, one.name) for one in points):
        alike = [one for one in points if (one.series, one.name) == (series, name)]
        cells = [series, name, f"{sum(one.bits for one in alike) / len(alike):.3f}"]
        for text in texts:
            of = lambda key, text=text, alike=alike: [one.texts[text][key] for one in alike if text in one.texts]
            cells += [_mean(of("perplexity"), "{:.2f}"), _mean(of("kl_divergence"), "{:.4f}")]
            cells += [_mean(of("same_token"), "{:.1%}")]
        rows.append(cells)
    about = f"Perplexity of the unquantized {result['model']}: {values}. Seeds {result['calibration']['seeds']}."
    return ["# Stored bits against what is lost", "", about, "", *table(header, rows)]


def _mean(values: list[float], form: str) -> str:
    if not values:
        return "-"
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def plot(path: Path, original: dict[str, float], points: list[Point]) -> None:
    """For each text the divergence from the original against bits, a line for each series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(original), figsize=(6 * len(original), 5), squeeze=False, sharey=True)
    for axes, text in zip(panels[0], original, strict=True):
        for series in dict.fromkeys(one.series for one in points):
            own = sorted((one.bits, one.texts[text]["kl_divergence"]) for one in points if one.series == series)
            axes.plot(*zip(*own, strict=True), marker="o", label=series)
        axes.set(title=text, xlabel="stored bits of a weight", yscale="log")
        axes.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("KL divergence from the original, nats a token")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    run_command(main, Options)
