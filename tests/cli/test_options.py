"""Options and models that are wrong: one line that names what, and what to give instead."""

import json
import shutil
from pathlib import Path

import pytest
from commands import refused, save_model
from PIL import Image
from samples import pattern, save_pattern

from tokenstep.hub import shipped_models


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_pattern(tmp_path / "photo.png", 40, 50)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--merge", "0.5"], "--merge 0.5 2"),
        (["--merge", "0.5,0.5,0.5"], "--merge 2"),
        (["--merge", "high,low"], "--merge numbers off"),
        (["--merge", "0.5,1.5"], "1.5 0 1"),
        (["--merge", "nan,0.5"], "nan"),
        (["--exits", "0.5,0.5"], "--exits 1 exit"),
        (["--exits", ""], "--exits"),
        (["--dense", "--exits", "0.9"], "--dense --exits"),
        (["--dense", "--max-loss", "1"], "--dense --max-loss"),
        (["--max-loss", "1", "--merge", "off"], "--max-loss --merge"),
        (["--max-loss", "1"], "operating points calibrate"),
        (["--device", "abacus"], "--device abacus cpu"),
        (["--device", "cuda:99"], "--device cuda:99 cpu"),
        (["--device", "meta"], "--device meta cpu"),
        (["--device", "mps"], "--device mps CUDA cpu"),
    ],
)
def test_wrong_options(saved: Path, photo: Path, options: list[str], words: str) -> None:
    line = refused("segment", photo, "--model", saved, "--out", photo.parent / "out", *options)
    assert all(word in line for word in words.split())
    assert not (photo.parent / "out").exists()


def test_an_unknown_model_lists_the_known_ones(photo: Path) -> None:
    for name in ("abacus", "no/such/folder", photo):
        line = refused("segment", photo, "--model", name)
        assert str(name) in line and all(known in line for known in shipped_models())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x10" * 100),
        ("config.json", None),
        ("config.json", b""),
        ("config.json", b"{classes: road"),
        ("config.json", b"\xff\xfe\x00"),
        ("config.json", b"{}"),
        ("config.json", b"[1, 2]"),
        ("config.json", b"null"),
    ],
)
def test_damaged_models(tmp_path: Path, saved: Path, name: str, content: bytes | None) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_bytes(content)
    Image.fromarray(pattern(8, 8)).save(tmp_path / "a.png")
    assert str(broken) in refused("segment", tmp_path / "a.png", "--model", broken)


def test_weights_that_are_cut_short(tmp_path: Path, saved: Path, photo: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        assert str(weights) in refused("segment", photo, "--model", tmp_path / "model")


def test_weights_of_other_classes(tmp_path: Path, saved: Path, photo: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    config = json.loads((saved / "config.json").read_text())
    config |= {"classes": ["sea", "land"], "palette": [[0, 0, 1], [0, 1, 0]]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused("segment", photo, "--model", tmp_path / "model")
