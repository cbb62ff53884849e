"""Weights that a training starts from: they come in whole, or the recipe is refused in a line."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from running import assert_same_weights, refused, watch
from safetensors.torch import load_file, save_file
from support import scramble
from torch import Tensor
from training import POLICY, TRAINER, VIT, policy_recipe, segmenter_recipe

from tokenstep.hub import load
from tokenstep.train.recipe import Phase, PolicyRecipe, SegmenterRecipe
from tokenstep.train.train import train_policy, train_segmenter

# So small a step that no weight changes by more than rounding.
STILL = Phase(steps=1, batch=2, crop=(64, 64), lr=1e-12, weight_decay=0.0)

Recipe = PolicyRecipe | SegmenterRecipe
State = dict[str, Tensor]
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of a ViT without its head, and of the CNN's stages alone, in half precision."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    found = {}
    for part, name in (("vit", "test_vit"), ("policy", "test_efficientnet")):
        model = timm.create_model(name)
        scramble(model)
        state = {
            key: value.half() if value.is_floating_point() else value
            for key, value in model.state_dict().items()
            if not key.startswith(("head", "conv_head", "bn2", "classifier"))
        }
        found[part] = folder / f"{part}.safetensors"
        save_file(state, found[part])
    return found


@pytest.fixture
def make(drawn: Path, policy: Path, tmp_path: Path) -> Make:
    """A recipe that trains a part from ``pretrained`` weights; ``changes`` are the part's."""

    def recipe(part: str, pretrained: bool | str | Path, **changes: Any) -> Recipe:
        pretrained = str(pretrained) if isinstance(pretrained, Path) else pretrained
        trainer = dataclasses.replace(TRAINER, save_every=1, val_pictures=1)
        if part == "policy":
            made = policy_recipe(drawn, tmp_path / "policy", 1)
            config = dataclasses.replace(POLICY, pretrained=pretrained, **changes)
            return dataclasses.replace(made, policy=config, phases=(STILL,), trainer=trainer)
        vit = dataclasses.replace(VIT, pretrained=pretrained, **changes)
        made = segmenter_recipe(drawn, policy, tmp_path / "vit", STILL)
        return dataclasses.replace(made, vit=vit, trainer=trainer)

    return recipe


def train(recipe: Recipe) -> State:
    """Train, and read the weights that are then in the folder."""
    if isinstance(recipe, PolicyRecipe):
        train_policy(recipe, progress=False)
    else:
        train_segmenter(recipe, progress=False)
    return load_file(Path(recipe.out) / "model.safetensors")


def assert_holds(found: State, wanted: State) -> None:
    """Every tensor that is wanted is found under its name, whatever module it is in by now."""
    assert wanted
    for name, value in wanted.items():
        alike = [held for key, held in found.items() if key.endswith(f".{name}")]
        same = [held for held in alike if held.shape == value.shape]
        assert any(torch.allclose(held, value.float(), atol=1e-5, rtol=0) for held in same), name


def test_a_policy_starts_from_a_file(make: Make, files: dict[str, Path]) -> None:
    used = ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2")
    learnt = {
        name: value
        for name, value in load_file(files["policy"]).items()
        if name.startswith(used) and name.endswith(("weight", "bias"))
    }
    recipe = make("policy", files["policy"])
    assert_holds(train(recipe), learnt)
    assert files["policy"].name in (Path(recipe.out) / "README.md").read_text()


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_a_vit_starts_from_a_file_on_its_own_grid(
    make: Make, files: dict[str, Path], stem: str
) -> None:
    # Of the file's six blocks, four are used.
    shape = {"patch_size": 8, "img_size": (64, 64), "depth": 4, "num_classes": 0}
    overlay = {"file": str(files["vit"]), "num_classes": 1}
    wanted = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay=overlay, **shape
    ).state_dict()
    for kind in ("weight", "bias"):
        value = wanted.pop(f"patch_embed.proj.{kind}")
        wanted |= {f"embed.proj.{kind}": value} if stem == "linear" else {}
    assert_holds(train(make("vit", files["vit"], stem=stem)), wanted)


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _changed(change: Callable[[State], State]) -> Callable[[Path], None]:
    return lambda path: save_file(change(load_file(path)), path)


def _renamed(state: State) -> State:
    return {f"net.{name}": value for name, value in state.items()}


def _without(start: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if start not in name}


def _wider(state: State) -> State:
    return {name: torch.cat([value, value]) for name, value in state.items() if value.ndim}


@pytest.mark.parametrize("part", ["vit", "policy"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_torn, "fetch it again"),
        (lambda path: path.write_bytes(b""), "fetch it again"),
        (lambda path: path.unlink(), "No such file"),
        (_changed(lambda state: {}), "holds no weights"),
        (_changed(lambda state: {k: v.int() for k, v in state.items()}), "holds whole numbers"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is no file"),
        (_changed(_renamed), "lacks"),
        (_changed(_without("blocks.2.")), r"lacks .*blocks\.2\."),
        (_changed(_without("norm")), None),
        (_changed(_wider), "does not fit"),
        (
            _changed(lambda state: {name: value / 0 for name, value in state.items()}),
            "not finite",
        ),
    ],
)
def test_a_wrong_file_is_named_and_nothing_is_trained(
    make: Make,
    files: dict[str, Path],
    tmp_path: Path,
    part: str,
    spoil: Callable[[Path], None],
    said: str | None,
) -> None:
    path = tmp_path / "wrong.safetensors"
    shutil.copy(files[part], path)
    spoil(path)
    recipe = make(part, path)
    if said is None and part == "policy":  # its norms are called otherwise
        return
    assert str(path) in refused(recipe, said or "lacks .*norm")
    assert not list(Path(recipe.out).glob("phase*")) and not (tmp_path / "recipe.json").exists()


