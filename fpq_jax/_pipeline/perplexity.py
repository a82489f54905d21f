"""Perplexity over whole windows: every token of a window but its first is predicted (GPTQ's protocol)."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fpq_jax._errors import FpqError
from fpq_jax._pipeline.batches import BATCH_TOKENS, Batches, batch_size
from fpq_jax._pipeline.layerwise import losses
from fpq_jax._support.mesh import make_mesh
from fpq_jax._support.trees import ByIdentity, jit

_Advance = Callable[[int], None]


class Perplexity(NamedTuple):
    """exp of the mean loss, and how many tokens were predicted."""

    value: float
    tokens: int


def perplexity(
    apply_fn: Callable[..., Any],
    params: Any,
    windows: Int[np.ndarray, "N L"],
    *,
    batch_tokens: int = BATCH_TOKENS,
    advance: _Advance | None = None,
) -> Perplexity:
    """Perplexity of ``apply_fn(params, tokens [B, L]) -> logits [B, L, V]`` on ``windows``.

    ``batch_tokens``: of a batch, at most an eighth of the windows. ``advance`` is told how many windows are done.
    FpqError if the loss is not finite.
    """
    mesh = make_mesh()
    batches = Batches.of(windows, mesh, batch_size(len(windows), windows.shape[1], mesh, batch_tokens))
    sums = np.zeros(len(windows))
    token_losses = _token_losses(ByIdentity(apply_fn))
    for tokens, real, index in zip(batches.tokens, batches.real, batches.index, strict=True):
        found = np.asarray(token_losses(params, jnp.asarray(tokens)))
        sums[index[real]] = found[real].sum(axis=1, dtype=np.float64)
        if advance is not None:
            advance(int(real.sum()))
    return of_losses(sums, windows.shape[1])


@functools.lru_cache(maxsize=8)
def _token_losses(apply_fn: ByIdentity) -> Callable[..., Float[Array, "B L-1"]]:
    return jit(lambda params, tokens: losses(apply_fn.function(params, tokens), tokens))


def of_losses(sums: np.ndarray, length: int) -> Perplexity:
    """From each window's sum of losses."""
    total, tokens = float(sums.sum()), len(sums) * (length - 1)
    if not math.isfinite(total):
        raise FpqError("The model's loss is not a finite number; its activations overflow (try --dtype float32).")
    return Perplexity(math.exp(total / tokens), tokens)
