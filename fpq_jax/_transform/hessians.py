"""X^T X of what each kernel of a function meets: over batches, over several uses, over the steps of a loop.

Products are taken with quantized activations, as inference will take them. Kernels that meet the same inputs share one
Hessian.
"""

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._algorithms.statistics import CalibrationStats, SharedInput
from fpq_jax._errors import FpqError
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._support.trees import is_array, named_leaves
from fpq_jax._transform.accumulate import record_stats, shared_inputs
from fpq_jax._transform.find_kernels import find_kernels
from fpq_jax._transform.recorder import Mask, RecordedKernel, Recorder
from fpq_jax._transform.selection import ParamUse, select


@dataclass(frozen=True)
class Hessians(Mapping[str, Any]):
    """Maps the path of each kernel to the Hessian of its inputs.

    The Hessian is the sum of x x^T over all inputs x, float32 ``[*stack, in, in]``.

    Attributes:
        stats: the same sums by the paths of all kernels that share the inputs, with how many inputs they are of
            (``stats.inputs``), and static scales of the inputs where the recipe asks for them
            (``stats.static_scales``).
        uses: what the function does with its parameters, as ``find_kernels`` says.
        complete: whether the Hessians are of all kernels that the recipe quantizes (False with ``only``).

    Example:
        >>> params = {name: {"kernel": jnp.ones((8, 4))} for name in ("query", "key")}
        >>> apply = lambda params, x: [x @ params[name]["kernel"] for name in ("query", "key")]
        >>> hessians = fpq.collect_hessians(apply, params, [jnp.ones((2, 8))], fpq.Recipe())
        >>> sorted(hessians), hessians["query.kernel"].shape
        (['key.kernel', 'query.kernel'], (8, 8))
        >>> len(hessians.stats.inputs), int(hessians.stats.of("key.kernel").count)
        (1, 2)
    """

    stats: CalibrationStats
    uses: dict[str, ParamUse]
    complete: bool

    @property
    def compared(self) -> bool:
        """Whether it is known what the unquantized model sees in the place of each input."""
        return all(one.cross is not None for one in self.stats.inputs.values())

    def __getitem__(self, path: str) -> Any:
        for paths, one in self.stats.inputs.items():
            if path in paths:
                return one.hessian
        raise KeyError(path)

    def __iter__(self) -> Iterator[str]:
        return iter(path for paths in self.stats.inputs for path in paths)

    def __len__(self) -> int:
        return sum(map(len, self.stats.inputs))


def collect_hessians(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    only: str | None = None,
    mask: Mask | None = None,
) -> Hessians:
    """Collects the Hessian of each kernel that a recipe quantizes, over batches of calibration data.

    The Hessian is the sum of x x^T over all inputs x of the kernel.

    Products are taken with activations quantized as inference will have them, and kernels that share their inputs share
    a Hessian. It is one pass, jitted for each shape of a batch, and two where activations have static scales.

    Args:
        apply_fn: called as ``apply_fn(params, *batch)``.
        params: a tree of arrays. What is a QTensor already is multiplied as such.
        batches: tuples of the further arguments, or single ones; arrays or trees of arrays.
        recipe: which kernels are quantized, and how their activations are.
        only: a pattern of paths, for a model whose Hessians do not fit into memory at once: collect and quantize part
            by part, with ``params`` whose finished parts are QTensors.
        mask: called as ``mask(*batch)``, gives an array that is nonzero at the positions that count: ``[B, T]`` for
            inputs ``[B, T, in]`` or ``[B * T, in]``, whose rows are in that order.

    Returns:
        The Hessians, by path.

    Raises:
        FpqError: a Hessian is zero or not finite, inputs do not fit the mask, there are no batches, or the recipe does
            not fit the parameters, or is sequential (see ``quantize_blocks``).

    Example:
        >>> def apply(params, x):
        ...     return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
        >>> params = {
        ...     "up": {"kernel": jax.random.normal(jax.random.key(0), (16, 32))},
        ...     "down": {"kernel": jax.random.normal(jax.random.key(1), (32, 16))},
        ... }
        >>> batches = list(jax.random.normal(jax.random.key(2), (3, 4, 8, 16)))  # 3 batches [4, 8, 16]
        >>> hessians = fpq.collect_hessians(apply, params, batches, fpq.Recipe.load("w4a8-fp-m2"))
        >>> {path: hessian.shape for path, hessian in sorted(hessians.items())}
        {'down.kernel': (32, 32), 'up.kernel': (16, 16)}
    """
    if recipe.sequential:
        raise FpqError(
            f"Recipe {recipe.name} is sequential, and all Hessians at once are not; use quantize_blocks, or a recipe "
            "without sequential and error_propagation."
        )
    return collect_named(apply_fn, params, batches, recipe, only=only, mask=mask)


