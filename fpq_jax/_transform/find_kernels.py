"""Which parameters of a function are kernels of products, and which of their axes are inputs."""

import math
from collections.abc import Callable
from typing import Any

import jax

from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._numerics.qtensor import Axes, Kind
from fpq_jax._transform.axis_layout import Layout, Product
from fpq_jax._transform.interpreter import interpret
from fpq_jax._transform.quantized import Traced, kernel_of
from fpq_jax._transform.selection import ParamUse, is_parameter
from fpq_jax._transform.tracked import ParamRef, TraceScope, TrackedParam, UseHandler


def find_kernels(apply_fn: Callable[..., Any], params: Any, *args: Any) -> dict[str, ParamUse]:
    """Finds what a function does with each of its parameters, without computing anything.

    Args:
        apply_fn: called as ``apply_fn(params, *args)``.
        params: a tree of arrays, or of shapes (``jax.ShapeDtypeStruct``).
        *args: the other arguments, arrays or shapes.

    Returns:
        The use of each parameter with two or more axes, by path.

    Example:
        >>> def apply(params, tokens):
        ...     x = params["embedding"][tokens]
        ...     return jnp.tanh(x @ params["up"]) @ params["down"].T
        >>> shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
        >>> params = {"embedding": shape(100, 8), "up": shape(8, 32), "down": shape(8, 32)}
        >>> uses = fpq.find_kernels(apply, params, jnp.zeros((2, 5), jnp.int32))
        >>> uses["up"].axes.kinds, uses["down"].axes.kinds
        (('in', 'out'), ('out', 'in'))
        >>> uses["embedding"].reason
        'it is used by gather, not in a product'
    """
    traced = Traced(apply_fn, (params, *args), {})
    own = {one.name: one.leaf for one in traced.inputs if one.argument == 0 and is_parameter(one.leaf)}
    handler = _RecordUses({name: tuple(leaf.shape) for name, leaf in own.items()})

    def trace(arrays: list[Any]) -> int:
        inputs = [track(one, array, None) for one, array in zip(traced.inputs, arrays, strict=True)]
        interpret(traced.jaxpr, inputs, handler)
        return 0

    jax.eval_shape(trace, [one.leaf for one in traced.inputs])
    return {name: handler.use_of(name, leaf) for name, leaf in own.items()}


def track(one: Any, value: Any, axes: Axes | None) -> Any:
    """An input of a function on its way, if it is a parameter that may be a kernel; otherwise as it is."""
    if is_quantized(one.leaf):
        return kernel_of(one._replace(leaf=value))
    if one.argument != 0 or not is_parameter(one.leaf):
        return value
    return TrackedParam(value, ParamRef(one.name), Layout.of(value.shape), value.dtype, axes)


class _RecordUses(UseHandler):
    """Notes what each parameter is used for, and changes nothing."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._products: dict[str, list[dict[int, Kind] | None]] = {}
        self._others: dict[str, set[str]] = {}

    def product(
        self, kernel: TrackedParam, x: Any, product: Product, scope: TraceScope, bind: Callable[..., Any], dtype: Any
    ) -> Any:
        if kernel.quantized:
            return None
        name = kernel.ref.path
        self._products.setdefault(name, []).append(_kinds(kernel.layout, product, self._shapes[name]))
        return bind(x, kernel.array())

    def other(self, kernel: TrackedParam, use: str) -> None:
        self._others.setdefault(kernel.ref.path, set()).add(use)

    def use_of(self, name: str, leaf: Any) -> ParamUse:
        """What was seen of a parameter."""
        others = ", ".join(sorted(self._others.get(name, ())))
        if not (products := self._products.get(name)):
            return ParamUse(
                None, f"it is used by {others}, not in a product" if others else "it is not used in a product"
            )
        kinds: dict[int, Kind] = {}
        for seen in products:
            if seen is None:
                return ParamUse(None, "a product takes one of its axes apart")
            for axis, kind in seen.items():
                both = {kinds.setdefault(axis, kind), kind}
                if len(both) > 1 and "in" in both:
                    return ParamUse(None, "its products are over different axes of it")
                if len(both) > 1:  # weights of a stack that also meet one input together
                    kinds[axis] = "stack"
        for axis, size in enumerate(leaf.shape):
            if size == 1:
                kinds.setdefault(axis, "in" if "out" in kinds.values() else "out")
        if len(kinds) < len(leaf.shape) or not {"in", "out"} <= set(kinds.values()):
            return ParamUse(None, "its products leave it no outputs")
        axes = Axes.of([kinds[i] for i in range(len(leaf.shape))], leaf.shape, leaf.dtype)
        return ParamUse(axes, f"it is also used by {others}" if others else "")


def _kinds(layout: Layout, product: Product, shape: tuple[int, ...]) -> dict[int, Kind] | None:
    """``Product.kinds``, with what was scanned over or cut on the way being a stack."""
    kinds = product.kinds(layout)
    if kinds is None:
        return None
    for axis, size in enumerate(shape):
        left = [f.size for f in layout.factors if f.axis == axis]
        if (not left or math.prod(left) < size) and kinds.setdefault(axis, "stack") != "stack":
            return None
    return kinds
