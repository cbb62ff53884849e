"""Training on pictures that the test draws: it learns, it merges, and it survives being killed."""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tokenstep.config import PolicyConfig, Settings, VitConfig
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.evaluate import evaluate
from tokenstep.hub import load
from tokenstep.loop import PhaseModule, Stream
from tokenstep.losses import segmentation_loss
from tokenstep.measure import Run
from tokenstep.model.policy import Policy
from tokenstep.policy_report import policy_report
from tokenstep.recipes import DataConfig, Phase, PolicyRecipe, SegmenterRecipe, TrainerConfig
from tokenstep.runs import save_weights
from tokenstep.train import (
    PolicyModule,
    SegmenterModule,
    build_segmenter,
    train_policy,
    train_segmenter,
)

COLOURS = np.array([[40, 90, 200], [200, 60, 50], [240, 220, 60]])
TRAINER = TrainerConfig(save_every=2, val_every=10_000, accelerator="cpu")
POLICY = PolicyConfig(trunk="test_efficientnet", stages=(1, 2), sizes=(2, 4), width=16, scale=0.5)
VIT = VitConfig(name="test_vit", patch=8, depth=4, image_size=(64, 64), exits=(2,), cells=2)


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
    gmac = {half: report[half]["gmac"] for half in ("dense", "reduced")}
    assert gmac["reduced"]["policy"] > 0
    assert gmac["reduced"]["total"] < gmac["dense"]["total"], "the policy costs what it saves"
    assert 0 < report["reduced"]["halted_share"] < 1
    assert json.loads((tmp_path / "recipe.json").read_text())["vit"]["patch"] == 8


@pytest.mark.parametrize(("scale_by", "side"), [("side", 64), ("pixel", None)])
def test_a_model_of_scenes_remembers_the_scale_of_its_pictures(
    drawn: Path, policy: Path, tmp_path: Path, scale_by: Literal["side", "pixel"], side: int | None
) -> None:
    phase = Phase(steps=1, batch=2, crop=(32, 32))
    recipe = segmenter_recipe(drawn, policy, tmp_path, phase)
    recipe = dataclasses.replace(recipe, scale_by=scale_by)
    train_segmenter(recipe, progress=False)
    assert load(tmp_path).config.long_side == side
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert written.pop("scale_by") == scale_by
    (tmp_path / "recipe.json").write_text(json.dumps(written))  # as an earlier version wrote it
    train_segmenter(recipe, progress=False)


class Killed(Exception):
    """Stands for kill -9."""


Batch = tuple[torch.Tensor, torch.Tensor]


def watch(
    train: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *, die_at: int | None = None
) -> list[Batch]:
    """The batches that a training takes; it may be stopped dead before step ``die_at``."""
    batches: list[Batch] = []

    def before_step(self: PhaseModule, batch: Batch, index: int) -> None:
        if len(batches) == die_at:
            raise Killed
        batches.append(batch)

    with monkeypatch.context() as patch:
        patch.setattr(PhaseModule, "on_train_batch_start", before_step)
        if die_at is None:
            train()
        else:
            with pytest.raises(Killed):
                train()
    return batches


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: Literal["adamw", "muon"],
) -> None:
    train_policy(policy_recipe(drawn, tmp_path / "whole", 7, optimizer), progress=False)
    broken = policy_recipe(drawn, tmp_path / "broken", 7, optimizer)
    watch(lambda: train_policy(broken, progress=False), monkeypatch, die_at=5)
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    rest = watch(lambda: train_policy(broken, progress=False), monkeypatch)
    assert len(rest) == 7 - 4, "the last checkpoint is that of step 4"
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")


def test_a_training_told_to_end_does_not_end_as_if_it_were_done(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    recipe = policy_recipe(drawn, tmp_path, 7, "adamw")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PhaseModule, "on_train_batch_start", told)
        train_policy(recipe, progress=False)
    assert not (tmp_path / "model.safetensors").exists()
    train_policy(recipe, progress=False)
    assert (tmp_path / "model.safetensors").exists()