def collect_named(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    only: str | SharedInput | None = None,
    mask: Mask | None = None,
    prefix: str = "",
    lenient: bool = False,
    reference: tuple[Any, Iterable[Any]] | None = None,
) -> Hessians:
    """``collect_hessians`` for a recipe that knows the paths with ``prefix`` in front. ``lenient``: it may be about
    none of them. ``only``: a pattern, or the paths. ``reference``: unquantized parameters and their own batches, to be
    compared with (see ``InputStats.cross``)."""
    given = (_arguments(batch) for batch in batches)
    if (first := next(given, None)) is None:
        raise FpqError("There are no batches to calibrate on.")
    uses = find_kernels(apply_fn, params, *first)
    leaves, _ = named_leaves(params, is_quantized)
    chosen = select(recipe, dict(leaves), uses, prefix, lenient).chosen
    if isinstance(only, tuple):
        chosen = {path: chosen[path] for path in only}
    elif only is not None and not (chosen := {path: chosen[path] for path in fnmatch.filter(chosen, only)}):
        raise FpqError(f"only={only!r} fits no kernel that the recipe quantizes.")
    if lenient and not chosen:
        return Hessians(CalibrationStats({}, {}), uses, True)
    kernels = {path: RecordedKernel.of(one.axes, one.recipe.spec) for path, one in chosen.items()}
    recorder, arrays = Recorder.of(apply_fn, params, kernels, mask)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in arrays):
        raise FpqError("The parameters are shapes without values; Hessians are collected with the values.")
    every: Iterable[tuple[Any, ...]] = itertools.chain([first], given)
    if any(kernel.activation_scale == "static" for kernel in kernels.values()):
        every = list(every)
    other = None
    if reference is not None:
        own, theirs = Recorder.of(apply_fn, reference[0], kernels, mask)
        other = own, theirs, map(_arguments, reference[1])
    stats = record_stats(recorder, arrays, every, static_batches=lambda: every, reference=other)
    result = Hessians(stats, uses, only is None)
    for path, one in chosen.items():
        if path not in result:
            raise FpqError(f"{prefix}{path} met no input during calibration.")
        if one.recipe.method == "gptq":
            check_seen(prefix + path, result[path])
    return result


def stages_named(
    apply_fn: Callable[..., Any], params: Any, batch: Any, recipe: Recipe, prefix: str
) -> list[SharedInput]:
    """The kernels that ``collect_named`` would choose, by their inputs, in the order in which the function comes to
    them."""
    args = _arguments(batch)
    leaves, _ = named_leaves(params, is_quantized)
    chosen = select(recipe, dict(leaves), find_kernels(apply_fn, params, *args), prefix, True).chosen
    kernels = {path: RecordedKernel.of(one.axes, one.recipe.spec) for path, one in chosen.items()}
    return shared_inputs(*Recorder.of(apply_fn, params, kernels), args)


def check_seen(path: str, matrix: Any) -> None:
    """FpqError for a Hessian that is zero or not finite, of a stack for any of it."""
    diagonal = np.asarray(jnp.diagonal(jnp.asarray(matrix), axis1=-2, axis2=-1))
    if not bool(jnp.all(jnp.isfinite(matrix))):
        raise FpqError(f"The inputs of {path} overflow or are not finite during calibration.")
    unseen = np.argwhere(~np.any(diagonal > 0, axis=-1))
    if len(unseen):
        where = f"[{', '.join(map(str, unseen[0]))}]" if unseen.shape[1] else ""
        raise FpqError(
            f"{path}{where} met only zeros during calibration; calibrate on more text, or give it method: round."
        )


def _arguments(batch: Any) -> tuple[Any, ...]:
    args = batch if type(batch) is tuple else (batch,)
    for leaf in jax.tree.leaves(args):
        if not is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            raise FpqError("A batch holds arrays alone; bind other arguments with functools.partial.")
    return args
