"""Operations through which a parameter is tracked: what they do to its layout.

Each gives the operation's results, or None where it makes an array of the parameter.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fpq_jax._transform.axis_layout import Layout
from fpq_jax._transform.tracked import TrackedParam, UseHandler


def _reshape(handler: UseHandler, eqn: Any, operands: list[Any]) -> list[Any] | None:
    kernel = operands[0]
    layout = kernel.layout.reshaped(eqn.outvars[0].aval.shape)
    return None if layout is None else [kernel.moved(layout, lambda w: bind(eqn, [w])[0])]


def _broadcast(handler: UseHandler, eqn: Any, operands: list[Any]) -> list[Any] | None:
    kernel, where = operands[0], eqn.params["broadcast_dimensions"]
    new = [size for i, size in enumerate(eqn.outvars[0].aval.shape) if i not in where]
    # axes of size 1 may come between
    same = list(where) == sorted(where) and [eqn.outvars[0].aval.shape[i] for i in where] == list(kernel.shape)
    return _reshape(handler, eqn, operands) if same and all(size == 1 for size in new) else None


def _transpose(handler: UseHandler, eqn: Any, operands: list[Any]) -> list[Any]:
    kernel = operands[0]
    return [kernel.moved(kernel.layout.transposed(eqn.params["permutation"]), lambda w: bind(eqn, [w])[0])]


def _cast(handler: UseHandler, eqn: Any, operands: list[Any]) -> list[Any] | None:
    dtype = eqn.outvars[0].aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [replace(operands[0].moved(operands[0].layout, lambda w: bind(eqn, [w])[0]), dtype=dtype)]


def _same(handler: UseHandler, eqn: Any, operands: list[Any]) -> list[Any] | None:
    if len(operands) > 1:  # several arrays put on a device at once
        return None
    kernel = operands[0]
    return [kernel.moved(kernel.layout, lambda w: bind(eqn, [w])[0])]


def _barrier(handler: UseHandler, eqn: Any, operands: list[Any]) -> list[Any]:
    """Each operand as it is; arrays are behind the barrier, and so are those of QTensors."""
    values = [operand.value if isinstance(operand, TrackedParam) else operand for operand in operands]
    return [
        replace(operand, value=done) if isinstance(operand, TrackedParam) else done
        for operand, done in zip(operands, jax.lax.optimization_barrier(values), strict=True)
    ]


def _slice(handler: UseHandler, eqn: Any, operands: list[Any]) -> list[Any] | None:
    kernel, p = operands[0], eqn.params
    if p["strides"] is not None and any(stride != 1 for stride in p["strides"]):
        return None
    sizes = [stop - start for start, stop in zip(p["start_indices"], p["limit_indices"], strict=True)]
    cut = lambda w: bind(eqn, [w])[0]
    part = _part(handler, kernel, sizes, p["start_indices"], cut)
    return None if part is None else [part]


def _dynamic_slice(handler: UseHandler, eqn: Any, operands: list[Any]) -> list[Any] | None:
    kernel, *starts = operands
    if any(isinstance(start, TrackedParam) for start in starts):
        return None
    cut = lambda w: bind(eqn, [w, *starts])[0]
    part = _part(handler, kernel, list(eqn.params["slice_sizes"]), starts, cut)
    return None if part is None else [part]


def _split(handler: UseHandler, eqn: Any, operands: list[Any]) -> list[Any] | None:
    kernel, axis, parts = operands[0], eqn.params["axis"], []
    start = 0
    for i, size in enumerate(map(int, eqn.params["sizes"])):
        sizes, starts = list(kernel.shape), [0] * len(kernel.shape)
        sizes[axis], starts[axis] = size, start
        parts.append(_part(handler, kernel, sizes, starts, partial(_nth, eqn, i)))
        start += size
    return None if any(part is None for part in parts) else parts


def _unstack(handler: UseHandler, eqn: Any, operands: list[Any]) -> list[Any] | None:
    kernel, axis, parts = operands[0], eqn.params["axis"], []
    for i in range(kernel.shape[axis]):
        sizes, starts = list(kernel.shape), [0] * len(kernel.shape)
        sizes[axis], starts[axis] = 1, i
        cut = partial(jax.lax.slice_in_dim, start_index=i, limit_index=i + 1, axis=axis)
        part = _part(handler, kernel, sizes, starts, cut)
        if part is None:
            return None
        layout = part.layout.reshaped(part.shape[:axis] + part.shape[axis + 1 :])
        if layout is None:
            return None
        parts.append(part.moved(layout, lambda w: jnp.squeeze(w, axis)))
    return parts


def _part(
    handler: UseHandler, kernel: TrackedParam, sizes: list[int], starts: Any, cut: Callable[[Array], Array]
) -> TrackedParam | None:
    """Some of a stack; None where anything else is cut."""
    changed = [axis for axis, size in enumerate(sizes) if size != kernel.shape[axis]]
    if not changed:
        return kernel
    if len(changed) > 1 or (factor := kernel.stack_axis(changed[0])) is None:
        return None
    (axis,), value = changed, kernel.value
    start, size = starts[axis], sizes[axis]
    if kernel.quantized:
        at = kernel.stack.index(factor)
        value = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, at), value)
    axes = list(kernel.layout.axes)
    axes[axis] = (factor._replace(size=size),)
    ref = handler.part(kernel, factor, start, size)
    return replace(kernel, ref=ref, layout=Layout(tuple(axes)), value=value if kernel.quantized else cut(value))


def _nth(eqn: Any, i: int, operand: Any) -> Any:
    return bind(eqn, [operand])[i]


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation for arrays."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    # older JAX: (functions, parameters)
    functions, params = bound if isinstance(bound, tuple) else ([], bound)
    results = eqn.primitive.bind(*functions, *operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


PRIMITIVE_RULES: dict[str, Callable[[UseHandler, Any, list[Any]], list[Any] | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "device_put": _same,
    "name": _same,
    "stop_gradient": _same,
    "sharding_constraint": _same,
    "optimization_barrier": _barrier,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
}
