"""Runs of many recipes on one model, each kept in a file as soon as it is finished, so that a study resumes."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from fpq_jax._console import console
from fpq_jax._errors import FpqError
from fpq_jax._job import Job
from fpq_jax._recipe import Recipe
from fpq_jax._report import environment, write_report

_SAMPLED = 2**20  # bytes of a weight file's beginning and of its end that identify it


class Runs:
    """What was measured on one job, in the JSON files of a folder."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.folder = job, folder
        self._facts = {
            "model": _model_digest(job.checkpoint.folder),
            "calibration": _digest(job.calibration.windows),
            "evaluation": {spec: _digest(windows) for spec, windows in job.evaluation.items()},
            "dtype": str(job.dtype),
            "seed": job.seed,
            "fpq-jax": environment()["versions"]["fpq-jax"],
        }

    def original(self) -> dict[str, float]:
        """Perplexity of the unquantized model on each evaluation text."""

        def run() -> dict[str, Any]:
            measured = self.job.perplexities(self.job.read(), "original")
            return {"perplexity": {spec: {"original": p.value, "tokens": p.tokens} for spec, p in measured.items()}}

        report = self._kept("original", {}, run)
        return {spec: row["original"] for spec, row in report["perplexity"].items()}

    def report(self, recipe: Recipe) -> dict[str, Any]:
        """The report of a recipe's run, as ``python -m fpq_jax.quantize`` would write it."""

        def run() -> dict[str, Any]:
            began = time.perf_counter()
            params, results = self.job.quantize(recipe, rows=False)
            quantized = self.job.perplexities(params, "quantized")
            original = {spec: value._replace(value=self.original()[spec]) for spec, value in quantized.items()}
            return self.job.report(recipe, params, results, original, quantized, time.perf_counter() - began)

        return self._kept(recipe.name, {"recipe": self.job.recipe_for_model(recipe).to_dict()}, run)

    def _kept(self, name: str, facts: dict[str, Any], run: Any) -> dict[str, Any]:
        path, facts = self.folder / f"{name}.json", self._facts | facts
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if differing := [key for key in facts if kept["of"].get(key) != facts[key]]:
                raise FpqError(
                    f"{path} is from another job ({', '.join(differing)} differ); remove it or name another --output."
                )
            return kept
        self.folder.mkdir(parents=True, exist_ok=True)
        report = {"of": facts} | run()
        write_report(path, report)
        values = ", ".join(f"{row.get('quantized', row['original']):.3f}" for row in report["perplexity"].values())
        console.print(f"{self.job.model_name}, {name}: {values}", markup=False)
        return report


def prepare(options: Any, model: str, recipes: list[Recipe]) -> Job:
    """The job of a model under a script's options, which are named as the command quantize names them."""
    names = ("calibration", "num_samples", "seq_len", "eval", "max_windows", "dtype", "seed")
    return Job.prepare(model, recipes, **{name: getattr(options, name) for name in names})


def model_title(model: str) -> str:
    """The name of a model in tables and of its folder of runs."""
    return Path(model).name or model


def text_title(spec: str) -> str:
    """The name of a text in tables."""
    return Path(spec).name


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _model_digest(folder: Path) -> str:
    """Of config.json and of the weight files' sizes, beginnings and ends."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(p for pattern in ("*.safetensors", "*.bin") for p in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED))
            file.seek(max(0, size - _SAMPLED))
            digest.update(file.read())
    return digest.hexdigest()


def _digest(windows: np.ndarray) -> str:
    return hashlib.sha256(f"{windows.shape}".encode() + windows.tobytes()).hexdigest()
