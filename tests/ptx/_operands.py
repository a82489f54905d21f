"""An instruction's operands, and how one is compiled, once, to a function of a warp."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx._arithmetic import FUNCTIONS, SHIFTS
from ptx._machine import Warp
from ptx._program import Instruction, Program, Scope
from ptx._values import (
    DTYPES,
    FLOATS,
    LANES,
    PARAMETER_BASE,
    SPECIAL,
    Execute,
    Mask,
    Source,
)

UNORDERED_MODIFIERS = {"rz", "rm", "rp", "NaN", "xorsign", "relu", "oob", "cc"}  # not modelled: they change results


def split(text: str) -> list[str]:
    """Operands, separated by the commas that are in no brackets."""
    result, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            result.append("")
        else:
            result[-1] += letter
    return [operand.strip() for operand in result if operand.strip()]


class Operands:
    """Compiles one instruction. Subclasses have a method op_x for each opcode x.y.z; its ``parts`` are y and z."""

    def __init__(self, program: Program, scope: Scope, instruction: Instruction):
        self.program, self.scope, self.instruction = program, scope, instruction
        self.registers: set[int] = set()
        self.written: set[int] = set()

    def compile(self) -> str | None:
        """Fill in the instruction; returns the label it branches to, if any."""
        instruction = self.instruction
        words = re.match(r"(?:@(!?)([\w$%]+)\s+)?([\w.:]+)\s*(.*)$", instruction.text)
        if words is None:
            raise self.unknown()
        if words[2]:
            predicate = self.source(words[2], "pred")
            instruction.guard = (lambda warp: ~predicate(warp)) if words[1] else predicate
        name, *parts = words[3].split(".")
        operands = split(words[4])
        instruction.aligned = "sync" in parts or "aligned" in parts or name in ("bar", "barrier")
        target = None
        try:
            if name == "bra":
                target = operands[0]
            elif name in ("ret", "exit"):
                instruction.leaves = True
            elif method := getattr(self, f"op_{name}", None):
                instruction.execute = method(parts, operands)
            elif name in FUNCTIONS:
                instruction.execute = self.elementwise(name, parts, operands)
            else:
                raise self.unknown()
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise self.unknown() from error
        instruction.registers, instruction.written = frozenset(self.registers), frozenset(self.written)
        return target

    def unknown(self) -> NotImplementedError:
        return NotImplementedError(f"PTX at {self.instruction}")

    def register(self, name: str) -> tuple[int, np.dtype]:
        found = self.scope.find("registers", name)
        if found is None:
            raise self.unknown()
        self.registers.add(found[0])
        return found

    def source(self, operand: str, kind: str) -> Source:
        """What an operand is in each lane, as an array of the type `kind` (two columns for an x2 type)."""
        packed = kind.endswith("x2")
        dtype = DTYPES[kind.removesuffix("x2")]
        width = dtype.itemsize * (2 if packed else 1)
        if operand.startswith("!"):
            negated = self.source(operand[1:], kind)
            return lambda warp: ~negated(warp)
        if self.scope.find("registers", operand) is None:
            if operand.startswith("%"):
                if operand not in SPECIAL:
                    raise self.unknown()
                return lambda warp: warp.special[operand].astype(dtype)
            constant = self.constant(operand, kind, width)
            return lambda warp: constant
        index, raw = self.register(operand)
        if width > raw.itemsize:
            raise self.unknown()
        narrow = None if width == raw.itemsize else DTYPES[f"u{8 * width}"]
        same = dtype == raw

        def read(warp: Warp) -> np.ndarray:
            value = warp.registers[index]
            if value is None:
                value = warp.locate(index)
            if same:
                return value
            return (value if narrow is None else value.astype(narrow)).view(dtype)

        return (lambda warp: read(warp).reshape(LANES, 2)) if packed else read

    def constant(self, operand: str, kind: str, width: int) -> np.ndarray:
        dtype = DTYPES[kind.removesuffix("x2")]
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", operand):
            bits = np.array(int(match[1], 16), f"u{len(match[1]) // 2}")
            value = np.full(LANES, bits.view(f"f{len(match[1]) // 2}"))
            return value.astype(dtype) if kind in FLOATS else value.view(dtype)
        if operand in self.program.symbols:
            number: int = self.program.symbols[operand]
        elif operand in self.program.parameters:
            number = PARAMETER_BASE + self.program.parameters[operand][0]
        elif kind in FLOATS and "." in operand:
            return np.full(LANES, float(operand)).astype(dtype)
        else:
            number = int(operand.rstrip("U"), 0)
        if kind == "pred":
            return np.full(LANES, bool(number))
        value = np.full(LANES, number & (1 << 8 * width) - 1, f"u{width}").view(dtype)
        return value.reshape(LANES, -1) if kind.endswith("x2") else value

    def target(self, operand: str) -> Callable[[Warp, np.ndarray, Mask], None]:
        """Writes the lanes of the mask, extending narrower values by sign or zeros to the width of the register."""
        if operand == "_":
            return lambda warp, value, mask: None
        index, dtype = self.register(operand)
        self.written.add(index)
        signed = np.dtype(f"i{dtype.itemsize}")
        garbage = (
            np.zeros(LANES, dtype) if dtype.kind == "b" else np.full(LANES, 0xDEADBEEFDEADBEEF, np.uint64).astype(dtype)
        )

        def write(warp: Warp, value: np.ndarray, mask: Mask) -> None:
            if value.dtype != dtype:
                if value.ndim == 2:
                    value = np.ascontiguousarray(value).view(f"u{2 * value.dtype.itemsize}").ravel()
                elif value.dtype.itemsize < dtype.itemsize:
                    value = value.astype(signed if value.dtype.kind == "i" else dtype)
                value = value.view(dtype)
            registers = warp.registers
            if mask is not None:
                value = np.where(mask, value, garbage if registers[index] is None else registers[index])
            registers[index] = value

        return write

    def address(self, operand: str) -> Source:
        """A bracketed address, as int64 or uint64 in each lane."""
        match = re.fullmatch(r"\[\s*([\w$%]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if match is None:
            raise self.unknown()
        found = self.scope.find("registers", match[1])
        base = self.source(match[1], "u64" if found is None else f"u{8 * found[1].itemsize}")
        offset = np.uint64(int(match[2] or "0", 0) & 2**64 - 1)
        return lambda warp: base(warp).astype(np.uint64) + offset

    def simple(self, function: Callable[..., Any], operand: str, sources: Sequence[Source]) -> Execute:
        write = self.target(operand)
        if len(sources) == 1:
            (only,) = sources
            return lambda warp, mask: write(warp, function(only(warp)), mask)
        if len(sources) == 2:
            first, second = sources
            return lambda warp, mask: write(warp, function(first(warp), second(warp)), mask)
        return lambda warp, mask: write(warp, function(*[source(warp) for source in sources]), mask)

    def elementwise(self, name: str, parts: list[str], operands: list[str]) -> Execute:
        kind, function = parts[-1], FUNCTIONS[name]
        if (
            UNORDERED_MODIFIERS & set(parts)
            or (kind in FLOATS and "sat" in parts)
            or (name == "prmt" and kind != "b32")
        ):
            raise self.unknown()
        kinds = SHIFTS.get(name, ("",) * (len(operands) - 1))
        if len(kinds) != len(operands) - 1:
            raise self.unknown()
        sources = [self.source(operand, each or kind) for operand, each in zip(operands[1:], kinds, strict=True)]
        if "ftz" in parts:
            flush = lambda a: np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(a.dtype.type(0), a), a)
            plain, function = (
                function,
                lambda *values: flush(plain(*[flush(v) if v.dtype == np.float32 else v for v in values])),
            )
        return self.simple(function, operands[0], sources)

    def full(self, operand: str) -> None:
        if int(operand, 0) & 0xFFFFFFFF != 0xFFFFFFFF:
            raise self.unknown()
