"""What every decoder-only model shares: tokens through ``embed``, the layers and ``head``, with or without a cache."""

import abc
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from fpq_jax.models._layers import Embedding, LayerCache
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class Decoder(nnx.Module):
    """Base of the model classes: ``model(tokens)`` gives logits; ``embed``, ``layers`` and ``head`` are its parts.

    A model class has these tables for its Hugging Face checkpoints: NAMES, pairs of a pattern for parameters' paths and
    the tensor's name; IGNORED, patterns of tensors that some checkpoints carry and nothing needs; Config, the class
    of its configuration; EMBEDDING, the beginnings of the paths of what ``embed`` needs.
    """

    NAMES: tuple[tuple[str, str], ...]
    IGNORED: tuple[str, ...]
    EMBEDDING: tuple[str, ...]
    Config: Any

    config: Any
    embed_tokens: Embedding
    layers: nnx.List[Any]

    @abc.abstractmethod
    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token ids to the first layer's input."""

    @abc.abstractmethod
    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The last layer's output to logits."""

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> list[LayerCache]:
        """An empty key-value cache for ``length`` tokens."""
        shape = (batch, length, self.config.num_key_value_heads, self.config.head_dim)
        return [LayerCache.zeros(*shape, dtype) for _ in range(self.config.num_hidden_layers)]

    def __call__(
        self, tokens: Int[Array, "B T"], cache: Sequence[LayerCache] | None = None, start: Int[Array, ""] | None = None
    ) -> Any:
        """Logits [B, T, V]; with a cache, (logits, new cache) for tokens at positions start, start + 1, ...."""
        offset = 0 if start is None else start
        positions = jnp.broadcast_to(offset + jnp.arange(tokens.shape[1]), tokens.shape)
        mask = None
        if cache is not None:
            mask = jnp.arange(cache[0].key.shape[1])[None, None, None, :] <= positions[:, None, :, None]
        x = self.embed(tokens, positions)
        new_cache = []
        for i, layer in enumerate(self.layers):
            x, layer_cache = layer(x, positions, mask, None if cache is None else cache[i], start)
            new_cache.append(layer_cache)
        logits = self.head(x)
        return logits if cache is None else (logits, new_cache)
