"""Run a function that knows nothing of quantization on quantized parameters."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fpq_jax._errors import FpqError
from fpq_jax._matmul.fp4_kernel.fragments import Fragments
from fpq_jax._matmul.linear import linears
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._numerics.qtensor import Axes, QTensor
from fpq_jax._support.trees import is_array, path_name
from fpq_jax._transform.axis_layout import Layout, MatmulForm, Product, matmul_form
from fpq_jax._transform.interpreter import interpret
from fpq_jax._transform.tracked import ParamRef, TraceScope, TrackedParam, UseHandler


def quantized(apply_fn: Callable[..., Any], *, strict: bool = False) -> Callable[..., Any]:
    """Transforms a function so that it takes QTensors in the refs of arrays (see ``quantize_params``).

    The function is traced as if they were arrays, and each product of an activation with a kernel becomes ``linear``:
    activations are quantized, and weights that have an FP8 form are multiplied in FP8. Kernels are tracked through
    transposes, reshapes, casts and indexing of a stack, and into jit, scan, while, cond, remat and vmap. Call the
    result under ``jax.jit``; by itself it is traced in each call. Gradients are those of ``linear``, also where a
    function with a derivative of its own takes a quantized kernel. Arguments that are not arrays, Python numbers among
    them, are not traced.

    Args:
        apply_fn: the function; nothing in it knows of quantization.
        strict: whether any other use of a QTensor (a gather, elementwise arithmetic) is an error. Otherwise it gets the
            dequantized array, with a warning that says where, once for each transformed function.

    Returns:
        A function of the same arguments, in which any array may be a QTensor.

    Raises:
        FpqError: in a call, under ``strict``, a QTensor is used in another way than in a product.

    Example:
        >>> apply = lambda params, x: jnp.tanh(x @ params["kernel"])
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 32))}
        >>> small = fpq.quantize_params(params, fpq.Recipe.load("w4a8-fp-m2"))
        >>> x = jax.random.normal(jax.random.key(1), (4, 16))
        >>> y = jax.jit(fpq.quantized(apply))(small, x)
        >>> bool((y == jnp.tanh(fpq.linear(x, small["kernel"]))).all())
        True
    """
    told: set[tuple[str, str]] = set()

    @functools.wraps(apply_fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not any(map(is_quantized, jax.tree.leaves((args, kwargs), is_leaf=is_quantized))):
            return apply_fn(*args, **kwargs)
        traced = Traced(apply_fn, args, kwargs)
        inputs = [kernel_of(one) if is_quantized(one.leaf) else one.leaf for one in traced.inputs]
        return traced.result(interpret(traced.jaxpr, inputs, MultiplyQuantized(strict, told)).outputs)

    return wrapped


class Input(NamedTuple):
    """An array or QTensor among a function's arguments. argument: its position; None for keywords."""

    name: str
    leaf: Any
    argument: int | None


