"""Arithmetic, memory and the synchronization of threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx._arithmetic import COMPARE, LOGIC, convert, high, look_up, widened
from ptx._machine import Warp
from ptx._memory import NamedBarrier
from ptx._operands import Operands, split
from ptx._values import (
    DTYPES,
    FLOATS,
    LANE,
    LANES,
    PARAMETER_BASE,
    REGISTERS,
    SHARED_WINDOW,
    UNFENCED,
    VISIBLE,
    Execute,
    KernelError,
    Mask,
    uniform,
)


class Instructions(Operands):
    """Instructions of threads and warps."""

    def op_mad(self, parts: list[str], operands: list[str]) -> Execute:
        """mul and mad: the low or high half of integer products, all of it (wide), or floats."""
        kind, several = parts[-1], len(operands) == 4
        if kind in FLOATS or kind.endswith("x2"):
            return self.elementwise("fma" if several else "times", parts, operands)
        wide = f"{kind[0]}{2 * int(kind[1:])}" if "wide" in parts else kind
        products: dict[str, Callable[..., Any]] = {"wide": widened, "hi": high, "lo": np.multiply}
        function = products[parts[0]]
        sources = [self.source(operand, kind) for operand in operands[1:3]]
        if not several:
            return self.simple(function, operands[0], sources)
        return self.simple(lambda a, b, c: function(a, b) + c, operands[0], [*sources, self.source(operands[3], wide)])

    op_mul = op_mad

    def op_lop3(self, parts: list[str], operands: list[str]) -> Execute:
        table = int(operands[4], 0)
        sources = [self.source(operand, "b32") for operand in operands[1:4]]
        return self.simple(lambda a, b, c: look_up(a, b, c, table), operands[0], sources)

    def op_setp(self, parts: list[str], operands: list[str]) -> Execute:
        compare, kind = COMPARE[parts[0]], parts[-1]
        if (kind in FLOATS and parts[0] in ("lo", "ls", "hi", "hs")) or "ftz" in parts:
            raise self.unknown()
        sources = [self.source(operand, kind) for operand in operands[1:3]]
        writes = [self.target(name.strip()) for name in operands[0].split("|")]
        logic = LOGIC[parts[1]] if len(operands) == 4 else None
        other = self.source(operands[3], "pred") if logic else None

        def execute(warp: Warp, mask: Mask) -> None:
            result = compare(sources[0](warp), sources[1](warp))
            for write, value in zip(writes, (result, ~result), strict=False):
                write(warp, logic(value, other(warp)) if logic and other else value, mask)

        return execute

    def op_mov(self, parts: list[str], operands: list[str]) -> Execute:
        """A copy, or the packing {a,b} of a wider register, or its unpacking."""
        kind = parts[-1]
        if not any(operand.startswith("{") for operand in operands):
            return self.simple(lambda a: a, operands[0], [self.source(operands[1], kind)])
        several = [split(operand.strip("{}")) for operand in operands]
        pieces = max(len(names) for names in several)
        part = f"b{int(kind[1:]) // pieces}"
        sources = [self.source(name, part if len(several[1]) > 1 else kind) for name in several[1]]
        writes = [self.target(name) for name in several[0]]

        def execute(warp: Warp, mask: Mask) -> None:
            values = [source(warp) for source in sources]
            if len(values) > 1:
                writes[0](warp, np.stack(values, 1).view(DTYPES[kind]).ravel(), mask)
            else:
                for index, write in enumerate(writes):
                    write(warp, values[0].view(DTYPES[part]).reshape(LANES, pieces)[:, index].copy(), mask)

        return execute

    def op_cvt(self, parts: list[str], operands: list[str]) -> Execute:
        target, kind = parts[-2:]
        if {"rz", "rm", "rp", "relu", "rna", "rs", "tf32"} & set(parts[:-1]):
            raise self.unknown()
        sources = [self.source(operand, kind) for operand in operands[1:]]
        modifiers, base = parts[:-2], target.removesuffix("x2")
        if len(sources) == 2:  # the first operand is the upper half
            return self.simple(lambda a, b: convert(np.stack([b, a], 1), base, modifiers), operands[0], sources)
        return self.simple(lambda a: convert(a, base, modifiers), operands[0], sources)

    def op_cvta(self, parts: list[str], operands: list[str]) -> Execute:
        shift = SHARED_WINDOW if "shared" in parts else 0
        move = np.uint64(2**64 - shift if "to" in parts and shift else shift)
        return self.simple(lambda a: a + move, operands[0], [self.source(operands[1], "u64")])

    def access(self, parts: list[str], operand: str) -> tuple[str, int, Callable[[Warp, Mask], tuple[str, np.ndarray]]]:
        """The element type, the vector length, and a function to (space, byte addresses [active lanes, bytes])."""
        kind = parts[-1]
        length = next((int(part[1]) for part in parts if part in ("v2", "v4", "v8")), 1)
        spaces = {"global", "param", "param::entry", "shared", "shared::cta", "shared::cluster"} & set(parts)
        space = spaces.pop().split("::")[0] if spaces else ""
        known = set("relaxed acquire release weak volatile gpu cta sys nc ca cg cs wb cv".split())
        for part in parts[:-1]:
            if part not in known | {space} and not re.fullmatch(r"v[248]|L[12]::\w+|(shared|param|level)::\w+", part):
                raise self.unknown()
        locate, size = self.address(operand), DTYPES[kind].itemsize * length

        def resolve(warp: Warp, mask: Mask) -> tuple[str, np.ndarray]:
            address = locate(warp) if mask is None else locate(warp)[mask]
            where = space
            if not where:
                where = "shared" if (address >= SHARED_WINDOW).all() else "global"
                address = address - np.uint64(SHARED_WINDOW if where == "shared" else 0)
            if (address % np.uint64(size)).any():
                raise KernelError(f"an address is not a multiple of {size} bytes")
            if where == "param":
                address = address - np.uint64(PARAMETER_BASE)
            return where, (address[:, None] + np.arange(size, dtype=np.uint64)).astype(np.int64)

        return kind, length, resolve

    def op_ld(self, parts: list[str], operands: list[str]) -> Execute:
        kind, length, resolve = self.access(parts, operands[1])
        writes = [self.target(name) for name in split(operands[0].strip("{}"))]
        if len(writes) != length:
            raise self.unknown()
        dtype = DTYPES[kind]

        def execute(warp: Warp, mask: Mask) -> None:
            space, address = resolve(warp, mask)
            active = slice(None) if mask is None else mask
            data = np.zeros((LANES, address.shape[1]), np.uint8)
            if space == "shared":
                data[active] = warp.block.read(address)
            elif space == "param":
                data[active] = warp.block.machine.parameters[address]
            else:
                data[active] = warp.block.machine.read(address, warp.threads[active])
            values = data.view(dtype)
            for index, write in enumerate(writes):
                write(warp, values[:, index].copy(), mask)

        return execute

    def op_st(self, parts: list[str], operands: list[str]) -> Execute:
        kind, length, resolve = self.access(parts, operands[0])
        sources = [self.source(name, kind) for name in split(operands[1].strip("{}"))]
        if len(sources) != length:
            raise self.unknown()

        def execute(warp: Warp, mask: Mask) -> None:
            space, address = resolve(warp, mask)
            active = slice(None) if mask is None else mask
            data = np.stack([source(warp) for source in sources], 1).view(np.uint8).reshape(LANES, -1)[active]
            if space == "shared":
                warp.block.write(address, data, UNFENCED + warp.index)
            else:
                warp.block.machine.write(address, data, warp.threads[active])

        return execute

    def op_setmaxnreg(self, parts: list[str], operands: list[str]) -> Execute:
        count = int(operands[0])

        def execute(warp: Warp, mask: Mask) -> None:
            allotted = warp.block.allotted
            allotted[warp.index] = count
            wanted = LANES * sum(allotted.values())
            if count % 8 or not 24 <= count <= 256 or wanted > REGISTERS:
                raise KernelError(f"setmaxnreg to {count}: {wanted} registers of {REGISTERS}")

        return execute

    def op_prefetch(self, parts: list[str], operands: list[str]) -> Execute:
        return lambda warp, mask: None

    def op_fence(self, parts: list[str], operands: list[str]) -> Execute:
        if parts[0] == "proxy" and not parts[1].startswith("async"):
            raise self.unknown()

        def execute(warp: Warp, mask: Mask) -> None:
            if parts[0] == "mbarrier_init":
                for barrier in warp.block.barriers.values():
                    barrier.fenced |= barrier.warp == warp.index
            if parts[0] == "proxy":
                warp.block.state[warp.block.state == UNFENCED + warp.index] = VISIBLE

        return execute

    def op_bar(self, parts: list[str], operands: list[str]) -> Execute:
        if parts[0] == "warp":
            return lambda warp, mask: None
        if parts[0] not in ("sync", "arrive"):
            raise self.unknown()
        number = self.source(operands[0], "u32")
        count = self.source(operands[1], "u32") if len(operands) > 1 else None

        def execute(warp: Warp, mask: Mask) -> None:
            expected = uniform(count(warp)) if count else LANES * self.program.warps
            barrier = warp.block.named.setdefault(uniform(number(warp)), NamedBarrier())
            if barrier.arrived and barrier.expected != expected:
                raise KernelError(f"a named barrier of {barrier.expected} threads is used with {expected}")
            barrier.expected, barrier.arrived = expected, barrier.arrived + LANES
            if expected % LANES or barrier.arrived > expected or not 0 <= uniform(number(warp)) < 16:
                raise KernelError("a named barrier of a wrong number or count")
            generation = barrier.generation
            if barrier.arrived == expected:
                barrier.arrived, barrier.generation = 0, generation + 1
            elif parts[0] == "sync":
                warp.waiting = lambda: barrier.generation != generation

        return execute

    op_barrier = op_bar

    def op_elect(self, parts: list[str], operands: list[str]) -> Execute:
        """One lane of the warp: not always lane 0, the ISA promises only that it is always the same."""
        self.full(operands[1])
        leader, elected = (self.target(name.strip()) for name in operands[0].split("|"))

        def execute(warp: Warp, mask: Mask) -> None:
            leader(warp, np.full(LANES, warp.block.elected, np.uint32), mask)
            elected(warp, LANE == warp.block.elected, mask)

        return execute

    def op_shfl(self, parts: list[str], operands: list[str]) -> Execute:
        self.full(operands[4])
        writes = [self.target(name.strip()) for name in operands[0].split("|")]
        value, other, clamp = (self.source(operand, "u32") for operand in operands[1:4])
        mode = parts[1]
        if mode not in ("idx", "up", "down", "bfly"):
            raise self.unknown()

        def execute(warp: Warp, mask: Mask) -> None:
            step, limits = other(warp).astype(int) & 31, clamp(warp).astype(int)
            segment = limits >> 8 & 31
            most = (LANE & segment) | (limits & 31 & ~segment)
            least = LANE & segment
            lane = {"up": LANE - step, "down": LANE + step, "bfly": LANE ^ step, "idx": least | (step & ~segment)}[mode]
            inside = lane >= most if mode == "up" else lane <= most
            writes[0](warp, value(warp)[np.where(inside, lane, LANE)], mask)
            if len(writes) > 1:
                writes[1](warp, inside, mask)

        return execute
