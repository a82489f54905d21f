"""Continue texts: python -m fpq_jax.generate --model DIR --prompt TEXT."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpq_jax._checkpoints.load_save import load
from fpq_jax._checkpoints.sources import open_model, resolve_model
from fpq_jax._errors import FpqError, check_at_least, check_seed
from fpq_jax._generation.generator import Generator, KvCache, Sampling
from fpq_jax._matmul.fp4_kernel.matmul import notice
from fpq_jax._matmul.weight_layouts import WeightLayout
from fpq_jax._pipeline.tokenizer import load_tokenizer
from fpq_jax._support.console import console, join_processes, run_command, size_text, write_text
from fpq_jax._support.files import read_json_object
from fpq_jax._support.mesh import parse_mesh
from fpq_jax._support.trees import stored_bytes
from fpq_jax.models.parameters import params_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """Continue one prompt or several."""

    prompt: tuple[str, ...]
    """Texts to continue, all at once."""
    model: str | None = None
    """Directory that quantize wrote, Hugging Face folder, hub id, demo-llama or demo-opt; left out, demo-llama."""
    max_new_tokens: int = 64
    """Tokens to add to each at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher is more random."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability."""
    seed: int = 0
    """Of the sampling."""
    weights: WeightLayout = "fp8"
    """4-bit weights expanded to FP8 from the start (fp8); or half the memory: expanded when they are multiplied
    (packed), or laid out for our own kernel for Hopper, which has not been measured yet (fragments)."""
    kv_cache: KvCache = "model"
    """Keys and values as the model computes them, or in FP8 (float8): half the memory of 16 bits."""
    mesh: str | None = None
    """Devices, as data=2,model=4: rows divided over data, weights over model; left out, one device."""
    distributed: bool = False
    """Join the same command's other processes; see docs/scale.md."""


def main(options: Options) -> None:
    """Run the command; FpqError for anything wrong with its input."""
    if options.distributed:
        join_processes()
    if not options.prompt:
        raise FpqError("There is no --prompt; give some text.")
    check_at_least(1, max_new_tokens=options.max_new_tokens)
    check_seed(options.seed)
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p)
    folder = resolve_model(options.model)
    mesh = parse_mesh(options.mesh)
    vocab_size = open_model(folder).model_config.vocab_size
    tokenizer = load_tokenizer(folder)
    stop = _stop_tokens(folder, tokenizer, vocab_size)
    model = load(folder, weights=options.weights, mesh=mesh if mesh.size > 1 else None)
    if options.weights == "fragments":
        console.print(notice())
    shown = _Shown(tokenizer, [list(tokenizer(text)["input_ids"]) for text in options.prompt])
    result = Generator(model, kv_cache=options.kv_cache)(
        shown.prompts,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=stop,
        seed=options.seed,
        on_token=shown.add,
    )
    shown.finish()
    prompt_tokens, new_tokens = (sum(map(len, rows)) for rows in (shown.prompts, result.tokens))
    decoded = new_tokens - sum(map(bool, result.tokens))  # the first of each row is the prefill's
    speed = f"{decoded / result.decode_seconds:.1f} tokens/s" if decoded > 0 else "no further step"
    console.print(
        f"\n{prompt_tokens} prompt tokens in {result.prefill_seconds:.2f} s, {new_tokens} new tokens: {speed}; "
        f"{size_text(stored_bytes(params_of(model)))} of weights, {size_text(result.cache_bytes)} of key-value cache",
    )


class _Shown:
    """Prints prompts and what is added to them: one as it comes, of several each when all are there."""

    def __init__(self, tokenizer: Any, prompts: list[list[int]]):
        self.tokenizer, self.prompts = tokenizer, prompts
        self.new: list[list[int]] = [[] for _ in prompts]
        self.text = ""
        if len(prompts) == 1:
            self._print_more(self._decoded(0))

    def add(self, row: int, token: int) -> None:
        self.new[row].append(token)
        if len(self.prompts) == 1:
            # decoded whole each time: a character may span tokens, a token's spaces depend on what stands before it
            text = self._decoded(0)
            if not text.endswith("\ufffd"):
                self._print_more(text)

    def finish(self) -> None:
        if len(self.prompts) == 1:
            self._print_more(self._decoded(0))
            write_text("\n")
            return
        for row in range(len(self.prompts)):
            write_text(self._decoded(row) + ("\n\n" if row + 1 < len(self.prompts) else "\n"))

    def _decoded(self, row: int) -> str:
        return self.tokenizer.decode(self.prompts[row] + self.new[row], skip_special_tokens=True)

    def _print_more(self, text: str) -> None:
        write_text(text[len(self.text) :])
        self.text = text


def _stop_tokens(folder: Path, tokenizer: Any, vocab_size: int) -> set[int]:
    """End-of-text tokens as the model's generation config, its config or its tokenizer name them, in this order."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = read_json_object(path).get("eos_token_id") if path.is_file() else None
        if found is None:
            continue
        tokens = found if isinstance(found, list) else [found]
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise FpqError(f"{path}: eos_token_id is {found!r}; it must be token ids below {vocab_size}.")
        return set(tokens)
    return set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}


if __name__ == "__main__":
    run_command(main, Options, "generate")
