"""Continue a text: python -m fpq_jax.generate --model DIR --prompt TEXT."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpq_jax._checkpoint import load, resolve_model
from fpq_jax._console import console, run_command
from fpq_jax._errors import FpqError
from fpq_jax._generation import generate
from fpq_jax._text import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Continue a prompt."""

    prompt: str
    """Text to continue."""
    model: str | None = None
    """Directory that quantize wrote, Hugging Face folder, hub id, demo-llama or demo-opt; left out, demo-llama."""
    max_new_tokens: int = 64
    """Tokens to add at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher is more random."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability."""
    seed: int = 0
    """Of the sampling."""


def main(options: Options) -> None:
    """Run the command; FpqError for anything wrong with its input."""
    if options.max_new_tokens < 1:
        raise FpqError(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 1.")
    if options.temperature < 0:
        raise FpqError(f"--temperature is {options.temperature}; it must not be negative.")
    if not 0 < options.top_p <= 1:
        raise FpqError(f"--top-p is {options.top_p}; it must be above 0 and at most 1.")
    folder = resolve_model(options.model)
    model = load(folder, expanded=True)
    tokenizer = load_tokenizer(folder)
    prompt = list(tokenizer(options.prompt)["input_ids"])
    new: list[int] = []
    shown = tokenizer.decode(prompt, skip_special_tokens=True)
    console.print(shown, end="", markup=False)

    def show(token: int | None) -> None:
        # decoded whole each time: a character may span tokens, a token's spaces depend on what stands before it
        nonlocal shown
        if token is not None:
            new.append(token)
        text = tokenizer.decode(prompt + new, skip_special_tokens=True)
        if token is None or not text.endswith("\ufffd"):
            console.print(text[len(shown) :], end="", markup=False)
            shown = text

    result = generate(
        model,
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        stop=_stop_tokens(folder, tokenizer),
        seed=options.seed,
        on_token=show,
    )
    show(None)
    console.print()
    speed = f"{result.decode_steps / result.decode_seconds:.1f} tokens/s" if result.decode_steps else "no further step"
    console.print(
        f"\n{len(prompt)} prompt tokens in {result.prefill_seconds:.2f} s, {len(result.tokens)} new tokens: {speed}",
        markup=False,
    )


def _stop_tokens(folder: Path, tokenizer: Any) -> set[int]:
    """End-of-text tokens as the model's generation config, its config or its tokenizer name them, in this order."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, json.JSONDecodeError):
            continue
        if found is not None:
            return set(found) if isinstance(found, list) else {found}
    return set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}


if __name__ == "__main__":
    run_command(main, Options, "generate")
