"""Rows of generation on a mesh: divided over its "data" axis where it divides their number, else on every device.

The cache's key-value heads are divided over "model", as the projections are that fill it. Tokens, positions and keys
are a few bytes and on every device, so that every process can read them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from fpq_jax._support.mesh import DATA, MODEL, abstract_mesh


def row_keys(seed: int, rows: int) -> Shaped[Array, " rows"]:
    """Keys that depend on the row and not on how many there are."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


@dataclass(frozen=True)
class Rows:
    """``count`` rows on ``mesh``; mesh None is the default device."""

    mesh: Mesh | AbstractMesh | None
    count: int

    @property
    def _spec(self) -> P:
        assert self.mesh is not None
        return P(None if self.count % self.mesh.shape[DATA] else DATA)

    def to_devices(self, array: np.ndarray) -> Array:
        """An array [rows, ...] on every device."""
        if self.mesh is None:
            return jnp.asarray(array)
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, P()), lambda index: array[index])

    def keys(self, seed: int) -> Shaped[Array, " rows"]:
        """A key for each row's random numbers."""
        make = lambda: row_keys(seed, self.count)
        return make() if self.mesh is None else jax.jit(make, out_shardings=NamedSharding(self.mesh, P()))()

    def cache(self, make: Callable[[], Any]) -> Any:
        """The cache [rows, heads, ...] that ``make`` makes, or its shapes if the mesh has no devices."""
        if self.mesh is None:
            return make()
        where = NamedSharding(self.mesh, P(*self._spec, MODEL))
        if isinstance(self.mesh, AbstractMesh):
            divided = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
            return jax.tree.map(divided, jax.eval_shape(make))
        return jax.jit(make, out_shardings=where)()

    def over(self, function: Any) -> Any:
        """function(graph, sampling, state, token, cache, position, keys) -> (token, cache, position) for these rows."""
        if self.mesh is None:
            return function
        mesh, rows = abstract_mesh(self.mesh), self._spec

        @wraps(function)
        def divided(graph: Any, sampling: Any, *arguments: Any) -> Any:
            # "data" alone is manual: a device pads its own rows and computes on no others'
            results = jax.shard_map(
                lambda *parts: function(graph, sampling, *parts),
                mesh=mesh,
                in_specs=(P(), rows, rows, rows, rows),
                out_specs=rows,
                axis_names={DATA},
                check_vma=False,
            )(*arguments)
            where = (NamedSharding(mesh, P()), NamedSharding(mesh, P(*rows, MODEL)), NamedSharding(mesh, P()))
            return tuple(map(jax.lax.with_sharding_constraint, results, where))

        return divided
