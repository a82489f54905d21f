"""The statistics of what each kernel of a function meets: the one engine, for our own models and for any other.

The function is called batch by batch, and every product is taken with activations quantized as inference will have
them. Kernels that are quantized already are multiplied as they are, so that a model can be gone through part by part.
Beside it a reference may run, the same function of other parameters on a stream of inputs of its own; what it sees at
each kernel is then compared with what the function sees there. On a mesh each device adds up its own part of every
batch, and the sums meet once at the end.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from fpq_jax._algorithms.statistics import CalibrationStats, InputStats, SharedInput, input_stats
from fpq_jax._errors import FpqError
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._numerics.activations import fake_quantize_tokens
from fpq_jax._numerics.formats import Format
from fpq_jax._numerics.qtensor import Axes, Kind
from fpq_jax._numerics.scales import Scale, range_scale
from fpq_jax._numerics.spec import ActivationScale, QuantSpec
from fpq_jax._support.placement import BATCH, per_device, replicate
from fpq_jax._support.trees import ByIdentity, is_array, merge_arrays, named_leaves, split_arrays
from fpq_jax._transform.axis_layout import Factor, MatmulForm, Product, matmul_form
from fpq_jax._transform.find_kernels import track
from fpq_jax._transform.interpreter import interpret
from fpq_jax._transform.quantized import Input, MultiplyQuantized, Traced, arranged, is_traced
from fpq_jax._transform.tracked import ADD, MAXIMUM, Merge, ParamRef, TraceScope, TrackedParam
from fpq_jax._transform.tracked import SharedInput as SharedRefs

Mask = Callable[..., Any]
Records = dict[SharedRefs, Any]
StaticScales = dict[SharedInput, Scale]  # by the kernels that see one input


class RecordedKernel(NamedTuple):
    """What the statistics of a kernel's input depend on."""

    axes: Axes
    activation: Format | None
    activation_scale: ActivationScale

    @classmethod
    def of(cls, axes: Axes, spec: QuantSpec) -> "RecordedKernel":
        """Of a kernel that is to be quantized under ``spec``."""
        return cls(axes, spec.activation, spec.activation_scale)

    @property
    def plain(self) -> "RecordedKernel":
        """With activations as they are."""
        return self._replace(activation=None, activation_scale="token")


