"""What fine-tuning adds: layer-wise rates, averaged weights, and a policy trained on the way."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from running import refused
from safetensors.torch import load_file, save_file
from training import POLICY, VIT, policy_recipe, segmenter_recipe

from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.data.pretrained import find_weights
from tokenstep.hosts.timm_build import published_vit
from tokenstep.model.segmenter import Segmenter
from tokenstep.policies.dcts import DCTS
from tokenstep.train.precision import settled
from tokenstep.train.recipe import Phase, SegmenterRecipe, read_recipe
from tokenstep.train.train import (
    PolicyModule,
    SegmenterModule,
    build_segmenter,
    train_policy,
    train_segmenter,
)

PHASE = Phase(steps=4, batch=2, crop=(64, 64), lr=1e-3, warmup=1)


def rates(module: Any) -> dict[str, float]:
    """The learning rate of each parameter at the start, by name."""
    (optimizer,), _ = module.configure_optimizers()
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        names[parameter]: group["initial_lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_a_layer_learns_slower_than_the_one_above_it(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    phase = dataclasses.replace(PHASE, layer_decay=0.5, head_lr=3.0)
    recipe = segmenter_recipe(drawn, policy, tmp_path, phase)
    recipe = dataclasses.replace(recipe, vit=dataclasses.replace(VIT, policy_features=True))
    model = build_segmenter(recipe, LabelledFolder(drawn, "train"))
    learn = rates(SegmenterModule(recipe, 0, model, torch.ones(3)))
    blocks = [learn[f"model.encoder.blocks.{index}.mlp.fc1.weight"] for index in range(4)]
    assert blocks == pytest.approx([1e-3 / 8, 1e-3 / 4, 1e-3 / 2, 1e-3])
    assert learn["model.tokenise.pos_embed"] == pytest.approx(1e-3 / 16)
    assert learn["model.encoder.norm.weight"] == pytest.approx(1e-3)
    heads = ("model.exits.", "model.decoder.", "model.tokenise.context.")
    for name, rate in learn.items():
        assert not name.startswith(heads) or rate == pytest.approx(3e-3), name


def test_no_rate_rises_while_the_others_fall(drawn: Path, policy: Path, tmp_path: Path) -> None:
    phase = dataclasses.replace(PHASE, steps=9, layer_decay=0.1)  # the embedding's is 1e-7
    recipe = segmenter_recipe(drawn, policy, tmp_path, phase)
    model = build_segmenter(recipe, LabelledFolder(drawn, "train"))
    (optimizer,), (schedule,) = SegmenterModule(
        recipe, 0, model, torch.ones(3)
    ).configure_optimizers()
    before = [group["lr"] for group in optimizer.param_groups]
    for _ in range(8):
        optimizer.step()
        schedule["scheduler"].step()
        now = [group["lr"] for group in optimizer.param_groups]
        assert all(new <= old * 1.0001 for old, new in zip(before, now, strict=True))
        before = now


def test_the_trunk_of_a_policy_learns_slower_than_the_rest(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path, 1)
    recipe = dataclasses.replace(
        recipe, phases=(dataclasses.replace(PHASE, head_lr=3.0),), class_weight=0.5
    )
    learn = rates(PolicyModule(recipe, 0, DCTS(POLICY, 8), 3))
    for name, rate in learn.items():
        assert rate == pytest.approx(1e-3 if name.startswith("policy.trunk.") else 3e-3), name


def test_a_phase_ends_with_the_average_of_its_steps(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    def ends(average: float, steps: int) -> dict[str, torch.Tensor]:
        # A constant rate, so that a shorter phase is the beginning of a longer one.
        phase = dataclasses.replace(PHASE, steps=steps, warmup=100, average=average)
        out = tmp_path / f"{average}-{steps}"
        train_segmenter(segmenter_recipe(drawn, policy, out, phase), progress=False)
        end = load_file(out / "model.safetensors")
        return {name: value for name, value in end.items() if value.is_floating_point()}

    wanted = ends(0.0, 1)  # the first step begins the average
    for steps in (2, 3):
        step = ends(0.0, steps)
        keep = min(0.2, steps / (9 + steps))  # 2 / 11, then 0.2: at first less is kept
        wanted = {name: wanted[name].lerp(step[name], 1 - keep) for name in wanted}
    averaged = ends(0.2, 3)
    for name, value in averaged.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
    frozen = [name for name in averaged if name.startswith("policy.")]
    assert frozen and all(torch.equal(averaged[name], step[name]) for name in frozen)


def written(folder: Path, drawn: Path) -> Path:
    """Recipes of a segmenter and, beside it, of the policy that it asks for."""
    (folder / "policy.toml").write_text(
        """
patch = 16
out = "elsewhere"
policy = { trunk = "test_efficientnet", stages = [1, 2], sizes = [2], width = 16 }
data = { root = "elsewhere", workers = 0 }
[[phases]]
steps = 1
batch = 2
crop = [64, 64]
"""
    )
    path = folder / "segmenter.toml"
    path.write_text(
        f"""
