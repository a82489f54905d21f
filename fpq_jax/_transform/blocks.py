"""Quantize a model block after block, each calibrated on what the quantized ones before it give."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._algorithms.statistics import SharedInput
from fpq_jax._errors import FpqError
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._support.trees import ByIdentity, jit, named_leaves
from fpq_jax._transform.hessians import Mask, collect_named, stages_named
from fpq_jax._transform.params import TreeReport, quantize_named
from fpq_jax._transform.quantized import quantized


def quantize_blocks(
    blocks: Sequence[tuple[Callable[..., Any], Any]],
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    mask: Mask | None = None,
    seed: int = 0,
) -> Iterator[tuple[Any, TreeReport]]:
    """Quantizes a model block after block, each calibrated on the outputs of the quantized blocks before it.

    Between blocks the hidden states are on the host. Blocks of one function and of parameters alike are compiled once.
    A recipe that is sequential calibrates each stage of a block, which is the kernels that share an input, behind the
    quantized stages before it; with error_propagation the unquantized model runs beside it.

    Args:
        blocks: (function, params) of each block, called as ``function(params, *batch)``. The result is the first
            argument of the next block, which takes the other arguments as they are.
        batches: tuples of the first block's arguments after ``params``, or single ones.
        recipe: which kernels are quantized, and how. Paths begin with a block's number, ``"3.attention.kernel"``.
        mask: which positions count, see ``collect_hessians``.
        seed: of LoRC's randomized singular value decomposition.

    Yields:
        The params of each block, for ``quantized(function)``, and the report of what became of them, as soon as the
        block is done.

    Raises:
        FpqError: as in ``collect_hessians`` and ``quantize_params``, or the recipe leaves every parameter as it is, or
            has error_propagation for a kernel that is a stack or is used more than once.

    Example:
        >>> block = lambda params, x: x + jnp.tanh(x @ params["kernel"])
        >>> blocks = [(block, {"kernel": jax.random.normal(jax.random.key(i), (16, 16)) / 4}) for i in range(2)]
        >>> batches = list(jax.random.normal(jax.random.key(2), (3, 32, 16)))
        >>> for params, report in fpq.quantize_blocks(blocks, batches, fpq.Recipe.load("w4a8-fp-m2")):
        ...     print(report.results[0].name, params["kernel"].shape)
        0.kernel (16, 16)
        1.kernel (16, 16)
    """
    names = [
        [f"{i}.{path}" for path, _ in named_leaves(params, is_quantized)[0]] for i, (_, params) in enumerate(blocks)
    ]
    for rule in recipe.rules:
        recipe.fitting(rule, [path for block in names for path in block], "parameter")
    inputs = [batch if type(batch) is tuple else (batch,) for batch in batches]
    quantized_any = any(map(is_quantized, jax.tree.leaves([p for _, p in blocks], is_leaf=is_quantized)))
    following = {ByIdentity(function): jit(quantized(function)) for function, _ in blocks}
    unquantized = {ByIdentity(function): jit(function) for function, _ in blocks} if recipe.propagates else {}
    reference = list(inputs) if recipe.propagates else None
    for i, (function, params) in enumerate(blocks):
        own, prefix = recipe.about(names[i]), f"{i}."
        stages: Sequence[SharedInput | None] = [None]
        if recipe.sequential and inputs:
            stages = stages_named(function, params, inputs[0], own, prefix) or [None]
        done, reports = params, []
        for stage in stages:
            other = None if reference is None or stage is None else (params, reference)
            found = collect_named(
                function, done, inputs, own, only=stage, mask=mask, prefix=prefix, lenient=True, reference=other
            )
            done, report = quantize_named(done, own, found, found.uses, seed, prefix, lenient=True)
            reports.append(report)
        report = TreeReport(tuple(result for one in reports for result in one.results), reports[-1].left)
        if i + 1 < len(blocks):
            key = ByIdentity(function)
            inputs = [(jax.device_get(following[key](done, *args)), *args[1:]) for args in inputs]
            if reference is not None:
                reference = [(jax.device_get(unquantized[key](params, *args)), *args[1:]) for args in reference]
        quantized_any |= bool(report.results)
        yield done, report
    if not quantized_any:
        raise FpqError(f"Recipe {recipe.name} leaves every parameter of every block as it is.")
