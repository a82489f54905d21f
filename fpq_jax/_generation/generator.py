"""Token by token generation of a batch of prompts with a key-value cache.

Two programs are compiled, each once for its shapes: the prefill of all prompts, filled up at their ends to one length,
and the step that decodes one token of each row. Both sample the next token on the device and are handed the cache to
write in place, so a step costs one dispatch, and the host reads a token while the next one is computed.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from fpq_jax._errors import FpqError
from fpq_jax._generation.row_sharding import Rows
from fpq_jax._numerics.qtensor import QTensor
from fpq_jax._support.compiling import compiled

KvCache = Literal["model", "float8"]
_MULTIPLE = 64  # prompts and caches are rounded up to it, so that programs serve again


@dataclass(frozen=True)
class Generated:
    """Holds what a ``Generator`` generated, and how long that took without compilation.

    Attributes:
        tokens: the new token ids of each row, without the prompt.
        prefill_seconds: time of the prompts, which gives each row its first token.
        decode_seconds: time of all later steps.
        decode_steps: how many later steps there were.
        cache_bytes: size of the key-value cache.

    Example:
        >>> generate = fpq.Generator(fpq.load("demo-llama"))
        >>> generated = generate([[0, 17, 42], [0, 5]], max_new_tokens=4)
        >>> generated.decode_steps, generated.decode_seconds > 0
        (3, True)
    """

    tokens: list[list[int]]
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    cache_bytes: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Describes how the next token is sampled from a model's logits.

    Attributes:
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_p: samples from the likeliest tokens that together have this probability.

    Raises:
        FpqError: the temperature is negative, or ``top_p`` is not in (0, 1].

    Example:
        >>> fpq.Sampling(temperature=0.8, top_p=0.95)
        Sampling(temperature=0.8, top_p=0.95)
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise FpqError(f"temperature is {self.temperature}; it must not be negative.")
        if not 0 < self.top_p <= 1:
            raise FpqError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")


GREEDY = Sampling()


def cache_dtype(model: Any, kv_cache: str) -> DTypeLike:
    """What a cache's keys and values are held in: as the model computes, or FP8 codes with scales. FpqError else."""
    if kv_cache not in get_args(KvCache):
        raise FpqError(f"kv_cache is {kv_cache!r}; it must be {' or '.join(get_args(KvCache))}.")
    if kv_cache == "float8":
        return jnp.float8_e4m3fn
    table = model.embed_tokens.embedding.get_value()
    return model.embed_tokens.dtype if isinstance(table, QTensor) else table.dtype


