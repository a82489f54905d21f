"""What instructions compute of the values of a warp's lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from ptx._values import DTYPES, FLOATS, KernelError

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def unordered(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The comparison that is true as well where an operand is NaN."""
    return lambda a, b: compare(a, b) | (a != a) | (b != b)


COMPARE |= {f"{name}u": unordered(COMPARE[name]) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMPARE |= {"num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b)}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once: the float64 sum is rounded to odd before it is rounded to float32."""
    if a.dtype != np.float32:
        if a.dtype == np.float64:
            raise NotImplementedError("fma.f64")
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    inexact = np.isfinite(total) & (error != 0)
    if inexact.any():
        bits = total.view(np.int64) - (inexact & ((error < 0) == (total > 0)))  # towards zero, then sticky
        total = np.where(inexact, bits | 1, bits).view(np.float64)
    return total.astype(np.float32)


def shift_left(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """shl: amounts beyond the width give 0."""
    bits = 8 * a.dtype.itemsize
    return np.where(b >= bits, 0, a << np.minimum(b, bits - 1).astype(a.dtype)).astype(a.dtype)


def shift_right(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """shr: amounts beyond the width give 0, or the sign."""
    bits = 8 * a.dtype.itemsize
    result = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return result if a.dtype.kind == "i" else np.where(b >= bits, 0, result).astype(a.dtype)


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each nibble of the selector takes a byte of b:a; its bit 3 takes that byte's sign eight times instead."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    taken = (both[:, None] >> (8 * (nibbles & 7)).astype(np.uint64)).astype(np.uint8)
    taken = np.where(nibbles & 8, taken.view(np.int8) >> 7, taken.view(np.int8)).astype(np.int8)
    return taken.view(np.uint32).ravel()


def extract(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: the field's sign bit fills the rest when the type is signed."""
    bits, length, start = 8 * a.dtype.itemsize, length & 255, start & 255
    field_ = shift_right(a, start)
    if a.dtype.kind == "u":
        return field_ & (shift_left(np.ones_like(a), length) - a.dtype.type(1))
    keep = np.minimum(start + length, bits)
    return np.where(length == 0, 0, shift_right(shift_left(a, bits - keep), bits - keep + start)).astype(a.dtype)


def insert(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: the low bits of a into a field of b."""
    ones = shift_left(shift_left(np.ones_like(a), length & 255) - a.dtype.type(1), start & 255)
    return b & ~ones | shift_left(a, start & 255) & ones


def look_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """lop3: bit 4a + 2b + c of the table."""
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def widened(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.wide."""
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    return a.astype(wide) * b.astype(wide)


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.hi, of 64 bits as well."""
    bits = 8 * a.dtype.itemsize
    return np.array([int(x) * int(y) >> bits for x, y in zip(a, b, strict=True)], a.dtype)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """div: of integers, towards zero."""
    if a.dtype.kind not in "iu":
        return a / b
    if (b == 0).any():
        raise KernelError("divides by zero")  # the lanes that are masked off may do so
    quotient = a // b
    return (quotient + ((a % b != 0) & ((a < 0) != (b < 0)))).astype(a.dtype)


def convert(value: np.ndarray, target: str, modifiers: Sequence[str]) -> np.ndarray:
    """cvt, elementwise."""
    dtype, rounding = DTYPES[target], {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    modes = [rounding[modifier] for modifier in modifiers if modifier in rounding]
    real = value.dtype.kind not in "iu"
    if target in FLOATS:
        if modes and real:
            value = modes[0](value.astype(np.float64))
        if "satfinite" in modifiers and target in ("e4m3", "e5m2"):
            limit = float(ml_dtypes.finfo(dtype).max)
            value = np.clip(value.astype(np.float32), -limit, limit)
        return value.astype(dtype) if "sat" not in modifiers else np.clip(value, 0, 1).astype(dtype)
    limits = np.iinfo(dtype)
    if not real:
        return (np.clip(value, limits.min, limits.max) if "sat" in modifiers else value).astype(dtype)
    value = np.nan_to_num(modes[0](value.astype(np.float64)), nan=0.0)
    return np.array([max(limits.min, min(limits.max, int(x))) for x in np.clip(value, -(2.0**65), 2.0**65)], dtype)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "times": np.multiply,
    "min": np.fmin,
    "max": np.fmax,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "shl": shift_left,
    "shr": shift_right,
    "div": divide,
    "rem": lambda a, b: a - divide(a, b) * b,
    "fma": fused,
    "bfe": extract,
    "bfi": insert,
    "prmt": permute,
    "selp": lambda a, b, p: np.where(p, a, b),
}
SHIFTS = {
    "shl": ("", "u32"),
    "shr": ("", "u32"),
    "bfe": ("", "u32", "u32"),
    "bfi": ("", "", "u32", "u32"),
    "selp": ("", "", "pred"),
}
