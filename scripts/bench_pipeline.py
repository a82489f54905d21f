"""Where the time of quantizing a layer goes, how far each stage is from this machine's peak, and what GPUs would take.

    python scripts/bench_pipeline.py --output benchmarks/pipeline

Writes a LLaMA with random weights, quantizes it with the library's own pipeline, and takes each stage's median over the
layers behind the first, which compiles. The arithmetic of a stage over the measured peak of a float32 matrix product is
its floor here; over an H100's peaks it is its floor there, for the paper's largest models. Writes pipeline.json and
pipeline.md.
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fpq_jax import Recipe, make_mesh
from fpq_jax._algorithms.lorc import OVERSAMPLING, POWER_ITERATIONS  # private: what its operations are counted by
from fpq_jax._checkpoints.huggingface import HfCheckpoint  # private: a checkpoint read and written tensor by tensor
from fpq_jax._pipeline.quantize_layers import quantize_checkpoint  # private: times the pipeline's stages
from fpq_jax._storage.orbax_parts import PartsWriter  # private: times the writing of a part
from fpq_jax._support.console import console, run_command  # private: speaks as the commands do
from fpq_jax.models.llama import Llama
from fpq_jax.models.parameters import abstract_model, params_of, to_hf_tensors

STAGES = ("read", "hessians", "gptq", "lorc", "errors", "forward", "write")
# dense peaks of an H100 SXM by its datasheet; float32 has no tensor cores there
H100 = {"bfloat16": 989e12, "float32": 67e12}
DISK, HOST_TO_DEVICE = 3e9, 50e9  # bytes/s, assumed: one NVMe drive, PCIe 5 x16
LAUNCH = 4e-6  # seconds, assumed
LAUNCHES_PER_INPUT = 5 / 8  # GPTQ's loop, counted by compiling for an H100 (docs/hopper.md)


@dataclass(frozen=True)
class Shape:
    """hidden (D), inner (F), layers, tokens of calibration (T) in windows of length (L); gated: LLaMA, else OPT."""

    hidden: int
    inner: int
    layers: int
    tokens: int = 128 * 2048
    length: int = 2048
    gated: bool = True

    @property
    def linears(self) -> list[tuple[int, int]]:
        """[in, out] of each run of GPTQ."""
        d, f = self.hidden, self.inner
        return [(d, 3 * d), (d, d), (d, 2 * f if self.gated else f), (f, d)]

    @property
    def weights(self) -> int:
        return sum(n * m for n, m in self.linears)


PAPER = {
    "LLaMA-7b": Shape(4096, 11008, 32),
    "OPT-30b": Shape(7168, 4 * 7168, 48, gated=False),
    "OPT-175b": Shape(12288, 4 * 12288, 96, gated=False),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the pipeline's stages."""

    hidden: int = 1024
    """Width."""
    inner: int = 2816
    """Width inside the MLP."""
    layers: int = 9
    """Layers; the first compiles and is left out."""
    num_samples: int = 8
    """Calibration windows."""
    seq_len: int = 1024
    """Tokens per window."""
    rank: int = 8
    """LoRC's."""
    output: Path | None = None
    """Folder for pipeline.json and pipeline.md."""


def main(options: Options) -> None:
    """Run the script."""
    shape = Shape(options.hidden, options.inner, options.layers, options.num_samples * options.seq_len, options.seq_len)
    peak = matmul_peak()
    seconds = measure(options, shape)
    work = flops(shape, options.rank)
    result = {
        "shape": asdict(shape),
        "parameters": shape.weights * shape.layers,
        "device": jax.devices()[0].device_kind,
        "float32_flops_per_second": peak,
        "seconds_per_layer": seconds,
        "flops_per_layer": work,
        "h100": {name: {n: h100(s, n) for n in (1, 8)} for name, s in PAPER.items()},
    }
    text = markdown(result)
    console.print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "pipeline.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (options.output / "pipeline.md").write_text(text + "\n", encoding="utf-8")


