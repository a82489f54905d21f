"""X^T X of what each kernel of a function meets: over batches, over several uses, over the steps of a loop.

Products are taken with quantized activations, as inference will take them. Kernels that meet the same inputs share one
Hessian.
"""

import fnmatch
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._algorithms.statistics import hessian
from fpq_jax._errors import FpqError
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._numerics.activations import fake_quantize_tokens
from fpq_jax._numerics.qtensor import Kind
from fpq_jax._numerics.scales import Scale, range_scale
from fpq_jax._support.trees import ByIdentity, is_array, merge_arrays, named_leaves, split_arrays
from fpq_jax._transform.axis_layout import Factor, MatmulForm, Product, matmul_form
from fpq_jax._transform.find_kernels import find_kernels, track
from fpq_jax._transform.interpreter import interpret
from fpq_jax._transform.quantized import Input, MultiplyQuantized, Traced, arranged, is_traced
from fpq_jax._transform.selection import Chosen, ParamUse, select
from fpq_jax._transform.tracked import ParamRef, SharedInput, TraceScope, TrackedParam, UseHandler, empty

Mask = Callable[..., Any]


@dataclass(frozen=True)
class Hessians(Mapping[str, Any]):
    """Maps the path of each kernel to the Hessian of its inputs.

    The Hessian is the sum of x x^T over all inputs x, float32 ``[*stack, in, in]``.

    Attributes:
        by_input: the same matrices by the paths of all kernels that share the inputs.
        fixed: static scales of the inputs, by path, where the recipe asks for them.
        uses: what the function does with its parameters, as ``find_kernels`` says.
        complete: whether the Hessians are of all kernels that the recipe quantizes (False with ``only``).

    Example:
        >>> params = {name: {"kernel": jnp.ones((8, 4))} for name in ("query", "key")}
        >>> apply = lambda params, x: [x @ params[name]["kernel"] for name in ("query", "key")]
        >>> hessians = fpq.collect_hessians(apply, params, [jnp.ones((2, 8))], fpq.Recipe())
        >>> sorted(hessians), hessians["query.kernel"].shape
        (['key.kernel', 'query.kernel'], (8, 8))
        >>> len(hessians.by_input)
        1
    """

    by_input: dict[tuple[str, ...], Any]
    fixed: dict[str, Scale]
    uses: dict[str, ParamUse]
    complete: bool

    def __getitem__(self, path: str) -> Any:
        for paths, matrix in self.by_input.items():
            if path in paths:
                return matrix
        raise KeyError(path)

    def __iter__(self) -> Iterator[str]:
        return iter(path for paths in self.by_input for path in paths)

    def __len__(self) -> int:
        return sum(map(len, self.by_input))


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
            not fit the parameters.

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
    return collect_named(apply_fn, params, batches, recipe, only=only, mask=mask)


def collect_named(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    only: str | None = None,
    mask: Mask | None = None,
    prefix: str = "",
    lenient: bool = False,
) -> Hessians:
    """``collect_hessians`` for a recipe that knows the paths with ``prefix`` in front. ``lenient``: it may be about
    none of them."""
    given = (_arguments(batch) for batch in batches)
    if (first := next(given, None)) is None:
        raise FpqError("There are no batches to calibrate on.")
    uses = find_kernels(apply_fn, params, *first)
    leaves, structure = named_leaves(params, is_quantized)
    chosen = select(recipe, dict(leaves), uses, prefix, lenient).chosen
    if only is not None and not (chosen := {path: chosen[path] for path in fnmatch.filter(chosen, only)}):
        raise FpqError(f"only={only!r} fits no kernel that the recipe quantizes.")
    if lenient and not chosen:
        return Hessians({}, {}, uses, True)
    arrays, static = split_arrays([leaf for _, leaf in leaves], is_traced)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in arrays):
        raise FpqError("The parameters are shapes without values; Hessians are collected with the values.")
    names = tuple(path for path, leaf in leaves if is_traced(leaf))
    program = _Recorder(
        ByIdentity(apply_fn), structure, static, names, tuple(chosen.items()), mask and ByIdentity(mask)
    )
    static_scales = [path for path, one in chosen.items() if one.recipe.spec.activation_scale == "static"]
    fixed: dict[str, Scale] = {}
    if static_scales:
        every = [first, *given]
        first, given = every[0], (args for args in every[1:])
        fixed = _static_scales(program, chosen, static_scales, arrays, every)
    found = _merged(program, arrays, fixed, itertools.chain([first], given))
    by_input = _by_input(found, chosen, dict(leaves))
    result = Hessians(by_input, fixed, uses, only is None)
    for path, one in chosen.items():
        if not any(path in paths for paths in by_input):
            raise FpqError(f"{prefix}{path} met no input during calibration.")
        if one.recipe.method == "gptq":
            check_seen(prefix + path, result[path])
    return result


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