def test_a_killed_segmenter_goes_on_in_its_phase(
    drawn: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Phase(steps=3, batch=2, crop=(64, 64), dense_share=0.5)
    second = dataclasses.replace(first, steps=6, pruning=True)

    def recipe(out: Path) -> SegmenterRecipe:
        vit = dataclasses.replace(VIT, drop_path=0.3)
        trainer = dataclasses.replace(TRAINER, val_every=2, val_pictures=1)
        made = segmenter_recipe(drawn, policy, out, first, second)
        return dataclasses.replace(made, vit=vit, trainer=trainer)

    def broken() -> object:
        return train_segmenter(recipe(tmp_path / "broken"), progress=False)

    train_segmenter(recipe(tmp_path / "whole"), progress=False)
    watch(broken, monkeypatch, die_at=3 + 5)
    assert len(watch(broken, monkeypatch)) == 6 - 4
    assert watch(broken, monkeypatch) == [], "it is done"
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")


def test_each_phase_draws_its_own_pictures(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = policy_recipe(drawn, tmp_path, 2)
    twice = dataclasses.replace(recipe, phases=recipe.phases * 2)
    batches = watch(lambda: train_policy(twice, progress=False), monkeypatch)
    for one, other in zip(batches[:2], batches[2:], strict=True):
        assert not torch.equal(one[0], other[0])


def refused(recipe: PolicyRecipe | SegmenterRecipe, match: str) -> str:
    with pytest.raises(TokenstepError, match=match) as caught:
        if isinstance(recipe, PolicyRecipe):
            train_policy(recipe, progress=False)
        else:
            train_segmenter(recipe, progress=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_of_another_recipe_is_not_taken_for_this_one(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    recipe = policy_recipe(drawn, tmp_path / "run", 3)
    stop = None if ended else 2
    watch(lambda: train_policy(recipe, progress=False), monkeypatch, die_at=stop)
    written = (tmp_path / "run" / "recipe.json").read_text()
    phase = recipe.phases[0]
    others: list[dict[str, object]] = [
        {"policy": dataclasses.replace(POLICY, width=24)},
        {"phases": (dataclasses.replace(phase, steps=4),)},
        {"phases": (dataclasses.replace(phase, optimizer="muon"),)},
        {"phases": (phase, phase)},
        {"tolerance": 0.1},
        {"trainer": dataclasses.replace(TRAINER, seed=1)},
        {"data": dataclasses.replace(recipe.data, scale=(0.5, 1.25))},
        {"data": dataclasses.replace(recipe.data, train_names=("!000",))},
        {
            "data": dataclasses.replace(
                recipe.data, root=str(draw(tmp_path, {"train": 3, "val": 1}))
            )
        },
    ]
    for change in others:
        refused(dataclasses.replace(recipe, **change), "another recipe")
    assert (tmp_path / "run" / "recipe.json").read_text() == written


def test_a_run_may_move_and_work_in_another_way(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = policy_recipe(drawn, tmp_path / "run", 3)
    watch(lambda: train_policy(recipe, progress=False), monkeypatch, die_at=2)  # 2 are saved
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "data").symlink_to(drawn)
    moved = dataclasses.replace(
        recipe,
        out=str(tmp_path / "moved"),
        data=dataclasses.replace(recipe.data, root=str(tmp_path / "data"), cache=True),
        trainer=dataclasses.replace(TRAINER, save_every=1, accelerator="auto"),
    )
    rest = watch(lambda: train_policy(moved, progress=False), monkeypatch)
    assert len(rest) == 1
    found = {path.name for path in (tmp_path / "moved" / "phase0").iterdir()}
    assert found == {"last.ckpt", "end.safetensors"}, "a second kill resumes from the newest"


def test_a_recipe_that_trained_nothing_may_be_corrected(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path, 1)
    trainer = dataclasses.replace(TRAINER, accelerator="abacus")
    refused(dataclasses.replace(recipe, tolerance=0.5, trainer=trainer), "abacus")
    train_policy(recipe, progress=False)


def test_a_segmenter_is_of_the_weights_of_one_policy(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "policy"
    shutil.copytree(policy, copy)
    phase = Phase(steps=1, batch=2, crop=(64, 64))
    recipe = segmenter_recipe(drawn, copy, tmp_path / "run", phase)
    train_segmenter(recipe, progress=False)
    state = load_file(copy / "model.safetensors")
    state["heads.0.bias"] += 1
    save_file(state, copy / "model.safetensors")
    refused(recipe, "another recipe")


@pytest.mark.parametrize("name", ["last.ckpt", "end.safetensors"])
@pytest.mark.parametrize("content", [b"", b"these are no weights", None])
def test_a_damaged_file_of_a_run_is_named(
    drawn: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    recipe = policy_recipe(drawn, tmp_path, 2)
    train_policy(recipe, progress=False)
    (tmp_path / "phase0" / "end.safetensors").rename(tmp_path / "end")
    if name == "end.safetensors":
        (tmp_path / "end").rename(tmp_path / "phase0" / name)
    path = tmp_path / "phase0" / name
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    assert str(path) in refused(recipe, "damaged")


def test_an_out_that_takes_no_files_is_named(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(out) in refused(policy_recipe(drawn, out, 1), "folder")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_label_is_one_line_from_a_worker_too(tmp_path: Path, workers: int) -> None:
    root = draw(tmp_path / "data", {"train": 1, "val": 1})
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(root / "train" / "labels" / "000.png")
    recipe = policy_recipe(root, tmp_path / "out", 1)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=workers))
    line = refused(recipe, "77")
    assert line.startswith(str(root)), line


@pytest.mark.parametrize(
    "trainer",
    [
        {"accelerator": "abacus"},
        pytest.param(
            {"accelerator": "cuda"},
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    drawn: Path, tmp_path: Path, trainer: dict[str, str]
) -> None:
    recipe = policy_recipe(drawn, tmp_path, 1)
    refused(dataclasses.replace(recipe, trainer=dataclasses.replace(TRAINER, **trainer)), "trainer")


def test_a_loss_that_is_no_number_ends_the_training(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path, 4)
    phase = dataclasses.replace(recipe.phases[0], lr=1e30, warmup=0)
    refused(dataclasses.replace(recipe, phases=(phase,)), "not finite at step")
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    network.weight.data[0, 0] = float("nan")
    with pytest.raises(TokenstepError, match="weight is not finite"):
        save_weights(network, tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_policy_that_is_no_number_has_no_report(drawn: Path) -> None:
    broken = Policy(POLICY, 8)
    broken.heads[0].bias.data.fill_(float("nan"))
    with pytest.raises(TokenstepError, match="NaN"):
        policy_report(broken, LabelledFolder(drawn, "val"), tolerance=0.0)


def test_labels_fill_whole_patches_and_are_not_stretched(
    drawn: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = Phase(steps=1, batch=2, crop=(50, 44))
    held: list[torch.Tensor] = []

    def loss(*args: Any) -> torch.Tensor:
        held.append(args[3])
        return segmentation_loss(*args)

    monkeypatch.setattr("tokenstep.train.segmentation_loss", loss)
    recipe = segmenter_recipe(drawn, policy, tmp_path, phase)
    ((_, labels),) = watch(lambda: train_segmenter(recipe, progress=False), monkeypatch)
    for padded in held:
        assert padded.shape == (2, 56, 48)
        assert torch.equal(padded[:, :50, :44], labels)
        assert (padded[:, 50:] == 255).all() and (padded[:, :, 44:] == 255).all()


def test_no_two_steps_or_devices_draw_the_same(
    drawn: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = Phase(steps=1, batch=1, crop=(64, 64))
    recipe = segmenter_recipe(drawn, policy, tmp_path, phase, phase)
    model = build_segmenter(recipe, LabelledFolder(drawn, "train"))
    monkeypatch.setattr(SegmenterModule, "log", lambda *_, **__: None)
    seeds = set()
    for number in range(2):
        module = SegmenterModule(recipe, number, model, torch.ones(3))
        for step, rank in itertools.product(range(3), range(2)):
            trainer: Any = SimpleNamespace(world_size=2, global_rank=rank, global_step=step)
            monkeypatch.setattr(module, "_trainer", trainer)
            batch = torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.int64)
            module.training_step(batch, 0)
            seeds.add(torch.initial_seed())
    assert len(seeds) == 2 * 3 * 2


def test_devices_look_for_unused_parameters_only_where_there_may_be_some(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    phase = Phase(steps=1, batch=1, crop=(64, 64))
    for sub_patches in (False, True):
        vit = dataclasses.replace(VIT, sub_patches=sub_patches)
        recipe = dataclasses.replace(segmenter_recipe(drawn, policy, tmp_path, phase), vit=vit)
        model = build_segmenter(recipe, LabelledFolder(drawn, "train"))
        module = SegmenterModule(recipe, 0, model, torch.ones(3))
        assert module.find_unused == sub_patches
    for side, unused in ((25, False), (24, True)):  # a superpatch of 4 x 8 px, begun
        small = dataclasses.replace(policy_recipe(drawn, tmp_path, 1).phases[0], crop=(64, side))
        one = dataclasses.replace(policy_recipe(drawn, tmp_path, 1), phases=(small,))
        assert PolicyModule(one, 0, Policy(POLICY, 8), 3).find_unused == unused


def test_two_processes_train_one_policy_and_speak_once(drawn: Path, tmp_path: Path) -> None:
    recipe = f"""
    patch = 8
    out = "{tmp_path / "out"}"
    data = {{ root = "{drawn}", workers = 0 }}
    policy = {{ trunk = "test_efficientnet", stages = [1, 2], sizes = [2, 4], width = 8 }}
    trainer = {{ accelerator = "cpu", devices = 2 }}
    phases = [{{ steps = 2, batch = 2, crop = [64, 64] }}]
    """
    (tmp_path / "recipe.toml").write_text(recipe)
    # A file, since Lightning starts the second process by running the first one's again.
    (tmp_path / "run.py").write_text("from tokenstep.cli import main\n\nmain()\n")
    call = [sys.executable, tmp_path / "run.py", "train", "policy", tmp_path / "recipe.toml"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 6
    assert "find_unused" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


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
        ({"vit": dataclasses.replace(VIT, name="test_vit.foo")}, "foo"),
        ({"vit": dataclasses.replace(VIT, patch=None, image_size=(8, 8))}, "image_size"),
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
    module = SegmenterModule(recipe, 0, model, torch.ones(3))
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
    module = SegmenterModule(recipe, 0, model, torch.ones(3))
    (optimizer,), _ = module.configure_optimizers()
    names = {parameter: name for name, parameter in module.named_parameters()}
    by_muon = {
        names[parameter]
        for group in optimizer.param_groups
        if group["orthogonal"]
        for parameter in group["params"]
    }
    assert any("blocks.0.mlp.fc1.weight" in name for name in by_muon)
    for name in by_muon:
        assert name.endswith("weight") and "norm" not in name, name
        assert "exits" not in name and "decoder" not in name, name


@pytest.mark.parametrize("head_lr", [1.0, 0.5])
def test_adamw_has_a_group_for_each_rate_and_decay(
    drawn: Path, policy: Path, tmp_path: Path, head_lr: float
) -> None:
    phase = Phase(steps=1, batch=2, crop=(64, 64), head_lr=head_lr)
    recipe = segmenter_recipe(drawn, policy, tmp_path, phase)
    model = build_segmenter(recipe, LabelledFolder(drawn, "train"))
    (optimizer,), _ = SegmenterModule(recipe, 0, model, torch.ones(3)).configure_optimizers()
    assert len(optimizer.param_groups) == (2 if head_lr == 1 else 4)