@dataclass(frozen=True)
class Recorder:
    """A function ``apply_fn(params, *batch)`` and its kernels whose inputs are recorded; equal ones, as of layers that
    are alike, are compiled once.

    structure, others: of the parameters, see ``split_arrays``; names: of their arrays. mask(*batch): which positions
    of the inputs count (nonzero).
    """

    apply_fn: ByIdentity
    structure: Any
    others: tuple[Any, ...]
    names: tuple[str, ...]
    kernels: tuple[tuple[str, RecordedKernel], ...]
    mask: ByIdentity | None

    @classmethod
    def of(
        cls,
        apply_fn: Callable[..., Any],
        params: Any,
        kernels: dict[str, RecordedKernel],
        mask: Mask | None = None,
        *,
        knows_qtensors: bool = False,
    ) -> tuple["Recorder", list[Any]]:
        """(the recorder, the arrays of ``params``). ``knows_qtensors``: the function multiplies QTensors itself;
        otherwise it is run as if they were arrays."""
        leaves, structure = named_leaves(params, None if knows_qtensors else is_quantized)
        arrays, others = split_arrays([leaf for _, leaf in leaves], is_traced)
        names = tuple(path for path, leaf in leaves if is_traced(leaf))
        one = cls(ByIdentity(apply_fn), structure, others, names, tuple(kernels.items()), mask and ByIdentity(mask))
        return one, arrays

    @property
    def plain(self) -> "Recorder":
        """The same with all activations as they are."""
        return replace(self, kernels=tuple((path, kernel.plain) for path, kernel in self.kernels))

    def stats(self, arrays: list[Any], scales: StaticScales, args: tuple[Any, ...]) -> Records:
        """InputStats of a batch."""
        mask = self._mask(args)
        return self._record(arrays, args, _Quantize(dict(self.kernels), scales, partial(_stats, mask=mask)), ADD)

    def ranges(self, arrays: list[Any], args: tuple[Any, ...]) -> Records:
        """Minus the least and the largest value of each input in a batch, with activations as they are."""
        return self._record(arrays, args, _Quantize(dict(self.plain.kernels), {}, _range), MAXIMUM)

    def inputs(self, arrays: list[Any], scales: StaticScales, args: tuple[Any, ...]) -> Records:
        """The inputs themselves, [*rows, in]."""
        return self._record(arrays, args, _Quantize(dict(self.kernels), scales, _input), _ONCE)

    def compared(
        self,
        arrays: list[Any],
        scales: StaticScales,
        args: tuple[Any, ...],
        reference: "Recorder",
        reference_arrays: list[Any],
        reference_args: tuple[Any, ...],
    ) -> Records:
        """``stats`` with what the reference sees."""
        if stacks := [path for path, kernel in self.kernels if "stack" in kernel.axes.kinds]:
            raise FpqError(f"{stacks[0]} is a stack of kernels, whose inputs cannot be compared with a reference's.")
        mask = self._mask(args)
        own = self.inputs(arrays, scales, args)
        others = reference.plain.inputs(reference_arrays, {}, reference_args)
        seen = {ref.path: x for refs, x in others.items() for ref in refs}
        stats = lambda name, x: input_stats(x, None if mask is None else _of_rows(mask, x.shape[:-1], name), seen[name])
        return {refs: stats(refs[0].path, x) for refs, x in own.items()}

    def _mask(self, args: tuple[Any, ...]) -> Any:
        if self.mask is None:
            return None
        mask = self.mask.function(*args)
        if not is_array(mask):
            raise FpqError(f"mask(*batch) gave {mask!r}; it must give an array, nonzero where a position counts.")
        return mask

    def _record(self, arrays: list[Any], args: tuple[Any, ...], handler: "_Quantize", merge: Merge) -> Records:
        kernels = dict(self.kernels)
        traced = Traced(self._apply, (arrays, *args), {})

        def tracked(one: Input) -> Any:
            if one.argument != 0:
                return one.leaf
            name = self.names[int(one.name.partition(".")[0])]
            if name not in kernels and not is_quantized(one.leaf):
                return one.leaf
            return track(one._replace(name=name), one.leaf, kernels[name].axes if name in kernels else None)

        return interpret(traced.jaxpr, [tracked(one) for one in traced.inputs], handler, merge).records

    def _apply(self, arrays: list[Any], *args: Any) -> Any:
        return self.apply_fn.function(jax.tree.unflatten(self.structure, merge_arrays(arrays, self.others)), *args)


def record_stats(
    recorder: Recorder,
    arrays: list[Any],
    batches: Iterable[tuple[Any, ...]],
    *,
    static_batches: Callable[[], Iterable[tuple[Any, ...]]] | None = None,
    mesh: Mesh | None = None,
    reference: tuple[Recorder, list[Any], Iterable[tuple[Any, ...]]] | None = None,
) -> CalibrationStats:
    """The statistics of all batches, of each kernel in the recorder that met any input.

    ``static_batches`` gives the batches once before, for static scales; needed where a kernel has one. ``mesh``: the
    first axis of what a batch holds is divided over its devices, on which the parameters are whole.
    ``reference``: another recorder of the same kernels, its arrays and batches.
    """
    static = {path for path, kernel in recorder.kernels if kernel.activation_scale == "static"}
    scales: StaticScales = {}
    if static:
        assert static_batches is not None
        scales = _static_scales(recorder, arrays, static_batches(), static, mesh)
    total: Records = {}
    known: set[Any] = set()
    other, other_arrays, other_batches = (None, [], None) if reference is None else reference
    following = iter(()) if other_batches is None else iter(other_batches)
    for args in batches:
        other_args = () if other is None else next(following)
        if (shape := _shape(args)) not in known:  # which kernels share an input may depend on it
            known.add(shape)
            new = jax.eval_shape(partial(_new, recorder, other), arrays, scales, args, other_arrays, other_args)
            total = _zeros(new, ADD, mesh) | total
        # waited for, or all batches would be on the devices at once
        total = jax.block_until_ready(
            accumulate(recorder, other, mesh, total, arrays, scales, args, other_arrays, other_args)
        )
    found = _by_input(recorder, _met(total, ADD, mesh), arrays)
    by_kernel = {path: scale for paths, scale in scales.items() for path in paths}
    return CalibrationStats(found, by_kernel)