class Generator:
    """Continues prompts with one model, keeping the programs that it compiled.

    A model that was prepared (``load(..., weights="fp8")``) is fastest.

    Args:
        model: one of this library's models, quantized or not.
        kv_cache: what keys and values are held in, ``"model"`` (the model's dtype) or ``"float8"``: E4M3 codes with a
            scale for each head and token, half the memory of 16 bits.

    Raises:
        FpqError: ``kv_cache`` is neither.

    Example:
        >>> generate = fpq.Generator(fpq.load("demo-llama"))
        >>> [len(row) for row in generate([[0, 17, 42], [0, 5]], max_new_tokens=4).tokens]
        [4, 4]
    """

    def __init__(self, model: Any, *, kv_cache: str = "model"):
        self._model = model
        self._graph, self._state = nnx.split(model)
        self._dtype = cache_dtype(model, kv_cache)
        self._programs: dict[Any, Any] = {}

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Collection[int] = (),
        seed: int = 0,
        on_token: Callable[[int, int], None] = lambda row, token: None,
    ) -> Generated:
        """Continues each prompt, all of them as one batch; greedy rows are what they would be alone.

        A row ends after ``max_new_tokens``, at a token of ``stop``, or at the model's last position.

        Args:
            prompts: token ids of each prompt.
            max_new_tokens: the most tokens that a row is continued by.
            sampling: how tokens are sampled; greedy by default.
            stop: token ids that end a row; they are not returned.
            seed: of the random numbers. They depend on the row and the position.
            on_token: called as ``on_token(row, token)`` with each new token as it comes.

        Returns:
            The new tokens of each row, with times.

        Raises:
            FpqError: ``max_new_tokens`` is less than 1; a prompt is empty, as long as the model's positions, or has
                tokens that the model has not.
        """
        if max_new_tokens < 1:
            raise FpqError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        limit = self._model.config.max_position_embeddings
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or 0 in lengths:
            raise FpqError("A prompt has no tokens; give some text.")
        vocab_size = self._model.config.vocab_size
        if strange := [token for prompt in prompts for token in prompt if not 0 <= token < vocab_size]:
            raise FpqError(
                f"A prompt has token {strange[0]}, but the model's last is {vocab_size - 1}; tokenizer and model do "
                "not belong together."
            )
        if max(lengths) >= limit:
            raise FpqError(f"The prompt has {max(lengths)} tokens; the model takes at most {limit - 1}.")
        # the last token is returned and not fed again
        room = [min(max_new_tokens, limit - length + 1) for length in lengths]
        # a model may have no positions beyond its last, not even for what is masked
        used = max(length + more - 1 for length, more in zip(lengths, room, strict=True))
        width, slots = (min(_rounded_up(size), limit) for size in (max(lengths), used))
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        on = Rows(self._model.mesh, len(prompts))
        cache = on.cache(lambda: self._model.init_cache(len(prompts), slots, self._dtype))
        cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        at, keys = on.to_devices(np.asarray(lengths, np.int32)), on.keys(seed)
        first = (self._state, on.to_devices(tokens), cache, at, keys)
        run_prefill = self._program(prefill, on, sampling, first)
        later = (self._state, at, cache, at, keys)
        run_step = self._program(step, on, sampling, later)

        rows: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))

        def take(new: np.ndarray) -> None:
            for row in sorted(running):
                token = int(new[row])
                if token not in stop:
                    rows[row].append(token)
                    on_token(row, token)
                if token in stop or len(rows[row]) == room[row]:
                    running.discard(row)

        began = time.perf_counter()
        token, cache, position = run_prefill(*first)
        token.block_until_ready()
        prefill_seconds = time.perf_counter() - began
        began, steps = time.perf_counter(), 0
        for _ in range(max(room) - 1):
            following, cache, position = run_step(self._state, token, cache, position, keys)
            take(np.asarray(token))
            token = following
            if not running:
                break  # the step under way is for nobody
            steps += 1
        if running:
            take(np.asarray(token))
        return Generated(rows, prefill_seconds, time.perf_counter() - began, steps, cache_bytes)

    def _program(self, function: Any, on: Rows, sampling: Sampling, arguments: tuple[Any, ...]) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[1:]))
        at = (function, sampling, shapes)
        if at not in self._programs:
            jitted = jax.jit(on.over(function), static_argnums=(0, 1), donate_argnums=4)
            self._programs[at] = compiled(jitted.lower(self._graph, sampling, *arguments))
        return self._programs[at]


def prefill(
    graph: Any,
    sampling: Sampling,
    state: Any,
    tokens: Int[Array, "B T"],
    cache: Any,
    lengths: Int[Array, " B"],
    keys: Shaped[Array, " B"],
) -> tuple[Int[Array, " B"], Any, Int[Array, " B"]]:
    """(each row's next token, the cache with the prompts in it, the position of that token)."""
    logits, cache = nnx.merge(graph, state)(tokens, cache, last=lengths - 1)
    return sample(logits[:, 0], sampling, keys, lengths), cache, lengths


def step(
    graph: Any,
    sampling: Sampling,
    state: Any,
    token: Int[Array, " B"],
    cache: Any,
    position: Int[Array, " B"],
    keys: Shaped[Array, " B"],
) -> tuple[Int[Array, " B"], Any, Int[Array, " B"]]:
    """The same for one more token of each row, which is at ``position``. Rows that ended go on in the last slot."""
    logits, cache = nnx.merge(graph, state)(token[:, None], cache, position)
    position = jnp.minimum(position + 1, cache[0].length - 1)
    return sample(logits[:, 0], sampling, keys, position), cache, position


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, keys: Shaped[Array, " B"], position: Int[Array, " B"]
) -> Int[Array, " B"]:
    """A token for each row; random numbers depend on its key and the position."""
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = jnp.where(_likeliest(logits, sampling.top_p), logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _likeliest(logits: Float[Array, "B V"], top_p: float) -> Bool[Array, "B V"]:
    """Which tokens stay: those whose likelier ones have not reached ``top_p`` together, the first always."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    keep = jnp.cumsum(ranked, axis=-1) - ranked < top_p
    return jax.vmap(lambda stays, at: jnp.zeros_like(stays).at[at].set(stays))(keep, order)


def _rounded_up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE
