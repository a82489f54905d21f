"""Perplexity of a model: python -m fpq_jax.evaluate --model DIR --eval SPEC ..."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from fpq_jax._checkpoints.demo import is_demo
from fpq_jax._checkpoints.sources import abstract_leaves, open_model, resolve_model
from fpq_jax._errors import check_at_least
from fpq_jax._generation.generator import KvCache
from fpq_jax._matmul.fp4_kernel.matmul import notice
from fpq_jax._matmul.weight_layouts import WeightLayout, check_any_for_fragments, check_layout
from fpq_jax._pipeline.batches import BATCH_TOKENS
from fpq_jax._pipeline.evaluation import perplexities_of, texts_of
from fpq_jax._pipeline.report import VERSION, environment
from fpq_jax._pipeline.text import check_spec
from fpq_jax._support.console import console, join_processes, run_command, shortened, size_text
from fpq_jax._support.files import check_writable, write_json
from fpq_jax._support.mesh import is_first, parse_mesh
from fpq_jax.models.kv_cache import CacheShape


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a model's perplexity."""

    model: str | None = None
    """Directory that quantize wrote, Hugging Face folder, hub id, demo-llama or demo-opt; left out, demo-llama."""
    eval: tuple[str, ...] = ()
    """Texts: wikitext2, ptb, c4, demo or files. By default those of the report of a quantized model, demo for a demo
    model, wikitext2 for others."""
    seq_len: int | None = None
    """Tokens per window; by default 2,048, or the model's longest if that is shorter."""
    max_windows: int | None = None
    """Only the first so many windows."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Unquantized arithmetic; by default as stored."""
    weights: WeightLayout = "fp8"
    """4-bit weights expanded to FP8 from the start (fp8), or packed until they are multiplied (packed): the same
    numbers; fragments is for the few tokens of generate, and expands the weights for the many of a batch of windows."""
    kv_cache: KvCache = "model"
    """Keys and values as the model computes them, or rounded as an FP8 cache would (float8)."""
    batch_tokens: int = BATCH_TOKENS
    """Tokens of a batch on each device; fewer take less memory."""
    mesh: str | None = None
    """Devices to divide the windows over, as data=4; by default one."""
    distributed: bool = False
    """Join the same command's other processes; see docs/scale.md."""
    report: Path | None = None
    """JSON file for the result."""


def main(options: Options) -> None:
    """Run the command; FpqError for anything wrong with its input."""
    began = time.perf_counter()
    if options.distributed:
        join_processes()
    for spec in options.eval:
        check_spec(spec)
    check_at_least(1, max_windows=options.max_windows, batch_tokens=options.batch_tokens)
    check_at_least(2, seq_len=options.seq_len)
    check_writable(options.report)
    mesh = parse_mesh(options.mesh)
    check_layout(options.weights, mesh.size if mesh.size > 1 else None)
    checkpoint = open_model(resolve_model(options.model))
    check_any_for_fragments(abstract_leaves(checkpoint), options.weights)
    if options.weights == "fragments":
        console.print(notice())
    config = checkpoint.model_config
    cache = None
    if options.kv_cache == "float8":
        cache = CacheShape(config.num_key_value_heads, config.head_dim, jnp.dtype(jnp.float8_e4m3fn))
    texts = texts_of(
        checkpoint,
        options.eval or (("demo",) if is_demo(options.model) else ()),
        seq_len=options.seq_len,
        max_windows=options.max_windows,
    )
    measured, _, weight_bytes = perplexities_of(
        checkpoint,
        texts,
        mesh,
        dtype=options.dtype,
        weights=options.weights,
        cache=cache,
        batch_tokens=options.batch_tokens,
    )
    console.print(f"{size_text(weight_bytes)} of weights as they are in memory, one layer at a time")
    which = "quantized" if checkpoint.quantized else "original"
    console.print(f"{'perplexity':<40} {which:>10} {'tokens':>10}")
    rows = {}
    for spec, (value, tokens) in measured.items():
        rows[spec] = {which: value, "tokens": tokens}
        console.print(f"{shortened(spec)} {value:>10.4f} {tokens:>10,}")
    if options.report is not None and is_first():
        report = {
            "version": VERSION,
            "model": "demo" if options.model is None else options.model,
            "weights": options.weights,
            "kv_cache": options.kv_cache,
            "weight_bytes": weight_bytes,
            "perplexity": rows,
            "seconds": round(time.perf_counter() - began, 2),
            **environment(),
        }
        write_json(options.report, report)


if __name__ == "__main__":
    run_command(main, Options, "evaluate")
