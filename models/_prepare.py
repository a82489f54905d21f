"""A model made ready to be run: Linears of one input merged, weights in the form in which they stay in memory."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from fpq_jax.models._layers import Block, Linear, MergedLinear

from fpq_jax._errors import FpqError
from fpq_jax._linear import FP8_MULTIPLE, product_kind
from fpq_jax._qtensor import QTensor
from fpq_jax._residency import can_concatenate, check_residency, concatenate, resident


def prepare(model: Any, expand: str = "load", *, attention: str = "xla") -> Any:
    """A copy of a model to generate and evaluate with; it gives what the model gives, and cannot be saved.

    Query, key and value become one product, gate and up another, where that is exact (see
    ``_residency.can_concatenate``); weights get the form that ``expand`` says: "load" expands 4-bit codes to FP8 once,
    "step" leaves them packed until they are multiplied. ``attention`` is the implementation used for prompts;
    "cudnn" needs a GPU and 16-bit arithmetic. Works on abstract models too. Arrays that need no change are shared
    with the model.
    """
    check_residency(expand)
    if attention not in ("xla", "cudnn"):
        raise FpqError(f"attention is {attention!r}; it must be xla or cudnn.")
    return prepare_in_place(nnx.clone(model), expand, attention)


def prepare_in_place(model: Any, expand: str, attention: str = "xla") -> Any:
    """``prepare`` of a model that nobody else holds: what is replaced is freed as it goes."""
    # blocks alone: a list of all modules would hold what is replaced until the end
    blocks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Block)]
    for block in blocks:
        for name, parts in block.MERGED.items():
            _merge(block, name, parts)
        if hasattr(block, "implementation"):
            block.implementation = attention
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear | MergedLinear):
            kernel = _computed(lambda kernel: resident(kernel, expand), module.kernel.get_value())
            module.kernel.set_value(kernel)
            if isinstance(kernel, QTensor) and product_kind(kernel) == "fp8":
                model.decode_rows = FP8_MULTIPLE
    model.prepared = True
    return model


def _merge(module: Block, name: str, parts: tuple[str, ...]) -> None:
    linears = [getattr(module, part) for part in parts]
    if getattr(module, name) is not None or not can_concatenate([linear.weights[0] for linear in linears]):
        return
    kernels, biases = zip(*(linear.weights for linear in linears), strict=True)
    sizes = tuple(kernel.shape[1] for kernel in kernels)
    bias = None if None in biases else _computed(lambda *all_: jnp.concatenate(all_), *biases)
    merged = MergedLinear(_computed(lambda *all_: concatenate(all_), *kernels), bias, sizes)
    setattr(module, name, nnx.data(merged))
    for part in parts:
        setattr(module, part, None)


def _computed(f: Any, *arguments: Any) -> Any:
    """f(*arguments), or the shapes of it where the arguments are shapes."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arguments)):
        return jax.eval_shape(f, *arguments)
    return f(*arguments)
