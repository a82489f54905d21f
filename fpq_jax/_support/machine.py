"""What the machine has left: host memory, device memory, disk."""

import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

_CGROUPS = (  # limit and use, and what of the use the kernel gives back; version 2, then 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def resident_memory() -> int:
    """Bytes that this process has in memory now (its peak, where the system does not say)."""
    pages = _numbers(Path("/proc/self/statm"))
    return pages[1] * resource.getpagesize() if len(pages) > 1 else peak_memory()


def peak_memory() -> int:
    """Most bytes that this process ever had in memory."""
    # ru_maxrss knows also what the process that started this one had
    if high_water := _lines(Path("/proc/self/status")).get("VmHWM:"):
        return high_water * 1024
    # ru_maxrss is in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_host_memory() -> int | None:
    """Bytes that this process may still take: what the system has, its control group and its limits allow. None where
    nothing says."""
    found = []
    meminfo = _lines(Path("/proc/meminfo"))
    if "MemAvailable:" in meminfo:
        found.append(meminfo["MemAvailable:"] * 1024)
    for limit, use, reclaimable in _CGROUPS:
        limits, uses = _numbers(Path(limit)), _numbers(Path(use))
        if limits and uses:
            found.append(limits[0] - uses[0] + _lines(Path(use).with_name("memory.stat")).get(reclaimable, 0))
    status = _lines(Path("/proc/self/status"))
    for limited, use in ((resource.RLIMIT_DATA, "VmData:"), (resource.RLIMIT_AS, "VmSize:")):
        most = resource.getrlimit(limited)[0]
        if most != resource.RLIM_INFINITY:
            found.append(most - status.get(use, 0) * 1024)
    return max(0, min(found)) if found else None


def free_device_memory() -> int | None:
    """Bytes that are free on the device with the least; None where it is the host's memory, or nothing says."""
    if on_cpu():
        return None
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    free = [s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats if "bytes_limit" in s]
    return min(free) if free else None


def on_cpu() -> bool:
    """Whether the devices' memory is the host's."""
    return jax.default_backend() == "cpu"


def free_disk(place: Path) -> int:
    """Bytes that are free where ``place`` is or will be."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text(encoding="utf-8").split() if word.isdigit()]
    except OSError:
        return []


def _lines(path: Path) -> dict[str, int]:
    """The first number of each line, by its first word."""
    try:
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def arithmetic_dtype(stored: Any, asked: Any = None) -> Any:
    """The dtype of what is not quantized: as asked, or as stored; float16, of which a CPU has no products, is float32
    there."""
    stored = jnp.dtype(stored)
    return jnp.dtype(asked or (jnp.float32 if stored == jnp.float16 and on_cpu() else stored))
