"""Tensor maps, barriers, and the global memory that the blocks of a launch share."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx._program import Program
from ptx._values import BUFFER_BITS, PARAMETER_BASE, KernelError


@dataclass(frozen=True)
class TensorMap:
    """A CUtensorMap: extents outermost first (as MLIR has them), strides and offset in bytes, swizzle 16 is none."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    itemsize: int
    array: np.ndarray | None = None
    offset: int = 0
    buffer: int = -1  # which of the kernel's buffers (inputs, then outputs) it describes

    def __post_init__(self) -> None:
        inner = self.box[-1] * self.itemsize
        rules = {
            "rank 1 to 5": 1 <= len(self.sizes) == len(self.strides) == len(self.box) <= 5,
            "box of 1 to 256 elements": all(1 <= extent <= 256 for extent in self.box),
            "sizes of 1 to 2**32": all(1 <= size <= 2**32 for size in self.sizes),
            "innermost stride of one element": self.strides[-1] == self.itemsize,
            "strides that are multiples of 16 bytes": all(s % 16 == 0 and s < 2**40 for s in self.strides[:-1]),
            "an inner box that is a multiple of 16 bytes": inner % 16 == 0,
            "a swizzle of 16, 32, 64 or 128 bytes": self.swizzle in (16, 32, 64, 128),
            "an inner box no wider than the swizzle": self.swizzle == 16 or inner <= self.swizzle,
            "a start that is a multiple of 16 bytes": self.offset % 16 == 0,
        }
        if self.array is not None:
            last = self.offset + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
            rules["a tensor inside its array"] = last + self.itemsize <= self.array.nbytes
        for rule, holds in rules.items():
            if not holds:
                raise KernelError(f"a tensor map needs {rule}: {self}")

    def read(self, coordinates: Sequence[int]) -> np.ndarray:
        """The bytes of the box at `coordinates` (innermost first, as in PTX), zero outside of the tensor."""
        address, inside = np.zeros((), np.int64), np.ones((), bool)
        for size, stride, extent, start in zip(self.sizes, self.strides, self.box, reversed(coordinates), strict=True):
            index = start + np.arange(extent, dtype=np.int64)
            address = address[..., None] + index * stride
            inside = inside[..., None] & (index >= 0) & (index < size)
        assert self.array is not None
        memory = as_bytes(self.array)
        address = np.where(inside, address + self.offset, 0)[..., None] + np.arange(self.itemsize)
        return np.where(inside[..., None], memory[address], np.uint8(0)).ravel()


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The memory of an array, without a copy."""
    return array.reshape(-1).view(np.uint8)


def swizzled(address: np.ndarray, swizzle: int) -> np.ndarray:
    """XOR the 16-byte chunk of an absolute shared address with its 128-byte row, as TMA and wgmma both do."""
    return address ^ ((address >> 7) & (swizzle // 16 - 1)) << 4


@dataclass
class MemoryBarrier:
    """An mbarrier: a phase ends when no arrivals are pending and all expected bytes have come. fenced: whether the warp
    that initialized it has made that visible to copies."""

    count: int
    pending: int
    warp: int
    fenced: bool = False
    bytes: int = 0
    phase: int = 0

    def step(self, arrivals: int = 0, expected: int = 0) -> None:
        self.bytes += expected
        self.pending -= arrivals
        if self.pending < 0:
            raise KernelError(f"an mbarrier of {self.count} got more arrivals than its phase has")
        if abs(self.bytes) >= 1 << 20:
            raise KernelError("the byte count of an mbarrier leaves its range")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


@dataclass
class NamedBarrier:
    """A barrier of bar.sync: how many threads have arrived in its current generation."""

    expected: int = 0
    arrived: int = 0
    generation: int = 0


class Machine:
    """What the CTAs of a launch share: global memory and the parameters."""

    def __init__(self, program: Program, grid: tuple[int, int, int], arguments: Sequence[Any], shared_bytes: int):
        self.program, self.grid, self.shared_bytes = program, grid, shared_bytes
        self.buffers: list[np.ndarray] = []
        self.owners: list[np.ndarray | None] = []  # per byte of an output: the thread that stored it, 0 for nobody
        self.maps: dict[int, TensorMap] = {}
        self.parameters = np.zeros(program.parameter_bytes, np.uint8)
        if len(arguments) != len(program.parameters):
            raise ValueError(f"{len(program.parameters)} parameters, but {len(arguments)} arguments")
        known: dict[int, int] = {}
        for argument, (start, size) in zip(arguments, program.parameters.values(), strict=True):
            array, offset = argument if isinstance(argument, tuple) else (argument, 0)
            if isinstance(array, np.ndarray):
                pointer = array.__array_interface__["data"][0]
                if pointer not in known:
                    known[pointer] = len(self.buffers)
                    self.buffers.append(as_bytes(array))
                    self.owners.append(np.zeros(array.nbytes, np.int32) if array.flags.writeable else None)
                    if array.flags.writeable:
                        self.buffers[-1][:] = 0xFF
                value = struct.pack("<Q", (known[pointer] + 1 << BUFFER_BITS) + offset)
            elif isinstance(array, list):
                value = bytes(128 * len(array))
                self.maps |= {PARAMETER_BASE + start + 128 * index: tensor for index, tensor in enumerate(array)}
            else:
                value = int(array).to_bytes(size, "little", signed=int(array) < 0)
            if len(value) != size:
                raise ValueError(f"an argument of {len(value)} bytes for a parameter of {size}")
            self.parameters[start : start + size] = np.frombuffer(value, np.uint8)

    def locate(self, address: np.ndarray) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
        """Split byte addresses [lanes, bytes] into (buffer, which lanes, offsets)."""
        index = (address[:, 0] >> BUFFER_BITS).astype(np.int64) - 1
        for buffer in np.unique(index).tolist():
            lanes = index == buffer
            offset = address[lanes].astype(np.int64) - (buffer + 1 << BUFFER_BITS)
            if not 0 <= buffer < len(self.buffers) or offset.max() >= len(self.buffers[buffer]):
                raise KernelError(f"a global address is out of bounds: byte {offset.max()} of buffer {buffer}")
            yield buffer, lanes, offset

    def read(self, address: np.ndarray, threads: np.ndarray) -> np.ndarray:
        result = np.empty(address.shape, np.uint8)
        for buffer, lanes, offset in self.locate(address):
            owners = self.owners[buffer]
            if owners is not None and (owners[offset] != threads[lanes, None]).any():
                raise KernelError("reads global memory that this thread has not written")
            result[lanes] = self.buffers[buffer][offset]
        return result

    def write(self, address: np.ndarray, data: np.ndarray, threads: np.ndarray) -> None:
        for buffer, lanes, offset in self.locate(address):
            owners = self.owners[buffer]
            if owners is None:
                raise KernelError("stores to an input")
            before = owners[offset]
            mine = np.broadcast_to(threads[lanes, None], offset.shape)
            owners[offset] = mine
            if ((before != 0) & (before != mine)).any() or (owners[offset] != mine).any():
                raise KernelError(f"two threads store to the same global address (buffer {buffer})")
            self.buffers[buffer][offset] = data[lanes]