@dataclass(frozen=True)
class _Recorder:
    """What a batch is recorded with; equal ones, as of blocks that are alike, are compiled once.

    structure, others: of the parameters, see ``split_arrays``; names: of their arrays. scaled: kernels of which the
    range of the inputs is recorded, instead of Hessians.
    """

    apply_fn: ByIdentity
    structure: Any
    others: tuple[Any, ...]
    names: tuple[str, ...]
    chosen: tuple[tuple[str, Chosen], ...]
    mask: ByIdentity | None
    scaled: tuple[str, ...] | None = None

    @property
    def merge(self) -> Any:
        return jnp.add if self.scaled is None else jnp.maximum

    def records(self, arrays: list[Any], fixed: dict[str, Scale], args: tuple[Any, ...]) -> dict[SharedInput, Array]:
        """Of one batch."""
        chosen = dict(self.chosen)
        if self.scaled is None:
            mask = None if self.mask is None else self.mask.function(*args)
            if self.mask is not None and not is_array(mask):
                raise FpqError(f"mask(*batch) gave {mask!r}; it must give an array, nonzero where a position counts.")
            rules: UseHandler = _RecordHessians(chosen, fixed, mask)
        else:
            chosen, rules = {path: chosen[path] for path in self.scaled}, _RecordRanges()
        traced = Traced(self._apply, (arrays, *args), {})

        def on_its_way(one: Input) -> Any:
            if one.argument != 0:
                return one.leaf
            name = self.names[int(one.name.partition(".")[0])]
            if name not in chosen and not is_quantized(one.leaf):
                return one.leaf
            return track(one._replace(name=name), one.leaf, chosen[name].axes if name in chosen else None)

        return interpret(traced.jaxpr, [on_its_way(one) for one in traced.inputs], rules, self.merge).records

    def _apply(self, arrays: list[Any], *args: Any) -> Any:
        return self.apply_fn.function(jax.tree.unflatten(self.structure, merge_arrays(arrays, self.others)), *args)


def _arguments(batch: Any) -> tuple[Any, ...]:
    args = batch if type(batch) is tuple else (batch,)
    for leaf in jax.tree.leaves(args):
        if not is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            raise FpqError("A batch holds arrays alone; bind other arguments with functools.partial.")
    return args


def _merged(
    program: _Recorder, arrays: list[Any], fixed: dict[str, Scale], batches: Iterable[tuple[Any, ...]]
) -> dict[SharedInput, Array]:
    """The records of all batches, merged on the device."""
    total: dict[SharedInput, Array] = {}
    known: set[Any] = set()
    for args in batches:
        leaves, structure = jax.tree.flatten(args)
        shape = (structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))
        if shape not in known:  # which kernels share an input may depend on it
            known.add(shape)
            new = empty(jax.eval_shape(program.records, arrays, fixed, args), program.merge)
            total = new | total
        # waited for, or all batches would be on the device at once
        total = jax.block_until_ready(_more(program, total, arrays, fixed, args))
    return total


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _more(
    program: _Recorder, total: dict[SharedInput, Array], arrays: list[Any], fixed: dict[str, Scale], args: Any
) -> dict[SharedInput, Array]:
    new = program.records(arrays, fixed, args)
    return {places: program.merge(old, new[places]) if places in new else old for places, old in total.items()}


def _static_scales(
    program: _Recorder, chosen: dict[str, Chosen], paths: list[str], arrays: list[Any], batches: list[tuple[Any, ...]]
) -> dict[str, Scale]:
    """The scale of each kernel's inputs, from the inputs as they are."""
    for path in paths:
        if "stack" in chosen[path].axes.kinds:
            raise FpqError(f"{path} is a stack of kernels, for which activation_scale static is not supported.")
    found = _merged(replace(program, scaled=tuple(paths)), arrays, {}, batches)
    fixed = {}
    for path in paths:
        # of each use: minus the least, and the largest
        low, high = jnp.max(jnp.stack([value for (place,), value in found.items() if place.path == path]), axis=0)
        activation = chosen[path].recipe.spec.activation
        assert activation is not None
        fixed[path] = range_scale(-low[None], high[None], activation)
    return fixed


class _RecordInputs(MultiplyQuantized):
    """Looks at the input of each kernel that is still an array, and multiplies QTensors."""

    records = True

    def __init__(self) -> None:
        super().__init__(False, set())

    def product(
        self, kernel: TrackedParam, x: Any, product: Product, scope: TraceScope, bind: Callable[..., Any], dtype: Any
    ) -> Any:
        if kernel.quantized:
            return super().product(kernel, x, product, scope, bind, dtype)
        assert kernel.axes is not None
        form = matmul_form(x.shape, kernel.layout, kernel.axes, product)
        if form is None:
            return None
        seen = self.see(kernel, arranged(x, form, scope), form, scope)
        return bind(x if seen is None else form.of_x.undone(seen, x.shape), kernel.value)

    def see(self, kernel: TrackedParam, x: Array, form: MatmulForm, scope: TraceScope) -> Array | None:
        """What the kernel is multiplied with, as ``how`` has x; None: x itself."""
        raise NotImplementedError

    def part(self, kernel: TrackedParam, axis: Factor, start: Any, size: int) -> ParamRef:
        if kernel.quantized:
            return kernel.place
        if isinstance(start, jax.core.Tracer):
            raise FpqError(
                f"{kernel.place.path} is indexed by a number that is computed, and its Hessians cannot be told apart "
                "then; scan over it instead."
            )
        return kernel.place.cut(axis.axis, int(start), size)


