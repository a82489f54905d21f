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
from fpq_jax._pipeline.predictions import losses
from fpq_jax._support.mesh import make_mesh
from fpq_jax._support.trees import ByIdentity, jit

_Advance = Callable[[int], None]


class Perplexity(NamedTuple):
    """Holds a perplexity and the number of tokens that it was measured on.

    Attributes:
        value: exp of the mean negative log-likelihood, in nats.
        tokens: how many tokens were predicted.

    Example:
        >>> fpq.Perplexity(value=27.35, tokens=32704).value
        27.35
    """

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
    """Computes the perplexity of a model on windows of text: all tokens of a window but the first are predicted.

    That is the protocol of GPTQ (Frantar et al., 2022, arXiv 2210.17323).

    Args:
        apply_fn: called as ``apply_fn(params, tokens [B, L])``, gives logits ``[B, L, V]``.
        params: the first argument of ``apply_fn``, any pytree.
        windows: int ``[N, L]``, token ids (see ``text_windows``).
        batch_tokens: about how many tokens are in a batch; a batch is at most an eighth of the windows.
        advance: called after each batch with the number of windows in it.

    Returns:
        The perplexity, and how many tokens were predicted.

    Raises:
        FpqError: the loss is not finite.

    Example:
        >>> params = {"logits": jnp.zeros((10, 10))}  # of the next token for each token: all are as likely
        >>> windows = np.random.default_rng(0).integers(0, 10, (4, 16), np.int32)
        >>> found = fpq.perplexity(lambda params, tokens: params["logits"][tokens], params, windows)
        >>> round(found.value, 3), found.tokens
        (10.0, 60)
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