policy_weights = "{folder}/policy"
policy_recipe = "policy.toml"
out = "{folder}/out"
data = {{ root = "{drawn}", workers = 0, train_names = ["!000"] }}
thresholds = {{ merge = [0.5] }}
vit = {{ name = "test_vit", patch = 8, depth = 2, image_size = [64, 64] }}
trainer = {{ accelerator = "cpu" }}
[[phases]]
steps = 1
batch = 2
crop = [64, 64]
"""
    )
    return path


def test_a_missing_policy_is_trained_first_on_the_same_pictures(
    drawn: Path, tmp_path: Path
) -> None:
    recipe = read_recipe(SegmenterRecipe, written(tmp_path, drawn))
    model = train_segmenter(recipe, progress=False)
    assert model.patch == 8
    own = load_file(tmp_path / "policy" / "model.safetensors")
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, own[name])
    held = (tmp_path / "policy" / "data.json").read_text()
    assert held == (tmp_path / "out" / "data.json").read_text() and "000" not in held

    # One that is there is taken as it is, whatever the recipe says now.
    (tmp_path / "policy.toml").unlink()
    other = dataclasses.replace(recipe, out=str(tmp_path / "other"))
    assert train_segmenter(other, progress=False).patch == 8


def test_a_policy_recipe_that_is_missing_is_one_line(drawn: Path, tmp_path: Path) -> None:
    recipe = read_recipe(SegmenterRecipe, written(tmp_path, drawn))
    (tmp_path / "policy.toml").unlink()
    refused(recipe, "policy.toml: cannot read the recipe")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("merge = [0.5]", "merge = [0.5, 0.5]", "superpatch size"),
        ("depth = 2", "depth = 2, exits = [7]", "exits"),
    ],
)
def test_a_segmenter_that_could_not_be_built_is_refused_before_its_policy_is_trained(
    drawn: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    path = written(tmp_path, drawn)
    path.write_text(path.read_text().replace(old, new))
    refused(read_recipe(SegmenterRecipe, path), said)
    assert not (tmp_path / "policy").exists()


def test_the_policy_is_for_the_patches_that_the_vit_really_has(drawn: Path, tmp_path: Path) -> None:
    path = written(tmp_path, drawn)
    path.write_text(path.read_text().replace("patch = 8, ", ""))
    (tmp_path / "policy.toml").write_text(
        (tmp_path / "policy.toml").read_text().replace("patch = 16", "patch = 8")
    )
    model = train_segmenter(read_recipe(SegmenterRecipe, path), progress=False)
    assert model.policy.patch == model.patch == 16


def test_no_policy_recipe_is_none(drawn: Path, tmp_path: Path) -> None:
    path = written(tmp_path, drawn)
    path.write_text(path.read_text().replace('"policy.toml"', '""'))
    refused(read_recipe(SegmenterRecipe, path), "holds no trained policy")


def test_a_policy_that_was_begun_before_heads_had_a_rate_goes_on_only_without(
    drawn: Path, tmp_path: Path
) -> None:
    recipe = policy_recipe(drawn, tmp_path / "out", 1)
    train_policy(recipe, progress=False)
    written_down = tmp_path / "out" / "recipe.json"
    held = json.loads(written_down.read_text())
    for key in ("layer_decay", "average"):  # as version 0.1 wrote it
        del held["phases"][0][key]
    held["phases"][0]["head_lr"] = 4.0
    written_down.write_text(json.dumps(held))
    asked = dataclasses.replace(recipe.phases[0], head_lr=4.0)
    refused(dataclasses.replace(recipe, phases=(asked,)), r"phases.0.head_lr 1.0 -> 4.0")
    train_policy(recipe, progress=False)  # at 1, which is what it learned at


def test_auto_is_what_the_machine_has_and_then_what_the_run_began_with(
    drawn: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def machine(amx: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})

    recipe = segmenter_recipe(drawn, policy, tmp_path, dataclasses.replace(PHASE, steps=1))
    auto = dataclasses.replace(
        recipe, trainer=dataclasses.replace(recipe.trainer, precision="auto")
    )
    machine(amx=True)
    assert settled(auto).trainer.precision == "bf16"
    assert settled(recipe).trainer.precision == "fp32"
    machine(amx=False)
    assert settled(auto).trainer.precision == "fp32"
    train_segmenter(auto, progress=False)
    machine(amx=True)
    assert settled(auto).trainer.precision == "fp32"
    train_segmenter(auto, progress=False)  # which is the same run


def test_pretrained_tokens_start_as_they_are_whatever_the_policy_saw(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    """What the policy saw is added by a projection that starts at zero, and learns."""
    file = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    recipe = segmenter_recipe(drawn, policy, tmp_path, PHASE)
    recipe = dataclasses.replace(recipe, vit=dataclasses.replace(VIT, policy_features=True))
    folder = LabelledFolder(drawn, "train")
    weights = find_weights(str(file), "vit.pretrained", published_vit("test_vit"))
    model = build_segmenter(recipe, folder, weights).eval()
    picture = folder[0][0][None]
    with torch.inference_mode():
        before = model(picture).logits
        for parameter in _context(model)[0].parameters():
            parameter.add_(1.0)
        assert torch.equal(model(picture).logits, before)
    assert _context(build_segmenter(recipe, folder))[-1].weight.any()  # at random, as before


def _context(model: Segmenter) -> Any:
    return model.tokenise.context
