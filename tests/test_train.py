"""Training on pictures that the test draws: it learns, it merges, and it survives being killed."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tokenstep.config import PolicyConfig, Settings, VitConfig
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.evaluate import evaluate
from tokenstep.hub import load
from tokenstep.loop import PhaseModule, Stream
from tokenstep.measure import Run
from tokenstep.model.policy import Policy
from tokenstep.recipes import DataConfig, Phase, PolicyRecipe, SegmenterRecipe, TrainerConfig
from tokenstep.train import SegmenterModule, train_policy, train_segmenter

COLOURS = np.array([[40, 90, 200], [200, 60, 50], [240, 220, 60]])
TRAINER = TrainerConfig(save_every=2, val_every=10_000, accelerator="cpu")
POLICY = PolicyConfig(trunk="test_efficientnet", stages=(1, 2), sizes=(2, 4), width=16, scale=1.0)
VIT = VitConfig(name="test_vit", patch=8, depth=3, image_size=(64, 64), exits=(2,), cells=2)


def draw(root: Path, counts: dict[str, int]) -> Path:
    """A labelled folder of noisy rectangles on a plain ground."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            label = np.zeros((64, 64), np.uint8)
            for value in (1, 2):
                top, left = generator.integers(0, 40, 2)
                height, width = generator.integers(12, 36, 2)
                label[top : top + height, left : left + width] = value
            noise = generator.normal(0, 12, (64, 64, 3))
            image = np.clip(COLOURS[label] + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / split / "images" / f"{index:03}.png")
            Image.fromarray(label).save(root / split / "labels" / f"{index:03}.png")
    classes = {"names": ["ground", "red", "yellow"], "palette": COLOURS.tolist()}
    (root / "classes.json").write_text(json.dumps(classes))
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn"), {"train": 24, "val": 6, "test": 6})


def data_config(root: Path) -> DataConfig:
    return DataConfig(str(root), scale=(0.8, 1.25), colour=0.1, workers=0)


def policy_recipe(
    root: Path, out: Path, steps: int, optimizer: Literal["adamw", "muon"] = "adamw"
) -> PolicyRecipe:
    phase = Phase(steps=steps, batch=8, crop=(64, 64), lr=5e-3, warmup=5, optimizer=optimizer)
    return PolicyRecipe(data_config(root), (phase,), 8, str(out), POLICY, trainer=TRAINER)


def segmenter_recipe(root: Path, policy: Path, out: Path, *phases: Phase) -> SegmenterRecipe:
    settings = Settings(merge=(0.5, 0.5), exits=(0.9,), spare=2)
    return SegmenterRecipe(
        data_config(root), phases, str(policy), str(out), settings, vit=VIT, trainer=TRAINER
    )


@pytest.fixture(scope="module")
def policy(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("policy")
    train_policy(policy_recipe(drawn, out, 60), progress=False)
    return out


def test_the_policy_learns_which_superpatches_are_homogeneous(policy: Path) -> None:
    report = json.loads((policy / "val.json").read_text())
    smallest = report["sizes"]["2"]
    assert smallest["precision"] > 0.8
    assert smallest["recall"] > 0.5
    assert smallest["purity"] > 0.93
    assert report["all"]["reduction"] > smallest["reduction"] > 1.2


def test_a_trained_segmenter_is_right_and_merges(drawn: Path, policy: Path, tmp_path: Path) -> None:
    phase = Phase(steps=90, batch=8, crop=(64, 64), lr=2e-3, warmup=10, dense_share=0.2)
    tuned = Phase(steps=10, batch=8, crop=(64, 64), lr=2e-4, warmup=2, pruning=True)
    train_segmenter(segmenter_recipe(drawn, policy, tmp_path, phase, tuned), progress=False)

    model = load(tmp_path)
    frozen = load_file(policy / "model.safetensors")  # with the statistics of its norms
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, frozen[name]), name
    settings = model.config.settings
    test = LabelledFolder(drawn, "test")
    report = evaluate(model, test, Run(settings))
    for half in ("dense", "reduced"):
        assert report[half]["miou"] > 0.6, half  # guessing one class gives less than 0.3
    assert report["reduced"]["tokens"]["start"] < 0.8 * report["dense"]["tokens"]["start"]
    assert (
        report["reduced"]["gmac"]["total"] - report["reduced"]["gmac"]["policy"]
        < (report["dense"]["gmac"]["total"])
    )
    assert 0 < report["reduced"]["halted_share"] < 1
    assert json.loads((tmp_path / "recipe.json").read_text())["vit"]["patch"] == 8


class Killed(Exception):
    """Stands for kill -9."""


