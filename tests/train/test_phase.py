"""One phase of a training: what it draws, what learns how fast."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import watch
from safetensors.torch import load_file
from training import POLICY, VIT, policy_recipe, segmenter_recipe

from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.policies.dcts import DCTS
from tokenstep.train.losses import segmentation_loss
from tokenstep.train.recipe import Phase
from tokenstep.train.train import (
    PolicyModule,
    SegmenterModule,
    build_segmenter,
    train_policy,
    train_segmenter,
)


def test_each_phase_draws_its_own_pictures(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = policy_recipe(drawn, tmp_path, 2)
    twice = dataclasses.replace(recipe, phases=recipe.phases * 2)
    batches = watch(lambda: train_policy(twice, progress=False), monkeypatch)
    for one, other in zip(batches[:2], batches[2:], strict=True):
        assert not torch.equal(one[0], other[0])


def test_labels_fill_whole_patches_and_are_not_stretched(
    drawn: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = Phase(steps=1, batch=2, crop=(50, 44))
    held: list[torch.Tensor] = []

    def loss(*args: Any) -> torch.Tensor:
        held.append(args[3])
        return segmentation_loss(*args)

    monkeypatch.setattr("tokenstep.train.phase.segmentation_loss", loss)
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
        assert PolicyModule(one, 0, DCTS(POLICY, 8), 3).find_unused == unused


def test_the_policy_may_learn_the_classes_aside(drawn: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(policy_recipe(drawn, tmp_path, 2), class_weight=0.5)
    train_policy(recipe, progress=False)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == DCTS(POLICY, 8).state_dict().keys()  # the head is dropped


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
