"""A compiled XLA program as a list of launches of GPU kernels, read from its HLO text."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

KernelKind = Literal["fp8_matmul", "fp4_matmul", "matmul", "fusion", "copy", "collective", "other"]

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# what launches nothing
_NO_KERNELS = frozenset({"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "partition-id"})
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<operands>.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")
_LAYOUT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Launch:
    """Describes one launch of a compiled program: a kernel of XLA or of a library, a copy or a collective.

    Attributes:
        kind: what it is; ``"fp4_matmul"`` is this library's own GPU kernel.
        name: its name in the HLO.
        scope: where it comes from, for instance ``"jit(step)/lorc/dot_general"``.
        output: type of its output, for instance ``"bf16[16,4096]"``.
        operands: of a matrix product, the types of the two factors.
        op: HLO's operation, ``"custom-call"`` for a library's kernel, ``"all-reduce"`` and the like for a collective.

    Example:
        >>> from fpq_jax.debug import Program
        >>> compiled = jax.jit(lambda x: jnp.tanh(x) + 1).lower(jnp.ones((2, 3))).compile()
        >>> [(launch.kind, launch.output) for launch in Program.of(compiled).launches]
        [('fusion', 'f32[2,3]')]
    """

    kind: KernelKind
    name: str
    scope: str
    output: str
    operands: tuple[str, ...] = ()
    op: str = "fusion"


@dataclass(frozen=True)
class Program:
    """Describes a compiled program: what it launches, and the memory of a device that it needs.

    Attributes:
        launches: the launches of GPU kernels in order.
        temp_bytes: size of the temporary buffers.
        argument_bytes: size of the arguments.
        alias_bytes: how much of the outputs is written over donated arguments.
        hlo: the program's optimized HLO.
        ptx: assembly of XLA's own kernels, ``""`` where it was not kept.

    Example:
        >>> from fpq_jax.debug import Program
        >>> program = Program.of(jax.jit(jnp.tanh, donate_argnums=0).lower(jnp.ones((2, 3))).compile())
        >>> program.argument_bytes, program.alias_bytes
        (24, 24)
        >>> program.matmuls("matmul")
        []
    """

    launches: tuple[Launch, ...]
    temp_bytes: int
    argument_bytes: int
    alias_bytes: int
    hlo: str
    ptx: str = ""

    @classmethod
    def of(cls, compiled: Any, ptx: str = "") -> "Program":
        """Reads what an executable consists of.

        Args:
            compiled: a ``jax.stages.Compiled``, for any device.
            ptx: assembly to keep with it.

        Returns:
            The program.
        """
        hlo, memory = compiled.as_text(), compiled.memory_analysis()
        return cls(
            launches=tuple(_launches(hlo)),
            temp_bytes=memory.temp_size_in_bytes,
            argument_bytes=memory.argument_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            hlo=hlo,
            ptx=ptx,
        )

    def matmuls(self, kind: KernelKind, *, but: tuple[str, ...] = ()) -> list[Launch]:
        """Lists the matrix products of a kind.

        Args:
            kind: ``"fp8_matmul"``, ``"fp4_matmul"`` or ``"matmul"``.
            but: scopes whose products are left out.

        Returns:
            The launches.
        """
        return [k for k in self.launches if k.kind == kind and not any(f"/{scope}/" in k.scope for scope in but)]

    def __str__(self) -> str:
        count = Counter(launch.kind for launch in self.launches)
        scopes = Counter(_scope_of(k.scope) for k in self.matmuls("matmul"))
        others = ", ".join(f"{n} in {scope}" for scope, n in sorted(scopes.items()))
        collectives = f"{count['collective']} collectives, " if count["collective"] else ""
        fp4 = f"{count['fp4_matmul']} of our own kernel, " if count["fp4_matmul"] else ""
        return (
            f"{len(self.launches)} launches: {fp4}{count['fp8_matmul']} FP8 products, {count['matmul']} other products"
            f"{f' ({others})' if others else ''}, {count['fusion']} fusions, {count['copy']} copies, "
            f"{collectives}{count['other']} others; {self.argument_bytes:,} bytes of arguments, "
            f"{self.temp_bytes:,} of temporaries"
        )


def _scope_of(op_name: str) -> str:
    known = [scope for scope in ("attention", "lorc", "head") if f"/{scope}/" in op_name]
    return known[0] if known else "linears"


def _launches(hlo: str) -> list[Launch]:
    computations, entry = _computations(hlo)
    return _launched(computations, entry)


def _computations(hlo: str) -> tuple[dict[str, list[re.Match[str]]], str]:
    """The instructions of each computation, and the entry's name."""
    computations: dict[str, list[re.Match[str]]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if started := _COMPUTATION.match(line):
            name = started[1]
            computations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif instruction := _INSTRUCTION.match(line):
            computations[name].append(instruction)
    return computations, entry


def _launched(computations: dict[str, list[re.Match[str]]], name: str) -> list[Launch]:
    types = {i["name"]: i["type"] for i in computations[name]}
    scopes = {i["name"]: _op_name(i["operands"]) for i in computations[name]}
    launches: list[Launch] = []
    for instruction in computations[name]:
        op, rest = instruction["op"], instruction["operands"]
        called = [c for c in _CALLED.findall(rest) if c in computations]
        if op in _NO_KERNELS or op.endswith("-done"):
            continue
        if op in ("call", "while", "conditional", "async-start"):
            launches += [launch for c in called for launch in _launched(computations, c)]
            continue
        kind: KernelKind = "copy" if op in ("copy", "copy-start", "transpose") else "other"
        if op.removesuffix("-start") in _COLLECTIVES:
            kind, op = "collective", op.removesuffix("-start")
        factors: tuple[str, ...] = ()
        own = "mosaic_gpu" in rest and "/fp4_matmul/" in _op_name(rest)
        if op == "custom-call" and ("__cublas" in rest or own):
            factors = _operand_types(rest, types)[:2]
        elif op == "fusion":
            kind, factors = "fusion", next((found for c in called if (found := _dot(computations, c))), ())
        if factors:
            kind = "fp8_matmul" if all(f.startswith("f8") for f in factors) else "fp4_matmul" if own else "matmul"
        # a rewritten instruction may have lost its own name: what it is computed from tells where it is from
        scope = scopes[instruction["name"]] or next((scopes[n] for n in _operand_names(rest) if scopes.get(n)), "")
        launches.append(Launch(kind, instruction["name"], scope, _LAYOUT.sub("", instruction["type"]), factors, op))
    return launches


def _op_name(rest: str) -> str:
    found = re.search(r'op_name="([^"]*)"', rest)
    return found[1] if found else ""


def _dot(computations: dict[str, list[re.Match[str]]], name: str) -> tuple[str, ...]:
    """The types of what a fusion multiplies as matrices, with those of fusions nested in it; empty if it does not."""
    types = {i["name"]: i["type"] for i in computations[name]}
    for instruction in computations[name]:
        if instruction["op"] == "dot":
            return _operand_types(instruction["operands"], types)[:2]
        for called in _CALLED.findall(instruction["operands"]):
            if called in computations and (found := _dot(computations, called)):
                return found
    return ()


def _operand_types(operands: str, types: dict[str, str]) -> tuple[str, ...]:
    return tuple(_LAYOUT.sub("", types.get(name, "?")) for name in _operand_names(operands))


def _operand_names(operands: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", operands.partition(")")[0])
