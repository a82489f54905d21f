"""Follow parameters through any function to the products in which they are used.

A function is traced to a jaxpr, and the jaxpr is evaluated with some of its inputs being followed. What moves one
(transposing, reshaping, casting, taking an index of a stack) moves its layout; a product is handed to a UseHandler;
whatever else takes one is told to it and gets an array. Loops, branches and calls that one enters are evaluated with it
inside; everything else is bound as it was traced, custom derivatives and all.

A handler may record arrays at products, as in taking Hessians. What is recorded inside of a loop comes out of it: added
up over the steps, or, of a parameter that is scanned over, with an axis for them.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fpq_jax._transform.axis_layout import Product
from fpq_jax._transform.primitive_rules import PRIMITIVE_RULES, bind
from fpq_jax._transform.tracked import ADD, Merge, ParamRef, SharedRefs, TraceScope, TrackedParam, UseHandler


class Outcome(NamedTuple):
    """A function's results, and what the handler recorded."""

    outputs: list[Any]
    records: dict[SharedRefs, Any]


def interpret(jaxpr: Any, arguments: Sequence[Any], handler: UseHandler, merge: Merge = ADD) -> Outcome:
    """Evaluate a jaxpr; arguments may be tracked parameters, and results are those that come back as they were.

    ``merge``: two records of the same kernels.
    """
    interpreter = _Interpreter(handler, merge)
    outputs, records = interpreter.inside(jaxpr, arguments)
    unmoved = {id(argument) for argument in arguments}
    return Outcome([out if id(out) in unmoved else interpreter.array(out, "a result") for out in outputs], records)