def abstract_accumulate(
    recorder: Recorder, arrays: list[Any], args: tuple[Any, ...], mesh: Mesh
) -> tuple[Any, list[SharedInput], int]:
    """(the lowered program of a batch, kernels that share an input, the bytes of all statistics). ``arrays``, ``args``:
    shapes, with shardings. Static scales are left out: they take next to nothing."""
    plain = replace(recorder, kernels=tuple((p, k._replace(activation_scale="token")) for p, k in recorder.kernels))
    new = jax.eval_shape(partial(_new, plain, None), arrays, {}, args, [], ())
    on = NamedSharding(mesh, BATCH)
    total = jax.tree.map(lambda one: jax.ShapeDtypeStruct((mesh.size, *one.shape), one.dtype, sharding=on), new)
    program = accumulate.lower(plain, None, mesh, total, arrays, {}, args, [], ())
    size = sum(one.size * one.dtype.itemsize for one in jax.tree.leaves(new))
    return program, list(_by_input(plain, new, arrays)), size


def _new(
    recorder: Recorder,
    reference: Recorder | None,
    arrays: list[Any],
    scales: StaticScales,
    args: tuple[Any, ...],
    reference_arrays: list[Any],
    reference_args: tuple[Any, ...],
) -> Records:
    if reference is None:
        return recorder.stats(arrays, scales, args)
    return recorder.compared(arrays, scales, args, reference, reference_arrays, reference_args)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def accumulate(
    recorder: Recorder,
    reference: Recorder | None,
    mesh: Mesh | None,
    total: Records,
    arrays: list[Any],
    scales: StaticScales,
    args: tuple[Any, ...],
    reference_arrays: list[Any],
    reference_args: tuple[Any, ...],
) -> Records:
    """``total`` and the statistics of a batch."""

    def add(total: Records, arrays: Any, scales: Any, args: Any, others: Any, other_args: Any) -> Records:
        return _merged(ADD, mesh, total, _new(recorder, reference, arrays, scales, args, others, other_args))

    if mesh is not None:
        add = per_device(add, mesh, (BATCH, P(), P(), BATCH, P(), BATCH), BATCH)
    return add(total, arrays, scales, args, reference_arrays, reference_args)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _widen(recorder: Recorder, mesh: Mesh | None, total: Records, arrays: list[Any], args: tuple[Any, ...]) -> Records:
    """``total`` and the ranges of a batch."""

    def add(total: Records, arrays: Any, args: Any) -> Records:
        return _merged(MAXIMUM, mesh, total, recorder.ranges(arrays, args))

    if mesh is not None:
        add = per_device(add, mesh, (BATCH, P(), BATCH), BATCH)
    return add(total, arrays, args)


def _merged(merge: Merge, mesh: Mesh | None, total: Records, new: Records) -> Records:
    """On a mesh ``total`` has an axis in front, of which a device sees its own."""
    own = new if mesh is None else jax.tree.map(lambda one: one[None], new)
    return {refs: merge(old, own[refs]) if refs in own else old for refs, old in total.items()}


