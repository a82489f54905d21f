"""Building blocks that every decoder shares: Linear, norms, embedding, rotary positions, cached attention.

Shapes use B (batch), T (tokens), S (keys), D (hidden size), H (query heads), K (key-value heads), C (head size).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from fpq_jax._linear import linear

_INIT_STDDEV = 0.02


class Linear(nnx.Module):
    """y = x @ kernel + bias, with kernel [in, out] an array or a QTensor."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.normal(_INIT_STDDEV)
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return linear(x, self.kernel.get_value(), None if self.bias is None else self.bias.get_value())


class RMSNorm(nnx.Module):
    """Root-mean-square normalization in float32, then the gain (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, *, epsilon: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return x32.astype(x.dtype) * self.scale.get_value()


class LayerNorm(nnx.Module):
    """Layer normalization in float32 (Ba, Kiros & Hinton, 2016), then gain and bias where there are any."""

    def __init__(self, size: int, *, affine: bool, dtype: DTypeLike, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((size,), dtype)) if affine else None
        self.bias = nnx.Param(jnp.zeros((size,), dtype)) if affine else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        if self.scale is not None and self.bias is not None:
            x32 = x32 * self.scale.get_value() + self.bias.get_value()
        return x32.astype(x.dtype)


class Embedding(nnx.Module):
    """A table of token vectors, and its transpose as an output head."""

    def __init__(self, num_embeddings: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embedding = nnx.Param(nnx.initializers.normal(_INIT_STDDEV)(rngs.params(), (num_embeddings, size), dtype))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return jnp.take(self.embedding.get_value(), tokens, axis=0)

    def attend(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        return x @ self.embedding.get_value().T


def rotate(
    x: Float[Array, "B T H C"], positions: Int[Array, "B T"], inverse_frequencies: Float[Array, " half"]
) -> Float[Array, "B T H C"]:
    """Rotary position embedding with the halves layout of Hugging Face's LLaMA; angles in float32."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies
    cos, sin = jnp.cos(angles)[:, :, None, :].astype(x.dtype), jnp.sin(angles)[:, :, None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [B, S, K, C]; slots not yet written hold zeros and are masked."""

    key: Any
    value: Any

    @classmethod
    def zeros(cls, batch: int, length: int, heads: int, head_dim: int, dtype: DTypeLike) -> "LayerCache":
        return cls(*(jnp.zeros((batch, length, heads, head_dim), dtype) for _ in range(2)))

    def write(self, key: Array, value: Array, start: Int[Array, ""]) -> "LayerCache":
        """Put T new keys and values behind the first ``start`` slots."""
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
        return LayerCache(put(self.key, key), put(self.value, value))


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B S K C"],
    value: Float[Array, "B S K C"],
    mask: Bool[Array, "B 1 T S"] | None,
) -> Float[Array, "B T D"]:
    """Grouped-query attention, softmax in float32; ``mask`` None means causal."""
    out = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=mask is None)
    return out.reshape(*out.shape[:2], -1)
