"""Runs of many recipes on one model, each kept in a file as soon as it is finished, so that a study resumes."""

import importlib.util
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpq_jax import FpqError, Recipe
from fpq_jax._pipeline.job import Job, JobOptions, open_job  # private: many recipes on one opened model
from fpq_jax._pipeline.run import (  # private: many recipes on one opened model
    OriginalResult,
    measure_original,
    run_progress,
    run_recipe,
)
from fpq_jax._support.console import console  # private: speaks as the commands do
from fpq_jax._support.files import write_json  # private: written whole, as the commands' reports


class Runs:
    """What was measured on one job, in the JSON files of a folder."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.folder = job, folder
        self._states = tempfile.TemporaryDirectory(prefix="fpq-")
        self._original: OriginalResult | None = None

    def _measured(self) -> OriginalResult:
        """The unquantized model, once in a process: its last hidden states, which take much room, are not kept."""
        if self._original is None:
            self._original = measure_original(self.job, Path(self._states.name) / "original")
        return self._original

    def original(self) -> dict[str, float]:
        """Perplexity of the unquantized model on each evaluation text."""

        def run() -> dict[str, Any]:
            measured = self._measured().perplexity
            return {"perplexity": {spec: {"original": p.value, "tokens": p.tokens} for spec, p in measured.items()}}

        report = self._kept("original", None, run)
        return {spec: row["original"] for spec, row in report["perplexity"].items()}

    def report(self, recipe: Recipe) -> dict[str, Any]:
        """The report of a recipe's run, as ``python -m fpq_jax.quantize`` would write it."""

        def run() -> dict[str, Any]:
            original = self._measured()
            began = time.perf_counter()
            with run_progress(self.job, recipe, None) as progress:
                return run_recipe(self.job, recipe, progress, began=began, original=original, rows=False).report

        return self._kept(recipe.name, recipe, run)

    def _kept(self, name: str, recipe: Recipe | None, run: Any) -> dict[str, Any]:
        path, facts = self.folder / f"{name}.json", self.job.facts(recipe)
        if path.is_file():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                differing = [key for key in facts if kept["of"].get(key) != facts[key]]
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
                raise FpqError(f"{path} is no finished run; remove it or name another --output.") from error
            if differing:
                raise FpqError(
                    f"{path} is from another job ({', '.join(differing)} differ); remove it or name another --output."
                )
            return kept
        self.folder.mkdir(parents=True, exist_ok=True)
        report = {"of": facts} | run()
        write_json(path, report)
        values = ", ".join(f"{row.get('quantized', row['original']):.3f}" for row in report["perplexity"].values())
        console.print(f"{self.job.model_name}, {name}: {values}")
        return report


def prepare(options: Any, model: str, recipes: list[Recipe], **changes: Any) -> Job:
    """The job of a model under a script's options, which are named as the command quantize names them."""
    names = ("calibration", "num_samples", "seq_len", "eval", "max_windows", "dtype", "seed")
    given = {name: getattr(options, name) for name in names if hasattr(options, name)} | changes
    return open_job(JobOptions(model=model, **given), recipes)


def check(models: Sequence[str], texts: Sequence[str]) -> None:
    """FpqError for what is wrong with a script's models and texts as such."""
    if not models or not texts:
        raise FpqError("Name at least one --model and one --eval.")
    if len({model_title(model) for model in models}) < len(models):
        raise FpqError("Two --model have the same name; their runs would be kept in one folder.")


def check_plots() -> None:
    """FpqError if plots cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FpqError("The plots need matplotlib, which is not installed; pip install '.[studies]'.")


def model_title(model: str) -> str:
    """The name of a model in tables and of its folder of runs."""
    return Path(model).name or model


def text_title(spec: str) -> str:
    """The name of a text in tables."""
    return Path(spec).name


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
