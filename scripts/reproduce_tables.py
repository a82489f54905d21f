"""Run ZeroQuant-FP's Table 1, B.1 and A.1 on any models and set the paper's numbers beside ours.

    python scripts/reproduce_tables.py --model DIR ... --eval wikitext2 ptb c4 --output DIR

zeroquant_fp.yaml says which recipe each row is. Every finished run is kept in --output, and the same command started
again goes on behind it. The calibration text is read and the unquantized model measured once for all rows; rows with
the same activations share the first layer's Hessians, and a recipe that stands in several tables runs once.
Writes tables.md and tables.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from _runs import Runs, check, model_title, prepare, table, text_title

from fpq_jax import FpqError, Recipe
from fpq_jax._support.console import console, run_command  # private: speaks as the commands do

PAPER = yaml.safe_load(Path(__file__).with_name("zeroquant_fp.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run ZeroQuant-FP's tables."""

    model: tuple[str, ...]
    """Hugging Face folders or hub ids, demo-llama, demo-opt."""
    eval: tuple[str, ...]
    """Texts to measure on, in the tables' order; the paper's are wikitext2 ptb c4."""
    output: Path
    """Folder for the tables and the finished runs; an existing one is gone on with."""
    tables: tuple[Literal["1", "B.1", "A.1"], ...] = ("1", "B.1", "A.1")
    """Which tables."""
    calibration: str | None = None
    """Text to calibrate on; c4 by default, demo for the demo models."""
    num_samples: int = 128
    """Calibration windows."""
    seq_len: int | None = None
    """Tokens per window; by default 2,048, or the model's longest if that is shorter."""
    max_windows: int | None = None
    """Evaluate on the first so many windows only."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Unquantized arithmetic; by default the checkpoint's own."""
    seed: int = 0
    """Of the choice of calibration windows and of LoRC's random projection."""


def main(options: Options) -> None:
    """Run the script; FpqError for anything wrong with its input."""
    check(options.model, options.eval)
    if not options.tables:
        raise FpqError("Name at least one of --tables.")
    rows = [row for row in PAPER["rows"] if row["table"] in options.tables]
    names = list(dict.fromkeys(row["recipe"] for row in rows if row["recipe"]))
    recipes = {name: Recipe.load(name) for name in names}
    # every model and text is opened and checked before the first one is worked on
    jobs = {model_title(model): prepare(options, model, list(recipes.values())) for model in options.model}
    measured = {}
    for title, job in jobs.items():
        paper_model = recognized(job.checkpoint.model_class.__name__, job.checkpoint.model_config)
        runs = Runs(job, options.output / "runs" / title)
        reports = {None: {"original": runs.original()}}
        for name, recipe in recipes.items():
            reports[name] = runs.report(for_paper_model(recipe, paper_model))
        measured[title] = {"paper_model": paper_model, "runs": {n: summary(r) for n, r in reports.items()}}
    result = {"texts": [text_title(spec) for spec in options.eval], "models": measured}
    result["claims"] = {title: check_claims(m["runs"]) for title, m in measured.items()}
    write(options, rows, result)
    console.print(f"The tables are in {options.output / 'tables.md'}.")


def recognized(architecture: str, config: Any) -> str | None:
    """The paper's model that has this shape; what was tuned from it later has the same."""
    for name, facts in PAPER["models"].items():
        shape = {key: value for key, value in facts.items() if key not in ("model_type", "group_size")}
        if facts["model_type"] == architecture.lower() and all(getattr(config, k) == v for k, v in shape.items()):
            return name
    return None


def for_paper_model(recipe: Recipe, paper_model: str | None) -> Recipe:
    """The recipe with the group size that the paper uses for the model."""
    size = PAPER["models"][paper_model].get("group_size") if paper_model else None
    grouped = isinstance(recipe.default.spec.group_size, int)
    return recipe.with_group_size(size) if size and grouped else recipe


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What the tables need of a run: perplexity by text, their mean, bits per weight."""
    if "original" in report:
        values, bits = list(report["original"].values()), 16.0
    else:
        values, bits = [row["quantized"] for row in report["perplexity"].values()], report["bits_per_weight"]
    return {"perplexity": values, "mean": sum(values) / len(values), "bits_per_weight": bits}


def check_claims(runs: dict[str | None, Any]) -> list[dict[str, Any]]:
    """The paper's ordering claims, each pair of recipes by its mean perplexity, and on how many texts they hold."""
    return [
        {
            "claim": claim["says"],
            "better": a,
            "worse": b,
            "means": [runs[a]["mean"], runs[b]["mean"]],
            "holds": runs[a]["mean"] <= runs[b]["mean"],
            "holds_on_texts": sum(x <= y for x, y in zip(runs[a]["perplexity"], runs[b]["perplexity"], strict=True)),
        }
        for claim in PAPER["claims"]
        for a, b in claim["pairs"]
        if a in runs and b in runs
    ]


def write(options: Options, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """The tables as Markdown and JSON."""
    named = {
        title: {**m, "runs": {name or "W16A16": run for name, run in m["runs"].items()}}
        for title, m in result["models"].items()
    }
    text = json.dumps({**result, "models": named}, indent=1)
    (options.output / "tables.json").write_text(text + "\n", encoding="utf-8")
    (options.output / "tables.md").write_text(markdown(options, rows, result), encoding="utf-8")


def markdown(options: Options, rows: list[dict[str, Any]], result: dict[str, Any]) -> str:
    """All tables, and the claims."""
    lines = ["# ZeroQuant-FP's tables", ""]
    lines += [f"Perplexity, lower is better: mean: {' / '.join(result['texts'])}.", ""]
    for name in options.tables:
        lines += [f"## Table {name}", ""]
        header, body = ["row", "recipe"], [[row["label"], row["recipe"] or ""] for row in rows if row["table"] == name]
        for title, measured in result["models"].items():
            paper_model = measured["paper_model"]
            header += [title, "bits"] + ([f"{paper_model} in the paper"] if paper_model else [])
            for line, row in zip(body, (r for r in rows if r["table"] == name), strict=True):
                run = measured["runs"][row["recipe"]]
                line += [numbers(run["mean"], run["perplexity"]), f"{run['bits_per_weight']:.2f}"]
                if paper_model:
                    line.append(paper_numbers(row["paper"].get(paper_model)))
        lines += [*table(header, body), ""]
    texts = len(result["texts"])
    lines += ["## The paper's claims", ""]
    lines += [f"By the means; in parentheses on how many of the {texts} texts alone.", ""] if texts > 1 else []
    header = ["claim", "of", "no higher than", *(f"{title}" for title in result["models"])]
    body = []
    for checks in zip(*result["claims"].values(), strict=True):
        first = checks[0]
        cells = [
            f"{c['means'][0]:.3f} / {c['means'][1]:.3f}: {'yes' if c['holds'] else '**no**'} ({c['holds_on_texts']})"
            for c in checks
        ]
        body.append([first["claim"], f"`{first['better']}`", f"`{first['worse']}`", *cells])
    return "\n".join([*lines, *table(header, body), ""])


def numbers(mean: float, values: list[float]) -> str:
    return f"{mean:.2f}: {' / '.join(f'{v:.2f}' for v in values)}" if len(values) > 1 else f"{mean:.2f}"


def paper_numbers(values: list[float] | float | None) -> str:
    """As the paper prints them: the mean alone, or the mean and the three texts'."""
    if isinstance(values, list):
        return numbers(values[0], values[1:])
    return "" if values is None else f"{values:.2f}"


if __name__ == "__main__":
    run_command(main, Options)