def train_killed(recipe: PolicyRecipe, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Start a training and stop it dead before step ``at``."""
    steps = 0

    def before_step(self: PhaseModule, batch: object, index: int) -> None:
        nonlocal steps
        steps += 1
        if steps > at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PhaseModule, "on_train_batch_start", before_step)
        with pytest.raises(Killed):
            train_policy(recipe, progress=False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: Literal["adamw", "muon"],
) -> None:
    train_policy(policy_recipe(drawn, tmp_path / "whole", 7, optimizer), progress=False)
    broken = policy_recipe(drawn, tmp_path / "broken", 7, optimizer)
    train_killed(broken, monkeypatch, at=5)  # the last checkpoint is that of step 4
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    train_policy(broken, progress=False)

    whole = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(tmp_path / "broken" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_of_another_recipe_is_not_resumed(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    recipe = policy_recipe(drawn, tmp_path, 3)
    if ended:
        train_policy(recipe, progress=False)
    else:
        train_killed(recipe, monkeypatch, at=2)
    wider = dataclasses.replace(recipe, policy=dataclasses.replace(POLICY, width=24))
    with pytest.raises(TokenstepError, match="another recipe") as caught:
        train_policy(wider, progress=False)
    assert "\n" not in str(caught.value)


def test_the_policy_may_learn_the_classes_aside(drawn: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(policy_recipe(drawn, tmp_path, 2), class_weight=0.5)
    train_policy(recipe, progress=False)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == Policy(POLICY, 8).state_dict().keys()  # the head is dropped


def test_the_stream_is_a_function_of_seed_and_place(drawn: Path) -> None:
    folder = LabelledFolder(drawn, "train", transform=lambda a, b: (a + torch.rand(()), b))
    whole = Stream(folder, seed=1, first=0, last=60)
    rest = Stream(folder, seed=1, first=30, last=60)
    for place in (30, 44, 59):
        assert torch.equal(whole[place][0], rest[place - 30][0])
    first_epoch = {float(whole[place][0].sum()) for place in range(24)}
    assert len(first_epoch) == 24  # every picture once an epoch


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy_weights": "nowhere"}, "holds no trained policy"),
        ({"vit": dataclasses.replace(VIT, patch=16)}, "patches of 8 px"),
        ({"vit": dataclasses.replace(VIT, name="resnet18")}, "resnet18"),
        ({"vit": dataclasses.replace(VIT, name="vit_of_dreams")}, "vit_of_dreams"),
        ({"settings": Settings(exits=(0.9, 0.9))}, "exit"),
        ({"settings": Settings(merge=(0.9,))}, "superpatch"),
    ],
)
def test_a_wrong_recipe_is_one_line(
    drawn: Path, policy: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    phase = Phase(steps=1, batch=2, crop=(64, 64))
    recipe = dataclasses.replace(segmenter_recipe(drawn, policy, tmp_path, phase), **change)
    with pytest.raises(TokenstepError, match=said) as caught:
        train_segmenter(recipe, progress=False)
    assert "\n" not in str(caught.value)


def test_a_recipe_without_phases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenstepError, match="phases"):
        segmenter_recipe(tmp_path, tmp_path, tmp_path)


def test_heads_learn_at_their_own_rate_and_tables_are_not_decayed(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    phase = Phase(steps=2, batch=2, crop=(64, 64), lr=1e-3, head_lr=4.0, weight_decay=0.1)
    recipe = segmenter_recipe(drawn, policy, tmp_path, phase)
    model = train_segmenter(recipe, progress=False)
    module = SegmenterModule(recipe, phase, model, torch.ones(3))
    (optimizer,), _ = module.configure_optimizers()
    names = {parameter: name for name, parameter in module.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.add(name)
            head = any(part in name for part in ("exits", "decoder"))
            assert group["initial_lr"] == pytest.approx(4e-3 if head else 1e-3), name
            plain = parameter.ndim == 1 or "pos_embed" in name or "cls_token" in name
            assert group["weight_decay"] == (0.0 if plain else 0.1), name
    assert seen == {name for name in names.values() if ".policy." not in name}


def test_muon_moves_the_matrices_and_adamw_the_rest(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    phase = Phase(steps=2, batch=2, crop=(64, 64), lr=1e-3, optimizer="muon")
    recipe = segmenter_recipe(drawn, policy, tmp_path, phase)
    model = train_segmenter(recipe, progress=False)
    module = SegmenterModule(recipe, phase, model, torch.ones(3))
    (optimizer,), _ = module.configure_optimizers()
    names = {parameter: name for name, parameter in module.named_parameters()}
    by_muon = {
        names[parameter]
        for group in optimizer.param_groups
        if not group["use_fallback"]
        for parameter in group["params"]
    }
    assert any("blocks.0.mlp.fc1.weight" in name for name in by_muon)
    for name in by_muon:
        assert name.endswith("weight") and "norm" not in name, name
        assert "exits" not in name and "decoder" not in name, name
