"""Text in, token windows out: named data sets by the paper's protocol, local files, and the demo text.

A SPEC is ``wikitext2``, ``ptb``, ``c4``, ``demo``, or the path of a .txt/.raw/.tokens file (its whole text) or of a
.jsonl/.jsonl.gz file (a document in each line's "text"). Evaluation follows GPTQ's protocol (paper: 4.1): the text is
tokenized once, with the special tokens that the tokenizer adds by itself, and cut into whole windows.
"""

import gzip
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from fpq_jax._checkpoints.demo import demo_model_path, demo_topics, is_demo
from fpq_jax._errors import FpqError

Split = Literal["calibration", "evaluation"]
Windows = Int[np.ndarray, "N L"]

_SPECS = "wikitext2, ptb, c4, demo, or the path of a .txt, .raw, .tokens, .jsonl or .jsonl.gz file"
_DATA_SETS = ("wikitext2", "ptb", "c4")
_TEXT_SUFFIXES = (".txt", ".raw", ".tokens")
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
_DEFAULT_LENGTH = 2048
_C4_EVALUATION = (1100, 256)  # documents, windows
_TAIL_SHARE, _TAIL_WINDOWS = 0.1, 64  # held back from the calibration text: this share, at most so many windows
_CHARACTERS_PER_TOKEN = 8  # generous, for how much of C4 to read


def check_spec(spec: str) -> None:
    """FpqError if ``spec`` names no known data set and no file that could be read as text."""
    if spec == "demo":
        return
    if spec in _DATA_SETS:
        if "datasets" not in sys.modules and importlib.util.find_spec("datasets") is None:
            raise FpqError(
                f"The text {spec} is fetched with the package datasets, which is not installed; "
                "pip install 'fpq-jax[data]', or name a file."
            )
        return
    if not spec.endswith(_TEXT_SUFFIXES + _JSONL_SUFFIXES):
        raise FpqError(f"{spec!r} is no text that can be read; name {_SPECS}.")
    if not Path(spec).is_file():
        raise FpqError(f"There is no text file {spec}.")


def window_length(seq_len: int | None, max_positions: int) -> int:
    """Tokens per window: as asked for, or 2,048 or the model's longest if that is shorter."""
    if seq_len is not None and seq_len > max_positions:
        raise FpqError(f"--seq-len {seq_len} is more than the model's {max_positions} positions.")
    return seq_len or min(_DEFAULT_LENGTH, max_positions)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, by transformers; no remote code is run."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, all about the files in the folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FpqError(
            f"No tokenizer can be loaded from {folder} ({reason}); copy the model's tokenizer files there."
        ) from error


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
    wanted = int(num_samples * length * (1 + 2 * _TAIL_SHARE)) * _CHARACTERS_PER_TOKEN
    documents = _documents(spec, "calibration", wanted)
    windows = _cut(_tokenize(documents, tokenizer, vocab_size, spec), length, spec)
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
    documents = _documents(spec, "evaluation", None)
    joined = " ".join(documents) if spec == "c4" or spec.endswith(_JSONL_SUFFIXES) else "\n\n".join(documents)
    windows = _cut(_tokenize([joined], tokenizer, vocab_size, spec), length, spec)
    return windows[: _C4_EVALUATION[1]] if spec == "c4" else windows


def _cut(tokens: Int[np.ndarray, " n"], length: int, spec: str) -> Windows:
    count = len(tokens) // length
    if count == 0:
        raise FpqError(
            f"The text {spec} has {len(tokens)} tokens, less than one window of {length}; "
            "use a longer text or a smaller --seq-len."
        )
    return tokens[: count * length].reshape(count, length)


def _tokenize(documents: list[str], tokenizer: Any, vocab_size: int, spec: str) -> Int[np.ndarray, " n"]:
    """All documents' tokens in a row, each with the special tokens that the tokenizer adds."""
    encoded = tokenizer(documents, verbose=False, return_attention_mask=False)["input_ids"]
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids in encoded]) if encoded else np.zeros(0, np.int32)
    if len(tokens) and tokens.max() >= vocab_size:
        raise FpqError(
            f"The tokenizer gives token {tokens.max()} for {spec}, but the model's last is {vocab_size - 1}; "
            "tokenizer and model do not belong together."
        )
    return tokens


def _documents(spec: str, split: Split, characters: int | None) -> list[str]:
    """The texts of a SPEC; for C4's training set only about as many ``characters`` as are needed."""
    check_spec(spec)
    if spec == "demo":
        return ["\n\n".join(demo_topics(held_out=split == "evaluation"))]
    if spec in _DATA_SETS:
        return _data_set(spec, split, characters)
    try:
        if spec.endswith(_TEXT_SUFFIXES):
            return [Path(spec).read_text(encoding="utf-8")]
        with gzip.open(spec, "rt", encoding="utf-8") if spec.endswith(".gz") else open(spec, encoding="utf-8") as file:
            return list(_json_lines(spec, file))
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise FpqError(f"{spec} cannot be read as UTF-8 text: {error}.") from error


def _json_lines(spec: str, file: Any) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise FpqError(f'{spec}, line {number}, is no JSON object with a "text".') from error


def _data_set(spec: str, split: Split, characters: int | None) -> list[str]:
    """WikiText-2 raw, PTB or C4 through Hugging Face datasets."""
    import datasets
    import huggingface_hub

    # its retries would be told one by one; the sentence below tells the outcome
    huggingface_hub.logging.set_verbosity_error()
    train = split == "calibration"
    try:
        if spec == "wikitext2":
            name = "train" if train else "test"
            return ["\n\n".join(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=name)["text"])]
        if spec == "ptb":
            # the hub's own Parquet conversion; the data set itself is a script, which datasets no longer runs
            rows = datasets.load_dataset(
                "ptb-text-only/ptb_text_only",
                revision="refs/convert/parquet",
                split="train" if train else "test",
            )
            return [" ".join(rows["sentence"])]
        file = "en/c4-train.00000-of-01024.json.gz" if train else "en/c4-validation.00000-of-00008.json.gz"
        rows = datasets.load_dataset("allenai/c4", data_files=file, split="train", streaming=True)
        if not train:
            return [row["text"] for row in itertools.islice(rows, _C4_EVALUATION[0])]
        documents, total = [], 0
        for row in rows:
            documents.append(row["text"])
            total += len(row["text"])
            if characters is not None and total >= characters:
                break
        return documents
    except Exception as error:  # datasets raises many kinds; the hub's own message is long and about URLs
        raise FpqError(
            f"The data set {spec} cannot be fetched ({type(error).__name__}); "
            f"name a local text instead: a .txt, .raw, .tokens, .jsonl or .jsonl.gz file."
        ) from error