@pytest.mark.parametrize("part", ["vit", "policy"])
@pytest.mark.parametrize("name", ["w.pth", "w.npz", "w.bin", "w.pt", "weights"])
def test_nothing_but_safetensors_is_read(
    make: Make, files: dict[str, Path], tmp_path: Path, part: str, name: str
) -> None:
    path = tmp_path / name
    torch.save(load_file(files[part]), path)
    said = refused(make(part, path), "safetensors")
    assert str(path) in said and f"{part}.pretrained" in said


@pytest.mark.parametrize("part", ["vit", "policy"])
def test_weights_of_the_hub(
    make: Make,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    name = f"{'test_vit' if part == 'vit' else 'test_efficientnet'}.r160_in1k"
    said = refused(make(part, True), "cannot be fetched")
    assert name in said and f'{part}.pretrained = "FILE.safetensors"' in said
    # As the hub's own client leaves it.
    repository = tmp_path / "hub" / f"models--timm--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    shutil.copy(files[part], repository / "snapshots" / ("a" * 40) / "model.safetensors")
    fetched, named = make(part, True), make(part, files[part])
    found = train(fetched)
    written = json.loads((Path(fetched.out) / "recipe.json").read_text())
    assert written["initial"]["source"] == f"timm/{name}"
    shutil.rmtree(fetched.out)
    if part == "vit":  # whose mean and std are a half
        assert all(torch.equal(value, found[name]) for name, value in train(named).items())
    else:
        assert tuple(written["mean"]) == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("part", ["vit", "policy"])
def test_a_tag_means_weights(make: Make, files: dict[str, Path], part: str) -> None:
    key, name = {"vit": ("name", "test_vit"), "policy": ("trunk", "test_efficientnet")}[part]
    tagged = {key: f"{name}.r160_in1k"}
    said = refused(make(part, False, **tagged), "names weights")
    assert f"set {part}.pretrained = true" in said and f"{part}.{key}" in said
    plain = train(make(part, files[part]))
    shutil.rmtree(make(part, False).out)
    for name, value in train(make(part, files[part], **tagged)).items():
        assert torch.equal(value, plain[name]), name


def test_a_folder_of_a_model_with_a_tag_still_loads(make: Make, tmp_path: Path) -> None:
    recipe = make("vit", False)
    found = train(recipe)
    path = Path(recipe.out) / "config.json"
    config = json.loads(path.read_text())
    config["vit"]["name"] += ".r160_in1k"
    config["policy"]["trunk"] += ".r160_in1k"
    for part in ("vit", "policy"):
        config[part].pop("pretrained")  # as an earlier version wrote it
    config.pop("initial")
    path.write_text(json.dumps(config))
    state = load(recipe.out).state_dict()
    assert all(torch.equal(state[name], value) for name, value in found.items())


def test_a_model_needs_its_start_no_more(
    make: Make, drawn: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    copies = {part: tmp_path / "secret" / f"{part}.safetensors" for part in files}
    (tmp_path / "secret").mkdir()
    for part, path in files.items():
        shutil.copy(path, copies[part])
    policy = make("policy", copies["policy"])
    train(policy)
    recipe = dataclasses.replace(make("vit", copies["vit"]), policy_weights=policy.out)
    found = train(recipe)
    shutil.rmtree(tmp_path / "secret")
    model = load(recipe.out)
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    text = (Path(recipe.out) / "config.json").read_text()
    assert "secret" not in text
    digests = {part: hashlib.sha256(path.read_bytes()).hexdigest() for part, path in files.items()}
    assert json.loads(text)["initial"] == [
        {"part": part, "source": f"{part}.safetensors", "sha256": digests[part]}
        for part in ("vit", "policy")
    ]
    card = (Path(recipe.out) / "README.md").read_text()
    assert "secret" not in card and "vit.safetensors" in card and "policy.safetensors" in card
    # A complete run is only read.
    for again in (policy, recipe):
        assert all(
            torch.equal(value, found.get(name, value)) for name, value in train(again).items()
        )
    assert "sha256" in (Path(recipe.out) / "recipe.json").read_text()
    refused(make("vit", False), "another recipe .*vit.pretrained")


@pytest.mark.parametrize("part", ["vit", "policy"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_run_goes_on_from_the_weights_that_it_began_with(
    make: Make,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    ended: bool,
) -> None:
    path, moved = tmp_path / "start.safetensors", tmp_path / "moved.safetensors"
    shutil.copy(files[part], path)
    phase = dataclasses.replace(STILL, steps=3, lr=1e-3)
    recipe, elsewhere, random = (
        dataclasses.replace(make(part, start), phases=(phase,)) for start in (path, moved, False)
    )
    whole = dataclasses.replace(recipe, out=str(tmp_path / "whole"))
    train(whole)
    watch(lambda: train(recipe), monkeypatch, die_at=None if ended else 2)
    path.rename(moved)
    save_file({name: value * 2 for name, value in load_file(moved).items()}, path)
    for other in (recipe, random):
        refused(other, f"another recipe .*{part}.pretrained")
    train(elsewhere)
    assert_same_weights(Path(recipe.out), Path(whole.out))
