"""How a training goes: a bar on a terminal, lines elsewhere."""

import re
import sys
from pathlib import Path

import pytest

from tokenstep.train.progress import Progress, spell


def test_lines_say_where_it_is_how_well_it_goes_and_how_long_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress(Path("out/log"), phases=2, every=0)
    progress.begin(1, 2, 4)
    progress.step(3, 0.5)
    progress.looked(0.4321)
    progress.step(4, 0.25)
    progress.end()
    out, err = capsys.readouterr()
    assert out == ""
    begin, third, fourth = err.splitlines()
    assert "phase 2 of 2" in begin and "after step 2" in begin and "--logdir out/log" in begin
    assert "phase 2 of 2, step 3 of 4: loss 0.5000" in third
    assert re.search(r"steps/s, \d+ s left$", third)
    assert "step 4 of 4: loss 0.2500, val mIoU 43.21" in fourth and "left" not in fourth


def test_lines_are_rare_but_the_last_step_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(Path("log"), phases=1, every=1000)
    progress.begin(0, 0, 50)
    for step in range(1, 51):
        progress.step(step, 1.0)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_bar_goes_on_where_the_run_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(Path("log"), phases=1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress.begin(0, 7, 12)
    progress.end()
    assert "7/12" in capsys.readouterr().err
    progress.begin(0, 7, 12)
    progress.step(8, 1.0)
    progress.end()
    progress.end()
    shown = capsys.readouterr().err
    assert "8/12" in shown and "loss 1.0000" in shown


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(Path("log"), phases=1, quiet=True, every=0)
    progress.begin(0, 0, 1)
    progress.step(1, 1.0)
    progress.say("done")
    progress.end()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (60, "1 min"), (3599, "1 h 0 min"), (9000, "2 h 30 min")]
)
def test_durations_are_said_as_a_person_says_them(seconds: float, text: str) -> None:
    assert spell(seconds) == text
