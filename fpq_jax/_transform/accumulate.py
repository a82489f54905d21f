"""The statistics of all batches: what a recorder finds in each, added up, over devices too.

On a mesh each device adds up its own part of every batch, and the sums meet once at the end.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from fpq_jax._algorithms.statistics import CalibrationStats, InputStats, SharedInput
from fpq_jax._errors import FpqError
from fpq_jax._numerics.qtensor import Kind
from fpq_jax._numerics.scales import range_scale
from fpq_jax._support.placement import BATCH, per_device, replicate
from fpq_jax._transform.recorder import Recorder, Records, SharedRefs, StaticScales
from fpq_jax._transform.tracked import ADD, MAXIMUM, Merge


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
            new = _traced_once.eval_shape(recorder, other, arrays, scales, args, other_arrays, other_args)
            total = _zeros(new, ADD, mesh) | total
        # waited for, or all batches would be on the devices at once
        total = jax.block_until_ready(
            accumulate(recorder, other, mesh, total, arrays, scales, args, other_arrays, other_args)
        )
    found = _by_input(recorder, _met(total, ADD, mesh), arrays)
    by_kernel = {path: scale for paths, scale in scales.items() for path in paths}
    return CalibrationStats(found, by_kernel)


def abstract_accumulate(
    recorder: Recorder, arrays: list[Any], args: tuple[Any, ...], mesh: Mesh, *, compared: bool = False
) -> tuple[Any, list[SharedInput], int]:
    """(the lowered program of a batch, kernels that share an input, the bytes of all statistics). ``arrays``, ``args``:
    shapes, with shardings; those of the reference too, if the inputs are ``compared`` with one. Static scales are left
    out: they take next to nothing."""
    plain = replace(recorder, kernels=tuple((p, k._replace(activation_scale="token")) for p, k in recorder.kernels))
    reference: tuple[Any, ...] = (plain, arrays, args) if compared else (None, [], ())
    new = _traced_once.eval_shape(plain, reference[0], arrays, {}, args, *reference[1:])
    on = NamedSharding(mesh, BATCH)
    total = jax.tree.map(lambda one: jax.ShapeDtypeStruct((mesh.size, *one.shape), one.dtype, sharding=on), new)
    program = accumulate.lower(plain, reference[0], mesh, total, arrays, {}, args, *reference[1:])
    size = sum(one.size * one.dtype.itemsize for one in jax.tree.leaves(new))
    return program, list(_by_input(plain, new, arrays)), size


def shared_inputs(recorder: Recorder, arrays: list[Any], args: tuple[Any, ...]) -> list[SharedInput]:
    """The kernels that share each input, in the order in which the function comes to them. ``arrays``, ``args``: shapes
    are enough. Static scales are left out."""
    plain, met = recorder.plain, list[str]()

    def traced(arrays: list[Any], args: tuple[Any, ...]) -> Records:
        found = _new(plain, None, arrays, {}, args, [], ())
        met.extend(ref.path for refs in found for ref in refs)  # here, since JAX sorts a dict's keys
        return found

    found = _by_input(plain, jax.eval_shape(traced, arrays, args), arrays)
    return sorted(found, key=lambda paths: min(met.index(path) for path in paths))


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


_traced_once = jax.jit(_new, static_argnums=(0, 1))  # of layers that are alike


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
