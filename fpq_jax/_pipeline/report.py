"""The report of a run: one JSON object, version 1, and how it reads on a screen."""

import importlib.metadata
import sys
from typing import Any

import jax

from fpq_jax._algorithms.quantize_linears import LinearResult
from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._checkpoints.run_progress import RunProgress
from fpq_jax._numerics.qtensor import QTensor
from fpq_jax._pipeline.evaluation import Evaluation
from fpq_jax._pipeline.job import Job
from fpq_jax._pipeline.perplexity import Perplexity
from fpq_jax._support.machine import peak_memory
from fpq_jax._support.trees import Flat, stored_bytes
from fpq_jax._version import __version__

VERSION = 1
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "numpy")


def layer_row(result: LinearResult) -> dict[str, Any]:
    """One entry of the report's "layers"."""
    row = {
        "name": result.name,
        "shape": list(result.shape),
        "rounding_error": result.rounding_error,
        "error": result.error,
        "damping": result.damping,
        "seconds": result.seconds,
    }
    return row | ({"notes": list(result.notes)} if result.notes else {})


def bits_per_weight(params: Flat) -> float:
    """Bits that the layers' quantized Linears store (codes, scales, exponents, low-rank factors) over their weights."""
    quantized = [leaf for path, leaf in params.items() if isinstance(leaf, QTensor) and path.startswith("layers.")]
    return 8 * sum(q.nbytes for q in quantized) / sum(q.size for q in quantized)


def environment() -> dict[str, Any]:
    """Peak memory, devices and versions. Memory is the process's peak resident set on the host, and the device's."""
    device_peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "fpq-jax": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return {
        "peak_memory_bytes": peak_memory(),
        "peak_device_memory_bytes": [p for p in device_peaks if p is not None],
        "devices": [d.device_kind for d in jax.devices()],
        "versions": versions,
    }


ROW_TITLE = f"{'Linear':<40} {'in':>6} {'out':>6} {'rounding':>10} {'error':>10} {'damping':>8} {'seconds':>8}"


def row_text(result: LinearResult) -> str:
    """One line of the table, and a line for each note."""
    damping = "-" if result.damping is None else f"{result.damping:.2g}"
    line = (
        f"{result.name:<40} {result.shape[0]:>6} {result.shape[1]:>6} {result.rounding_error:>10.3e} "
        f"{result.error:>10.3e} {damping:>8} {result.seconds:>8.2f}"
    )
    return "\n".join([line, *(f"  note: {note}" for note in result.notes)])


def make_report(
    job: Job,
    recipe: Recipe,
    progress: RunProgress,
    results: list[LinearResult],
    original: dict[str, Perplexity],
    quantized: Evaluation,
    seconds: float,
) -> dict[str, Any]:
    """The report's JSON (see docs/checkpoint.md)."""
    samples, length = job.calibration.windows.shape
    params = progress.abstract()
    held_back = None if job.calibration.tail is None else job.calibration.tail_name
    return {
        "version": VERSION,
        "model": job.model_name,
        "recipe": job.recipe_for_model(recipe).to_dict(),
        "calibration": {
            "spec": job.calibration.spec,
            "num_samples": samples,
            "requested_samples": job.options.samples,
            "seq_len": length,
            "max_windows": job.options.max_windows,
            # the text under "perplexity" that is the end of the calibration text
            "held_back": None if held_back == job.calibration.spec else held_back,
        },
        "dtype": str(job.dtype),
        "seed": job.options.seed,
        "mesh": dict(job.mesh.shape),
        "perplexity": {
            spec: {
                "original": original[spec].value,
                "quantized": quantized.values[spec].value,
                "tokens": original[spec].tokens,
                "kl_divergence": quantized.divergences[spec].kl,
                "same_token": quantized.divergences[spec].same_token,
            }
            for spec in job.evaluation
        },
        "layers": [layer_row(result) for result in results],
        "stages": progress.stages(),
        "bits_per_weight": bits_per_weight(params),
        "bytes": {"original": job.checkpoint.nbytes, "quantized": stored_bytes(params)},
        "seconds": round(seconds, 2),
        **environment(),
    }
