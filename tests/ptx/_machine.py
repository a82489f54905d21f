"""A block: its warps, its shared memory, what is in flight, and whose turn it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx._memory import Machine, MemoryBarrier, NamedBarrier, TensorMap, swizzled
from ptx._program import Instruction, Program
from ptx._values import (
    BARRIER,
    COLUMN,
    DTYPES,
    IN_FLIGHT,
    LANE,
    LANES,
    ROW,
    SHARED_BASE,
    UNFENCED,
    UNWRITTEN,
    VISIBLE,
    KernelError,
    Mask,
)


@dataclass
class Product:
    """A wgmma.mma_async that some warps of a warpgroup have issued."""

    instruction: Instruction
    descriptor: int
    accumulate: bool
    issued: int = 0


class Warp:
    """Registers and position of 32 lanes. A register is an array that is never changed in place, None if unwritten."""

    def __init__(self, block: Block, index: int):
        self.block, self.index = block, index
        self.registers: list[Any] = [None] * len(block.program.registers)
        self.counter = 0
        self.counters: np.ndarray | None = None  # per lane, while the lanes are not all at one place
        self.alive = np.ones(LANES, bool)
        self.finished = False
        self.waiting: Callable[[], bool] | None = None
        self.locked: dict[int, tuple[int, bool]] = {}  # registers of the products in flight -> product, accumulator?
        self.unfenced: set[int] = set()  # registers of wgmma written since the last wgmma.fence
        self.fenced = False
        self.issued = 0  # products
        self.commits: list[int] = []  # products issued before each wgmma.commit_group
        thread = index * LANES + LANE
        x, y, _ = block.program.threads
        position = (thread % x, thread // x % y, thread // (x * y))
        values: dict[str, Any] = {"%laneid": LANE, "%warpid": np.full(LANES, index), "%nwarpid": block.program.warps}
        for axis, name in enumerate("xyz"):
            values |= {f"%tid.{name}": position[axis], f"%ntid.{name}": block.program.threads[axis]}
            values |= {f"%ctaid.{name}": block.position[axis], f"%nctaid.{name}": block.grid[axis]}
            values |= {f"%cluster_ctaid.{name}": 0, f"%cluster_nctaid.{name}": 1}
        self.special = {name: np.full(LANES, value, np.uint32) for name, value in values.items()}
        self.threads = (block.number * block.program.warps * LANES + thread + 1).astype(np.int32)  # unique in the grid

    def where(self) -> str:
        places = sorted({self.counter} if self.counters is None else set(self.counters[self.alive].tolist()))
        places = [places[0] - 1] if self.waiting else places  # a wait has moved on already
        lines = (self.block.program.instructions[min(p, len(self.block.program.instructions) - 1)] for p in places)
        return f"warp {self.index} at " + " / ".join(str(line) for line in lines)

    def choose(self) -> tuple[int, Mask]:
        """The lanes that go next when they are diverged: the lowest, but whoever is at a .sync waits for the others."""
        assert self.counters is not None
        places = np.unique(self.counters[self.alive])
        for place in places.tolist():
            if not self.block.program.instructions[place].aligned:
                if len(places) == 1 and self.alive.all():
                    self.counter, self.counters = place, None
                    return place, None
                return place, self.alive & (self.counters == place)
        if len(places) > 1 or not self.alive.all():
            raise KernelError("lanes that diverged or returned do not all reach a .sync or .aligned instruction")
        self.counter, self.counters = int(places[0]), None
        return self.counter, None

    def move(self, lanes: Mask, target: int) -> None:
        if self.counters is None and lanes is None:
            self.counter = target
            return
        if self.counters is None:
            self.counters = np.full(LANES, self.counter)
        self.counters = np.where(True if lanes is None else lanes, target, self.counters)

    def advance(self, count: int) -> None:
        """Execute up to `count` instructions, fewer if one of them has to wait."""
        instructions = self.block.program.instructions
        while count > 0 and self.waiting is None and not self.finished:
            count -= 1
            place, lanes = (self.counter, None) if self.counters is None else self.choose()
            instruction = instructions[place]
            if self.locked and not instruction.product and not self.locked.keys().isdisjoint(instruction.registers):
                raise KernelError("touches a register of a wgmma.mma_async that no wgmma.wait_group has covered")
            mask = lanes
            if instruction.guard is not None:
                mask = instruction.guard(self) if lanes is None else instruction.guard(self) & lanes
                if mask.all():
                    mask = None
                elif instruction.aligned and mask.any():
                    raise KernelError("a .sync or .aligned instruction is predicated differently among its lanes")
            taken = mask is None or bool(mask.any())
            if instruction.branch is not None:
                self.move(lanes, place + 1)
                if taken:
                    self.move(lanes if instruction.guard is None else mask, instruction.branch)
            elif instruction.leaves:
                self.move(lanes, place + 1)
                if taken:
                    self.leave(mask)
            else:
                if taken:
                    if instruction.unfences:
                        self.unfenced |= instruction.unfences
                    instruction.execute(self, mask)
                self.move(lanes, place + 1)

    def leave(self, mask: Mask) -> None:
        if mask is not None and self.counters is None:
            self.counters = np.full(LANES, self.counter)
        self.alive = self.alive & ~(np.ones(LANES, bool) if mask is None else mask)
        self.finished = not self.alive.any()
        if self.finished and self.locked:
            raise KernelError("a warp returns with wgmma.mma_async in flight")

    def locate(self, index: int) -> np.ndarray:
        value = self.registers[index]
        if value is None:
            raise KernelError(f"reads {self.block.program.registers[index]}, which was never written")
        return value


class Block:
    """A CTA."""

    def __init__(self, machine: Machine, number: int, generator: random.Random):
        self.machine, self.program, self.grid = machine, machine.program, machine.grid
        x, y, _ = self.grid
        self.position = (number % x, number // x % y, number // (x * y))
        self.number, self.random = number, generator
        end = SHARED_BASE + self.program.static_bytes + machine.shared_bytes
        self.memory = np.full(end, 0xFF, np.uint8)  # a NaN in e4m3
        self.state = np.full(end, UNWRITTEN, np.int16)
        self.barriers: dict[int, MemoryBarrier] = {}
        self.named: dict[int, NamedBarrier] = {}
        self.arriving: list[tuple[np.ndarray, np.ndarray, int]] = []  # addresses, bytes, mbarrier
        self.warps = [Warp(self, index) for index in range(self.program.warps)]
        self.products: list[list[Product]] = [[] for _ in range(-(-self.program.warps // 4))]
        self.multiplied = [0] * len(self.products)
        self.allotted: dict[int, int] = {}  # registers of a lane by warp, as setmaxnreg has them
        self.elected = generator.randrange(LANES)

    def check(self, address: np.ndarray) -> None:
        if address.size and (int(address.min()) < SHARED_BASE or int(address.max()) >= len(self.memory)):
            raise KernelError(f"shared address {int(address.min())} to {int(address.max())} is out of bounds")

    def read(self, address: np.ndarray, asynchronous: bool = False) -> np.ndarray:
        self.check(address)
        state = self.state[address]
        if (state <= UNWRITTEN).any():
            raise KernelError(
                f"reads shared memory at {int(address[state <= UNWRITTEN][0])} that nothing has been written to"
            )
        if asynchronous and (state >= UNFENCED).any():
            raise KernelError("the async proxy reads shared memory that was stored without a fence.proxy.async")
        return self.memory[address]

    def write(self, address: np.ndarray, data: np.ndarray | np.uint8, state: int, arrives: bool = False) -> None:
        self.check(address)
        before = self.state[address]
        if (before == BARRIER).any():
            raise KernelError("writes over an mbarrier")
        if (before == IN_FLIGHT).any() and not arrives:
            raise KernelError("writes over the destination of a TMA load in flight")
        self.memory[address], self.state[address] = data, state

    def barrier(self, address: int) -> MemoryBarrier:
        if address not in self.barriers:
            raise KernelError(f"there is no mbarrier at shared address {address}")
        return self.barriers[address]

    def load_tensor(self, tensor: TensorMap, coordinates: Sequence[int], destination: int, barrier: int) -> None:
        """Start a copy. From now on nobody may read the destination, until its bytes come in up to three portions."""
        if destination % 128:
            raise KernelError(f"the destination {destination} of a TMA load is not a multiple of 128 bytes")
        if len(coordinates) != len(tensor.box):
            raise KernelError(f"{len(coordinates)} coordinates for a tensor map of rank {len(tensor.box)}")
        if not self.barrier(barrier).fenced:
            raise KernelError("a TMA load on an mbarrier without a fence.mbarrier_init behind its initialization")
        data = tensor.read(coordinates)
        inner = tensor.box[-1] * tensor.itemsize
        if tensor.swizzle != 16 and inner != tensor.swizzle:
            raise NotImplementedError("an inner box narrower than its swizzle")
        address = swizzled(destination + np.arange(len(data)), tensor.swizzle)
        self.write(address, np.uint8(0xFF), IN_FLIGHT)
        cuts = sorted(16 * self.random.randint(0, len(data) // 16) for _ in range(2))
        for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if stop > start:
                self.arriving.append((address[start:stop], data[start:stop], barrier))

    def matrix(self, descriptor: int, rows: int) -> np.ndarray:
        """The [rows, 32 bytes] K-major operand that a wgmma matrix descriptor points to."""
        start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
        mode = descriptor >> 62
        row, column = np.arange(rows)[:, None], np.arange(32)
        if mode == 0:
            within = row % 8 * 16 + column // 16 * leading + column % 16
        else:
            swizzle = 256 >> mode
            if (start >> 7) & (swizzle // 16 - 1) != (descriptor >> 49) & 7 or (descriptor >> 49) & 7:
                raise NotImplementedError("a matrix that does not start on a boundary of its swizzle pattern")
            if start % swizzle + 32 > swizzle:
                raise KernelError("a matrix descriptor reaches over the end of its swizzled row")
            within = row % 8 * swizzle + column
        address = start + row // 8 * stride + within
        return self.read(address if mode == 0 else swizzled(address, 256 >> mode), asynchronous=True)

    def multiply(self, group: int) -> None:
        """Execute a warpgroup's next product: exact in float64, rounded once to float32 (an H100 keeps fewer bits)."""
        product = self.products[group][self.multiplied[group]]
        assert product.instruction.product is not None
        kind, rows, accumulators, fragments = product.instruction.product
        warps = self.warps[4 * group : 4 * group + 4]
        left = np.empty((64, 32), np.uint8)
        for number, warp in enumerate(warps):
            for index, register in enumerate(fragments):
                place = 16 * number + ROW + index % 2 * 8, 16 * (index // 2) + 4 * COLUMN
                left[place[0][:, None], place[1][:, None] + np.arange(4)] = (
                    warp.locate(register).view(np.uint8).reshape(LANES, 4)
                )
        right = self.matrix(product.descriptor, rows)
        result = left.view(DTYPES[kind[0]]).astype(np.float64) @ right.view(DTYPES[kind[1]]).astype(np.float64).T
        for number, warp in enumerate(warps):
            for index, register in enumerate(accumulators):
                part = result[16 * number + ROW + index // 2 % 2 * 8, index // 4 * 8 + 2 * COLUMN + index % 2]
                if product.accumulate:
                    part = part + warp.locate(register).view(np.float32)
                warp.registers[register] = part.astype(np.float32).view(np.uint32)
        self.multiplied[group] += 1

    def events(self) -> list[int]:
        """What may happen next without any warp: TMA portions by index, products of warpgroup g as -1 - g."""
        ready = list(range(len(self.arriving)))
        for group, (products, done) in enumerate(zip(self.products, self.multiplied, strict=True)):
            if done < len(products) and products[done].issued == 4:
                ready.append(-1 - group)
        return ready

    def happen(self, event: int) -> None:
        if event < 0:
            self.multiply(-1 - event)
            return
        address, data, barrier = self.arriving.pop(event)
        self.write(address, data, VISIBLE, arrives=True)
        self.barrier(barrier).step(expected=-len(data))

    def run(self) -> None:
        eager = self.random.choice((0.0, 0.05, 0.3, 1.0))  # how soon copies and products happen, 0: as late as possible
        burst = self.random.choice((2, 20, 200, 2000))
        live, current = self.warps, None  # current: the warp that runs, None for what happens asynchronously
        try:
            while live:
                ready = self.events() if self.arriving or any(map(len, self.products)) else []
                if ready and self.random.random() < eager:
                    self.happen(self.random.choice(ready))
                first = self.random.randrange(len(live))
                for current in live[first:] + live[:first]:
                    if current.waiting is None or current.waiting():
                        current.waiting = None
                        current.advance(self.random.randint(1, burst))
                        break
                else:
                    current = None
                    if not (ready := self.events()):
                        raise KernelError("deadlock:\n" + "\n".join(warp.where() for warp in live))
                    self.happen(self.random.choice(ready))
                if current and current.finished:
                    live = [warp for warp in live if not warp.finished]
                current = None
        except (KernelError, NotImplementedError) as error:
            raise type(error)(
                f"CTA {self.number}, {current.where() if current else 'asynchronously'}:\n{error}"
            ) from error
        if self.arriving:
            raise KernelError(f"CTA {self.number} returns with TMA loads in flight")


def run(
    program: Program,
    grid: int | tuple[int, int, int],
    arguments: Sequence[Any],
    *,
    seed: int,
    shared_bytes: int,
    blocks: Iterable[int] | None = None,
) -> None:
    """Execute `blocks` (all of the grid's by default), one after the other in a random order.

    An argument is an array (a global pointer, or with a byte offset the pair of both), a list of `TensorMap`s (the
    by-value block of descriptors) or an integer. Arrays that are not writeable are inputs; the writeable ones are
    outputs, which are first filled with 0xFF, a NaN in every float type, and are written in place.
    """
    extents = (grid, 1, 1) if isinstance(grid, int) else grid
    machine = Machine(program, extents, arguments, shared_bytes)
    generator = random.Random(seed)
    numbers = list(range(int(np.prod(extents)))) if blocks is None else list(blocks)
    generator.shuffle(numbers)
    with np.errstate(all="ignore"):
        for number in numbers:
            Block(machine, number, generator).run()
