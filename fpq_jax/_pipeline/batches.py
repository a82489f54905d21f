"""Windows of tokens in batches of one size, divided over the devices of a mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from fpq_jax._support.machine import free_host_memory
from fpq_jax._support.mesh import from_first
from fpq_jax._support.placement import BATCH
from fpq_jax.models.spec import ModelSpec

BATCH_TOKENS = 8192  # of a batch, on each device
_SHARES = 8  # so many devices have work even where windows are few
_HIDDEN_SHARE = 0.25  # of the free host memory, for the hidden states of what is evaluated


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


def windows_at_once(count: int, length: int, model_spec: ModelSpec, mesh: Mesh, tokens: int = BATCH_TOKENS) -> int:
    """Of how many windows the hidden states are kept on the host together: a part of what is free there."""
    free = free_host_memory()
    if free is None:
        return count
    row = length * model_spec.config.hidden_size * jnp.dtype(model_spec.dtype).itemsize
    fit = int(free * _HIDDEN_SHARE) * jax.process_count() // row
    size = batch_size(count, length, mesh, tokens)
    # the same in every process, whatever is free there
    return from_first(min(count, max(1, fit // size) * size))
