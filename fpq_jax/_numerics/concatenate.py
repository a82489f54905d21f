"""Kernels of one input side by side as one kernel."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fpq_jax._numerics.qtensor import LowRank, QTensor


def can_concatenate(kernels: Sequence[Any]) -> bool:
    """Whether kernels of one input can become one, exactly: arrays of one dtype, or QTensors of one spec whose scales
    all belong to an output row. Calibrated scales of activations are each kernel's own."""
    if not all(isinstance(kernel, QTensor) for kernel in kernels):
        return not any(isinstance(kernel, QTensor) for kernel in kernels) and len({k.dtype for k in kernels}) == 1
    return (
        len({kernel.spec for kernel in kernels}) == 1
        and all(kernel.input_scale is None and kernel.spec.group_size != "tensor" for kernel in kernels)
        and len({(k.low_rank.a.dtype, k.low_rank.scale is None) for k in kernels if k.low_rank is not None}) <= 1
    )


def concatenate(kernels: Sequence[Any], shards: int = 1) -> Any:
    """One kernel with the outputs of all, in order; see ``can_concatenate``. QTensors' codes must not be padded yet.

    More ``shards``: one after the other, each with its equal part of every kernel's outputs in order.
    """
    return _concatenated(tuple(kernels), shards)


@partial(jax.jit, static_argnums=1, inline=True)
def _concatenated(kernels: tuple[Any, ...], shards: int) -> Any:
    if not isinstance(kernels[0], QTensor):
        return joined(kernels, 1, shards)
    rows: dict[str, Any] = {}
    for name in ("codes", "row_scale", "exponents", "group_scale", "zero"):
        if getattr(kernels[0], name) is not None:
            rows[name] = joined([getattr(kernel, name) for kernel in kernels], 0, shards)
    shape = (kernels[0].shape[0], sum(kernel.shape[1] for kernel in kernels))
    return QTensor(**rows, low_rank=_concatenate_low_rank(kernels, shards), spec=kernels[0].spec, shape=shape)


def joined(arrays: Sequence[Array], axis: int, shards: int) -> Array:
    """Arrays concatenated along ``axis``, by parts as in ``concatenate``."""
    if shards == 1:
        return jnp.concatenate(arrays, axis)
    apart = [a.reshape(*a.shape[:axis], shards, -1, *a.shape[axis + 1 :]) for a in arrays]
    whole = jnp.concatenate(apart, axis + 1)
    return whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])


def _concatenate_low_rank(kernels: Sequence[QTensor], shards: int) -> LowRank | None:
    """The factors A side by side, and the factors B as blocks on a diagonal."""
    present = [kernel.low_rank for kernel in kernels if kernel.low_rank is not None]
    if not present:
        return None
    a = jnp.concatenate([factors.a for factors in present], axis=1)
    scale = None if present[0].scale is None else jnp.concatenate([factors.scale for factors in present])
    blocks, rank = [], 0
    for kernel in kernels:
        b = jnp.zeros((0, kernel.shape[1]), present[0].b.dtype) if kernel.low_rank is None else kernel.low_rank.b
        blocks.append(jnp.pad(b, ((rank, a.shape[1] - rank - len(b)), (0, 0))))
        rank += len(b)
    return LowRank(a, joined(blocks, 1, shards), scale)
