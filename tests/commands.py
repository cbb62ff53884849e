"""The command line as a user calls it, in this process, and a tiny model to call it with."""

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import CLASSES, PALETTE

from tokenstep.cli import main
from tokenstep.config import PolicyConfig, Thresholds, VitConfig
from tokenstep.model.config import ModelConfig
from tokenstep.model.segmenter import Segmenter


def call(*arguments: object) -> tuple[int, str, str]:
    """Run `tokenstep` with some arguments: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["tokenstep", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as caught,
    ):
        main.main()
    return int(caught.value.code or 0), out.getvalue(), err.getvalue()


def refused(*arguments: object) -> str:
    """Run a call that is wrong; its one line on stderr."""
    code, _, err = call(*arguments)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("tokenstep: ")
    return line


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Have packages be missing, as they are where their extra is not installed."""
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


def save_model(folder: Path) -> Path:
    """A tiny model that knows nothing, saved as any other is."""
    torch.manual_seed(0)
    vit = VitConfig("test_vit", patch=8, depth=2, image_size=(32, 48), exits=(1,), cells=2)
    policy = PolicyConfig("test_efficientnet", stages=(1, 2), sizes=(2, 4), width=8)
    # Superpatches wherever they fit, so that the largest picture costs little.
    config = ModelConfig(CLASSES, PALETTE, vit, policy, Thresholds((0.0, 0.0), (0.36,)))
    Segmenter.build(config).eval().save_pretrained(folder)
    return folder


def report_in(out: Path) -> list[dict[str, Any]]:
    """The entries of a report, which is JSON without NaN."""

    def never(word: str) -> None:
        raise AssertionError(f"{word} in report.json")

    images = json.loads((out / "report.json").read_text(), parse_constant=never)["images"]
    assert isinstance(images, list)
    return images
