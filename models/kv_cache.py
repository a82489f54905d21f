"""The key-value cache of generation, and attention to what is in it.

B (batch), T (new tokens), S (slots), H (query heads), K (key-value heads), G (query heads of one key-value head),
C (head size). A row's token at position p is in slot p. Prompts of different lengths are filled up at their ends: what
stands in the slots behind a row's last position is masked, and written over by the tokens to come.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fpq_jax._numerics.activations import quantize_tokens
from fpq_jax._numerics.formats import E4M3
from fpq_jax.models.causal_attention import causal_attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [B, K, S, C]; as E4M3 codes with a float32 scale per head and token [B, K, S], or,
    without scales, as they are."""

    key: Any
    value: Any
    key_scale: Any = None
    value_scale: Any = None

    @classmethod
    def zeros(cls, batch: int, length: int, heads: int, head_dim: int, dtype: DTypeLike) -> "LayerCache":
        """An empty cache; dtype float8_e4m3fn is the one with scales."""
        codes = [jnp.zeros((batch, heads, length, head_dim), dtype) for _ in range(2)]
        if jnp.dtype(dtype) != jnp.float8_e4m3fn:
            return cls(*codes)
        return cls(*codes, *(jnp.zeros((batch, heads, length), jnp.float32) for _ in range(2)))

    @property
    def length(self) -> int:
        """Slots."""
        return self.key.shape[2]

    def encoded(self, key: Float[Array, "B T K C"], value: Float[Array, "B T K C"]) -> "LayerCache":
        """New tokens' keys and values in this cache's form."""
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if self.key_scale is None:
            return LayerCache(key.astype(self.key.dtype), value.astype(self.value.dtype))
        keys, values = quantize_tokens(key, E4M3), quantize_tokens(value, E4M3)
        return LayerCache(keys.codes, values.codes, keys.scale[..., 0], values.scale[..., 0])

    def written(self, new: "LayerCache", start: Int[Array, " B"]) -> "LayerCache":
        """This cache with ``new`` in each row's slots from ``start`` on."""
        if len(start) == 1:
            put = lambda slots, tokens: jax.lax.dynamic_update_slice_in_dim(slots, tokens, start[0], axis=2)
            return jax.tree.map(put, self, new)
        put_row = jax.vmap(lambda row, tokens, at: jax.lax.dynamic_update_slice_in_dim(row, tokens, at, axis=1))
        return jax.tree.map(lambda slots, tokens: put_row(slots, tokens, start), self, new)

    def decoded(self, dtype: DTypeLike) -> tuple[Float[Array, "B S K C"], Float[Array, "B S K C"]]:
        """Keys and values as numbers, heads behind slots."""
        numbers = [self.key, self.value]
        if self.key_scale is not None:
            scales = [self.key_scale, self.value_scale]
            numbers = [codes.astype(jnp.float32) * s[..., None] for codes, s in zip(numbers, scales, strict=True)]
        key, value = (n.astype(dtype).swapaxes(1, 2) for n in numbers)
        return key, value

    def attention(self, query: Float[Array, "B T H C"], positions: Int[Array, "B T"]) -> Float[Array, "B T H C"]:
        """Attention of each query to the slots up to its position."""
        batch, tokens, heads, size = query.shape
        query = query.reshape(batch, tokens, self.key.shape[1], -1, size)
        # heads stand before slots, so that a row of scores is contiguous and its softmax one kernel; FP8's scales are
        # applied to scores and weights, and codes, which the query's dtype holds exactly, are read as they are
        scores = _einsum("btkgc,bksc->bkgts", query, self.key.astype(query.dtype)) * np.float32(size**-0.5)
        if self.key_scale is not None:
            scores = scores * self.key_scale[:, :, None, None, :]
        seen = jnp.arange(self.length) <= positions[:, None, None, :, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        if self.value_scale is not None:
            weights = weights * self.value_scale[:, :, None, None, :]
        out = _einsum("bkgts,bksc->btkgc", weights.astype(query.dtype), self.value.astype(query.dtype))
        return out.astype(query.dtype).reshape(batch, tokens, heads, size)


def _einsum(equation: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """In float32. XLA's CPU has no batched product of bfloat16 that gives it, and is handed float32."""
    product = lambda x, y: jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
    widened = lambda x, y: product(x.astype(jnp.float32), y.astype(jnp.float32))
    return jax.lax.platform_dependent(x, y, cpu=widened, default=product)


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T K C"],
    value: Float[Array, "B T K C"],
    positions: Int[Array, "B T"],
    cache: LayerCache | None,
    *,
    fresh: bool = False,
    implementation: Any = "xla",
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """Causal grouped-query attention, softmax in float32: (output, cache with the new tokens in it).

    The keys are the new tokens' alone without a cache or if it is ``fresh``, that is, empty; otherwise all that it
    holds up to each token's position. ``implementation`` is that of ``causal_attention``, where the keys are the new
    tokens'.
    """
    new = None
    if cache is not None:
        new = cache.encoded(key, value)
        cache = cache.written(new, positions[:, 0])
    if cache is not None and not fresh:
        out = cache.attention(query, positions)
    else:
        if new is not None:
            key, value = new.decoded(query.dtype)
        out = causal_attention(query, key, value, implementation)
    return out.reshape(*positions.shape, -1), cache


class CacheShape(NamedTuple):
    """What a layer's cache is made of: heads of keys and values, their size, and its dtype."""

    heads: int
    head_dim: int
    dtype: Any
