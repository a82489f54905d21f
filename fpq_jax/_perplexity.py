"""Perplexity over whole windows: every token of a window but its first is predicted (GPTQ's protocol)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fpq_jax._errors import FpqError

_TOKENS_PER_BATCH = 8192


class Perplexity(NamedTuple):
    """exp of the mean loss, and how many tokens were predicted."""

    value: float
    tokens: int


def batches(windows: Int[np.ndarray, "N L"], size: int) -> list[tuple[np.ndarray, int]]:
    """Equal batches of windows and how many rows of each are real; the last one is filled up with its first row."""
    result = []
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        filled = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
        result.append((filled, len(batch)))
    return result


def batch_size(num_windows: int, length: int) -> int:
    """Windows per batch for about ``_TOKENS_PER_BATCH`` tokens."""
    return max(1, min(num_windows, _TOKENS_PER_BATCH // length))


def perplexity(
    model: Any,
    windows: Int[np.ndarray, "N L"],
    advance: Callable[[int], None] | None = None,
    *,
    cache_dtype: DTypeLike | None = None,
) -> Perplexity:
    """Perplexity of ``model(tokens) -> logits`` on ``windows``; ``advance`` is told how many windows are done.

    With ``cache_dtype`` keys and values are what a cache of that dtype gives back, as in generation.
    """
    graph, state = nnx.split(model)
    total, tokens = 0.0, 0
    for batch, real in batches(windows, batch_size(*windows.shape)):
        losses = np.asarray(_token_losses(graph, cache_dtype, state, jnp.asarray(batch)))[:real]
        total += float(losses.sum(dtype=np.float64))
        tokens += losses.size
        if advance is not None:
            advance(real)
    if not math.isfinite(total):
        raise FpqError("The model's loss is not a finite number; its activations overflow (try --dtype float32).")
    return Perplexity(math.exp(total / tokens), tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _token_losses(
    graph: Any, cache_dtype: DTypeLike | None, state: Any, tokens: Int[Array, "B L"]
) -> Float[Array, "B L-1"]:
    """Negative log-likelihood of each token but the first, in float32."""
    model = nnx.merge(graph, state)
    if cache_dtype is None:
        logits = model(tokens)
    else:
        logits, _ = model(tokens, model.init_cache(*tokens.shape, cache_dtype))
    logits = logits[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
