"""A model's forward pass one layer at a time, on windows divided over a mesh: for models larger than memory.

The windows of a batch are divided over all devices, each of which holds the whole layer. Between layers the hidden
states stay on the host, each process those of its own windows.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from fpq_jax._pipeline.batches import Batches
from fpq_jax._support.placement import BATCH, abstract, per_device, prefetch_to_devices, to_devices, to_host
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


def logits(model_spec: ModelSpec, params: Flat, hidden: np.ndarray, mesh: Mesh) -> Iterator[Float[Array, "B L V"]]:
    """Of a batch of the last layer's output, one window on each device at a time: all of a batch's may be much.

    ``params``: what the head needs, by path, on every device.
    """
    for rows in window_by_window(hidden, mesh):
        yield _logits(model_spec, mesh, params, to_devices(rows, mesh))


def window_by_window(rows: np.ndarray, mesh: Mesh) -> Iterator[np.ndarray]:
    """A batch in as many parts as each device has windows of it. ``rows``: those of this process."""
    of_device = rows.reshape(len(mesh.local_devices), -1, *rows.shape[1:])
    for i in range(of_device.shape[1]):
        yield of_device[:, i]


def abstract_logits(model_spec: ModelSpec, params: Flat, length: int, mesh: Mesh) -> tuple[Any, int]:
    """(the lowered program of ``logits`` for windows of so many tokens, bytes of what it gives on each device);
    ``params`` are shapes."""
    if not model_spec.config.tie_word_embeddings:
        params = {p: leaf for p, leaf in params.items() if not p.startswith(model_spec.model_class.EMBEDDING)}
    rows = abstract(model_spec.hidden((mesh.size, length)), mesh, BATCH)
    lowered = _logits.lower(model_spec, mesh, abstract(params, mesh, P()), rows)
    (found,) = jax.tree.leaves(lowered.out_info)
    return lowered, found.size * found.dtype.itemsize // mesh.size


def token_losses(logits: Float[Array, "B L V"], tokens: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Negative log-likelihood [b, L-1] of each token but the first, of this process's rows, in float32."""
    return to_host(_losses(mesh, logits, to_devices(tokens, mesh)))


def token_divergences(
    logits: Float[Array, "B L V"], original: Float[Array, "B L V"], mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """How far predictions are from the original's, of this process's rows, for each token but the first: (the
    Kullback-Leibler divergence in nats, float32 [b, L-1]; whether the most likely token is the same, bool [b, L-1])."""
    divergence, same = _divergences(mesh, logits, original)
    return to_host(divergence), to_host(same)


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


@partial(jax.jit, static_argnums=(0, 1))
def _logits(model_spec: ModelSpec, mesh: Mesh, params: Flat, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    def local(params: Flat, hidden: Array) -> Array:
        return with_params(model_spec.without_layers(), params).head(hidden)

    return per_device(local, mesh, (P(), BATCH), BATCH)(params, hidden)


@partial(jax.jit, static_argnums=0)
def _losses(mesh: Mesh, logits: Float[Array, "B L V"], tokens: Int[Array, "B L"]) -> Float[Array, "B L-1"]:
    return per_device(losses, mesh, (BATCH, BATCH), BATCH)(logits, tokens)


@partial(jax.jit, static_argnums=0)
def _divergences(
    mesh: Mesh, logits: Float[Array, "B L V"], original: Float[Array, "B L V"]
) -> tuple[Float[Array, "B L-1"], Bool[Array, "B L-1"]]:
    return per_device(divergences, mesh, (BATCH, BATCH), (BATCH, BATCH))(logits, original)


def losses(logits: Float[Array, "B L V"], tokens: Int[Array, "B L"]) -> Float[Array, "B L-1"]:
    """Negative log-likelihood of each token but the first, in float32."""
    logits = logits[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def divergences(
    logits: Float[Array, "B L V"], original: Float[Array, "B L V"]
) -> tuple[Float[Array, "B L-1"], Bool[Array, "B L-1"]]:
    """See ``token_divergences``."""
    ours, theirs = logits.astype(jnp.float32), original.astype(jnp.float32)
    (_, log_total), (weights, log_weights) = _softmax(ours), _softmax(theirs)
    mean = jnp.sum(weights * (theirs - ours), axis=-1) / jnp.sum(weights, axis=-1)
    same = _most_likely(ours) == _most_likely(theirs)
    return (mean + log_total - log_weights)[:, :-1], same[:, :-1]


def _softmax(logits: Float[Array, "B L V"]) -> tuple[Float[Array, "B L V"], Float[Array, "B L"]]:
    """(not yet divided by its sum, the logarithm of the sum of exponentials)."""
    shift = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - shift)
    return weights, jnp.log(jnp.sum(weights, axis=-1)) + shift[..., 0]


def _most_likely(logits: Float[Array, "B L V"]) -> Int[Array, "B L"]:
    """The first of the largest, by two simple reductions, which take a third of ``argmax``'s time on a CPU."""
    numbers = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, numbers, logits.shape[-1]), axis=-1)


def _positions(tokens: Array) -> Int[Array, "B L"]:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
