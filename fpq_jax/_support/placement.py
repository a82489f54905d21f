"""Arrays onto the devices of a mesh and back to the host."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from fpq_jax._support.mesh import AXES

BATCH = P(AXES)  # the first dimension, windows, over all devices


def to_devices(rows: np.ndarray, mesh: Mesh) -> Array:
    """A batch on the devices, of this process's rows."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), rows)


def prefetch_to_devices(batches: Sequence[np.ndarray], mesh: Mesh) -> Iterator[Array]:
    """Each batch of ``batches`` on the devices; the next one is on its way while one is used."""
    following = to_devices(batches[0], mesh)
    for i in range(len(batches)):
        current = following
        if i + 1 < len(batches):
            following = to_devices(batches[i + 1], mesh)
        yield current


def to_host(batch: Array) -> np.ndarray:
    """This process's rows of a batch, on the host."""
    shards = sorted(batch.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    rows = [np.asarray(shard.data) for shard in shards]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A pytree on every device of the mesh; its arrays are on the host, or global ones."""
    everywhere = NamedSharding(mesh, P())

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == everywhere.device_set:
            return leaf if leaf.sharding.is_fully_replicated else _replicate(leaf, everywhere)
        return jax.make_array_from_callback(leaf.shape, everywhere, lambda index: np.asarray(leaf)[index])

    return jax.tree.map(one, tree)


@partial(jax.jit, static_argnums=1)
def _replicate(leaf: Array, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(leaf, sharding)


def broadcast_from(tree: Any | None, shapes: Any, mesh: Mesh) -> Any:
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
        return _broadcast(all_parts, NamedSharding(mesh, P()))

    return jax.tree.map(one, shapes) if tree is None else jax.tree.map(one, shapes, tree)


@partial(jax.jit, static_argnums=1)
def _broadcast(parts: Array, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(jnp.sum(parts, axis=0, dtype=parts.dtype), sharding)


def replicated(mesh: Mesh) -> Callable[[str, str], jax.sharding.Sharding]:
    """Every array on every device, as ``read_part`` asks for it."""
    return lambda path, part: NamedSharding(mesh, P())


def abstract(tree: Any, mesh: Mesh, spec: P) -> Any:
    """The tree's shapes and dtypes, on the mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def per_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``function`` on each device's own part."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
