"""A model's forward pass one layer at a time, on windows divided over a mesh: for models larger than memory.

The windows of a batch are divided over all devices, each of which holds the whole layer. Between layers the hidden
states stay on the host, each process those of its own windows.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fpq_jax._machine import free_host_memory, on_cpu
from fpq_jax._mesh import AXES, from_first
from fpq_jax._tree import Flat
from fpq_jax.models import LayerCache, abstract_model, with_params

BATCH = P(AXES)  # the first dimension, windows, over all devices
BATCH_TOKENS = 8192  # of a batch, on each device
_SHARES = 8  # so many devices have work even where windows are few
_HIDDEN_SHARE = 0.25  # of the free host memory, for the hidden states of what is evaluated

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batches:
    """Windows [N, L] in equal batches, the last one filled up with others' rows.

    tokens: of each batch this process's rows [b, L]. real: bool [b], which are no filling. index: int [b], their places
    in the windows. count: N.
    """

    tokens: list[np.ndarray]
    real: list[np.ndarray]
    index: list[np.ndarray]
    count: int
    mesh: Mesh

    @classmethod
    def of(cls, windows: Int[np.ndarray, "N L"], mesh: Mesh, size: int) -> "Batches":
        """Batches of ``size`` windows, see ``batch_size``."""
        index = np.arange(-(-len(windows) // size) * size)
        real = index < len(windows)
        index = np.where(real, index, 0)
        mine = _local_rows(mesh, size)
        rows = [start + mine for start in range(0, len(index), size)]
        cut = lambda values: [values[r] for r in rows]
        return cls(cut(windows[index]), cut(real), cut(index), len(windows), mesh)


def batch_size(num_windows: int, length: int, mesh: Mesh, tokens: int = BATCH_TOKENS) -> int:
    """Windows per batch: each device's share is about ``tokens`` tokens, at most an eighth of the windows.

    The share does not depend on the number of devices, so a device's programs are the same for any number, and hidden
    states the same bits.
    """
    return max(1, min(tokens // length, -(-num_windows // _SHARES))) * mesh.size


def _local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch this process's devices have."""
    slices: Any = NamedSharding(mesh, BATCH).addressable_devices_indices_map((size,)).values()
    return np.concatenate([np.arange(size)[index] for index in sorted(slices, key=lambda i: i[0].start or 0)])


