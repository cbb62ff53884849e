"""Peak memory of a call, and what the machine or its container leaves."""

import mmap
from pathlib import Path

import pytest
import torch
from support import machine_says

from tokenstep.measure.machine import MIB, available_bytes, peak_mib

CPU = torch.device("cpu")


def pages() -> mmap.mmap:
    """48 MiB of resident memory."""
    held = mmap.mmap(-1, 48 * MIB)
    for place in range(0, len(held), mmap.PAGESIZE):
        held[place] = 1
    return held


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_is_what_a_call_held_at_once() -> None:
    def hold(count: int) -> None:
        # From the system, not from the C library: of what others freed in this process, that may
        # reuse a part, and keep it when it is freed again.
        held = [pages() for _ in range(count)]
        for one in held:
            one.close()
        pages().close()

    for count in (1, 2, 3):
        found = peak_mib(lambda count=count: hold(count), CPU)  # type: ignore[misc]
        assert found == pytest.approx(48 * count, rel=0.1, abs=4)
    again = peak_mib(lambda: None, CPU)
    assert again is not None and again < 4


MEMINFO = "MemTotal:  64 kB\nMemAvailable:  9 kB\n"
NEW, OLD = "/sys/fs/cgroup/memory.", "/sys/fs/cgroup/memory/memory."


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"/proc/meminfo": MEMINFO}, 9 * 1024),
        ({"/proc/meminfo": MEMINFO, f"{NEW}max": "5000\n", f"{NEW}current": "1000\n"}, 4000),
        ({"/proc/meminfo": MEMINFO, f"{NEW}max": "99999\n", f"{NEW}current": "0\n"}, 9 * 1024),
        ({"/proc/meminfo": MEMINFO, f"{NEW}max": "max\n", f"{NEW}current": "1000\n"}, 9 * 1024),
        (
            {
                "/proc/meminfo": MEMINFO,
                f"{OLD}limit_in_bytes": "700\n",
                f"{OLD}usage_in_bytes": "100\n",
            },
            600,
        ),
        ({}, None),
    ],
)
def test_what_is_left_is_what_the_machine_and_its_container_leave(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], left: int | None
) -> None:
    machine_says(monkeypatch, files)
    assert available_bytes(CPU) == left


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_this_machine_has_memory_left() -> None:
    free = available_bytes(CPU)
    assert free is not None and free > 0
