"""Perplexity over whole windows: every token of a window but its first is predicted (GPTQ's protocol)."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from fpq_jax._errors import FpqError
from fpq_jax._layerwise import (
    BATCH_TOKENS,
    Batches,
    CacheShape,
    Skeleton,
    ahead,
    embed,
    forward,
    losses,
    replicate,
    token_losses,
)
from fpq_jax._mesh import make_mesh, sum_over_processes
from fpq_jax._tree import Flat, below
from fpq_jax.models import EMBEDDING, HEAD, params_of, part_names, prepare_in_place, with_params

_Advance = Callable[[int], None]
Reader = Callable[[str], Flat]  # the parameters of a part, by path


class Perplexity(NamedTuple):
    """exp of the mean loss, and how many tokens were predicted."""

    value: float
    tokens: int


def perplexity(model: Any, windows: Int[np.ndarray, "N L"], advance: _Advance | None = None) -> Perplexity:
    """Perplexity of ``model(tokens) -> logits`` on ``windows``; ``advance`` is told how many windows are done."""
    graph, state = nnx.split(model)
    batches = Batches.of(windows, make_mesh())
    sums = np.zeros(len(windows))
    for tokens, real, index in zip(batches.tokens, batches.real, batches.index, strict=True):
        found = np.asarray(_token_losses(graph, state, jnp.asarray(tokens)))
        sums[index[real]] = found[real].sum(axis=1, dtype=np.float64)
        if advance is not None:
            advance(int(real.sum()))
    return _of(sums, windows.shape[1])


@partial(jax.jit, static_argnums=0)
def _token_losses(graph: Any, state: Any, tokens: Int[Array, "B L"]) -> Float[Array, "B L-1"]:
    return losses(nnx.merge(graph, state)(tokens), tokens)


def _of(sums: np.ndarray, length: int) -> Perplexity:
    """From each window's sum of losses."""
    total, tokens = float(sums.sum()), len(sums) * (length - 1)
    if not math.isfinite(total):
        raise FpqError("The model's loss is not a finite number; its activations overflow (try --dtype float32).")
    return Perplexity(math.exp(total / tokens), tokens)


class Streamed(NamedTuple):
    """Perplexity by text, and the bytes of all weights as they were in memory, one layer after the other."""

    perplexities: dict[str, Perplexity]
    weight_bytes: int


def streamed_perplexities(
    skeleton: Skeleton,
    read: Reader,
    texts: Mapping[str, Int[np.ndarray, "N L"]],
    mesh: Mesh,
    *,
    expand: str = "load",
    cache: CacheShape | None = None,
    at_once: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    read_ahead: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> Streamed:
    """Perplexity of a model whose parts are read one after the other, on texts of windows of one length.

    Windows are divided over the mesh, in batches of ``batch_tokens`` on each device. ``expand`` is the weights' form,
    see ``prepare``; with ``cache`` keys and values are what such a cache gives back, as in generation. ``at_once``
    windows' hidden states are kept on the host; for more than that, the model is read again. ``advance`` is called
    behind each of ``steps`` layers.
    """
    windows = np.concatenate(list(texts.values()))
    sums, weight_bytes = np.zeros(len(windows)), 0
    at_once = at_once or len(windows)
    for start in range(0, len(windows), at_once):
        found, weight_bytes = _losses_of(
            skeleton, read, windows[start : start + at_once], mesh, expand, cache, batch_tokens, read_ahead, advance
        )
        sums[start : start + at_once] = found
    ends = np.cumsum([len(w) for w in texts.values()])
    each = zip(texts.items(), np.split(sums, ends[:-1]), strict=True)
    return Streamed({name: _of(own, w.shape[1]) for (name, w), own in each}, weight_bytes)


def steps(config: Any, num_windows: int, at_once: int | None) -> int:
    """How often ``streamed_perplexities`` calls ``advance``."""
    return config.num_hidden_layers * -(-num_windows // (at_once or num_windows))


def _losses_of(
    skeleton: Skeleton,
    read: Reader,
    windows: np.ndarray,
    mesh: Mesh,
    expand: str,
    cache: CacheShape | None,
    batch_tokens: int,
    read_ahead: bool,
    advance: Callable[[], None],
) -> tuple[np.ndarray, int]:
    """Each window's sum of losses, and the bytes of weights."""
    batches = Batches.of(windows, mesh, batch_tokens)
    _, *layers, _ = part_names(skeleton.config)
    outer = replicate(read(EMBEDDING), mesh)
    hidden = embed(skeleton, outer, batches)
    weight_bytes = _bytes(outer)
    if not skeleton.config.tie_word_embeddings:
        outer = {}
    for name, params in zip(layers, ahead(read, layers) if read_ahead else map(read, layers), strict=True):
        own = {f"layers.0.{path}": leaf for path, leaf in below(replicate(params, mesh), f"{name}.").items()}
        layer = prepare_in_place(with_params(skeleton.with_one_layer(), own), expand).layers[0]
        del params, own
        weight_bytes += _bytes(params_of(layer))
        forward(layer, hidden, mesh, cache)
        del layer
        advance()
    head = replicate(read(HEAD), mesh)
    weight_bytes += _bytes(head)
    sums = np.zeros(len(windows))
    for found, real, index in zip(
        token_losses(skeleton, outer | head, hidden, batches), batches.real, batches.index, strict=True
    ):
        sums[index[real]] = found[real].sum(axis=1, dtype=np.float64)
    return sum_over_processes(sums), weight_bytes


def _bytes(params: Flat) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
