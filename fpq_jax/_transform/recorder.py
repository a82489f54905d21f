"""The statistics of what each kernel of a function meets: the one engine, for our own models and for any other.

The function is called batch by batch, and every product is taken with activations quantized as inference will have
them. Kernels that are quantized already are multiplied as they are, so that a model can be gone through part by part.
Beside it a reference may run, the same function of other parameters on a stream of inputs of its own; what it sees at
each kernel is then compared with what the function sees there. ``accumulate`` adds the batches up.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fpq_jax._algorithms.statistics import InputStats, SharedInput, input_stats
from fpq_jax._errors import FpqError
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._numerics.activations import fake_quantize_tokens
from fpq_jax._numerics.formats import Format
from fpq_jax._numerics.qtensor import Axes
from fpq_jax._numerics.scales import Scale
from fpq_jax._numerics.spec import ActivationScale, QuantSpec
from fpq_jax._support.trees import ByIdentity, is_array, merge_arrays, named_leaves, split_arrays
from fpq_jax._transform.axis_layout import Factor, MatmulForm, Product, matmul_form
from fpq_jax._transform.find_kernels import track
from fpq_jax._transform.interpreter import interpret
from fpq_jax._transform.quantized import Input, MultiplyQuantized, Traced, arranged, is_traced
from fpq_jax._transform.tracked import ADD, MAXIMUM, Merge, ParamRef, SharedRefs, TraceScope, TrackedParam

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
