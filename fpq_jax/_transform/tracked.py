"""What is known of a parameter on its way through a function, and what is done where it is used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fpq_jax._matmul.fp4_kernel.fragments import of_fragments
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._numerics.qtensor import Axes, dequantize
from fpq_jax._transform.axis_layout import Factor, Layout, Product, laid_out


class ParamRef(NamedTuple):
    """Which parameter, and which part of its stack. parts: by axis, (axis, start, stop). scans: of each scan over its
    stack that this is inside of, (which scan, where among the stack's axes the one is that it is over)."""

    path: str
    parts: tuple[tuple[int, int, int], ...] = ()
    scans: tuple[tuple[int, int], ...] = ()

    def cut(self, axis: int, start: int, size: int) -> "ParamRef":
        """A part of what this is."""
        begins = {part[0]: part[1] for part in self.parts}
        first = begins.get(axis, 0) + start
        others = [part for part in self.parts if part[0] != axis]
        return self._replace(parts=tuple(sorted([*others, (axis, first, first + size)])))


SharedRefs = tuple[ParamRef, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrackedParam:
    """A parameter on its way: a QTensor, which never moves, or an array, which is as ``layout`` says.

    axes: what the parameter's axes are, None while that is not known.
    """

    value: Any
    ref: ParamRef = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    axes: Axes | None = field(default=None, metadata={"static": True})

    @property
    def quantized(self) -> bool:
        return is_quantized(self.value)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def stack(self) -> tuple[Factor, ...]:
        """The factors of its stack, in the order of the parameter."""
        assert self.axes is not None
        return tuple(f for f in self.layout.factors if self.axes.kinds[f.axis] == "stack")

    def array(self) -> Array:
        """What it stands for."""
        if not self.quantized:
            return self.value
        assert self.axes is not None
        return laid_out(dequantize(of_fragments(self.value), self.dtype), self.layout, self.axes)

    def moved(self, layout: Layout, move: Callable[[Array], Array]) -> "TrackedParam":
        """With another layout, which ``move`` gives to an array."""
        return replace(self, layout=layout, value=self.value if self.quantized else move(self.value))

    def stack_axis(self, axis: int) -> Factor | None:
        """The factor that ``axis`` is, if it may be one axis of a stack as the parameter has it."""
        factors = self.layout.axes[axis]
        if len(factors) != 1 or len(factors[0].key) > 1:
            return None
        if self.axes is not None and self.axes.kinds[factors[0].axis] != "stack":
            return None
        return factors[0]


class UseHandler:
    """What is done where a followed parameter is used. records: whether ``product`` gives anything to record."""

    records = False

    def product(
        self, kernel: TrackedParam, x: Any, product: Product, scope: "TraceScope", bind: Callable[..., Any], dtype: Any
    ) -> Any:
        """The product's result in ``dtype``; ``bind``: of x and an array. None: it is not of inputs and a weight."""
        raise NotImplementedError

    def other(self, kernel: TrackedParam, use: str) -> None:
        """It is used as an array."""

    def part(self, kernel: TrackedParam, axis: Factor, start: Any, size: int) -> ParamRef:
        """The ref of what is cut out of its stack."""
        return kernel.ref


class Merge(NamedTuple):
    """How two records of the same kernels become one: each array of one with that of the other.

    neutral: changes nothing when it is merged. over: the same for all of an axis.
    """

    function: Callable[[Array, Array], Array]
    neutral: float
    over: Callable[..., Array]

    def __call__(self, one: Any, other: Any) -> Any:
        return jax.tree.map(self.function, one, other)

    def empty(self, shapes: Any) -> Any:
        """Records of these shapes that change nothing."""
        return jax.tree.map(lambda shape: jnp.full(shape.shape, self.neutral, shape.dtype), shapes)

    def into(self, records: dict[Any, Any], key: Any, value: Any) -> None:
        """Put a record to others, or merge it with the one of its key."""
        records[key] = self(records[key], value) if key in records else value


ADD = Merge(jnp.add, 0, jnp.sum)
MAXIMUM = Merge(jnp.maximum, -jnp.inf, jnp.max)


class Site(NamedTuple):
    """What is recorded of an input, and the kernels that see it."""

    refs: list[ParamRef]
    value: Any


class TraceScope:
    """What was computed at one level of a function, so that equal inputs are known to be one, and what was recorded."""

    def __init__(self, merge: Merge) -> None:
        self._merge = merge
        self._results: dict[Any, Any] = {}
        self._inputs: dict[Any, tuple[Any, dict[Any, Any]]] = {}
        self._records: dict[SharedRefs, Any] = {}
        self._sites: list[Site] = []
        self._alive: list[Any] = []  # so that no id is used twice

    def of_input(self, x: Any, how: Any) -> dict[Any, Any]:
        """A place to keep what depends on ``x``, taken in the way ``how``, alone."""
        return self._inputs.setdefault((id(x), how), (x, {}))[1]

    def once(self, key: Any, operands: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The result of an operation, the same one for the same operands."""
        whole = (key, tuple(map(id, operands)))
        if whole not in self._results:
            self._alive.append(operands)
            self._results[whole] = compute()
        return self._results[whole]

    def site(self, value: Any) -> Site:
        """A record of kernels whose names are added to it."""
        self._sites.append(Site([], value))
        return self._sites[-1]

    def record(self, refs: SharedRefs, value: Any) -> None:
        """A record of kernels; it merges with others of the same."""
        self._merge.into(self._records, refs, value)

    def records(self) -> dict[SharedRefs, Any]:
        """All of them, in the order in which the function comes to them."""
        sites, self._sites = self._sites, []
        for refs, value in sites:
            self.record(tuple(refs), value)
        return self._records