def _zeros(shapes: Records, merge: Merge, mesh: Mesh | None) -> Records:
    if mesh is None:
        return merge.empty(shapes)
    on = NamedSharding(mesh, BATCH)  # one for each device
    zeros = lambda one: jnp.full((mesh.size, *one.shape), merge.neutral, one.dtype, device=on)
    return jax.tree.map(zeros, shapes)


def _met(total: Records, merge: Merge, mesh: Mesh | None) -> Records:
    """The records of all devices as one, on every device."""
    return total if mesh is None else _over_devices(total, merge, mesh)


@partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def _over_devices(total: Records, merge: Merge, mesh: Mesh) -> Records:
    everywhere = NamedSharding(mesh, P())
    one = lambda array: jax.lax.with_sharding_constraint(merge.over(array, axis=0), everywhere)
    return jax.tree.map(one, total)


def _shape(args: tuple[Any, ...]) -> Any:
    leaves, structure = jax.tree.flatten(args)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def _static_scales(
    recorder: Recorder, arrays: list[Any], batches: Iterable[tuple[Any, ...]], static: set[str], mesh: Mesh | None
) -> StaticScales:
    """The scale of each kernel's input, from the inputs as they are, by the kernels that share it."""
    kernels = tuple((path, kernel) for path, kernel in recorder.kernels if path in static)
    for path, kernel in kernels:
        if "stack" in kernel.axes.kinds:
            raise FpqError(f"{path} is a stack of kernels, for which activation_scale static is not supported.")
    recorder = replace(recorder, kernels=kernels, mask=None)
    total: Records = {}
    for args in batches:
        new = jax.eval_shape(recorder.ranges, arrays, args)
        total = _zeros({refs: one for refs, one in new.items() if refs not in total}, MAXIMUM, mesh) | total
        total = jax.block_until_ready(_widen(recorder, mesh, total, arrays, args))
    met = {refs: np.asarray(one) for refs, one in _met(total, MAXIMUM, mesh).items()}
    uses: dict[str, set[SharedRefs]] = defaultdict(set)
    for refs in met:
        for ref in refs:
            uses[ref.path].add(refs)
    sharing: dict[Any, list[str]] = defaultdict(list)
    for path, _ in kernels:
        if path in uses:
            kernel = dict(kernels)[path]
            sharing[frozenset(uses[path]), kernel.activation].append(path)
    scales: StaticScales = {}
    for (inputs, activation), paths in sharing.items():
        assert activation is not None
        low, high = jnp.asarray(np.max([met[refs] for refs in inputs], axis=0))
        scales[tuple(paths)] = range_scale(-low[None], high[None], activation)
    return scales if mesh is None else replicate(scales, mesh)


class _Quantize(MultiplyQuantized):
    """Multiplies each recorded kernel with its activations quantized, and records what ``measure(path, x, form)`` makes
    of them."""

    records = True

    def __init__(
        self,
        kernels: dict[str, RecordedKernel],
        scales: StaticScales,
        measure: Callable[[str, Array, MatmulForm], Any],
    ):
        super().__init__(False, set())
        self._kernels, self._scales, self._measure = kernels, scales, measure

    def product(
        self, kernel: TrackedParam, x: Any, product: Product, scope: TraceScope, bind: Callable[..., Any], dtype: Any
    ) -> Any:
        if kernel.quantized:
            return super().product(kernel, x, product, scope, bind, dtype)
        assert kernel.axes is not None
        form = matmul_form(x.shape, kernel.layout, kernel.axes, product)
        if form is None:
            return None
        path = kernel.ref.path
        if path not in self._kernels:
            return bind(x, kernel.value)
        activation = self._kernels[path].activation
        shared, scale = next(((paths, s) for paths, s in self._scales.items() if path in paths), (None, None))
        arrangement = arranged(x, form, scope)
        kept = scope.of_input(arrangement, ("seen", activation, shared, form.stack, form.shared))
        if "seen" not in kept:
            quantize = lambda x: x if activation is None else fake_quantize_tokens(x, activation, scale)
            kept["seen"] = quantize(arrangement)
            kept["site"] = scope.site(self._measure(path, kept["seen"], form))
        kept["site"].refs.append(kernel.ref)
        return bind(x if activation is None else form.of_x.undone(kept["seen"], x.shape), kernel.value)

    def part(self, kernel: TrackedParam, axis: Factor, start: Any, size: int) -> ParamRef:
        if kernel.quantized:
            return kernel.ref
        if isinstance(start, jax.core.Tracer):
            raise FpqError(
                f"{kernel.ref.path} is indexed by a number that is computed, and its Hessians cannot be told apart "
                "then; scan over it instead."
            )
        return kernel.ref.cut(axis.axis, int(start), size)


