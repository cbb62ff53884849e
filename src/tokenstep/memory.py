"""Memory of calls and machines: the most that a call takes, and what is left."""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """The most memory that ``call`` held above what was held before it, in MiB.

    On a GPU as torch's allocator counts it, on Linux as the process's resident pages; None where
    neither can be told.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    if not Path("/proc/self/clear_refs").exists():
        return None
    _give_back()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's word for: forget the peak
    call()
    return max(0, _resident("VmHWM") - before) / MIB


def _give_back() -> None:
    """Return freed pages to the system, so that a call cannot take them unseen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def available_bytes(device: torch.device) -> int | None:
    """Memory that a batch can still take on ``device``; None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    limits = [left for left in [_cgroup_left()] if left is not None]
    return min(found + limits, default=None)


def _cgroup_left(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the limit of a container leaves, under either version of control groups."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # not of this version, or "max": no limit
            return int((root / limit).read_text()) - int((root / used).read_text())
    return None
