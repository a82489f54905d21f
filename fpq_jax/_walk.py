"""Follow parameters through any function to the products in which they are used.

A function is traced to a jaxpr, and the jaxpr is evaluated with some of its inputs being followed. What moves one
(transposing, reshaping, casting, taking an index of a stack) moves its layout; a product is handed to the rules;
whatever else takes one is told to them and gets an array. Loops, branches and calls that one enters are evaluated with
it inside; everything else is bound as it was traced, custom derivatives and all.

Rules may record arrays at products, as in taking Hessians. What is recorded inside of a loop comes out of it: added up
over the steps, or, of a parameter that is scanned over, with an axis for them.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fpq_jax._layout import Factor, Layout, Product, laid_out
from fpq_jax._qtensor import Axes, QTensor, dequantize


class Place(NamedTuple):
    """Which parameter, and which part of its stack. parts: by axis, (axis, start, stop). scans: of each scan over its
    stack that this is inside of, (which scan, where among the stack's axes the one is that it is over)."""

    path: str
    parts: tuple[tuple[int, int, int], ...] = ()
    scans: tuple[tuple[int, int], ...] = ()

    def cut(self, axis: int, start: int, size: int) -> "Place":
        """A part of what this is."""
        begins = {part[0]: part[1] for part in self.parts}
        first = begins.get(axis, 0) + start
        others = [part for part in self.parts if part[0] != axis]
        return self._replace(parts=tuple(sorted([*others, (axis, first, first + size)])))


Together = tuple[Place, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Followed:
    """A parameter on its way: a QTensor, which never moves, or an array, which is as ``layout`` says.

    axes: what the parameter's axes are, None while that is not known.
    """

    value: Any
    place: Place = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    axes: Axes | None = field(default=None, metadata={"static": True})

    @property
    def quantized(self) -> bool:
        return isinstance(self.value, QTensor)

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
        return laid_out(dequantize(self.value, self.dtype), self.layout, self.axes)

    def moved(self, layout: Layout, move: Callable[[Array], Array]) -> "Followed":
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


class Rules:
    """What is done where a Followed is used. records: whether ``product`` gives anything to record."""

    records = False

    def product(
        self, kernel: Followed, x: Any, product: Product, known: "Known", bind: Callable[..., Any], dtype: Any
    ) -> Any:
        """The product's result in ``dtype``; ``bind``: of x and an array. None: it is not of inputs and a weight."""
        raise NotImplementedError

    def other(self, kernel: Followed, use: str) -> None:
        """It is used as an array."""

    def part(self, kernel: Followed, axis: Factor, start: Any, size: int) -> Place:
        """The place of what is cut out of its stack."""
        return kernel.place


Merge = Callable[[Array, Array], Array]


class Site(NamedTuple):
    """What is recorded of an input, and the kernels that see it."""

    places: list[Place]
    value: Array


class Known:
    """What was computed at one level of a function, so that equal inputs are known to be one, and what was recorded."""

    def __init__(self, merge: Merge) -> None:
        self._merge = merge
        self._results: dict[Any, Any] = {}
        self._inputs: dict[Any, tuple[Any, dict[Any, Any]]] = {}
        self._records: dict[Together, Array] = {}
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

    def site(self, value: Array) -> Site:
        """A record of kernels whose names are added to it."""
        self._sites.append(Site([], value))
        return self._sites[-1]

    def record(self, places: Together, value: Array) -> None:
        """A record of kernels; it merges with others of the same."""
        add(self._records, places, value, self._merge)

    def records(self) -> dict[Together, Array]:
        """All of them."""
        while self._sites:
            places, value = self._sites.pop()
            self.record(tuple(places), value)
        return self._records


def add(records: dict[Any, Array], key: Any, value: Array, merge: Merge) -> None:
    """Put a record to others, or merge it with the one of its key."""
    records[key] = merge(records[key], value) if key in records else value


class Outcome(NamedTuple):
    """A function's results, and what rules recorded."""

    outputs: list[Any]
    records: dict[Together, Array]


def walk(jaxpr: Any, arguments: Sequence[Any], rules: Rules, merge: Merge = jnp.add) -> Outcome:
    """Evaluate a jaxpr; arguments may be Followed, and results are those that come back as they were.

    ``merge``: two records of the same kernels.
    """
    walker = _Walk(rules, merge)
    outputs, records = walker.inside(jaxpr, arguments)
    unmoved = {id(argument) for argument in arguments}
    return Outcome([out if id(out) in unmoved else walker.array(out, "a result") for out in outputs], records)


class _Walk:
    def __init__(self, rules: Rules, merge: Merge):
        self.rules = rules
        self.merge = merge
        self.known = Known(merge)
        self.scans = 0
        self.called: dict[int, tuple[list[Place | None], Callable[..., Any]]] = {}  # by jaxpr

    def inside(self, jaxpr: Any, arguments: Sequence[Any]) -> Outcome:
        """Evaluate what is a function of its own, with records of its own."""
        outer, self.known = self.known, Known(self.merge)
        try:
            outputs = self.run(jaxpr, arguments)
            return Outcome(outputs, self.known.records())
        finally:
            self.known = outer

    def arrays_inside(self, jaxpr: Any, arguments: Sequence[Any], same: Any = ()) -> Outcome:
        """``inside``, with arrays for results, and None for those in ``same``."""
        outputs, records = self.inside(jaxpr, arguments)
        use = "a result of a loop or a branch"
        return Outcome([None if i in same else self.array(out, use) for i, out in enumerate(outputs)], records)

    def run(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        consts = getattr(jaxpr, "consts", ())
        values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
        read = lambda atom: atom.val if hasattr(atom, "val") else values[atom]
        within: Any = None
        with ExitStack() as scope:
            for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
                # the names and options that it was traced under; entered where they change
                context = (str(eqn.source_info.name_stack), eqn.ctx)
                if context != within:
                    scope.close()
                    if context[0]:
                        scope.enter_context(jax.named_scope(context[0]))
                    scope.enter_context(eqn.ctx.manager)
                    within = context
                results = self.evaluate(eqn, [read(atom) for atom in eqn.invars])
                values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def evaluate(self, eqn: Any, operands: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if not any(isinstance(operand, Followed) for operand in operands):
            if name in _SAME_EVERYWHERE:
                return self.known.once((name, str(eqn.params)), operands, lambda: _bind(eqn, operands))
            return _bind(eqn, operands)
        if (rule := _STRUCTURES.get(name)) is not None:
            return rule(self, eqn, operands)
        if name == "dot_general":
            if (result := self.product(eqn, operands)) is not None:
                return [result]
        elif (move := _MOVES.get(name)) is not None and isinstance(operands[0], Followed):
            if (moved := move(self, eqn, operands)) is not None:
                return moved
        both = name == "dot_general" and all(isinstance(operand, Followed) for operand in operands)
        use = "a product with another parameter" if both else name
        return _bind(eqn, [self.array(operand, use) for operand in operands])

    def array(self, value: Any, use: str) -> Any:
        """A value as an array; the rules are told of a Followed that had to become one."""
        if not isinstance(value, Followed):
            return value
        self.rules.other(value, use)
        return value.array()

    def product(self, eqn: Any, operands: list[Any]) -> Any:
        kernel_first = isinstance(operands[0], Followed)
        kernel, x = operands if kernel_first else operands[::-1]
        if isinstance(x, Followed) or not jnp.issubdtype(x.dtype, jnp.floating):
            return None
        bind = lambda x, w: _bind(eqn, [w, x] if kernel_first else [x, w])[0]
        product = Product.of(eqn.params["dimension_numbers"], kernel_first)
        with _precision(eqn.params["precision"]):
            return self.rules.product(kernel, x, product, self.known, bind, eqn.outvars[0].aval.dtype)

    def record(self, records: dict[Together, Array]) -> None:
        """Add what was recorded inside of something to what is known here."""
        for places, value in records.items():
            self.known.record(places, value)

    # what a kernel is in from here on

    def call(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """A function that is called: jit, and functions with derivatives of their own."""
        constrained = lambda values, shardings: [
            jax.lax.with_sharding_constraint(value, sharding)
            if isinstance(sharding, jax.sharding.Sharding) and not isinstance(value, Followed)
            else value
            for value, sharding in zip(values, shardings or [None] * len(values), strict=True)
        ]
        jaxpr = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
        operands = constrained(operands, eqn.params.get("in_shardings"))
        if self.rules.records or len(jaxpr.eqns) < _WORTH_A_CALL:
            outputs = self.run(jaxpr, operands)
        else:
            outputs = self.call_once_traced(jaxpr, operands)
        return constrained(outputs, eqn.params.get("out_shardings"))

    def call_once_traced(self, jaxpr: Any, operands: list[Any]) -> list[Any]:
        """What many layers call is traced once, with the places that the first of them had."""
        own = [operand.place if isinstance(operand, Followed) else None for operand in operands]
        if id(jaxpr) not in self.called:
            function = lambda operands: self.inside(jaxpr, _renamed(operands, own)).outputs
            self.called[id(jaxpr)] = own, jax.jit(function)
        first, function = self.called[id(jaxpr)]
        outputs = function(_renamed(operands, [place and Place("") for place in own]))
        back = dict(zip(first, own, strict=True))
        return _renamed(outputs, [back[out.place] if isinstance(out, Followed) else None for out in outputs])

    def remat(self, eqn: Any, operands: list[Any]) -> list[Any]:
        jaxpr = eqn.params["jaxpr"]
        same = _forwarded(jaxpr)
        again = partial(jax.checkpoint, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        function = again(lambda *arguments: self.arrays_inside(jaxpr, arguments, same))
        outputs, records = function(*operands)
        self.record(records)
        return _with_forwarded(outputs, same, operands)

    def cond(self, eqn: Any, operands: list[Any]) -> list[Any]:
        index, *arguments = operands
        jaxprs = eqn.params["branches"]
        forwarded = [_forwarded(jaxpr).items() for jaxpr in jaxprs]
        same = dict(set.intersection(*map(set, forwarded)))
        branch = lambda jaxpr, empty, *arguments: self._filled(self.arrays_inside(jaxpr, arguments, same), empty)
        empty: dict[Together, Array] = {}
        if self.rules.records:
            for jaxpr in jaxprs:
                empty |= self._empty(lambda *a, jaxpr=jaxpr: self.arrays_inside(jaxpr, a, same).records, *arguments)
        branches = [partial(branch, jaxpr, empty) for jaxpr in jaxprs]
        outputs, records = jax.lax.switch(index, branches, *arguments)
        self.record(records)
        return _with_forwarded(outputs, same, arguments)

    def while_loop(self, eqn: Any, operands: list[Any]) -> list[Any]:
        p = eqn.params
        cond_end = p["cond_nconsts"]
        end = cond_end + p["body_nconsts"]
        in_cond, in_body, start = operands[:cond_end], operands[cond_end:end], operands[end:]
        start = [self.array(value, "a while loop's carry") for value in start]
        asked = lambda carry: self.inside(p["cond_jaxpr"], [*in_cond, *carry])

        def step(carry):
            outputs, records = self.arrays_inside(p["body_jaxpr"], [*in_body, *carry])
            if self.rules.records:
                for places, value in asked(carry).records.items():
                    add(records, places, value, self.merge)
            return outputs, records

        empty = self._empty(lambda *carry: step(carry)[1], *start) if self.rules.records else {}

        def body(state):
            carry, records = state
            outputs, new = step(carry)
            return outputs, self._merged(records, new)

        outputs, records = jax.lax.while_loop(lambda state: asked(state[0]).outputs[0], body, (start, empty))
        self.record(records)
        if self.rules.records:  # it is asked once more than there are steps
            self.record(asked(outputs).records)
        return outputs

    def scan(self, eqn: Any, operands: list[Any]) -> list[Any]:
        consts, start, xs = _scan_groups(eqn.params, operands)
        start = [self.array(value, "a scan's carry") for value in start]
        scanned = [self._scannable(x) for x in xs]
        self.scans += 1
        this = self.scans

        def step(carry, values):
            inner = [_step_of(x, value, this) for x, value in zip(scanned, values, strict=True)]
            outputs, records = self.arrays_inside(eqn.params["jaxpr"], [*consts, *carry, *inner])
            each: dict[Any, Array] = {}
            every: dict[Together, Array] = {}
            for places, value in records.items():
                # a stack's own records have an axis for the steps, all others are merged
                inside = [place for place in places if place.scans and place.scans[-1][0] == this]
                for where in {place.scans[-1][1] for place in inside}:
                    own = (place._replace(scans=place.scans[:-1]) for place in inside if place.scans[-1][1] == where)
                    add(each, (tuple(own), where), value, self.merge)
                if others := tuple(place for place in places if place not in inside):
                    add(every, others, value, self.merge)
            return outputs, each, every

        stacked = [x.value if isinstance(x, Followed) else x for x in scanned]
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stacked)
        empty = self._empty(lambda *carry: step(carry, one_of(one))[2], *start) if self.rules.records else {}

        def body(state, values):
            carry, records = state
            outputs, each, every = step(carry, values)
            return (outputs[: len(start)], self._merged(records, every)), (outputs[len(start) :], each)

        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        (carry, every), (ys, each) = jax.lax.scan(body, (start, empty), stacked, **options)
        self.record(every)
        self.record({own: jnp.moveaxis(value, 0, where) for (own, where), value in each.items()})
        return [*carry, *ys]

    def _scannable(self, value: Any) -> Any:
        """With the stack that is scanned over in front."""
        if not isinstance(value, Followed):
            return value
        factor = value.stack_axis(0)
        if factor is None:
            return self.array(value, "a scan over its inputs or outputs")
        if not value.quantized or (at := value.stack.index(factor)) == 0:
            return value
        return replace(value, value=jax.tree.map(lambda a: jnp.moveaxis(a, at, 0), value.value))

    def _empty(self, function: Callable[..., dict[Together, Array]], *arguments: Any) -> dict[Together, Array]:
        """What merges with the function's records to what they are."""
        return empty(jax.eval_shape(function, *arguments), self.merge)

    def _merged(self, records: dict[Together, Array], new: dict[Together, Array]) -> dict[Together, Array]:
        return {places: self.merge(value, new[places]) for places, value in records.items()}

    def _filled(self, outcome: Outcome, empty: dict[Together, Array]) -> Outcome:
        return outcome._replace(records=empty | outcome.records)

    # what leaves a kernel one

    def reshape(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
        kernel = operands[0]
        layout = kernel.layout.reshaped(eqn.outvars[0].aval.shape)
        return None if layout is None else [kernel.moved(layout, lambda w: _bind(eqn, [w])[0])]

    def broadcast(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
        kernel, where = operands[0], eqn.params["broadcast_dimensions"]
        new = [size for i, size in enumerate(eqn.outvars[0].aval.shape) if i not in where]
        # axes of size 1 may come between
        same = list(where) == sorted(where) and [eqn.outvars[0].aval.shape[i] for i in where] == list(kernel.shape)
        return self.reshape(eqn, operands) if same and all(size == 1 for size in new) else None

    def transpose(self, eqn: Any, operands: list[Any]) -> list[Any]:
        kernel = operands[0]
        return [kernel.moved(kernel.layout.transposed(eqn.params["permutation"]), lambda w: _bind(eqn, [w])[0])]

    def cast(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
        dtype = eqn.outvars[0].aval.dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return [replace(operands[0].moved(operands[0].layout, lambda w: _bind(eqn, [w])[0]), dtype=dtype)]

    def same(self, eqn: Any, operands: list[Any]) -> list[Any]:
        kernel = operands[0]
        return [kernel.moved(kernel.layout, lambda w: _bind(eqn, [w])[0])]

    def barrier(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """Each operand as it is; arrays are behind the barrier, and so are those of QTensors."""
        values = [operand.value if isinstance(operand, Followed) else operand for operand in operands]
        return [
            replace(operand, value=done) if isinstance(operand, Followed) else done
            for operand, done in zip(operands, jax.lax.optimization_barrier(values), strict=True)
        ]

    def slice(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
        kernel, p = operands[0], eqn.params
        if p["strides"] is not None and any(stride != 1 for stride in p["strides"]):
            return None
        sizes = [stop - start for start, stop in zip(p["start_indices"], p["limit_indices"], strict=True)]
        cut = lambda w: _bind(eqn, [w])[0]
        part = self._part(kernel, sizes, p["start_indices"], cut)
        return None if part is None else [part]

    def dynamic_slice(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
        kernel, *starts = operands
        if any(isinstance(start, Followed) for start in starts):
            return None
        cut = lambda w: _bind(eqn, [w, *starts])[0]
        part = self._part(kernel, list(eqn.params["slice_sizes"]), starts, cut)
        return None if part is None else [part]

    def split(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
        kernel, axis, parts = operands[0], eqn.params["axis"], []
        start = 0
        for i, size in enumerate(map(int, eqn.params["sizes"])):
            sizes, starts = list(kernel.shape), [0] * len(kernel.shape)
            sizes[axis], starts[axis] = size, start
            parts.append(self._part(kernel, sizes, starts, partial(_nth, eqn, i)))
            start += size
        return None if any(part is None for part in parts) else parts

    def unstack(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
        kernel, axis, parts = operands[0], eqn.params["axis"], []
        for i in range(kernel.shape[axis]):
            sizes, starts = list(kernel.shape), [0] * len(kernel.shape)
            sizes[axis], starts[axis] = 1, i
            cut = partial(jax.lax.slice_in_dim, start_index=i, limit_index=i + 1, axis=axis)
            part = self._part(kernel, sizes, starts, cut)
            if part is None:
                return None
            layout = part.layout.reshaped(part.shape[:axis] + part.shape[axis + 1 :])
            if layout is None:
                return None
            parts.append(part.moved(layout, lambda w: jnp.squeeze(w, axis)))
        return parts

    def _part(self, kernel: Followed, sizes: list[int], starts: Any, cut: Callable[[Array], Array]) -> Followed | None:
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
        place = self.rules.part(kernel, factor, start, size)
        return replace(kernel, place=place, layout=Layout(tuple(axes)), value=value if kernel.quantized else cut(value))


def _renamed(values: Sequence[Any], places: Sequence[Place | None]) -> list[Any]:
    return [v if place is None else replace(v, place=place) for v, place in zip(values, places, strict=True)]


def _step_of(x: Any, value: Any, scan: int) -> Any:
    """What a step of a scan sees of ``x``."""
    if not isinstance(x, Followed):
        return value
    where = 0 if x.axes is None else x.stack.index(x.layout.axes[0][0])
    place = x.place._replace(scans=(*x.place.scans, (scan, where)))
    return replace(x, value=value, place=place, layout=x.layout.without(0))


def empty(shapes: dict[Together, Any], merge: Merge) -> dict[Together, Array]:
    """Records of these shapes that change nothing when they are merged."""
    neutral = 0 if merge is jnp.add else -jnp.inf
    return {places: jnp.full(shape.shape, neutral, shape.dtype) for places, shape in shapes.items()}


def _forwarded(jaxpr: Any) -> dict[int, int]:
    """Results that are arguments as they came: by a result's index, the argument's."""
    arguments = {id(var): i for i, var in enumerate(jaxpr.invars)}
    return {i: arguments[id(out)] for i, out in enumerate(jaxpr.outvars) if id(out) in arguments}


def _with_forwarded(outputs: Sequence[Any], same: dict[int, int], arguments: Sequence[Any]) -> list[Any]:
    return [arguments[same[i]] if i in same else out for i, out in enumerate(outputs)]


def _precision(precision: Any) -> Any:
    """What a product was traced with, for what takes its place."""
    if not isinstance(precision, tuple) or precision[0] is None:
        return nullcontext()
    return jax.default_matmul_precision(precision[0].name.lower())


def one_of(shapes: Any) -> Any:
    """Arrays of these shapes, inside of a trace for shapes alone."""
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    bound = eqn.primitive.get_bind_params(eqn.params)
    # older JAX: (functions, parameters)
    functions, params = bound if isinstance(bound, tuple) else ([], bound)
    results = eqn.primitive.bind(*functions, *operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _nth(eqn: Any, i: int, operand: Any) -> Any:
    return _bind(eqn, [operand])[i]


def _scan_groups(params: dict[str, Any], operands: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """A scan's operands: constants, the carry, and what is scanned over."""
    if "num_consts" in params:
        first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
        return operands[:first], operands[first:second], operands[second:]
    consts, carry, xs = params["ft_in"].update(operands).unpack()  # jax 0.11
    return list(consts.vals), list(carry.vals), list(xs.vals)


_WORTH_A_CALL = 12  # equations of a function that is traced once for all its calls, not inlined
_SAME_EVERYWHERE = frozenset(
    ("convert_element_type", "reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "copy")
)
_STRUCTURES: dict[str, Callable[[_Walk, Any, list[Any]], list[Any]]] = {
    "jit": _Walk.call,
    "pjit": _Walk.call,
    "closed_call": _Walk.call,
    "core_call": _Walk.call,
    "custom_jvp_call": _Walk.call,
    "custom_vjp_call": _Walk.call,
    "remat2": _Walk.remat,
    "cond": _Walk.cond,
    "while": _Walk.while_loop,
    "scan": _Walk.scan,
}
_MOVES: dict[str, Callable[[_Walk, Any, list[Any]], list[Any] | None]] = {
    "transpose": _Walk.transpose,
    "reshape": _Walk.reshape,
    "squeeze": _Walk.reshape,
    "expand_dims": _Walk.reshape,
    "broadcast_in_dim": _Walk.broadcast,
    "convert_element_type": _Walk.cast,
    "copy": _Walk.same,
    "copy_p": _Walk.same,
    "device_put": _Walk.same,
    "name": _Walk.same,
    "stop_gradient": _Walk.same,
    "sharding_constraint": _Walk.same,
    "optimization_barrier": _Walk.barrier,
    "slice": _Walk.slice,
    "dynamic_slice": _Walk.dynamic_slice,
    "split": _Walk.split,
    "unstack": _Walk.unstack,
}
