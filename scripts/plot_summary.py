"""Size and perplexity before and after quantization: a Markdown table and a picture, from the reports of quantize.

    python scripts/plot_summary.py benchmarks/smollm2/*.json --output docs/_static/summary.svg

The reports are what ``python -m fpq_jax.quantize --report FILE`` wrote, one for each recipe, of one model on the same
texts. The table goes to standard output.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from _runs import model_title, table, text_title

from fpq_jax import FpqError
from fpq_jax._support.console import console, run_command  # private: speaks as the commands do

_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
_INK, _FAINT, _GRAY, _LAYERS, _REST, _DOT = "#24292f", "#6e7781", "#8c959f", "#2f6db5", "#b9cde5", "#c2410c"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw size and perplexity before and after quantization."""

    reports: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files that quantize --report wrote."""
    output: Path | None = None
    """Picture, .svg or .png; left out, only the table is printed."""
    text: str | None = None
    """The evaluation text, as the reports name it; by default their only one."""


class Row(NamedTuple):
    """A model, quantized or not. rest_bytes: of the parameters that are in no quantized layer."""

    name: str
    perplexity: float
    bits: float
    nbytes: int
    rest_bytes: float


class Summary(NamedTuple):
    """What the reports are about, and their rows: the original first, then from large to small."""

    model: str
    text: str
    tokens: int
    rows: list[Row]


def main(options: Options) -> None:
    """Run the script; FpqError for anything wrong with its input."""
    summary = summarize([_read(path) for path in options.reports], options.text)
    console.print("\n".join(markdown(summary)))
    if options.output is not None:
        draw(summary, options.output)


def summarize(reports: list[dict[str, Any]], text: str | None = None) -> Summary:
    """The rows of reports of one model; FpqError for reports that cannot stand beside each other."""
    if not reports:
        raise FpqError("Name at least one report.")
    texts = {name for report in reports for name in report["perplexity"]}
    if text is None and len(texts) > 1:
        raise FpqError(f"The reports have several texts; choose one with --text: {', '.join(sorted(texts))}.")
    text = text or next(iter(texts))
    measured = []
    for report in reports:
        if text not in report["perplexity"]:
            raise FpqError(f"The report of {report['recipe']['name']} has no perplexity on {text}.")
        measured.append(report["perplexity"][text])
    first, before = reports[0], measured[0]
    for report, row in zip(reports, measured, strict=True):
        of_one_run = all(report[key] == first[key] for key in ("model", "dtype")) and row["tokens"] == before["tokens"]
        if not of_one_run or not math.isclose(row["original"], before["original"], rel_tol=1e-3):
            raise FpqError(
                f"The reports of {first['recipe']['name']} and {report['recipe']['name']} are of different models, "
                "dtypes or evaluation windows; run them with the same options."
            )
    names = [report["recipe"]["name"] for report in reports]
    if len(set(names)) < len(names):
        raise FpqError("Two reports are of the same recipe; name one of them.")
    weights = _weights(first)
    bits, total = _BITS[first["dtype"]], first["bytes"]["original"]
    original = Row(f"original, {first['dtype']}", before["original"], bits, total, _rest(total, bits, weights))
    rows = [
        Row(
            report["recipe"]["name"],
            row["quantized"],
            report["bits_per_weight"],
            size := report["bytes"]["quantized"],
            _rest(size, report["bits_per_weight"], _weights(report)),
        )
        for report, row in zip(reports, measured, strict=True)
    ]
    rows.sort(key=lambda row: (-row.nbytes, row.name))
    return Summary(model_title(first["model"]), text_title(text), before["tokens"], [original, *rows])


def markdown(summary: Summary) -> list[str]:
    """The lines of the table."""
    original = summary.rows[0]
    cells = []
    for row in summary.rows:
        change = "" if row is original else f" (+{row.perplexity / original.perplexity - 1:.1%})".replace("+-", "-")
        name = row.name if row is original else f"`{row.name}`"
        cells.append([name, f"{row.perplexity:.2f}{change}", f"{row.bits:.2f}", f"{row.nbytes / 1e6:.1f}"])
    return table(["recipe", "perplexity", "bits per quantized weight", "size (MB)"], cells)


def draw(summary: Summary, path: Path) -> None:
    """Bars of the sizes beside dots of the perplexities, on a white ground that is legible on dark pages too."""
    if path.suffix not in (".svg", ".png"):
        raise FpqError(f"{path} is no picture that can be written; name a .svg or .png file.")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FpqError("The picture needs matplotlib, which is not installed; pip install '.[studies]'.") from error
    rows = summary.rows
    places = range(len(rows))
    options = {"font.size": 10, "text.color": _INK, "svg.hashsalt": "fpq_jax"}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(9, 1.5 + 0.42 * len(rows)), layout="constrained", facecolor="white")
        sizes, losses = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
        quantized = [(row.nbytes - row.rest_bytes) / 1e6 for row in rows]
        colors = [_GRAY] + [_LAYERS] * (len(rows) - 1)
        sizes.barh(places, quantized, color=colors, height=0.62)
        rest = [row.rest_bytes / 1e6 for row in rows]
        sizes.barh(places, rest, left=quantized, color=_REST, height=0.62)
        for y, row in enumerate(rows):
            label = f" {row.nbytes / 1e6:.0f} MB" + (f", {row.bits:.1f} bits" if y else "")
            sizes.text(row.nbytes / 1e6, y, label, va="center")
        sizes.set(yticks=places, yticklabels=[row.name for row in rows], xlim=(0, 1.35 * max(quantized) + max(rest)))
        sizes.set_title("size: linear layers, then all else (light)", fontsize=10, loc="left")
        values = [row.perplexity for row in rows]
        losses.axvline(values[0], color=_GRAY, linewidth=1, linestyle=":")
        losses.scatter(values, places, color=[_GRAY] + [_DOT] * (len(rows) - 1), s=48, zorder=3)
        room = (max(values) - min(values)) or 1.0
        for y, value in enumerate(values):
            losses.text(value + 0.04 * room, y, f"{value:.2f}", va="center")
        losses.set(xlim=(min(values) - 0.12 * room, max(values) + 0.3 * room))
        losses.set_title("perplexity (lower is better; axis cut)", fontsize=10, loc="left")
        sizes.invert_yaxis()
        for axes in (sizes, losses):
            axes.tick_params(length=0, colors=_INK, labelsize=10)
            axes.tick_params(axis="x", colors=_FAINT, labelsize=8)
            axes.spines[:].set_visible(False)
            axes.grid(axis="x", color="#eaeef2", zorder=0)
            axes.set_axisbelow(True)
        figure.suptitle(
            f"{summary.model}: {summary.text}, {summary.tokens:,} predicted tokens", x=0.01, ha="left", fontsize=11
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FpqError(f"{path} cannot be read as a report: {error}.") from error
    wanted = ("model", "dtype", "recipe", "perplexity", "layers", "bits_per_weight", "bytes")
    if not isinstance(report, dict) or any(key not in report for key in wanted):
        raise FpqError(f"{path} is no report; name a file that quantize --report wrote.")
    return report


def _weights(report: dict[str, Any]) -> int:
    """How many weights are quantized."""
    return sum(math.prod(layer["shape"]) for layer in report["layers"])


def _rest(nbytes: int, bits: float, weights: int) -> float:
    return max(0.0, nbytes - weights * bits / 8)


if __name__ == "__main__":
    run_command(main, Options)
