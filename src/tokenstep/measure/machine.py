"""The machine: what it is, how fast it multiplies, what memory a call takes and what is left."""

import contextlib
import ctypes
import gc
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

MIB = 2**20
PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "openvino")


def description(device: torch.device) -> dict[str, Any]:
    """Describe what is timed: processor, threads, versions, and the commit if this is a clone."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": commit(),
        **{name: version(name) for name in PACKAGES if find_spec(name)},
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str | None:
    """The commit of the clone that the package runs from, with "+" if it was changed since."""
    call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    try:
        completed = subprocess.run([*call, "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or installed from a wheel
    return completed.stdout.strip()


@torch.inference_mode()
def gemm_rate(weight: Tensor, rows: int = 4096, repeats: int = 20) -> float:
    """GMAC per second of ``rows`` tokens times ``weight (out, in)``: the best of ``repeats``."""
    x = torch.randn(rows, weight.shape[1]).to(weight)
    times = []
    for _ in range(repeats):
        start = perf_counter()
        y = x @ weight.T
        if y.is_cuda:
            torch.cuda.synchronize(y.device)
        times.append(perf_counter() - start)
    return rows * weight.numel() / min(times) / 1e9


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """The most memory that ``call`` held above what was held before it, in MiB.

    On a GPU torch's allocator counts it. On Linux the process's resident pages count. It is None
    where neither can be told.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    if not Path("/proc/self/clear_refs").exists():
        return None
    _free_pages()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel then forgets the peak
    call()
    return max(0, _resident("VmHWM") - before) / MIB


def _free_pages() -> None:
    """Return freed pages to the system, so that a call that takes them again counts."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def available_bytes(device: torch.device) -> int | None:
    """Memory in bytes that a batch can still take on ``device``; None where it cannot be told."""
    if device.type == "cuda":
        # Torch keeps the memory of freed tensors and gives it to the next ones.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    left = _cgroup_left()
    return min(free if left is None else [*free, left], default=None)


def _cgroup_left(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the limit of a container leaves, under either version of control groups."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # not of this version, or "max": no limit
            return int((root / limit).read_text()) - int((root / used).read_text())
    return None