def matmul_peak() -> float:
    """FLOP/s of a large float32 product, the best of some."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    product(a).block_until_ready()
    best = min(_seconds(lambda: product(a).block_until_ready()) for _ in range(8))
    return 2 * 2048**3 / best


def measure(options: Options, shape: Shape) -> dict[str, float]:
    """Median seconds of each stage of a layer."""
    recipe = Recipe.load("w4a8-fp-m2-lorc").with_lorc_rank(options.rank)
    windows = np.random.default_rng(0).integers(0, 256, (options.num_samples, options.seq_len))
    stages: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = HfCheckpoint(write_random_llama(Path(folder), shape))
        writer = PartsWriter(Path(folder) / "out")
        # the last layer runs no forward behind it
        for part in quantize_checkpoint(checkpoint, recipe, windows, jnp.float32, make_mesh()):
            write = lambda part=part: (writer.write(part.name, part.params), writer.wait())
            stages.append({**part.seconds, "write": _seconds(write)})
        writer.close()
    return {stage: statistics.median(s[stage] for s in stages[2:-2]) for stage in STAGES}


def flops(shape: Shape, rank: int) -> dict[str, float]:
    """Of each stage of a layer; reading and writing have none."""
    forward = 2 * shape.tokens * shape.weights + 4 * shape.tokens * shape.length * shape.hidden
    grams = 2 * shape.tokens * sum(n * n for n, _ in shape.linears)
    # factorization, then the products with all finished inputs; three products with H tell what was lost
    gptq = sum(n**3 / 3 + n * n * m + 3 * 2 * n * n * m for n, m in shape.linears)
    passes = 2 * POWER_ITERATIONS + 2
    return {
        "hessians": forward + grams,
        "gptq": gptq,
        "lorc": 2 * passes * (rank + OVERSAMPLING) * shape.weights,
        "errors": 2 * sum(n * n * m for n, m in shape.linears),
        "forward": forward,
    }


def h100(shape: Shape, devices: int, rank: int = 8) -> dict[str, float]:
    """Least seconds of each stage of a layer on so many H100, and of the whole model in "model"."""
    work = flops(shape, rank)
    forward = work["forward"] / H100["bfloat16"] / devices
    hidden = shape.tokens * shape.hidden * 2
    cholesky = sum(n**3 / 3 for n, _ in shape.linears)
    launches = sum(n for n, _ in shape.linears) * LAUNCHES_PER_INPUT * LAUNCH
    seconds = {
        "read": 2 * shape.weights / DISK,
        "hessians": forward + (work["hessians"] - work["forward"]) / H100["float32"] / devices,
        # every device factorizes; its share of the outputs is its own
        "gptq": (cholesky + (work["gptq"] - cholesky) / devices) / H100["float32"] + launches,
        "lorc": work["lorc"] / H100["float32"] / min(devices, 6),
        "errors": work["errors"] / H100["float32"] / devices,
        "forward": forward + 3 * hidden / HOST_TO_DEVICE / devices,
        "write": 0.52 * shape.weights / DISK,
    }
    # reading and writing are done beside the rest
    compute = sum(seconds[stage] for stage in ("hessians", "gptq", "lorc", "errors", "forward"))
    return {**seconds, "model": shape.layers * max(compute, seconds["read"], seconds["write"])}


def markdown(result: dict[str, Any]) -> str:
    seconds, work, peak = (
        result["seconds_per_layer"], result["flops_per_layer"], result["float32_flops_per_second"]
    )  # fmt: skip
    total = sum(seconds.values())
    lines = [
        f"{result['parameters'] / 1e6:.0f} M quantized parameters, {result['device']}, "
        f"{peak / 1e9:.0f} GFLOP/s in float32; {result['shape']['tokens']} calibration tokens.",
        "",
        "| stage | seconds per layer | share | GFLOP | floor (s) | floor / measured |",
        "|---|---|---|---|---|---|",
    ]
    for stage in STAGES:
        cells = [stage, f"{seconds[stage]:.3f}", f"{seconds[stage] / total:.0%}"]
        if stage in work:
            floor = work[stage] / peak
            cells += [f"{work[stage] / 1e9:.0f}", f"{floor:.3f}", f"{floor / seconds[stage]:.0%}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Floors on H100s, milliseconds per layer; the last column is the whole model in minutes.", ""]
    lines += [f"| model | H100s | {' | '.join(STAGES)} | model |", f"|{'---|' * (len(STAGES) + 3)}"]
    for name, by_devices in result["h100"].items():
        for devices, found in by_devices.items():
            cells = [f"{1e3 * found[stage]:.0f}" for stage in STAGES]
            lines.append(f"| {name} | {devices} | {' | '.join(cells)} | {found['model'] / 60:.1f} |")
    return "\n".join(lines)


def write_random_llama(folder: Path, shape: Shape) -> Path:
    """A float32 checkpoint with a tokenizer's worth of 256 tokens and random weights."""
    config = {"model_type": "llama", "vocab_size": 256, "hidden_size": shape.hidden, "intermediate_size": shape.inner,
              "num_hidden_layers": shape.layers, "num_attention_heads": 8,
              "max_position_embeddings": shape.length}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rng = np.random.default_rng(0)
    params = {
        path: rng.standard_normal(leaf.shape, np.float32) * (0.02 if leaf.ndim > 1 else 0.1) + (leaf.ndim == 1)
        for path, leaf in params_of(abstract_model(Llama, Llama.Config.from_hf(config))).items()
    }
    save_file(to_hf_tensors(Llama, params), folder / "model.safetensors")
    return folder


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    run_command(main, Options)
