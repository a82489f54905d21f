"""Building blocks that every decoder shares: Linear, norms, embedding.

Shapes use B (batch), T (tokens), D (hidden size), H (heads), C (head size).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fpq_jax._matmul.linear import linear, linears
from fpq_jax._numerics.qtensor import QTensor, take_outputs
from fpq_jax._support.mesh import MODEL, over_model

_INIT_STDDEV = 0.02


class Linear(nnx.Module):
    """y = x @ kernel + bias, with kernel [in, out] an array or a QTensor."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.normal(_INIT_STDDEV)
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None

    @property
    def weights(self) -> tuple[Any, Any]:
        """(kernel, bias or None)."""
        return self.kernel.get_value(), None if self.bias is None else self.bias.get_value()

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return linear(x, *self.weights)


class MergedLinear(nnx.Module):
    """Several Linears of one input as one: kernel [in, sum of sizes]; called, it gives each one's output.

    Its outputs are in ``shards`` equal parts, each of which has its share of every Linear's.
    """

    def __init__(self, kernel: Any, bias: Any, sizes: tuple[int, ...], shards: int = 1):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)
        self.sizes = sizes
        self.shards = shards

    def __call__(self, x: Float[Array, "*batch in"]) -> list[Float[Array, "*batch out"]]:
        y = linear(x, self.kernel.get_value(), None if self.bias is None else self.bias.get_value())
        if self.shards == 1:
            ends = np.cumsum(self.sizes)
            return [y[..., end - size : end] for end, size in zip(ends, self.sizes, strict=True)]
        parts = jnp.split(y.reshape(*x.shape[:-1], self.shards, -1), np.cumsum(self.sizes)[:-1] // self.shards, axis=-1)
        return [part.reshape(*x.shape[:-1], -1) for part in parts]


class Block(nnx.Module):
    """Base of what has Linears of one input. MERGED: attribute for a MergedLinear -> the Linears that it replaces.

    The attribute is None, and the Linears are there, until ``prepare`` merges them.
    """

    MERGED: ClassVar[dict[str, tuple[str, ...]]]

    def project(self, x: Float[Array, "*batch in"], name: str) -> list[Float[Array, "*batch out"]]:
        """The output of each Linear of MERGED[name], merged or not."""
        merged = getattr(self, name)
        if merged is not None:
            return merged(x)
        return linears(x, [getattr(self, part).weights for part in self.MERGED[name]])


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
    """A table of token vectors, and its transpose as an output head.

    The table is an array [tokens, D], or a QTensor whose outputs are the tokens. mesh: of the devices that have a part
    of the vocabulary each, or None.
    """

    mesh: Mesh | AbstractMesh | None = None

    def __init__(self, num_embeddings: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embedding = nnx.Param(nnx.initializers.normal(_INIT_STDDEV)(rngs.params(), (num_embeddings, size), dtype))
        self.dtype = jnp.dtype(dtype)  # of the vectors that a quantized table gives

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = self.embedding.get_value()
        if self.mesh is None:
            return self._vectors(table, tokens)

        def found(table, tokens):
            size = len(table.codes if isinstance(table, QTensor) else table)
            at = tokens - jax.lax.axis_index(MODEL) * size
            here = (at >= 0) & (at < size)
            return jax.lax.psum(jnp.where(here[..., None], self._vectors(table, at), 0), MODEL)

        # left to XLA, one token's vector costs the whole table, gathered in every step
        return over_model(found, self.mesh, (P(MODEL), P()), P())(table, tokens)

    def _vectors(self, table, tokens):
        if isinstance(table, QTensor):
            return take_outputs(table, tokens, self.dtype)
        return jnp.take(table, tokens, axis=0, mode=None if self.mesh is None else "clip")

    def attend(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        table = self.embedding.get_value()
        return linear(x, table) if isinstance(table, QTensor) else x @ table.T


def split_heads(x: Float[Array, "R T D"], head_dim: int, batch: int) -> Float[Array, "B T H C"]:
    """The heads of the first ``batch`` rows; what is behind them is padding (see ``pad_rows``)."""
    return x[:batch].reshape(batch, x.shape[1], -1, head_dim)


def pad_rows(x: Float[Array, "B T D"], rows: int) -> Float[Array, "R T D"]:
    """Zeros behind the last row, up to ``rows``."""
    return jnp.pad(x, ((0, rows - len(x)), (0, 0), (0, 0))) if rows > len(x) else x
