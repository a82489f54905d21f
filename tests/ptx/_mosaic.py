"""What Mosaic's MLIR dump says of a launch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptx._memory import TensorMap


@dataclass
class Launch:
    """What Mosaic's host function passes to gpu.launch_func. The buffers are the kernel's inputs, then its outputs."""

    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int
    arguments: list[tuple[int, int] | list[TensorMap]]  # (buffer, byte offset), or the descriptors passed by value

    def bind(self, buffers: Sequence[np.ndarray]) -> list[Any]:
        """The arguments of `run` for these buffers."""
        bound: list[Any] = []
        for argument in self.arguments:
            if isinstance(argument, list):
                bound.append([replace(tensor, array=buffers[tensor.buffer]) for tensor in argument])
            else:
                bound.append((buffers[argument[0]], argument[1]))
        return bound


def launch(mlir: str) -> Launch:
    """Evaluate the host function, as the last pass before gpu.launch_func is lowered has it.

    A value is an integer, or a tuple: ("slot", i, 0) points to the pointer of buffer i, ("buffer", i, offset) into that
    buffer, ("stack", name, offset) into an alloca.
    """
    end = mlir.rindex("gpu.launch_func")
    body = mlir[mlir.rindex("func.func @", 0, end) : mlir.index("\n", end)]
    _, pointers = re.findall(r"(%\w+): !llvm\.ptr", body.partition("\n")[0])  # the context, and the buffers
    values: dict[str, Any] = {pointers: ("slot", 0, 0)}
    stack: dict[tuple[str, int], Any] = {}
    maps: dict[tuple[str, int], TensorMap] = {}
    element_bits = {"i8": 8, "i32": 32, "i64": 64, "!llvm.ptr": 64, "f32": 32, "bf16": 16, "f16": 16, "i16": 16}
    item_sizes = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2, 9: 4, 10: 8}
    move = (
        "unrealized_conversion_cast|memref.reinterpret_cast|memref.transpose|memref.extract_aligned_pointer_as_index|"
        "inttoptr|ptrtoint|index_cast|trunc|memref.expand_shape"
    )

    def value(name: str) -> Any:
        return values[name] if name.startswith("%") else int(name)

    for line in body.splitlines():
        name, _, operation = line.strip().partition(" = ") if re.match(r"\s*%\S+ = ", line) else ("", "", line.strip())
        operands = re.findall(r"%[\w#]+", operation)
        if match := re.match(r"(?:llvm\.mlir|arith)\.constant(?: |\()(-?\d+) : ", operation):
            values[name] = int(match[1])
        elif match := re.match(r"llvm\.mlir\.constant\((-?\d+) :", operation):
            values[name] = int(match[1])
        elif match := re.match(r"llvm\.getelementptr (?:inbounds )?(%\w+)\[(%?\w+)\].*-> !llvm\.ptr, (\S+)", operation):
            kind, index, offset = values[match[1]]
            bits = 8 if match[3].startswith("f8") else element_bits[match[3]]
            step = value(match[2])
            values[name] = (kind, index + step, 0) if kind == "slot" else (kind, index, offset + step * bits // 8)
        elif operation.startswith("llvm.load"):
            kind, index, offset = values[operands[0]]
            values[name] = ("buffer", index, 0) if kind == "slot" else (kind, index, offset)
        elif operation.startswith("llvm.alloca"):
            values[name] = ("stack", name, 0)
        elif operation.startswith("llvm.store"):
            stack[values[operands[1]][1:]] = values[operands[0]]
        elif operation.startswith("llvm.insertvalue"):
            inserted = values[operands[0]]
            if re.search(r"\[2\] :", operation) and inserted != 0:
                raise NotImplementedError(f"an offset in {operation}")
            values[name] = inserted if isinstance(inserted, tuple) else values.get(operands[1])
        elif re.match(rf"\w*\.?(?:{move})", operation):
            if (shift := re.search(r"offset: \[(.*?)\]", operation)) and shift[1] != "0":
                raise NotImplementedError(f"an offset in {operation}")
            values[name] = values.get(operands[0])
        elif "@mosaic_gpu_init_tma_desc(" in operation:
            if "private" in operation:
                continue
            target, base, code, rank, sizes, strides, swizzle, box = (values[operand] for operand in operands)
            extents = [tuple(stack[array[1], 8 * i] for i in range(rank)) for array in (sizes, strides, box)]
            size = item_sizes[code]
            scaled = tuple(size * stride for stride in extents[1])
            maps[target[1:]] = TensorMap(extents[0], scaled, extents[2], swizzle, size, offset=base[2], buffer=base[1])
    call = body[body.index("gpu.launch_func") :]
    match = re.search(
        r"blocks in \((.*?)\) threads in \((.*?)\).*?dynamic_shared_memory_size (%\w+) args\((.*?)\)", call
    )
    if match is None or "clusters" in call:
        raise NotImplementedError(call)
    grid, threads = ([values[name] for name in re.findall(r"%\w+", group)] for group in match.groups()[:2])
    arguments: list[tuple[int, int] | list[TensorMap]] = []
    for name in re.findall(r"%\w+", match[4]):
        kind, index, offset = values[name]
        found = [tensor for place, tensor in sorted(maps.items()) if place[0] == index]
        arguments.append(found if kind == "stack" else (index, offset))
    return Launch(tuple(grid), tuple(threads), values[match[3]], arguments)
