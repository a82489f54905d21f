"""Token by token generation with a key-value cache: one jitted prefill, one jitted step for fixed shapes."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fpq_jax._errors import FpqError


@dataclass(frozen=True)
class Generated:
    """tokens: the new ones, without the prompt. Seconds of the prompt and per later step, compilation left out."""

    tokens: list[int]
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int


def generate(
    model: Any,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
    on_token: Callable[[int], None] = lambda token: None,
) -> Generated:
    """Continue ``prompt``. temperature 0 is greedy; top_p keeps the likeliest tokens of that total probability.

    Ends after ``max_new_tokens``, at a token of ``stop`` (not returned), or at the model's last position.
    """
    limit = model.config.max_position_embeddings
    if not prompt:
        raise FpqError("The prompt has no tokens; give some text.")
    if len(prompt) >= limit:
        raise FpqError(f"The prompt has {len(prompt)} tokens; the model takes at most {limit - 1}.")
    length = min(limit, len(prompt) + max_new_tokens)
    graph, state = nnx.split(model)
    cache = model.init_cache(1, length, model.embed_tokens.embedding.get_value().dtype)
    tokens = jnp.asarray([prompt], jnp.int32)
    sample = partial(_sample, temperature=temperature, top_p=top_p)
    keys = jax.random.split(jax.random.key(seed), max_new_tokens)

    prefill = _step.lower(graph, state, tokens, cache, jnp.int32(0)).compile()
    step = _step.lower(graph, state, tokens[:, :1], cache, jnp.int32(0)).compile()
    began = time.perf_counter()
    logits, cache = prefill(state, tokens, cache, jnp.int32(0))
    token = int(sample(logits, keys[0]))
    prefill_seconds = time.perf_counter() - began

    new: list[int] = []
    began, steps = time.perf_counter(), 0
    for position in range(len(prompt), length + 1):
        if token in stop:
            break
        new.append(token)
        on_token(token)
        if position == length or len(new) == max_new_tokens:
            break
        logits, cache = step(state, jnp.full((1, 1), token, jnp.int32), cache, jnp.int32(position))
        token = int(sample(logits, keys[len(new)]))
        steps += 1
    return Generated(new, prefill_seconds, time.perf_counter() - began, steps)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
    graph: Any, state: Any, tokens: Int[Array, "1 T"], cache: Any, start: Int[Array, ""]
) -> tuple[Float[Array, " V"], Any]:
    """Logits behind the last token, and the cache with all tokens in it."""
    logits, cache = nnx.merge(graph, state)(tokens, cache, start)
    return logits[0, -1].astype(jnp.float32), cache


@partial(jax.jit, static_argnames=("temperature", "top_p"))
def _sample(logits: Float[Array, " V"], key: Array, *, temperature: float, top_p: float) -> Int[Array, ""]:
    if temperature == 0:
        return jnp.argmax(logits)
    logits = logits / temperature
    if top_p < 1:
        order = jnp.argsort(-logits)
        ranked = jax.nn.softmax(logits[order])
        # a token stays while the likelier ones before it have not reached top_p: the first always does
        keep = jnp.cumsum(ranked) - ranked < top_p
        logits = logits.at[order].set(jnp.where(keep, logits[order], -jnp.inf))
    return jax.random.categorical(key, logits)
