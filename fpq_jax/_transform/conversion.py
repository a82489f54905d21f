"""A tree's QTensors as arrays again, or in the layout in which they are multiplied."""

from functools import partial
from typing import Any

import jax

from fpq_jax._matmul.fp4_kernel.fragments import of_fragments
from fpq_jax._matmul.weight_layouts import WeightLayout, check_any_for_fragments, check_layout, is_quantized, to_layout
from fpq_jax._numerics.qtensor import dequantize
from fpq_jax._transform.axis_layout import Layout, laid_out
from fpq_jax._transform.quantized import axes_of


def dequantize_params(params: Any) -> Any:
    """Dequantizes a tree: QTensors become arrays of the shapes and dtypes that the parameters had.

    Args:
        params: a tree of arrays and QTensors.

    Returns:
        The tree of arrays.

    Example:
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 32), jnp.bfloat16)}
        >>> small = fpq.quantize_params(params, fpq.Recipe.load("w4a8-fp-m2"))
        >>> fpq.dequantize_params(small)["kernel"].dtype
        dtype(bfloat16)
    """

    def one(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        axes = axes_of(leaf)
        return laid_out(dequantize(of_fragments(leaf), axes.dtype), Layout.of(axes.shape(leaf.stack)), axes)

    return jax.tree.map(one, params, is_leaf=is_quantized)


def expand_params(params: Any, weights: WeightLayout = "fp8") -> Any:
    """Changes the layout of a tree's QTensors to the one in which they are multiplied.

    All layouts give the same weights. FP8 codes are padded with zeros to multiples of 16, which FP8 products need.

    Args:
        params: a tree of arrays and QTensors.
        weights: ``"fp8"`` expands 4-bit codes that have an FP8 form to FP8 once, exactly, a byte for each weight;
            ``"packed"`` leaves them packed; ``"fragments"`` lays them out for this library's own GPU kernel, which has
            not been measured on a GPU yet.

    Returns:
        The tree with its QTensors in that layout.

    Raises:
        FpqError: ``weights`` is none of these, or is ``"fragments"`` and the GPU kernel multiplies no weight of the
            tree.

    Example:
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 32))}
        >>> small = fpq.quantize_params(params, fpq.Recipe.load("w4a8-fp-m2"))
        >>> small["kernel"].codes.shape, fpq.expand_params(small)["kernel"].codes.shape  # [out, in]
        ((32, 8), (32, 16))
    """
    known = [leaf.sharding for leaf in jax.tree.leaves(params) if _has_device(leaf)]
    devices = max((len(sharding.device_set) for sharding in known), default=1)
    check_layout(weights, devices if devices > 1 else None)

    def one(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        make = partial(to_layout, layout=weights)
        for _ in leaf.stack:
            make = jax.vmap(make)
        return make(leaf)

    check_any_for_fragments(jax.tree.leaves(params, is_leaf=is_quantized), weights)
    return jax.tree.map(one, params, is_leaf=is_quantized)


def _has_device(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
