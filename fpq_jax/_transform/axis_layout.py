"""Where a weight's inputs and outputs lie in an array that a function has transposed and reshaped.

An array's axes are made of factors of the axes that the parameter had: transposing reorders them, reshaping joins them
or splits them, and a product tells which are inputs. A QTensor never moves; its layout does.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from fpq_jax._numerics.qtensor import Axes, Kind


class Factor(NamedTuple):
    """A factor of a parameter's axis: ``key`` is the axis and its place there, so keys sort as the parameter lies."""

    key: tuple[int, ...]
    size: int

    @property
    def axis(self) -> int:
        return self.key[0]


Factors = tuple[Factor, ...]


@dataclass(frozen=True)
class Layout:
    """The factors that each axis of an array is made of, row-major."""

    axes: tuple[Factors, ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Layout":
        """An array as it is."""
        return cls(tuple((Factor((axis,), size),) for axis, size in enumerate(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(f.size for f in factors) for factors in self.axes)

    @property
    def factors(self) -> Factors:
        """All of them, in the order of the parameter."""
        return tuple(sorted(f for factors in self.axes for f in factors))

    def transposed(self, permutation: Sequence[int]) -> "Layout":
        return Layout(tuple(self.axes[i] for i in permutation))

    def without(self, axis: int) -> "Layout":
        return Layout(self.axes[:axis] + self.axes[axis + 1 :])

    def reshaped(self, shape: Sequence[int]) -> "Layout | None":
        """None where an axis of the result is no product of factors."""
        assert math.prod(shape) == math.prod(self.shape)
        queue = [f for factors in self.axes for f in factors]
        axes = []
        for size in shape:
            taken, product = [], 1
            while product < size or (queue and queue[0].size == 1):
                first = queue.pop(0)
                missing = size // product
                if size % product or (first.size > missing and first.size % missing):
                    return None
                if first.size > missing:
                    queue.insert(0, Factor((*first.key, 1), first.size // missing))
                    first = Factor((*first.key, 0), missing)
                taken.append(first)
                product *= first.size
                if product == size == 1:
                    break
            if product != size:
                return None
            axes.append(tuple(taken))
        if queue:  # of size 1, behind the last axis
            if not axes:
                return None
            axes[-1] += tuple(queue)
        return Layout(tuple(axes))


class Product(NamedTuple):
    """A dot_general of an array x and a kernel, as axes of either."""

    x_contracted: tuple[int, ...]
    x_batch: tuple[int, ...]
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    kernel_first: bool  # whether the kernel was the left operand

    @classmethod
    def of(cls, dimension_numbers: Any, kernel_first: bool) -> "Product":
        (left, right), (left_batch, right_batch) = dimension_numbers
        if kernel_first:
            return cls(tuple(right), tuple(right_batch), tuple(left), tuple(left_batch), True)
        return cls(tuple(left), tuple(left_batch), tuple(right), tuple(right_batch), False)

    def kinds(self, layout: Layout) -> dict[int, Kind] | None:
        """By axis of the parameter what the product makes of it; None if it takes one apart. What is of size 1 may be
        anything, and is not said."""
        kinds: dict[int, Kind] = {}
        for i, factors in enumerate(layout.axes):
            kind: Kind = "in" if i in self.contracted else "stack" if i in self.batch else "out"
            for f in factors:
                if f.size > 1 and kinds.setdefault(f.axis, kind) != kind:
                    return None
        return kinds


class Rearrange(NamedTuple):
    """How an array gets other axes: transposed, reshaped, and the same again."""

    first: tuple[int, ...]
    factors: tuple[int, ...]
    second: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, array: Array) -> Array:
        array = _reshaped(_transposed(array, self.first), self.factors)
        return _reshaped(_transposed(array, self.second), self.shape)

    def undone(self, array: Array, shape: Sequence[int]) -> Array:
        """The inverse, for what had this shape."""
        array = _reshaped(array, tuple(self.factors[i] for i in self.second))
        array = _transposed(array, tuple(np.argsort(self.second).tolist()))
        array = _reshaped(array, tuple(shape[i] for i in self.first))
        return _transposed(array, tuple(np.argsort(self.first).tolist()))


def _transposed(array: Array, order: tuple[int, ...]) -> Array:
    return array if order == tuple(range(len(order))) else array.transpose(order)


def _reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    return array if array.shape == shape else array.reshape(shape)


class MatmulForm(NamedTuple):
    """A product of x and a kernel as one of matrices: ``of_x`` gives x as [*stack, *rows, in], ``of_result`` turns
    what comes of it, [*stack, *rows, out], into the product's result.

    stack: the sizes of the kernel's stack. shared: for each, whether x has it too; otherwise it has no such axis.
    """

    of_x: Rearrange
    of_result: Rearrange
    stack: tuple[int, ...]
    shared: tuple[bool, ...]


@functools.lru_cache(maxsize=4096)  # layers are alike
def matmul_form(x_shape: tuple[int, ...], layout: Layout, axes: Axes, product: Product) -> MatmulForm | None:
    """None where the product contracts anything but the kernel's inputs, or shares anything but its stack with x."""
    many = lambda factors: tuple(f for f in factors if f.size > 1)  # what is of size 1 may stand anywhere
    kind = lambda wanted: tuple(f for f in layout.factors if axes.kinds[f.axis] == wanted)
    joined = lambda indices: many(f for i in indices for f in layout.axes[i])
    sizes = lambda factors: tuple(f.size for f in factors)
    stack, inputs, outputs = many(kind("stack")), many(kind("in")), many(kind("out"))
    contracted, batch = joined(product.contracted), joined(product.batch)
    if set(contracted) != set(inputs) or not set(batch) <= set(stack):
        return None
    rows = tuple(i for i in range(len(x_shape)) if i not in product.x_batch + product.x_contracted)
    row_sizes = tuple(x_shape[i] for i in rows)
    shared = tuple(f for f in stack if f in batch)
    behind = len(batch) + len(rows)
    of_x = Rearrange(
        product.x_batch + rows + product.x_contracted,
        sizes(batch) + row_sizes + sizes(contracted),
        tuple(batch.index(f) for f in shared)
        + tuple(range(len(batch), behind))
        + tuple(behind + contracted.index(f) for f in inputs),
        sizes(shared) + row_sizes + (math.prod(sizes(inputs)),),
    )
    free = joined(i for i in range(len(layout.axes)) if i not in product.contracted + product.batch)
    ref = {f: i for i, f in enumerate(stack)} | {f: len(stack) + len(rows) + i for i, f in enumerate(outputs)}
    kernel, own = tuple(ref[f] for f in free), tuple(range(len(stack), len(stack) + len(rows)))
    every = kind("stack")
    of_result = Rearrange(
        tuple(range(len(every) + len(rows) + 1)),
        sizes(stack) + row_sizes + sizes(outputs),
        tuple(ref[f] for f in batch) + (kernel + own if product.kernel_first else own + kernel),
        _result_shape(x_shape, layout, product),
    )
    return MatmulForm(of_x, of_result, sizes(every), tuple(f in batch for f in every))


def _result_shape(x_shape: Sequence[int], layout: Layout, product: Product) -> tuple[int, ...]:
    """The shape of the product's result."""
    shape = layout.shape
    free = [shape[i] for i in range(len(shape)) if i not in product.contracted + product.batch]
    own = [x_shape[i] for i in range(len(x_shape)) if i not in product.x_contracted + product.x_batch]
    return tuple([shape[i] for i in product.batch] + (free + own if product.kernel_first else own + free))


def laid_out(w: Array, layout: Layout, axes: Axes) -> Array:
    """A dense kernel [*stack, in, out] as the array that ``layout`` describes."""
    order = [f for kind in ("stack", "in", "out") for f in layout.factors if axes.kinds[f.axis] == kind]
    w = w.reshape([f.size for f in order])
    w = w.transpose([order.index(f) for factors in layout.axes for f in factors])
    return w.reshape(layout.shape)


def to_kernel(array: Any, axes: Axes) -> Any:
    """A parameter as [*stack, in, out], the inverse of ``laid_out`` for a parameter as it is."""
    order = [i for kind in ("stack", "in", "out") for i, k in enumerate(axes.kinds) if k == kind]
    stack = [array.shape[i] for i in order if axes.kinds[i] == "stack"]
    inputs = math.prod(array.shape[i] for i, kind in enumerate(axes.kinds) if kind == "in")
    return array.transpose(order).reshape(*stack, inputs, -1)