def put(rows: np.ndarray, mesh: Mesh) -> Array:
    """A batch on the devices, of this process's rows."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), rows)


def on_devices(batches: Sequence[np.ndarray], mesh: Mesh) -> Iterator[Array]:
    """Each batch of ``batches`` on the devices; the next one is on its way while one is used."""
    following = put(batches[0], mesh)
    for i in range(len(batches)):
        current = following
        if i + 1 < len(batches):
            following = put(batches[i + 1], mesh)
        yield current


def fetch(batch: Array) -> np.ndarray:
    """This process's rows of a batch, on the host."""
    shards = sorted(batch.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    rows = [np.asarray(shard.data) for shard in shards]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A pytree on every device of the mesh; its arrays are on the host, or global ones."""
    everywhere = NamedSharding(mesh, P())

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == everywhere.device_set:
            return leaf if leaf.sharding.is_fully_replicated else _replicated(leaf, everywhere)
        return jax.make_array_from_callback(leaf.shape, everywhere, lambda index: np.asarray(leaf)[index])

    return jax.tree.map(one, tree)


@partial(jax.jit, static_argnums=1)
def _replicated(leaf: Array, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(leaf, sharding)


def from_one(tree: Any | None, shapes: Any, mesh: Mesh) -> Any:
    """On every device what one device has; ``tree`` is None in processes without it, ``shapes`` are its arrays'."""
    parts = NamedSharding(mesh, P(AXES))

    def one(shape: jax.ShapeDtypeStruct, leaf: Any = None) -> Array:
        there = None if leaf is None else next(iter(leaf.devices()))
        mine = [
            leaf[None] if device == there else jax.device_put(np.zeros((1, *shape.shape), shape.dtype), device)
            for device in mesh.devices.ravel()
            if device.process_index == jax.process_index()
        ]
        all_parts = jax.make_array_from_single_device_arrays((mesh.size, *shape.shape), parts, mine)
        return _sum(all_parts, NamedSharding(mesh, P()))

    return jax.tree.map(one, shapes) if tree is None else jax.tree.map(one, shapes, tree)


@partial(jax.jit, static_argnums=1)
def _sum(parts: Array, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(jnp.sum(parts, axis=0, dtype=parts.dtype), sharding)


def everywhere(mesh: Mesh) -> Callable[[str, str], jax.sharding.Sharding]:
    """Every array on every device, as ``read_part`` asks for it."""
    return lambda path, part: NamedSharding(mesh, P())


class Skeleton(NamedTuple):
    """What a model is without its weights: class, configuration, and the dtype of what is not quantized."""

    model_class: Any
    config: Any
    dtype: Any

    def without_layers(self) -> Any:
        """An abstract model of the parts before and behind the layers."""
        return abstract_model(self.model_class, replace(self.config, num_hidden_layers=0), self.dtype)

    def with_one_layer(self) -> Any:
        """An abstract model whose only layer is like all of them."""
        return abstract_model(self.model_class, replace(self.config, num_hidden_layers=1), self.dtype)

    def layer(self) -> Any:
        """An abstract layer."""
        return self.with_one_layer().layers[0]

    def hidden(self, tokens: tuple[int, int]) -> jax.ShapeDtypeStruct:
        """The hidden states of [windows, tokens]."""
        return jax.ShapeDtypeStruct((*tokens, self.config.hidden_size), self.dtype)


def windows_at_once(count: int, length: int, skeleton: Skeleton, mesh: Mesh, tokens: int = BATCH_TOKENS) -> int:
    """Of how many windows the hidden states are kept on the host together: a part of what is free there."""
    free = free_host_memory()
    if free is None:
        return count
    row = length * skeleton.config.hidden_size * jnp.dtype(skeleton.dtype).itemsize
    fit = int(free * _HIDDEN_SHARE) * jax.process_count() // row
    size = batch_size(count, length, mesh, tokens)
    # the same in every process, whatever is free there
    return from_first(min(count, max(1, fit // size) * size))


def arithmetic_dtype(stored: Any, asked: Any = None) -> Any:
    """The dtype of what is not quantized: as asked, or as stored; float16, of which a CPU has no products, is float32
    there."""
    stored = jnp.dtype(stored)
    return jnp.dtype(asked or (jnp.float32 if stored == jnp.float16 and on_cpu() else stored))


class CacheShape(NamedTuple):
    """What a layer's cache is made of: heads of keys and values, their size, and its dtype."""

    heads: int
    head_dim: int
    dtype: Any


def embed(skeleton: Skeleton, params: Flat, batches: Batches) -> list[np.ndarray]:
    """The first layer's input for each batch, on the host.

    ``params``: what embedding needs, by path, on every device.
    """
    mesh = batches.mesh
    return [fetch(_embed(skeleton, mesh, params, tokens)) for tokens in on_devices(batches.tokens, mesh)]


def forward(layer: Any, hidden: list[np.ndarray], mesh: Mesh, cache: CacheShape | None = None) -> None:
    """Replace each batch of hidden states by the layer's output. The layer's arrays are on every device.

    With ``cache`` keys and values are what such a cache gives back, as in generation.
    """
    graph, state = nnx.split(layer)
    for i, rows in enumerate(on_devices(hidden, mesh)):
        hidden[i] = fetch(_forward(graph, mesh, cache, state, rows))


def token_losses(skeleton: Skeleton, params: Flat, hidden: list[np.ndarray], batches: Batches) -> list[np.ndarray]:
    """Negative log-likelihood [b, L-1] of each token but the first, of each batch's rows, in float32.

    ``params``: what the head needs, by path, on every device.
    """
    mesh = batches.mesh
    return [
        fetch(_losses(skeleton, mesh, params, rows, put(tokens, mesh)))
        for rows, tokens in zip(on_devices(hidden, mesh), batches.tokens, strict=True)
    ]


def abstract_losses(skeleton: Skeleton, params: Flat, tokens: tuple[int, int], mesh: Mesh) -> Any:
    """The lowered program of ``token_losses`` for a batch of [windows, tokens]; ``params`` are shapes."""
    if not skeleton.config.tie_word_embeddings:
        params = {p: leaf for p, leaf in params.items() if not p.startswith(skeleton.model_class.EMBEDDING)}
    rows, ids = skeleton.hidden(tokens), jax.ShapeDtypeStruct(tokens, jnp.int32)
    return _losses.lower(skeleton, mesh, abstract(params, mesh, P()), *abstract((rows, ids), mesh, BATCH))


def abstract(tree: Any, mesh: Mesh, spec: P) -> Any:
    """The tree's shapes and dtypes, on the mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


@partial(jax.jit, static_argnums=(0, 1))
def _embed(skeleton: Skeleton, mesh: Mesh, params: Flat, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    def local(params: Flat, tokens: Array) -> Array:
        return with_params(skeleton.without_layers(), params).embed(tokens, _positions(tokens))

    return divided(local, mesh, (P(), BATCH), BATCH)(params, tokens)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    graph: Any, mesh: Mesh, cache: CacheShape | None, state: Any, hidden: Float[Array, "B L D"]
) -> Float[Array, "B L D"]:
    def local(state: Any, hidden: Array) -> Array:
        empty = None if cache is None else LayerCache.zeros(hidden.shape[0], hidden.shape[1], *cache)
        return nnx.merge(graph, state)(hidden, _positions(hidden), empty, True)[0]

    return divided(local, mesh, (P(), BATCH), BATCH)(state, hidden)


@partial(jax.jit, static_argnums=(0, 1))
def _losses(
    skeleton: Skeleton, mesh: Mesh, params: Flat, hidden: Float[Array, "B L D"], tokens: Int[Array, "B L"]
) -> Float[Array, "B L-1"]:
    def local(params: Flat, hidden: Array, tokens: Array) -> Array:
        return losses(with_params(skeleton.without_layers(), params).head(hidden), tokens)

    return divided(local, mesh, (P(), BATCH, BATCH), BATCH)(params, hidden, tokens)


def losses(logits: Float[Array, "B L V"], tokens: Int[Array, "B L"]) -> Float[Array, "B L-1"]:
    """Negative log-likelihood of each token but the first, in float32."""
    logits = logits[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def divided(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``function`` on each device's own part."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _positions(tokens: Array) -> Int[Array, "B L"]:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item, in order; the next one is computed in a thread while one is used."""
    with ThreadPoolExecutor(1) as thread:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > 1:
                yield pending.popleft().result()  # and not kept here
        while pending:
            yield pending.popleft().result()
