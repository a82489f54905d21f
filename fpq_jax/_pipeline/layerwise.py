"""A model's forward pass one layer at a time, on windows divided over a mesh: for models larger than memory.

The windows of a batch are divided over all devices, each of which holds the whole layer. Between layers the hidden
states stay on the host, each process those of its own windows.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fpq_jax._pipeline.batches import Batches
from fpq_jax._support.placement import BATCH, per_device, prefetch_to_devices, to_host
from fpq_jax._support.trees import Flat
from fpq_jax.models.kv_cache import CacheShape, LayerCache
from fpq_jax.models.parameters import with_params
from fpq_jax.models.spec import ModelSpec


def embed(model_spec: ModelSpec, params: Flat, batches: Batches) -> list[np.ndarray]:
    """The first layer's input for each batch, on the host.

    ``params``: what embedding needs, by path, on every device.
    """
    mesh = batches.mesh
    return [to_host(_embed(model_spec, mesh, params, tokens)) for tokens in prefetch_to_devices(batches.tokens, mesh)]


def forward(layer: Any, hidden: list[np.ndarray], mesh: Mesh, cache: CacheShape | None = None) -> None:
    """Replace each batch of hidden states by the layer's output. The layer's arrays are on every device.

    With ``cache`` keys and values are what such a cache gives back, as in generation.
    """
    graph, state = nnx.split(layer)
    for i, rows in enumerate(prefetch_to_devices(hidden, mesh)):
        hidden[i] = to_host(_forward(graph, mesh, cache, state, rows))


@partial(jax.jit, static_argnums=(0, 1))
def _embed(model_spec: ModelSpec, mesh: Mesh, params: Flat, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    def local(params: Flat, tokens: Array) -> Array:
        return with_params(model_spec.without_layers(), params).embed(tokens, _positions(tokens))

    return per_device(local, mesh, (P(), BATCH), BATCH)(params, tokens)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    graph: Any, mesh: Mesh, cache: CacheShape | None, state: Any, hidden: Float[Array, "B L D"]
) -> Float[Array, "B L D"]:
    def local(state: Any, hidden: Array) -> Array:
        empty = None if cache is None else LayerCache.zeros(hidden.shape[0], hidden.shape[1], *cache)
        return nnx.merge(graph, state)(hidden, _positions(hidden), empty, True)[0]

    return per_device(local, mesh, (P(), BATCH), BATCH)(state, hidden)


def _positions(tokens: Array) -> Int[Array, "B L"]:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
