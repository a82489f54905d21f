"""Write a quantized model for other engines: python -m fpq_jax.export --model DIR --format NAME --output DIR."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fpq_jax._checkpoints.export import Export, FormatName, prepare_export
from fpq_jax._checkpoints.sources import open_model, resolve_model
from fpq_jax._errors import FpqError, check_at_least
from fpq_jax._pipeline.evaluation import perplexities_of, texts_of
from fpq_jax._pipeline.text import Windows, check_spec
from fpq_jax._storage.compressed_tensors import FORMATS
from fpq_jax._storage.lora_adapter import FOLDER
from fpq_jax._storage.safetensors_writer import parse_size
from fpq_jax._support.console import console, progress_bar, run_command, shortened, size_text
from fpq_jax._support.mesh import make_mesh
from fpq_jax._support.new_directory import check_output, new_directory
from fpq_jax.models.parameters import part_names

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a quantized model in the layout of other engines, exactly."""

    model: str
    """Directory that quantize wrote."""
    format: FormatName
    """fp8: compressed-tensors FP8; mxfp4 and int4: compressed-tensors 4-bit weights; bf16: a plain Hugging Face
    checkpoint; safetensors: fpq_jax's own, without Orbax."""
    output: Path
    """Directory for the result."""
    merge_lorc: bool = False
    """fp8: add LoRC to the weights and round them again, instead of an adapter beside them; what that costs is
    measured."""
    max_shard_size: str = "5GB"
    """Largest file of weights, as 5GB, 500MB or 2GiB."""
    eval: tuple[str, ...] = ()
    """Texts on which --merge-lorc is measured; by default those of the model's report."""
    max_windows: int | None = None
    """Measure on the first so many windows only."""


def main(options: Options) -> None:
    """Run the command; FpqError for anything wrong with its input."""
    size = parse_size(options.max_shard_size)
    check_at_least(1, max_windows=options.max_windows)
    if not options.merge_lorc and (options.eval or options.max_windows):
        raise FpqError("--eval and --max-windows are for --merge-lorc; leave them out, or use evaluate.")
    for spec in options.eval:
        check_spec(spec)
    check_output(options.output)
    checkpoint = open_model(resolve_model(options.model))
    export = prepare_export(checkpoint, options.format, merge_lorc=options.merge_lorc, max_shard_size=size)
    texts = {}
    if options.merge_lorc:
        texts = texts_of(checkpoint, options.eval, seq_len=None, max_windows=options.max_windows)
    parts = part_names(checkpoint.model_config)
    with new_directory(options.output) as folder, progress_bar("parts", len(parts)) as advance:
        written = export.write(folder, advance)
    files = f"{written.files} file{'s' if written.files > 1 else ''}"
    console.print(f"{options.output}: {size_text(written.nbytes)} in {files}.")
    for line in _notes(export, options.output):
        console.print(line)
    if texts:
        _print_cost(export, options.output, texts)


def _notes(export: Export, output: Path) -> list[str]:
    """What a person must know of the result, and how to go on."""
    lines, name = [], export.name
    activations = sorted({str(q.spec.activation) for q in export.weights.values() if q.spec.activation is not None})
    if name in FORMATS:
        what = "merged weights were rounded to FP8" if export.merge_lorc else "weights are the model's bit for bit"
        lines.append(f"compressed-tensors {FORMATS[name]}; {what}.")
        if torn := export.torn:
            more = f" and {len(torn) - 1} more" if len(torn) > 1 else ""
            lines.append(
                f"vLLM and SGLang merge Linears of one input, and cannot load {torn[0]}{more}, quantized in part."
            )
    if name == "bf16":
        lines.append("A plain checkpoint: each weight is the quantized one, LoRC added, rounded to bfloat16.")
    if activations and name in ("mxfp4", "int4", "bf16"):
        lines.append(
            f"It leaves activations as they are; this model was measured with them in {', '.join(activations)}."
        )
    folder = shlex.quote(str(output))
    if name == "safetensors":
        texts = "" if (output / "report.json").is_file() else " --eval wikitext2"
        return [*lines, "Next:", f"  python -m fpq_jax.evaluate --model {folder}{texts}"]
    serve = f"vllm serve {folder}" + (" --linear-backend marlin --dtype bfloat16" if name == "mxfp4" else "")
    if export.rank:
        adapter = output / FOLDER
        lines.append(f"LoRC is a PEFT adapter of rank {export.rank} in {adapter}, to be loaded with it.")
        most = next((rank for rank in _LORA_RANKS if rank >= export.rank), None)
        if most is None:
            lines.append(f"vLLM takes ranks up to {_LORA_RANKS[-1]}; use --merge-lorc for it.")
        else:
            name_and_folder = shlex.quote(f"{FOLDER}={adapter}")
            serve += f" --enable-lora --max-lora-rank {most} --lora-modules {name_and_folder}"
    return [*lines, "Next (docs/engines.md has the other engines):", f"  {serve}"]


def _print_cost(export: Export, output: Path, texts: Mapping[str, Windows]) -> None:
    mesh = make_mesh()
    before = perplexities_of(export.checkpoint, texts, mesh).values
    after = perplexities_of(open_model(output), texts, mesh).values
    console.print(f"\n{'perplexity':<40} {'with LoRC':>10} {'merged':>10} {'tokens':>10}")
    for spec, (value, tokens) in before.items():
        console.print(f"{shortened(spec)} {value:>10.4f} {after[spec].value:>10.4f} {tokens:>10,}")


if __name__ == "__main__":
    run_command(main, Options, "export")
