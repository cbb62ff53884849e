"""The command line as a whole: its help and version, extras that are missing, its bar."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest
from commands import call, refused, without

from tokenstep import __version__, terminal


def test_the_package_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tokenstep", "--version"])
    with pytest.raises(SystemExit) as caught, warnings.catch_warnings():
        runpy.run_module("tokenstep", run_name="__main__")
    assert not caught.value.code and capsys.readouterr().out == f"{__version__}\n"


def test_version_and_help() -> None:
    assert call("--version") == (0, f"{__version__}\n", "")
    code, stdout, _ = call("--help")
    assert code == 0 and all(verb in stdout for verb in ("segment", "evaluate", "train"))


def test_training_faults_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    assert "a.toml" in refused("train", "policy", tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("out = 'x'\npatch = 8\n")
    assert "zebra" in refused("train", "policy", tmp_path / "a.toml", "zebra=1")
    assert "zebra" in refused("train", "segmenter", tmp_path / "a.toml", "zebra")


def test_training_without_its_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "lightning")
    for verb in ("policy", "segmenter"):
        line = refused("train", verb, tmp_path / "a.toml")
        assert "lightning" in line and "tokenstep[train]" in line


@pytest.mark.parametrize("visible", [True, False])
def test_a_bar_only_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], visible: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: visible)
    with terminal.progress_bar() as progress:
        assert list(progress.track("ab", description="letters")) == ["a", "b"]
    out, err = capsys.readouterr()
    assert out == "" and ("letters" in err and "2/2" in err if visible else err == "")


def test_a_missing_extra_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "matplotlib")
    line = refused("compare", "--data", tmp_path, "--out", tmp_path / "o")
    assert "matplotlib" in line and "tokenstep[plot]" in line
