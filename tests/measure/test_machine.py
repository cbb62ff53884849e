"""Peak memory of a call, and what the machine or its container leaves."""

from pathlib import Path

import pytest
import torch

from tokenstep.measure import machine
from tokenstep.measure.machine import MIB, available_bytes, peak_mib

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_is_what_a_call_held_at_once() -> None:
    def hold(count: int) -> None:
        # 48 MiB each: what is larger than 32 MiB, the C library returns as soon as it is freed.
        held = [torch.ones(12 * MIB) for _ in range(count)]
        del held
        torch.ones(12 * MIB)

    hold(1)
    for count in (1, 2, 3):
        found = peak_mib(lambda count=count: hold(count), CPU)  # type: ignore[misc]
        assert found == pytest.approx(48 * count, rel=0.1, abs=4)
    again = peak_mib(lambda: None, CPU)
    assert again is not None and again < 4


def test_what_is_left_is_what_the_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = available_bytes(CPU)
    if Path("/proc/meminfo").exists():
        assert free is not None and free > 0
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._cgroup_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine._cgroup_left(tmp_path) == 4000
    (tmp_path / "memory.max").unlink()
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("700\n")
    (old / "memory.usage_in_bytes").write_text("100\n")
    assert machine._cgroup_left(tmp_path) == 600
    monkeypatch.setattr(machine, "_cgroup_left", lambda: 600)
    assert available_bytes(CPU) == 600
