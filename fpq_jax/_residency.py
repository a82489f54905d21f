"""What is done once to weights that are loaded to be multiplied: in which form they stay in memory.

- "load": whatever has an FP8 form is expanded to it, a byte per weight, and padded to FP8's multiple: fastest.
- "step": 4-bit codes stay packed, half a byte per weight, and are expanded inside each product: for models that would
  not fit otherwise, and where many tokens share the expansion;
- "kernel": 4-bit codes are laid out for our own kernel (see ``kernels``), half a byte per weight, and not expanded
  where the tokens are few. It has not been measured: no GPU has run it yet.

All are exact, so they give the same results ("kernel" but for the order of float32 sums, and without the rounding to
bfloat16 of weights with free scales).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array

from fpq_jax._errors import FpqError
from fpq_jax._linear import FP8_MULTIPLE, product_kind
from fpq_jax._qtensor import LowRank, QTensor, expand, pad_to
from fpq_jax.kernels import Fragments, check_device, fragments, of_fragments, takes

Residency = Literal["load", "step", "kernel"]


def check_residency(how: Any, devices: int | None = None) -> None:
    """FpqError for other names, and for the kernel where it cannot be; ``devices``: of a mesh, if there is one."""
    if how not in get_args(Residency):
        raise FpqError(f"expand is {how!r}; it must be {', '.join(get_args(Residency)[:-1])} or kernel.")
    if how == "kernel":
        check_device()
        if devices is not None:
            raise FpqError("The kernel multiplies on one device, without a mesh; expand with load or step.")


def check_any_for_kernel(leaves: Iterable[Any], how: str) -> None:
    """FpqError if our kernel is asked for and none of a model's parameters is for it."""
    fits = lambda leaf: isinstance(leaf, Fragments) or (isinstance(leaf, QTensor) and takes(leaf))
    if how == "kernel" and not any(map(fits, leaves)):
        raise FpqError(
            "No weight here is for the kernel, which multiplies weights in e2m1, e3m0 or int4 by activations in e4m3; "
            "expand with load or step."
        )


def resident(kernel: Any, how: str, *, pad: bool = True) -> Any:
    """A kernel in the form in which it stays in memory; arrays, and weights without an FP8 form, stay as they are.
    With "kernel", what our kernel is not for is as with "load".

    ``pad`` False leaves padding to ``linear``: zeros behind the last row or column would move the parts of a weight
    that is divided over devices.
    """
    if not isinstance(kernel, QTensor | Fragments):
        return kernel
    kernel = of_fragments(kernel)
    if how == "kernel" and takes(kernel):
        return fragments(kernel)
    if how != "step" and kernel.has_fp8_form and product_kind(kernel) != "int8":
        kernel = expand(kernel)
    if pad and kernel.spec.format.is_float8 and product_kind(kernel) == "fp8":
        kernel = replace(kernel, codes=pad_to(kernel.codes, FP8_MULTIPLE, FP8_MULTIPLE))
    return kernel


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
        block: Array = jnp.zeros((a.shape[1], kernel.shape[1]), present[0].b.dtype)
        if kernel.low_rank is not None:
            block = block.at[rank : rank + len(kernel.low_rank.b)].set(kernel.low_rank.b)
            rank += len(kernel.low_rank.b)
        blocks.append(block)
    return LowRank(a, joined(blocks, 1, shards), scale)