def _stats(name: str, x: Array, form: MatmulForm, *, mask: Any) -> InputStats:
    """Of the input of a stack of kernels, with the stack's axes in front."""
    shared = sum(form.shared)
    rows = None if mask is None else _of_rows(mask, x.shape[shared:-1], name)
    one = lambda x: input_stats(x, rows)
    for _ in range(shared):
        one = jax.vmap(one)
    axes = [axis for axis, has in enumerate(form.shared) if not has]
    of_stack = lambda a: jnp.broadcast_to(jnp.expand_dims(a, axes), (*form.stack, *a.shape[shared:]))
    return jax.tree.map(of_stack, one(x))


def _range(name: str, x: Array, form: MatmulForm) -> Array:
    return jnp.stack([jnp.max(-x), jnp.max(x)]).astype(jnp.float32)


def _input(name: str, x: Array, form: MatmulForm) -> Array:
    return x


def _met_twice(one: Array, other: Array) -> Array:
    raise FpqError("A kernel is used twice, or in a loop; its inputs cannot be compared with a reference's.")


_ONCE = Merge(_met_twice, 0, _met_twice)


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


def _by_input(recorder: Recorder, found: Records, arrays: list[Any]) -> dict[SharedInput, InputStats]:
    """Records of kernels, and of parts of stacks, as whole ones by the kernels that share them."""
    kernels, shapes = dict(recorder.kernels), {n: a.shape for n, a in zip(recorder.names, arrays, strict=True)}
    # of each kernel: in which records it is, as which part
    within: dict[str, list[tuple[SharedRefs, Any]]] = defaultdict(list)
    for refs in found:
        for ref in refs:
            within[ref.path].append((refs, ref.parts))
    sharing: dict[Any, list[str]] = defaultdict(list)
    for path in kernels:
        if path in within:
            sharing[tuple(sorted(within[path]))].append(path)
    by_input = {}
    for records, paths in sharing.items():
        kinds = kernels[paths[0]].axes.kinds
        stack = [n for n, kind in zip(shapes[paths[0]], kinds, strict=True) if kind == "stack"]
        by_input[tuple(paths)] = _added_up([(found[key], _where(parts, kinds)) for key, parts in records], stack)
    return by_input


def _where(parts: tuple[tuple[int, int, int], ...], kinds: Sequence[Kind]) -> tuple[slice, ...]:
    """Which part of the stack a kernel is; () for all of it."""
    index = [slice(None)] * kinds.count("stack")
    for axis, start, stop in parts:
        index[kinds[:axis].count("stack")] = slice(start, stop)
    return tuple(index) if parts else ()


def _added_up(records: list[tuple[InputStats, tuple[slice, ...]]], stack: list[int]) -> InputStats:
    """Records, each of a part of the stack, as one of all of it."""
    if len(records) == 1 and not records[0][1]:
        return records[0][0]

    def one(*arrays: Array) -> Array:
        total = jnp.zeros((*stack, *arrays[0].shape[len(stack) :]), arrays[0].dtype)
        for array, (_, where) in zip(arrays, records, strict=True):
            total = total.at[where].add(array) if where else total + array
        return total

    return jax.tree.map(one, *(stats for stats, _ in records))
