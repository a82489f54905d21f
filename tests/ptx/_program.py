"""A kernel as a list of instructions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx._values import LANES, Execute, Source


@dataclass
class Instruction:
    """One PTX statement, compiled."""

    line: int
    text: str
    execute: Execute = lambda warp, mask: None
    guard: Source | None = None
    branch: int | None = None
    leaves: bool = False
    aligned: bool = False  # all lanes must execute it together
    registers: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    unfences: frozenset[int] = frozenset()  # registers of wgmma that it writes
    product: tuple[tuple[str, str], int, list[int], list[int]] | None = None  # types, N, accumulators, A fragments

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Program:
    """A compiled kernel."""

    name: str
    threads: tuple[int, int, int]
    parameters: dict[str, tuple[int, int]]  # offset and size of each
    symbols: dict[str, int] = field(default_factory=dict)
    static_bytes: int = 0
    registers: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)

    @property
    def warps(self) -> int:
        return int(np.prod(self.threads)) // LANES

    @property
    def parameter_bytes(self) -> int:
        return max((start + size for start, size in self.parameters.values()), default=0)


@dataclass
class Scope:
    """The names declared between braces: inline assembly declares its own registers and labels, again and again."""

    parent: Scope | None = None
    registers: dict[str, tuple[int, np.dtype]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def find(self, kind: str, name: str) -> Any:
        names = getattr(self, kind)
        return names[name] if name in names else self.parent.find(kind, name) if self.parent else None