class _Interpreter:
    def __init__(self, handler: UseHandler, merge: Merge):
        self.handler = handler
        self.merge = merge
        self.scope = TraceScope(merge)
        self.scans = 0
        # by jaxpr, and which of its operands are tracked
        self.called: dict[Any, tuple[list[ParamRef | None], Callable[..., Any]]] = {}

    def inside(self, jaxpr: Any, arguments: Sequence[Any]) -> Outcome:
        """Evaluate what is a function of its own, with records of its own."""
        outer, self.scope = self.scope, TraceScope(self.merge)
        try:
            outputs = self.run(jaxpr, arguments)
            return Outcome(outputs, self.scope.records())
        finally:
            self.scope = outer

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
        if not any(isinstance(operand, TrackedParam) for operand in operands):
            if name in _SAME_EVERYWHERE:
                return self.scope.once((name, str(eqn.params)), operands, lambda: bind(eqn, operands))
            return bind(eqn, operands)
        if (rule := _STRUCTURES.get(name)) is not None:
            return rule(self, eqn, operands)
        if name == "dot_general":
            if (result := self.product(eqn, operands)) is not None:
                return [result]
        elif (move := PRIMITIVE_RULES.get(name)) is not None and isinstance(operands[0], TrackedParam):
            if (moved := move(self.handler, eqn, operands)) is not None:
                return moved
        both = name == "dot_general" and all(isinstance(operand, TrackedParam) for operand in operands)
        use = "a product with another parameter" if both else name
        return bind(eqn, [self.array(operand, use) for operand in operands])

    def array(self, value: Any, use: str) -> Any:
        """A value as an array; the handler is told of a parameter that had to become one."""
        if not isinstance(value, TrackedParam):
            return value
        self.handler.other(value, use)
        return value.array()

    def product(self, eqn: Any, operands: list[Any]) -> Any:
        kernel_first = isinstance(operands[0], TrackedParam)
        kernel, x = operands if kernel_first else operands[::-1]
        if isinstance(x, TrackedParam) or not jnp.issubdtype(x.dtype, jnp.floating):
            return None
        multiply = lambda x, w: bind(eqn, [w, x] if kernel_first else [x, w])[0]
        product = Product.of(eqn.params["dimension_numbers"], kernel_first)
        with _precision(eqn.params["precision"]):
            return self.handler.product(kernel, x, product, self.scope, multiply, eqn.outvars[0].aval.dtype)

    def record(self, records: dict[SharedRefs, Any]) -> None:
        """Add what was recorded inside of something to what is known here."""
        for refs, value in records.items():
            self.scope.record(refs, value)

    # what a kernel is in from here on

    def call(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """A function that is called: jit, and functions with derivatives of their own."""
        constrained = lambda values, shardings: [
            jax.lax.with_sharding_constraint(value, sharding)
            if isinstance(sharding, jax.sharding.Sharding) and not isinstance(value, TrackedParam)
            else value
            for value, sharding in zip(values, shardings or [None] * len(values), strict=True)
        ]
        jaxpr = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
        operands = constrained(operands, eqn.params.get("in_shardings"))
        if self.handler.records or len(jaxpr.eqns) < _WORTH_A_CALL:
            outputs = self.run(jaxpr, operands)
        else:
            outputs = self.call_once_traced(jaxpr, operands)
        return constrained(outputs, eqn.params.get("out_shardings"))

    def call_once_traced(self, jaxpr: Any, operands: list[Any]) -> list[Any]:
        """What many layers call is traced once, with the refs that the first of them had."""
        own = [operand.ref if isinstance(operand, TrackedParam) else None for operand in operands]
        key = (id(jaxpr), tuple(ref is None for ref in own))
        if key not in self.called:
            function = lambda operands: self.inside(jaxpr, _renamed(operands, own)).outputs
            self.called[key] = own, jax.jit(function)
        first, function = self.called[key]
        outputs = function(_renamed(operands, [ref and ParamRef("") for ref in own]))
        back = dict(zip(first, own, strict=True))
        return _renamed(outputs, [back[out.ref] if isinstance(out, TrackedParam) else None for out in outputs])

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
        platforms = eqn.params.get("branches_platforms")
        if self.handler.records and platforms is not None and None in platforms:
            # one platform's own form may have other shapes; what is recorded is that of all others
            return self.run(jaxprs[platforms.index(None)], arguments)
        forwarded = [_forwarded(jaxpr).items() for jaxpr in jaxprs]
        same = dict(set.intersection(*map(set, forwarded)))
        branch = lambda jaxpr, empty, *arguments: self._filled(self.arrays_inside(jaxpr, arguments, same), empty)
        empty: dict[SharedRefs, Any] = {}
        if self.handler.records:
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
            if self.handler.records:
                for refs, value in asked(carry).records.items():
                    self.merge.into(records, refs, value)
            return outputs, records

        empty = self._empty(lambda *carry: step(carry)[1], *start) if self.handler.records else {}

        def body(state):
            carry, records = state
            outputs, new = step(carry)
            return outputs, self._merged(records, new)

        outputs, records = jax.lax.while_loop(lambda state: asked(state[0]).outputs[0], body, (start, empty))
        self.record(records)
        if self.handler.records:  # it is asked once more than there are steps
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
            each: dict[Any, Any] = {}
            every: dict[SharedRefs, Any] = {}
            for refs, value in records.items():
                # a stack's own records have an axis for the steps, all others are merged
                inside = [ref for ref in refs if ref.scans and ref.scans[-1][0] == this]
                for where in {ref.scans[-1][1] for ref in inside}:
                    own = (ref._replace(scans=ref.scans[:-1]) for ref in inside if ref.scans[-1][1] == where)
                    self.merge.into(each, (tuple(own), where), value)
                if others := tuple(ref for ref in refs if ref not in inside):
                    self.merge.into(every, others, value)
            return outputs, each, every

        stacked = [x.value if isinstance(x, TrackedParam) else x for x in scanned]
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stacked)
        empty = self._empty(lambda *carry: step(carry, _one_of(one))[2], *start) if self.handler.records else {}

        def body(state, values):
            carry, records = state
            outputs, each, every = step(carry, values)
            return (outputs[: len(start)], self._merged(records, every)), (outputs[len(start) :], each)

        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        (carry, every), (ys, each) = jax.lax.scan(body, (start, empty), stacked, **options)
        self.record(every)
        to = lambda where: lambda a: jnp.moveaxis(a, 0, where)
        self.record({own: jax.tree.map(to(where), value) for (own, where), value in each.items()})
        return [*carry, *ys]

    def _scannable(self, value: Any) -> Any:
        """With the stack that is scanned over in front."""
        if not isinstance(value, TrackedParam):
            return value
        factor = value.stack_axis(0)
        if factor is None:
            return self.array(value, "a scan over its inputs or outputs")
        if not value.quantized or (at := value.stack.index(factor)) == 0:
            return value
        return replace(value, value=jax.tree.map(lambda a: jnp.moveaxis(a, at, 0), value.value))

    def _empty(self, function: Callable[..., dict[SharedRefs, Any]], *arguments: Any) -> dict[SharedRefs, Any]:
        """What merges with the function's records to what they are."""
        return self.merge.empty(jax.eval_shape(function, *arguments))

    def _merged(self, records: dict[SharedRefs, Any], new: dict[SharedRefs, Any]) -> dict[SharedRefs, Any]:
        return {refs: self.merge(value, new[refs]) for refs, value in records.items()}

    def _filled(self, outcome: Outcome, empty: dict[SharedRefs, Any]) -> Outcome:
        return outcome._replace(records=empty | outcome.records)


def _renamed(values: Sequence[Any], refs: Sequence[ParamRef | None]) -> list[Any]:
    return [v if ref is None else replace(v, ref=ref) for v, ref in zip(values, refs, strict=True)]


def _step_of(x: Any, value: Any, scan: int) -> Any:
    """What a step of a scan sees of ``x``."""
    if not isinstance(x, TrackedParam):
        return value
    where = 0 if x.axes is None else x.stack.index(x.layout.axes[0][0])
    ref = x.ref._replace(scans=(*x.ref.scans, (scan, where)))
    return replace(x, value=value, ref=ref, layout=x.layout.without(0))


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


def _one_of(shapes: Any) -> Any:
    """Arrays of these shapes, inside of a trace for shapes alone."""
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


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
_STRUCTURES: dict[str, Callable[[_Interpreter, Any, list[Any]], list[Any]]] = {
    "jit": _Interpreter.call,
    "pjit": _Interpreter.call,
    "closed_call": _Interpreter.call,
    "core_call": _Interpreter.call,
    "custom_jvp_call": _Interpreter.call,
    "custom_vjp_call": _Interpreter.call,
    "remat2": _Interpreter.remat,
    "cond": _Interpreter.cond,
    "while": _Interpreter.while_loop,
    "scan": _Interpreter.scan,
}
