"""Text in, token windows out (see ``documents`` for what a text is).

Evaluation follows GPTQ's protocol (paper: 4.1): the text is tokenized once, with the special tokens that the tokenizer
adds by itself, and cut into whole windows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from fpq_jax._checkpoints.demo import demo_model_path, is_demo
from fpq_jax._errors import FpqError
from fpq_jax._pipeline.documents import C4, documents, source
from fpq_jax._pipeline.tokenizer import load_tokenizer

Windows = Int[np.ndarray, "N L"]

_DEFAULT_LENGTH = 2048
_C4_WINDOWS = 256  # to evaluate on
_TAIL_SHARE, _TAIL_WINDOWS = 0.1, 64  # held back from the calibration text: this share, at most so many windows
_CHARACTERS_PER_TOKEN = 8  # generous, for how much of a text to read
# of a file, from which windows are drawn: so many times what they need, and not less than WikiText-2's training text
_READ_TIMES, _READ_CHARACTERS = 8, 2**24
_TOKENIZED_TOGETHER = 2**20  # characters, of which the tokenizer takes a hundred times as much memory for a while


def check_spec(spec: str) -> None:
    """FpqError if ``spec`` names no known data set and no file that could be read as text."""
    source(spec)


def window_length(seq_len: int | None, max_positions: int) -> int:
    """Tokens per window: as asked for, or 2,048 or the model's longest if that is shorter."""
    if seq_len is not None and seq_len > max_positions:
        raise FpqError(f"--seq-len {seq_len} is more than the model's {max_positions} positions.")
    return seq_len or min(_DEFAULT_LENGTH, max_positions)


@dataclass(frozen=True)
class CalibrationText:
    """spec: of the text. windows [N, L] to calibrate on; tail [M, L] held back from it, None if none was asked for."""

    spec: str
    windows: Windows
    tail: Int[np.ndarray, "M L"] | None

    @property
    def tail_name(self) -> str:
        """What the tail is called in a report; the demo text's is its own evaluation text."""
        return self.spec if self.spec == "demo" else f"{self.spec} (held-back tail)"


def calibration_text(
    spec: str, tokenizer: Any, *, num_samples: int, length: int, seed: int, hold_back: bool, vocab_size: int
) -> CalibrationText:
    """``num_samples`` windows drawn without overlap from the text of ``spec``, fewer if it has no more.

    With ``hold_back`` the end of the text is kept for evaluation and never drawn from; the demo text has an end of its
    own, what the demo model was not trained on.
    """
    found = source(spec)
    wanted = int(num_samples * length * (1 + 2 * _TAIL_SHARE)) * _CHARACTERS_PER_TOKEN
    most = wanted if spec == C4 else max(_READ_TIMES * wanted, _READ_CHARACTERS)
    windows = _cut(_tokenize(documents(found, "calibration", most), tokenizer, vocab_size, spec, most), length, spec)
    tail = None
    if hold_back and spec == "demo":
        tail = evaluation_windows(spec, tokenizer, length=length, vocab_size=vocab_size)
    elif hold_back:
        if len(windows) < 2:
            raise FpqError(
                f"The calibration text {spec} has one window of {length} tokens, so no tail can be held back; "
                "use a longer text, a smaller --seq-len, or name --eval."
            )
        size = max(1, min(_TAIL_WINDOWS, int(len(windows) * _TAIL_SHARE)))
        windows, tail = windows[:-size], windows[-size:]
    chosen = np.random.default_rng(seed).permutation(len(windows))[:num_samples]
    return CalibrationText(spec, windows[chosen], tail)


def text_windows(
    spec: str, tokenizer: Any, length: int, *, num_samples: int | None = None, seed: int = 0
) -> Int[np.ndarray, "N L"]:
    """Reads a text and cuts it into windows of tokens.

    Evaluation follows the protocol of GPTQ (ZeroQuant-FP, section 4.1): the text is tokenized once, with the special
    tokens that the tokenizer adds by itself, and cut into whole windows.

    Args:
        spec: ``"wikitext2"``, ``"ptb"``, ``"c4"``, ``"demo"``, or the path of a text file, as the commands take it.
        tokenizer: one of transformers, or a model's folder, or the name of a demo model.
        length: tokens in a window.
        num_samples: None for the text to evaluate on, all of it in order; otherwise how many windows to draw, without
            overlap, from the text to calibrate on.
        seed: of the drawing.

    Returns:
        int32 ``[N, length]``; with ``num_samples`` at most so many.

    Raises:
        FpqError: the text cannot be read or is shorter than a window, or no tokenizer can be loaded.

    Example:
        >>> windows = fpq.text_windows("demo", "demo-llama", 128, num_samples=4)
        >>> windows.shape, windows.dtype
        ((4, 128), dtype('int32'))
    """
    check_spec(spec)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(demo_model_path(tokenizer) if is_demo(tokenizer) else Path(tokenizer))
    if num_samples is None:
        return evaluation_windows(spec, tokenizer, length=length, vocab_size=len(tokenizer))
    options: Any = {"seed": seed, "hold_back": False, "vocab_size": len(tokenizer)}
    return calibration_text(spec, tokenizer, num_samples=num_samples, length=length, **options).windows


def evaluation_windows(spec: str, tokenizer: Any, *, length: int, vocab_size: int) -> Windows:
    """The evaluation text of ``spec`` in whole, non-overlapping windows [N, length]."""
    found = source(spec)
    joined = " ".join(documents(found, "evaluation")) if found.has_rows or spec == C4 else None
    texts = documents(found, "evaluation") if joined is None else [joined]
    windows = _cut(_tokenize(texts, tokenizer, vocab_size, spec), length, spec)
    return windows[:_C4_WINDOWS] if spec == C4 else windows


def _cut(tokens: Int[np.ndarray, " n"], length: int, spec: str) -> Windows:
    count = len(tokens) // length
    if count == 0:
        raise FpqError(
            f"The text {spec} has {len(tokens)} tokens, less than one window of {length}; "
            "use a longer text or a smaller --seq-len."
        )
    return tokens[: count * length].reshape(count, length)


def _tokenize(
    texts: Iterable[str], tokenizer: Any, vocab_size: int, spec: str, characters: int | None = None
) -> Int[np.ndarray, " n"]:
    """All texts' tokens in a row, each with the special tokens that the tokenizer adds; of texts that together have
    more than so many ``characters`` the first ones."""
    found: list[Int[np.ndarray, " n"]] = []
    waiting: list[str] = []
    total = together = 0

    def tokenize() -> None:
        if waiting:
            encoded = tokenizer(waiting, verbose=False, return_attention_mask=False)["input_ids"]
            found.extend(np.asarray(ids, np.int32) for ids in encoded)
            waiting.clear()

    for text in texts:
        waiting.append(text)
        total, together = total + len(text), together + len(text)
        if together >= _TOKENIZED_TOGETHER:
            tokenize()
            together = 0
        if characters is not None and total >= characters:
            break
    tokenize()
    tokens = np.concatenate(found) if found else np.zeros(0, np.int32)
    if len(tokens) and tokens.max() >= vocab_size:
        raise FpqError(
            f"The tokenizer gives token {tokens.max()} for {spec}, but the model's last is {vocab_size - 1}; "
            "tokenizer and model do not belong together."
        )
    return tokens
