"""Run the PTX of a Hopper kernel on a CPU, in NumPy, strictly enough to show its races.

What the PTX ISA leaves open is drawn at random from a seed (which warp runs, when a TMA load arrives, when wgmma reads
its operands, which lane elect.sync elects), and what it leaves undefined raises `KernelError` (reading shared memory
that no completed copy has filled, touching the registers of a wgmma in flight, two threads storing to one address), so
that a kernel that passes under many seeds owes nothing to lucky timing.

`parse` compiles every instruction once to a closure over the 32 lanes of a warp; `run` executes a grid; `launch` reads
from Mosaic's MLIR dump what the host passes to the kernel.
"""

from ptx._machine import run
from ptx._memory import TensorMap
from ptx._mosaic import launch
from ptx._parse import parse
from ptx._values import KernelError

__all__ = ["KernelError", "TensorMap", "launch", "parse", "run"]
