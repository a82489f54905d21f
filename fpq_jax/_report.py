"""The report of a run: one JSON object, version 1, and how it reads on a screen."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import jax

from fpq_jax._atomic import files_digest
from fpq_jax._machine import peak_memory
from fpq_jax._qtensor import QTensor
from fpq_jax._solve import LinearResult
from fpq_jax._tree import Flat

VERSION = 1
_PACKAGES = ("fpq-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "numpy")


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
    """Bits that the quantized Linears store (codes, scales, exponents, low-rank factors) over their weights."""
    quantized = [leaf for leaf in params.values() if isinstance(leaf, QTensor)]
    return 8 * sum(q.nbytes for q in quantized) / sum(q.size for q in quantized)


def environment() -> dict[str, Any]:
    """Peak memory, devices and versions. Memory is the process's peak resident set on the host, and the device's."""
    device_peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
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


def code_digest() -> str:
    """Of this package's sources: another version may come to other numbers."""
    import fpq_jax.models

    modules = (fpq_jax, fpq_jax.models)
    return files_digest(sorted(p for module in modules for p in Path(str(module.__file__)).parent.glob("*.py")))


ROW_TITLE = f"{'Linear':<40} {'in':>6} {'out':>6} {'rounding':>10} {'error':>10} {'damping':>8} {'seconds':>8}"


def row_text(result: LinearResult) -> str:
    """One line of the table, and a line for each note."""
    damping = "-" if result.damping is None else f"{result.damping:.2g}"
    line = (
        f"{result.name:<40} {result.shape[0]:>6} {result.shape[1]:>6} {result.rounding_error:>10.3e} "
        f"{result.error:>10.3e} {damping:>8} {result.seconds:>8.2f}"
    )
    return "\n".join([line, *(f"  note: {note}" for note in result.notes)])


def shortened(spec: str) -> str:
    """The name of a text in 40 columns; of a long path the end."""
    return f"{spec if len(spec) <= 40 else '...' + spec[-37:]:<40}"


def size_text(size: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
