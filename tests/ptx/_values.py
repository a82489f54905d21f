"""Types, addresses and the lanes of a warp, which everything else is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from ptx._machine import Warp

LANES = 32
REGISTERS = 65_536  # of a processor
SHARED_BASE = 1024  # the first KiB belongs to the system on Hopper, so that no valid shared address is 0
SHARED_WINDOW = 1 << 56  # generic addresses of shared memory start here
PARAMETER_BASE = 1 << 60
BUFFER_BITS = 40  # buffer i occupies the global addresses from (i + 1) << BUFFER_BITS
UNWRITTEN, VISIBLE, UNFENCED = 0, 1, 2  # per byte of shared memory; UNFENCED + w: stored by warp w, not yet fenced
BARRIER, IN_FLIGHT = -1, -2
DTYPES: dict[str, Any] = {
    f"{kind}{8 * size}": np.dtype(f"{code}{size}")
    for kind, code in (("b", "u"), ("u", "u"), ("s", "i"))
    for size in (1, 2, 4, 8)
}
DTYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
DTYPES |= {"bf16": np.dtype(ml_dtypes.bfloat16), "e4m3": np.dtype(ml_dtypes.float8_e4m3fn)}
DTYPES |= {"e5m2": np.dtype(ml_dtypes.float8_e5m2)}
FLOATS = {"f16", "f32", "f64", "bf16", "e4m3", "e5m2"}
SPECIAL = {"%laneid", "%warpid", "%nwarpid"} | {
    f"%{name}.{axis}"
    for axis in "xyz"
    for name in ("tid", "ntid", "ctaid", "nctaid", "cluster_ctaid", "cluster_nctaid")
}
LANE = np.arange(LANES)
ROW, COLUMN = LANE // 4, LANE % 4  # of a lane within wgmma's 8-row fragments
Mask = np.ndarray | None  # the lanes that execute; None: all of them
Execute = Callable[["Warp", Mask], None]
Source = Callable[["Warp"], np.ndarray]


class KernelError(RuntimeError):
    """What the kernel did wrong, and where."""


def uniform(values: np.ndarray) -> int:
    """The one value of all lanes."""
    if (values != values[0]).any():
        raise KernelError("the lanes of a warp disagree about an operand that has to be uniform")
    return int(values[0])
