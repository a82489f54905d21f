"""What every decoder-only model shares: tokens through ``embed``, the layers and ``head``, with or without a cache."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fpq_jax.models.kv_cache import LayerCache
from fpq_jax.models.layers import Block, Embedding, pad_rows


class Decoder(nnx.Module):
    """Base of the model classes: ``model(tokens)`` gives logits; ``embed``, ``layers`` and ``head`` are its parts.

    A model class has these tables for its Hugging Face checkpoints: NAMES, pairs of a pattern for parameters' paths and
    the tensor's name; IGNORED, patterns of tensors that some checkpoints carry and nothing needs; Config, the class
    of its configuration; EMBEDDING, the beginnings of the paths of what ``embed`` needs; DIVISIBLE, the sizes in Config
    that a "model" axis must divide; SPLIT, "outputs" and "inputs" -> a pattern for the names of what it divides so;
    BLOCKS, the classes whose Linears of one input may be merged.
    """

    NAMES: tuple[tuple[str, str], ...]
    IGNORED: tuple[str, ...]
    EMBEDDING: tuple[str, ...]
    Config: Any
    DIVISIBLE: tuple[str, ...]
    SPLIT: ClassVar[dict[str, str]]
    BLOCKS: tuple[type[Block], ...]

    config: Any
    prepared = False  # whether ``prepare`` made it
    mesh: Any = None  # what the parameters are divided over, if they are
    decode_rows = 1  # rows of hidden states in a decode step are padded to a multiple of this, once for all Linears
    embed_tokens: Embedding
    layers: nnx.List[Any]

    @abc.abstractmethod
    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token ids to the first layer's input."""

    @abc.abstractmethod
    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The last layer's output to logits."""

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> list[LayerCache]:
        """An empty key-value cache for ``length`` tokens; dtype float8_e4m3fn holds codes and scales."""
        shape = (batch, length, self.config.num_key_value_heads, self.config.head_dim)
        return [LayerCache.zeros(*shape, dtype) for _ in range(self.config.num_hidden_layers)]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Sequence[LayerCache] | None = None,
        start: Int[Array, "*B"] | None = None,
        last: Int[Array, " B"] | None = None,
    ) -> Any:
        """Logits [B, T, V]; with a cache, (logits, new cache).

        start: position of each row's first token, or of all rows'; None for a cache that is empty. last: index of the
        one token in each row whose logits are wanted; they are [B, 1, V] then.
        """
        offset = jnp.int32(0) if start is None else jnp.asarray(start)
        positions = jnp.broadcast_to(offset[..., None] + jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed(tokens, positions)
        if cache is not None and tokens.shape[1] == 1:
            x = pad_rows(x, len(x) + -len(x) % self.decode_rows)
        new_cache = []
        for i, layer in enumerate(self.layers):
            x, layer_cache = layer(x, positions, None if cache is None else cache[i], start is None)
            new_cache.append(layer_cache)
        x = x[: len(tokens)]
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        with jax.named_scope("head"):
            logits = self.head(x)
        return logits if cache is None else (logits, new_cache)
