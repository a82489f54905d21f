"""How fast a model is quantized, evaluated and generates on this machine, beside the machine's own limits and torch.

    python scripts/bench_model.py --model DIR --calibration FILE --eval FILE --output DIR

Everything is done --repeats times, in turns where torch is beside, and told as median and range. Quantizing and
evaluating are the commands themselves, in fresh processes: the rate of an evaluation is what more windows cost, and
start-up, with all compilation, is the rest. With --torch, the Python of an environment that has torch and transformers
(and llm-compressor, for its GPTQ), the same is done there on the same windows. Writes bench_model.json and
bench_model.md.
"""

import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from _runs import check, model_title, table

from fpq_jax import FpqError, Generator, load, text_windows
from fpq_jax._checkpoints.sources import open_model, resolve_model  # private: a checkpoint's config
from fpq_jax._pipeline.report import environment  # private: told as in the commands' reports
from fpq_jax._support.console import console, run_command  # private: speaks as the commands do
from fpq_jax._support.files import write_json  # private: written whole, as the commands' reports
from fpq_jax._support.machine import peak_memory  # private: as the commands' reports have it
from fpq_jax.models.parameters import abstract_model, params_of

TORCH = Path(__file__).with_name("bench_model_torch.py")
FORMS = ("original", "fp8", "packed")  # of the weights in memory
FEWER = 8  # windows of an evaluation, whose time is taken from that of more


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time a model from the checkpoint to its tokens."""

    model: str
    """Hugging Face folder or hub id, demo-llama or demo-opt."""
    calibration: str
    """Text to calibrate on."""
    eval: str
    """Text to evaluate on, and to take prompts from."""
    output: Path
    """Folder for bench_model.json and bench_model.md."""
    recipe: str = "w4a8-fp-m2-lorc"
    """Name of a recipe in configs/, or a YAML file."""
    num_samples: int = 32
    """Calibration windows."""
    seq_len: int = 512
    """Tokens per window."""
    max_windows: int = 40
    """Windows of an evaluation, more than 8."""
    rows: tuple[int, ...] = (1, 4, 16)
    """Rows that generate together."""
    prompt: int = 64
    """Tokens of a prompt."""
    new_tokens: int = 32
    """Tokens to generate for each row."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Unquantized arithmetic; by default the checkpoint's own."""
    repeats: int = 3
    torch: Path | None = None
    """Python of an environment that has torch and transformers."""


@dataclass(frozen=True)
class Bench:
    """What all measurements are given."""

    options: Options
    folder: Path  # of what is not kept
    windows: Path  # a file of the calibration's and the evaluation's

    def command(self, name: str, *arguments: Any) -> tuple[float, dict[str, Any]]:
        """Seconds of one of the commands in a fresh process, and its report."""
        report = self.folder / "report.json"
        line = [sys.executable, "-m", f"fpq_jax.{name}", "--seq-len", self.options.seq_len, "--report", report]
        line += [] if self.options.dtype is None else ["--dtype", self.options.dtype]
        began = time.perf_counter()
        done = subprocess.run([*map(str, line), *map(str, arguments)], capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode != 0:
            raise FpqError(f"{name} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return seconds, json.loads(report.read_text(encoding="utf-8"))

    def model(self, form: str) -> str | Path:
        """Where the weights of a form are."""
        return self.options.model if form == "original" else self.folder / "quantized"


Figures = dict[str, float]  # by name, which ends in a unit


def main(options: Options) -> None:
    """Run the script; FpqError for anything wrong with its input."""
    check([options.model], [options.eval])
    if options.max_windows <= FEWER:
        raise FpqError(f"max_windows is {options.max_windows}; it must be more than {FEWER}.")
    if options.repeats < 1 or not options.rows or min(options.rows) < 1:
        raise FpqError("repeats and all of rows must be at least 1.")
    if options.torch is not None and not options.torch.is_file():
        raise FpqError(f"There is no Python {options.torch}; --torch names one that has torch.")
    options.output.mkdir(parents=True, exist_ok=True)
    folder = resolve_model(options.model)
    calibration = text_windows(options.calibration, folder, options.seq_len, num_samples=options.num_samples)
    evaluation = text_windows(options.eval, folder, options.seq_len)[: options.max_windows]
    if len(evaluation) < options.max_windows:
        raise FpqError(
            f"{options.eval} has only {len(evaluation)} windows; name a longer text, or fewer --max-windows."
        )
    with tempfile.TemporaryDirectory(prefix="fpq-") as temporary:
        windows = Path(temporary) / "windows.npz"
        np.savez(windows, calibration=calibration, evaluation=evaluation)
        bench = Bench(options, Path(temporary), windows)
        tasks: dict[str, Callable[[], Figures]] = {"ours: quantize": lambda: quantize(bench)}
        tasks |= {f"ours: evaluate, {form}": lambda form=form: evaluate(bench, form) for form in FORMS}
        tasks |= {f"ours: generate, {form}": lambda form=form: generate(bench, form) for form in FORMS}
        if options.torch is not None:
            for part in ("quantize", "evaluate, bfloat16", "evaluate, float32", "generate, bfloat16",
                         "generate, float32"):  # fmt: skip
                tasks[f"torch: {part}"] = lambda part=part: of_torch(bench, folder, part)
        measured: dict[str, dict[str, list[float]]] = {name: {} for name in tasks}
        for turn in range(options.repeats):
            for name, task in tasks.items():
                figures = task()
                for figure, value in figures.items():
                    measured[name].setdefault(figure, []).append(value)
                console.print(f"{turn + 1}/{options.repeats} {name}: {figures}")
    result = {
        "model": model_title(options.model),
        "recipe": options.recipe,
        "calibration": {"windows": options.num_samples, "seq_len": options.seq_len},
        "max_windows": options.max_windows,
        "prompt": options.prompt,
        "new_tokens": options.new_tokens,
        "limits": limits(),
        "model_size": model_size(folder),
        "measured": measured,
        **environment(),
    }
    write_json(options.output / "bench_model.json", result)
    text = "\n".join(markdown(result))
    (options.output / "bench_model.md").write_text(text + "\n", encoding="utf-8")
    console.print(text)


def quantize(bench: Bench) -> Figures:
    """The command, which also evaluates on one window; its result is what the quantized forms are measured on."""
    options, output = bench.options, bench.model("fp8")
    if Path(output).exists():
        Path(output).rename(bench.folder / f"older-{time.monotonic_ns()}")
    seconds, report = bench.command(
        "quantize", "--model", options.model, "--recipe", options.recipe, "--calibration", options.calibration,
        "--num-samples", options.num_samples, "--eval", options.eval, "--max-windows", 1, "--output", output,
    )  # fmt: skip
    stages = {f"{stage}, s": value for stage, value in report["stages"].items()}
    return {"whole command, s": seconds, **stages, "peak memory, MB": report["peak_memory_bytes"] / 1e6}


def evaluate(bench: Bench, form: str) -> Figures:
    """The command on fewer windows and on more."""
    options = bench.options
    layout = () if form == "original" else ("--weights", form)
    of = lambda count: bench.command(
        "evaluate", "--model", bench.model(form), "--eval", options.eval, "--max-windows", count, *layout
    )
    (fewer, _), (more, report) = of(FEWER), of(options.max_windows)
    per_window = (more - fewer) / (options.max_windows - FEWER)
    figures = {"start-up, s": fewer - FEWER * per_window, "peak memory, MB": report["peak_memory_bytes"] / 1e6}
    # of a small model it may be lost in what start-up varies by
    return {"tokens/s": (options.seq_len - 1) / per_window, **figures} if per_window > 0 else figures


def generate(bench: Bench, form: str) -> Figures:
    """The generator on rows of prompts, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_generate, bench, form).result()


def _generate(bench: Bench, form: str) -> Figures:
    options = bench.options
    began = time.perf_counter()
    layout: dict[str, Any] = {} if form == "original" else {"weights": form}
    model = load(bench.model(form), dtype=options.dtype, **layout)
    jax.block_until_ready(jax.tree.leaves(model))
    figures = {"load, s": time.perf_counter() - began}
    tokens = np.load(bench.windows)["evaluation"].ravel()
    for rows in options.rows:
        prompts = [tokens[i * options.prompt :][: options.prompt].tolist() for i in range(rows)]
        generator = Generator(model)
        seconds = []
        for _ in range(2):  # the first compiles
            began = time.perf_counter()
            found = generator(prompts, max_new_tokens=options.new_tokens)
            seconds.append(time.perf_counter() - began)
        figures[f"compile, {rows} rows, s"] = seconds[0] - seconds[1]
        figures[f"prefill, {rows} rows, tokens/s"] = rows * options.prompt / found.prefill_seconds
        figures[f"decode, {rows} rows, tokens/s"] = rows * found.decode_steps / found.decode_seconds
    return figures | {"peak memory, MB": peak_memory() / 1e6}


def of_torch(bench: Bench, folder: Path, part: str) -> Figures:
    """The same by torch, in its own environment; nothing where that lacks what it takes."""
    options, output = bench.options, bench.folder / "torch.json"
    line = [options.torch, TORCH, "--part", part, "--model", folder, "--windows", bench.windows, "--output", output,
            "--rows", *options.rows, "--prompt", options.prompt, "--new-tokens", options.new_tokens]  # fmt: skip
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FpqError(f"torch's {part} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return json.loads(output.read_text(encoding="utf-8"))


def limits() -> dict[str, float]:
    """What this machine reaches where nothing is in the way: GFLOP/s of large products, GB/s of a read."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32, precision="highest"))
    read = jax.jit(jnp.sum)
    data = jnp.ones(2**27, jnp.float32)
    flops = {str(x.dtype): 2 * 2048**3 / _best(lambda x=x: multiply(x)) / 1e9 for x in (a, a.astype(jnp.bfloat16))}
    return flops | {"bandwidth": data.nbytes / _best(lambda: read(data)) / 1e9}


def _best(run: Callable[[], Any], repeats: int = 8) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def model_size(folder: Path) -> dict[str, int]:
    """Weights that a token is multiplied by: those of the Linears of all layers, and the head's."""
    checkpoint = open_model(folder)
    model_class = checkpoint.model_class
    sizes = params_of(abstract_model(model_class, checkpoint.model_config))
    linears = sum(leaf.size for path, leaf in sizes.items() if path.startswith("layers.") and leaf.ndim == 2)
    config = checkpoint.model_config
    return {"linears": linears, "head": config.vocab_size * config.hidden_size}


def markdown(result: dict[str, Any]) -> list[str]:
    """A table for each part: what was measured, and what the machine's limits allow."""
    size, bounds = result["model_size"], result["limits"]
    weights = size["linears"] + size["head"]
    values = ", ".join(f"{name} {value:.0f}" for name, value in bounds.items())
    lines = [
        f"# {result['model']}, {result['recipe']}",
        "",
        f"Limits of this machine, products in GFLOP/s, bandwidth in GB/s: {values}. "
        f"{weights / 1e6:.0f} M weights for a token, which at these limits are "
        + ", ".join(
            f"{1e9 * bounds[dtype] / (2 * weights):.0f} tokens/s in {dtype}" for dtype in ("float32", "bfloat16")
        )
        + f", and for one row of 16-bit weights {1e9 * bounds['bandwidth'] / (2 * weights):.0f} tokens/s.",
    ]
    for part in ("quantize", "evaluate", "generate"):
        named = {name: figures for name, figures in result["measured"].items() if f": {part}" in name}
        rows = list(dict.fromkeys(figure for figures in named.values() for figure in figures))
        cells = [[row, *(_range(figures.get(row)) for figures in named.values())] for row in rows]
        lines += ["", f"## {part}", "", *table(["", *named], cells)]
    return lines


def _range(values: list[float] | None) -> str:
    if not values:
        return "-"
    form = lambda value: f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    middle = form(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form(min(values))} to {form(max(values))})"


if __name__ == "__main__":
    run_command(main, Options)
