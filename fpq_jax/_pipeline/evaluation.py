"""Perplexity of a model that is read layer by layer, which may be larger than the memory."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int

from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._checkpoints.model_folder import QuantizedCheckpoint
from fpq_jax._errors import FpqError
from fpq_jax._pipeline.batches import BATCH_TOKENS, Batches, batch_size, windows_at_once
from fpq_jax._pipeline.layerwise import embed, forward
from fpq_jax._pipeline.perplexity import Perplexity, of_losses
from fpq_jax._pipeline.predictions import LastLayer, predictions
from fpq_jax._pipeline.text import Windows, calibration_text, evaluation_windows, window_length
from fpq_jax._pipeline.tokenizer import load_tokenizer
from fpq_jax._support.console import progress_bar
from fpq_jax._support.machine import arithmetic_dtype
from fpq_jax._support.mesh import sum_over_processes
from fpq_jax._support.placement import replicate, replicated
from fpq_jax._support.prefetch import prefetch
from fpq_jax._support.trees import Flat, below, stored_bytes
from fpq_jax.models.kv_cache import CacheShape
from fpq_jax.models.parameters import EMBEDDING, HEAD, params_of, part_names, with_params
from fpq_jax.models.prepare import prepare_in_place
from fpq_jax.models.spec import ModelSpec

Reader = Callable[[str], Flat]  # the parameters of a part, by path
Checkpoint = QuantizedCheckpoint | HfCheckpoint
_DEFAULT_TEXT = "wikitext2"


class Divergence(NamedTuple):
    """How far a model's predictions are from the original's: kl, the Kullback-Leibler divergence in nats for each
    token; same_token, how often the most likely token is the same, 0 to 1."""

    kl: float
    same_token: float

    @classmethod
    def of(cls, sums: np.ndarray, length: int) -> "Divergence":
        """From each window's sums."""
        kl, same = sums.sum(axis=1) / (sums.shape[1] * (length - 1))
        return cls(float(kl), float(same))


class Evaluation(NamedTuple):
    """By text perplexity and, beside an original, divergence from it; and the bytes of all weights as they were in
    memory, one layer after the other."""

    values: dict[str, Perplexity]
    divergences: dict[str, Divergence]
    weight_bytes: int


class Original(NamedTuple):
    """What predictions are compared with: how the unquantized model's head is read, and the folder where its last
    hidden states were kept."""

    model_spec: ModelSpec
    read: Reader
    states: Path