class _RecordRanges(_RecordInputs):
    def see(self, kernel: TrackedParam, x: Array, form: MatmulForm, scope: TraceScope) -> None:
        scope.record((kernel.place,), jnp.stack([jnp.max(-x), jnp.max(x)]).astype(jnp.float32))


class _RecordHessians(_RecordInputs):
    def __init__(self, chosen: dict[str, Chosen], fixed: dict[str, Scale], mask: Any):
        super().__init__()
        self._chosen = chosen
        self._fixed = fixed
        self._mask = mask

    def see(self, kernel: TrackedParam, x: Array, form: MatmulForm, scope: TraceScope) -> Array:
        path = kernel.place.path
        activation, fixed = self._chosen[path].recipe.spec.activation, self._fixed.get(path)
        kept = scope.of_input(x, ("seen", activation, path if fixed is not None else None, form.stack, form.shared))
        if "seen" not in kept:
            kept["seen"] = x if activation is None else fake_quantize_tokens(x, activation, fixed)
            kept["site"] = scope.site(self._hessian(path, kept["seen"], form))
        kept["site"].places.append(kernel.place)
        return kept["seen"]

    def _hessian(self, name: str, x: Array, form: MatmulForm) -> Array:
        shared = sum(form.shared)
        mask = None if self._mask is None else _of_rows(self._mask, x.shape[shared:-1], name)
        one = lambda x: hessian(x, mask)
        for _ in range(shared):
            one = jax.vmap(one)
        matrix = one(x)
        axes = [axis for axis, has in enumerate(form.shared) if not has]
        return jnp.broadcast_to(jnp.expand_dims(matrix, axes), (*form.stack, *matrix.shape[-2:]))


def _of_rows(mask: Any, rows: tuple[int, ...], name: str) -> Array:
    """The mask for inputs [*rows, in]."""
    mask = jnp.asarray(mask)
    if rows[: mask.ndim] == mask.shape:
        return jnp.broadcast_to(mask.reshape(*mask.shape, *[1] * (len(rows) - mask.ndim)), rows)
    if rows == (mask.size,):
        return mask.reshape(rows)
    raise FpqError(
        f"The inputs of {name} are {'x'.join(map(str, rows))} rows, which a mask of "
        f"{'x'.join(map(str, mask.shape))} positions does not fit; leave that kernel out, with only= or a rule."
    )


def _by_input(
    found: dict[SharedInput, Any], chosen: dict[str, Chosen], leaves: dict[str, Any]
) -> dict[tuple[str, ...], Any]:
    """Records of kernels, and of parts of stacks, as whole matrices by the kernels that share them."""
    # of each kernel: in which records it is, as which part
    within: dict[str, list[tuple[SharedInput, Any]]] = defaultdict(list)
    for places in found:
        for place in places:
            within[place.path].append((places, place.parts))
    sharing: dict[Any, list[str]] = defaultdict(list)
    for path in chosen:
        if path in within:
            sharing[tuple(sorted(within[path]))].append(path)
    by_input = {}
    for records, paths in sharing.items():
        kinds = chosen[paths[0]].axes.kinds
        stack = [n for n, kind in zip(leaves[paths[0]].shape, kinds, strict=True) if kind == "stack"]
        by_input[tuple(paths)] = _added_up([(found[key], _where(parts, kinds)) for key, parts in records], stack)
    return by_input


def _where(parts: tuple[tuple[int, int, int], ...], kinds: Sequence[Kind]) -> tuple[slice, ...]:
    """Which part of the stack a kernel is; () for all of it."""
    index = [slice(None)] * kinds.count("stack")
    for axis, start, stop in parts:
        index[kinds[:axis].count("stack")] = slice(start, stop)
    return tuple(index) if parts else ()


def _added_up(matrices: list[tuple[Any, tuple[slice, ...]]], stack: list[int]) -> Any:
    """Matrices, each of a part of the stack, as one of all of it."""
    if len(matrices) == 1 and not matrices[0][1]:
        return matrices[0][0]
    total = jnp.zeros((*stack, *matrices[0][0].shape[-2:]), jnp.float32)
    for matrix, where in matrices:
        total = total.at[where].add(matrix) if where else total + matrix
    return total
