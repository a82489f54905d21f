"""The asynchronous proxy: mbarriers, copies of tensors, and the tensor cores."""

from __future__ import annotations

import re

import numpy as np

from ptx._instructions import Instructions
from ptx._machine import Product, Warp
from ptx._memory import MemoryBarrier
from ptx._operands import split
from ptx._values import (
    BARRIER,
    DTYPES,
    LANE,
    LANES,
    UNWRITTEN,
    Execute,
    KernelError,
    Mask,
    uniform,
)


class Compiler(Instructions):
    """All instructions."""

    def op_mbarrier(self, parts: list[str], operands: list[str]) -> Execute:
        action = parts[0]
        if action in ("try_wait", "test_wait"):
            return self.wait(parts, operands)
        has_state = not operands[0].startswith("[")
        state = self.target(operands[0]) if has_state else None
        operands = operands[1:] if has_state else operands
        address = self.address(operands[0])
        amount = self.source(operands[1] if len(operands) > 1 else "1", "u32")
        if action not in ("init", "arrive", "expect_tx", "complete_tx", "inval") or {"noComplete", "relaxed"} & set(
            parts
        ):
            raise self.unknown()

        def execute(warp: Warp, mask: Mask) -> None:
            block, phases = warp.block, np.zeros(LANES, np.uint64)
            where, amounts = address(warp), amount(warp)
            for lane in LANE if mask is None else np.flatnonzero(mask):
                place, number = int(where[lane]), int(amounts[lane])
                if action == "init":
                    bytes_ = np.arange(place, place + 8)
                    if place % 8 or not 0 < number < 1 << 20 or place in block.barriers:
                        raise KernelError("initializes an mbarrier twice, misaligned or with a wrong count")
                    block.write(bytes_, np.uint8(0xFF), BARRIER)
                    block.barriers[place] = MemoryBarrier(number, number, warp.index)
                    continue
                barrier = block.barrier(place)
                phases[lane] = barrier.phase
                if action == "arrive":
                    barrier.step(*((1, number) if "expect_tx" in parts else (number, 0)))
                elif action == "inval":
                    del block.barriers[place]
                    block.state[place : place + 8] = UNWRITTEN
                else:
                    barrier.step(expected=number if action == "expect_tx" else -number)
            if state:
                state(warp, phases, mask)

        return execute

    def wait(self, parts: list[str], operands: list[str]) -> Execute:
        """try_wait may return false for no reason: one in four does, the others suspend the warp until it is true."""
        write, address = self.target(operands[0]), self.address(operands[1])
        parity = "parity" in parts
        phase = self.source(operands[2], "u32" if parity else "u64")

        def execute(warp: Warp, mask: Mask) -> None:
            active = slice(None) if mask is None else mask
            barrier, value = warp.block.barrier(uniform(address(warp)[active])), uniform(phase(warp)[active])
            if parity and value not in (0, 1):
                raise KernelError(f"{value} is not a parity")
            ready = lambda: barrier.phase % 2 != value if parity else barrier.phase != value
            done = ready()
            if not done and warp.block.random.random() >= 0.25:
                warp.waiting, done = ready, True
            write(warp, np.full(LANES, done), mask)

        return execute

    def op_cp(self, parts: list[str], operands: list[str]) -> Execute:
        if parts[2] in ("commit_group", "wait_group"):
            return lambda warp, mask: None  # they count stores to global memory, of which there are none here
        shape = ["async", "bulk", "tensor"]
        tail = ["global", "mbarrier::complete_tx::bytes"]
        rest = [part for part in parts[4:] if part not in ("tile", "shared::cta", "shared::cluster")]
        if parts[:3] != shape or not re.fullmatch("[1-5]d", parts[3]) or rest != tail or len(operands) != 3:
            raise self.unknown()
        match = re.fullmatch(r"\[\s*([\w$%]+)\s*,\s*\{(.*)\}\s*\]", operands[1])
        if match is None:
            raise self.unknown()
        destination, barrier = self.address(operands[0]), self.address(operands[2])
        descriptor = self.source(match[1], "u64")
        coordinates = [self.source(name, "s32") for name in split(match[2])]

        def execute(warp: Warp, mask: Mask) -> None:
            for lane in LANE if mask is None else np.flatnonzero(mask):
                tensor = warp.block.machine.maps.get(int(descriptor(warp)[lane]))
                if tensor is None:
                    raise KernelError("a TMA load whose descriptor is not one of the parameters")
                start = [int(coordinate(warp)[lane]) for coordinate in coordinates]
                warp.block.load_tensor(tensor, start, int(destination(warp)[lane]), int(barrier(warp)[lane]))

        return execute

    def op_wgmma(self, parts: list[str], operands: list[str]) -> Execute:
        if parts[0] == "fence":

            def fence(warp: Warp, mask: Mask) -> None:
                warp.fenced, warp.unfenced = True, set()

            return fence
        if parts[0] == "commit_group":
            return lambda warp, mask: warp.commits.append(warp.issued)
        if parts[0] == "wait_group":
            return self.wait_group(int(operands[0]))
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", parts[3])
        if parts[:3] != ["mma_async", "sync", "aligned"] or shape is None or parts[4] != "f32":
            raise self.unknown()
        left, right = parts[5:]
        if int(shape[2]) * DTYPES[left].itemsize != 32 or DTYPES[right].itemsize != DTYPES[left].itemsize:
            raise self.unknown()
        if not operands[1].startswith("{") or operands[4:6] != ["1", "1"] or operands[6:] not in ([], ["0"]):
            raise self.unknown()
        accumulators, fragments = (
            [self.register(n)[0] for n in split(operand.strip("{}"))] for operand in operands[:2]
        )
        if len(accumulators) != int(shape[1]) // 2 or len(fragments) != 4 or int(shape[1]) % 8 or int(shape[1]) > 256:
            raise self.unknown()
        instruction, matrix, accumulate = (
            self.instruction,
            self.source(operands[2], "u64"),
            self.source(operands[3], "pred"),
        )
        instruction.product = ((left, right), int(shape[1]), accumulators, fragments)

        def execute(warp: Warp, mask: Mask) -> None:
            block, group = warp.block, warp.index // 4
            products = block.products[group]
            if not warp.fenced or not warp.unfenced.isdisjoint((*accumulators, *fragments)):
                raise KernelError("wgmma.mma_async without a wgmma.fence after its registers were written")
            uses = dict.fromkeys(fragments, False) | dict.fromkeys(accumulators, True)
            if any(warp.locked.get(register, (0, role))[1] != role for register, role in uses.items()):
                raise KernelError("wgmma.mma_async uses an accumulator in flight as A, or the reverse")
            if warp.issued == len(products):
                products.append(Product(instruction, uniform(matrix(warp)), bool(uniform(accumulate(warp)))))
            product = products[warp.issued]
            mine = (instruction, uniform(matrix(warp)), bool(uniform(accumulate(warp))))
            if mine != (product.instruction, product.descriptor, product.accumulate):
                raise KernelError("the warps of a warpgroup issue different products")
            product.issued += 1
            warp.locked |= {register: (warp.issued, role) for register, role in uses.items()}
            warp.issued += 1

        return execute

    def wait_group(self, pending: int) -> Execute:
        def execute(warp: Warp, mask: Mask) -> None:
            done = warp.commits[-1 - pending] if len(warp.commits) > pending else 0
            block, group = warp.block, warp.index // 4

            def ready() -> bool:
                if block.multiplied[group] < done:
                    return False
                warp.locked = {register: use for register, use in warp.locked.items() if use[0] >= done}
                return True

            if not ready():
                warp.waiting = ready

        return execute