def perplexities(
    model_spec: ModelSpec,
    read: Reader,
    texts: Mapping[str, Int[np.ndarray, "N L"]],
    mesh: Mesh,
    *,
    weights: str = "fp8",
    cache: CacheShape | None = None,
    batch_tokens: int = BATCH_TOKENS,
    read_ahead: bool = True,
    title: str = "",
    keep: Path | None = None,
    original: Original | None = None,
) -> Evaluation:
    """Perplexity of a model whose parts are read one after the other, on texts of windows of one length.

    Windows are divided over the mesh, in batches of ``batch_tokens`` on each device. ``weights`` is the weights'
    layout, see ``prepare``; with ``cache`` keys and values are what such a cache gives back, as in generation. Where
    the hidden states of all windows would be too much for the host, the model is read again for each piece of them.
    ``keep``: a folder for the last hidden states, with which an ``Original`` predicts.
    """
    windows = np.concatenate(list(texts.values()))
    length = windows.shape[1]
    size = batch_size(len(windows), length, mesh, batch_tokens)
    at_once = windows_at_once(len(windows), length, model_spec, mesh, batch_tokens)
    sums, weight_bytes = np.zeros((3, len(windows))), 0
    pieces = range(0, len(windows), at_once)
    layers = model_spec.config.num_hidden_layers
    with progress_bar(f"{title}perplexity on {', '.join(texts)}", len(pieces) * layers) as advance:
        reading = _Reading(
            model_spec=model_spec,
            read=read,
            weights=weights,
            cache=cache,
            read_ahead=read_ahead,
            keep=keep,
            original=original,
            advance=advance,
        )
        for start in pieces:
            piece = slice(start, start + at_once)
            sums[:, piece], weight_bytes = reading.sums(Batches.of(windows[piece], mesh, size), start // size)
    ends = np.cumsum([len(w) for w in texts.values()])
    of_text = dict(zip(texts, np.split(sums, ends[:-1], axis=1), strict=True))
    return Evaluation(
        {name: of_losses(losses, length) for name, (losses, _, _) in of_text.items()},
        {name: Divergence.of(own[1:], length) for name, own in of_text.items()} if original is not None else {},
        weight_bytes,
    )


def perplexities_of(
    checkpoint: Checkpoint,
    texts: Mapping[str, Int[np.ndarray, "N L"]],
    mesh: Mesh,
    *,
    dtype: DTypeLike | None = None,
    weights: str = "fp8",
    cache: CacheShape | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Evaluation:
    """``perplexities`` of a model's folder; ``dtype`` of the unquantized arithmetic, by default the checkpoint's."""
    dtype = arithmetic_dtype(checkpoint.dtype, dtype)
    one_reads = isinstance(checkpoint, HfCheckpoint)
    if isinstance(checkpoint, HfCheckpoint):
        read = partial(checkpoint.read_part, dtype=dtype)
    else:
        own = None if dtype == checkpoint.dtype else dtype
        read = partial(checkpoint.read_part, dtype=own, sharding=replicated(mesh))
    return perplexities(
        ModelSpec(checkpoint.model_class, checkpoint.model_config, dtype),
        read,
        texts,
        mesh,
        weights=weights,
        cache=cache,
        batch_tokens=batch_tokens,
        read_ahead=one_reads or jax.process_count() == 1,
    )


def texts_of(
    checkpoint: Checkpoint, specs: Sequence[str], *, seq_len: int | None, max_windows: int | None
) -> dict[str, Windows]:
    """The texts to measure a model on, in windows of its tokenizer's tokens.

    Without ``specs``, those of the report of a quantized model, windows as there so that the numbers can be compared;
    WikiText-2 for a model without one.
    """
    folder, config = checkpoint.folder, checkpoint.model_config
    tokenizer = load_tokenizer(folder)
    length, calibration = seq_len, None
    reported = isinstance(checkpoint, QuantizedCheckpoint) or checkpoint.is_packed
    if not specs and reported:
        specs, calibration = _texts_of_report(folder)
        length = length or calibration["seq_len"]
        max_windows = max_windows or calibration["max_windows"]
    length = window_length(length, config.max_position_embeddings)
    texts: dict[str, Windows] = {}
    for spec in specs or (_DEFAULT_TEXT,):
        if calibration is not None and spec == calibration.get("held_back"):
            windows = calibration_text(
                calibration["spec"],
                tokenizer,
                num_samples=calibration["requested_samples"],
                length=length,
                seed=0,
                hold_back=True,
                vocab_size=config.vocab_size,
            ).tail
            assert windows is not None
        else:
            windows = evaluation_windows(spec, tokenizer, length=length, vocab_size=config.vocab_size)
        texts[spec] = windows[:max_windows]
    return texts


def _texts_of_report(folder: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The texts that a model was measured on, and what it was calibrated on."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return tuple(report["perplexity"]), report["calibration"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise FpqError(f"{folder} has no readable report.json to take the texts from; name --eval.") from error


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """How a model is read, once for each piece of the windows, and what is done on the way; see ``perplexities``."""

    model_spec: ModelSpec
    read: Reader
    weights: str
    cache: CacheShape | None
    read_ahead: bool
    keep: Path | None
    original: Original | None
    advance: Callable[[], None]

    def sums(self, batches: Batches, first: int) -> tuple[np.ndarray, int]:
        """Each window's sums of losses, of divergences, and of tokens that are the original's, float64 [3, windows];
        and the bytes of weights. ``first``: the first batch's number among all."""
        hidden, head, weight_bytes = self._last_hidden(batches)
        mesh, original = batches.mesh, self.original
        head_of_original = {} if original is None else _head(original.model_spec, original.read, mesh)
        sums = np.zeros((3, batches.count))
        for b, rows in enumerate(hidden):
            if self.keep is not None:
                np.save(_states(self.keep, first + b), rows.view(np.uint8))  # files have no name for bfloat16
            other = None
            if original is not None:
                kept = np.load(_states(original.states, first + b)).view(original.model_spec.dtype)
                other = LastLayer(original.model_spec, head_of_original, kept)
            predicted = predictions(LastLayer(self.model_spec, head, rows), batches.tokens[b], mesh, other)
            real = batches.real[b]
            of_windows = predicted[real].sum(axis=1, dtype=np.float64).T
            sums[: len(of_windows), batches.index[b][real]] = of_windows
        return sum_over_processes(sums), weight_bytes

    def _last_hidden(self, batches: Batches) -> tuple[list[np.ndarray], Flat, int]:
        """(the last layer's output for each batch, on the host; the head's parameters; bytes of all weights)."""
        mesh, model_spec = batches.mesh, self.model_spec
        _, *layers, _ = part_names(model_spec.config)
        outer = replicate(self.read(EMBEDDING), mesh)
        hidden = embed(model_spec, outer, batches)
        weight_bytes = stored_bytes(outer)
        if not model_spec.config.tie_word_embeddings:
            outer = {}
        reading = prefetch(self.read, layers) if self.read_ahead else map(self.read, layers)
        for name in layers:
            params = below(replicate(next(reading), mesh), f"{name}.")
            own = {f"layers.0.{path}": leaf for path, leaf in params.items()}
            layer = prepare_in_place(with_params(model_spec.with_one_layer(), own), self.weights).layers[0]
            del params, own
            weight_bytes += stored_bytes(params_of(layer))
            forward(layer, hidden, mesh, self.cache)
            del layer
            self.advance()
        head = replicate(self.read(HEAD), mesh)
        return hidden, outer | head, weight_bytes + stored_bytes(head)


def _head(model_spec: ModelSpec, read: Reader, mesh: Mesh) -> Flat:
    """What the head needs, by path, on every device."""
    embedding = read(EMBEDDING) if model_spec.config.tie_word_embeddings else {}
    return replicate(embedding | read(HEAD), mesh)


def _states(folder: Path, batch: int) -> Path:
    return folder / f"{batch}.{jax.process_index()}.npy"
