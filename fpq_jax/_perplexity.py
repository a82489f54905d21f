"""Perplexity over whole windows: every token of a window but its first is predicted (GPTQ's protocol)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fpq_jax._errors import FpqError
from fpq_jax._layerwise import Batches, batch_size, losses
from fpq_jax._mesh import make_mesh

_Advance = Callable[[int], None]


class Perplexity(NamedTuple):
    """exp of the mean loss, and how many tokens were predicted."""

    value: float
    tokens: int


def perplexity(model: Any, windows: Int[np.ndarray, "N L"], advance: _Advance | None = None) -> Perplexity:
    """Perplexity of ``model(tokens) -> logits`` on ``windows``; ``advance`` is told how many windows are done."""
    graph, state = nnx.split(model)
    mesh = make_mesh()
    batches = Batches.of(windows, mesh, batch_size(len(windows), windows.shape[1], mesh))
    sums = np.zeros(len(windows))
    for tokens, real, index in zip(batches.tokens, batches.real, batches.index, strict=True):
        found = np.asarray(_token_losses(graph, state, jnp.asarray(tokens)))
        sums[index[real]] = found[real].sum(axis=1, dtype=np.float64)
        if advance is not None:
            advance(int(real.sum()))
    return of_losses(sums, windows.shape[1])


@partial(jax.jit, static_argnums=0)
def _token_losses(graph: Any, state: Any, tokens: Int[Array, "B L"]) -> Float[Array, "B L-1"]:
    return losses(nnx.merge(graph, state)(tokens), tokens)


def of_losses(sums: np.ndarray, length: int) -> Perplexity:
    """From each window's sum of losses."""
    total, tokens = float(sums.sum()), len(sums) * (length - 1)
    if not math.isfinite(total):
        raise FpqError("The model's loss is not a finite number; its activations overflow (try --dtype float32).")
    return Perplexity(math.exp(total / tokens), tokens)