class Traced:
    """A function traced at arguments, as if QTensors among them were arrays.

    inputs: the arguments of the jaxpr. Leaves that are no arrays are not traced.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        leaves, structure = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_quantized)
        dynamic = [i for i, (_, leaf) in enumerate(leaves) if is_traced(leaf)]
        self.inputs = [_input(*leaves[i]) for i in dynamic]

        def flat(*arrays: Array) -> list[Any]:
            values = [leaf for _, leaf in leaves]
            for i, array in zip(dynamic, arrays, strict=True):
                values[i] = array
            args, kwargs = jax.tree.unflatten(structure, values)
            outputs, self._out_structure = jax.tree.flatten(function(*args, **kwargs))
            self._out_static = [None if _is_output(leaf) else leaf for leaf in outputs]
            self._out_dynamic = [i for i, leaf in enumerate(outputs) if _is_output(leaf)]
            return [outputs[i] for i in self._out_dynamic]

        self.jaxpr = jax.make_jaxpr(flat)(*(_abstract(one.leaf) for one in self.inputs))

    def result(self, outputs: list[Any]) -> Any:
        """The function's result of the jaxpr's; a parameter that is returned as it came is the QTensor again."""
        values = list(self._out_static)
        for i, out in zip(self._out_dynamic, outputs, strict=True):
            values[i] = out.value if isinstance(out, TrackedParam) else out
        return jax.tree.unflatten(self._out_structure, values)


def axes_of(q: QTensor | Fragments) -> Axes:
    """What the axes are of the parameter that ``q`` stands for now."""
    axes = Axes.of(("in", "out"), q.shape, jnp.float32) if q.axes is None else q.axes
    return axes.with_stack(len(q.stack))


def _abstract(leaf: Any) -> Any:
    if is_quantized(leaf):
        axes = axes_of(leaf)
        return jax.ShapeDtypeStruct(axes.shape(leaf.stack), axes.dtype)
    return leaf


def kernel_of(one: Input) -> TrackedParam:
    """A QTensor at the beginning of its way."""
    axes = axes_of(one.leaf)
    return TrackedParam(
        one.leaf, ParamRef(one.name), Layout.of(axes.shape(one.leaf.stack)), jnp.dtype(axes.dtype), axes
    )


def _input(path: tuple[Any, ...], leaf: Any) -> Input:
    group, where, *rest = path
    if group.idx == 1:
        return Input(path_name(path[1:]), leaf, None)
    name = path_name(rest)
    if where.idx > 0 or not name:
        name = f"argument {where.idx}{'.' if name else ''}{name}"
    return Input(name, leaf, where.idx)


def is_traced(leaf: Any) -> bool:
    """Whether a leaf is an array or a QTensor."""
    return is_quantized(leaf) or is_array(leaf)


def _is_output(leaf: Any) -> bool:
    return is_traced(leaf) or isinstance(leaf, bool | int | float | complex)


class MultiplyQuantized(UseHandler):
    """Multiplies QTensors with ``linear``."""

    def __init__(self, strict: bool, told: set[tuple[str, str]]):
        self._strict = strict
        self._described = told

    def product(
        self, kernel: TrackedParam, x: Any, product: Product, scope: TraceScope, bind: Callable[..., Any], dtype: Any
    ) -> Any:
        assert kernel.axes is not None
        form = matmul_form(x.shape, kernel.layout, kernel.axes, product)
        return None if form is None else form.of_result(_multiplied(x, kernel.value, form, scope, dtype))

    def other(self, kernel: TrackedParam, use: str) -> None:
        if not kernel.quantized:
            return
        path = kernel.ref.path
        what = f"{path} is used in a way that has no quantized form ({use})"
        if self._strict:
            raise FpqError(f"{what}; leave it as it is with a rule of the recipe, or call without strict.")
        if (path, use) not in self._described:
            self._described.add((path, use))
            warnings.warn(f"{what}; it is dequantized there.", stacklevel=2)


def arranged(x: Array, form: MatmulForm, scope: TraceScope) -> Array:
    """x as its product wants it, the same array for all products that want it so."""
    kept = scope.of_input(x, form.of_x)
    if "x" not in kept:
        kept["x"] = form.of_x(x)
    return kept["x"]


def _multiplied(x: Array, q: QTensor | Fragments, form: MatmulForm, scope: TraceScope, dtype: Any) -> Array:
    """``linear`` of x and each weight of a stack."""
    x = arranged(x, form, scope)
    if not form.stack:
        return linears(x, [(q, None)], dtype=dtype, shared=scope.of_input(x, "tokens"))[0]
    # of an axis that a reshape took apart, the parts
    q = jax.tree.map(lambda a: a.reshape(*form.stack, *a.shape[len(q.stack) :]), replace(q, axes=None))
    multiply = lambda x, q: linears(x, [(q, None)], dtype=dtype)[0]
    for shared in reversed(form.shared):
        multiply = jax.vmap(multiply, in_axes=(0 if shared else None, 0))
    return multiply(x, q)
