"""Train a policy from label maps, then a segmenter with that policy frozen."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokenstep.config import ModelConfig, PolicyConfig, Settings, from_dict
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.loop import PhaseModule, run_phase, save_weights
from tokenstep.losses import (
    class_weights,
    homogeneity_loss,
    homogeneity_targets,
    naming_loss,
    segmentation_loss,
)
from tokenstep.metrics import confusion_matrix, iou_of
from tokenstep.model.exits import DeepSupervision
from tokenstep.model.policy import Policy
from tokenstep.model.superpatches import padded_labels
from tokenstep.pictures import write_text
from tokenstep.policy_report import policy_report
from tokenstep.recipes import Phase, PolicyRecipe, SegmenterRecipe
from tokenstep.segmenter import WEIGHTS, StepSegmenter
from tokenstep.transforms import to_float


class PolicyModule(PhaseModule):
    """Trains a :class:`Policy` on whether superpatches share one class."""

    def __init__(self, recipe: PolicyRecipe, phase: Phase, policy: Policy, classes: int) -> None:
        super().__init__(recipe.data, phase, recipe.trainer.seed)
        self.recipe = recipe
        self.policy = policy
        self.classes = classes
        self.namer = nn.Conv2d(policy.channels, classes, 1) if recipe.class_weight > 0 else None

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Loss of one batch."""
        images, labels = batch
        targets = homogeneity_targets(
            labels,
            patch=self.recipe.patch,
            sizes=self.recipe.policy.sizes,
            classes=self.classes,
            tolerance=self.recipe.tolerance,
        )
        # The same normalisation as the segmenter's default.
        sight = self.policy.look((images - 0.5) / 0.5)
        loss = homogeneity_loss(self.policy.score(sight), targets)
        self.log("loss", loss, prog_bar=True)
        if self.namer is not None:
            named = self.namer(self.policy.features(sight))
            aside = naming_loss(named, padded_labels(labels, self.recipe.patch))
            self.log("naming", aside, prog_bar=True)
            loss = loss + self.recipe.class_weight * aside
        return loss


class SegmenterModule(PhaseModule):
    """Trains a :class:`StepSegmenter` with its policy frozen, on merged tokens."""

    heads = ("model.exits.", "model.decoder.", "model.tokenise.context.")

    def __init__(
        self, recipe: SegmenterRecipe, phase: Phase, model: StepSegmenter, weight: Tensor
    ) -> None:
        super().__init__(recipe.data, phase, recipe.trainer.seed)
        self.recipe = recipe
        self.model = model
        self.register_buffer("weight", weight, persistent=False)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross-entropy of the decoder and, as deep supervision, of every exit."""
        images, labels = batch
        settings = self.recipe.settings
        # Drawn from the step alone, so that a resumed run draws the same.
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)
        normal = self.model.normalise(images)
        sights = self.model.look(normal)
        level = self.model.partition(normal, settings, sights)
        dense = torch.rand(len(images), device=level.device) < self.phase.dense_share
        level = torch.where(dense.view(-1, 1, 1), level.clamp(max=0), level)
        watch = DeepSupervision(self.model.exits)
        used = settings if self.phase.pruning else Settings()
        out = self.model.encode(normal, level, settings=used, sights=sights, observers=[watch])
        weight = cast(Tensor, self.weight)
        live = out.logits[: len(out.tokens.x)]
        loss = segmentation_loss(out.tokens, live, level, labels, weight)
        self.log("loss", loss, prog_bar=True)
        for tokens, logits in watch.seen:
            aside = segmentation_loss(tokens, logits, level, labels, weight)
            loss = loss + self.recipe.exit_weight / len(watch.seen) * aside
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Count the pixels of one picture, merged and (if in this phase) pruned."""
        images, labels = batch
        settings = self.recipe.settings
        used = settings if self.phase.pruning else settings.without_exits()
        predicted = self.model.label_maps(self.model(to_float(images), settings=used))[0]
        self.confusion += confusion_matrix(predicted, labels[0], len(self.model.config.classes))

    def on_validation_epoch_start(self) -> None:
        """Forget the counts of the last look."""
        classes = len(self.model.config.classes)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log mIoU from the summed counts of all devices."""
        confusion = cast(Tensor, self.all_gather(self.confusion))
        confusion = confusion.view(-1, *self.confusion.shape).sum(0)
        self.log("val_miou", iou_of(confusion).nanmean().float(), prog_bar=True)


def train_policy(recipe: PolicyRecipe, *, progress: bool = True) -> dict[str, Any]:
    """Train a policy and write it to ``recipe.out``; returns its scores on val.

    Raises:
        TokenstepError: the data or the recipe is at fault.
    """
    val = LabelledFolder(recipe.data.root, recipe.data.val_split, names=recipe.data.val_names)
    torch.manual_seed(recipe.trainer.seed)
    try:
        policy = Policy(recipe.policy, recipe.patch)
    except ValueError as error:
        raise TokenstepError(f"recipe: {error}") from error
    out = Path(recipe.out)
    for number, phase in enumerate(recipe.phases):
        module = PolicyModule(recipe, phase, policy, len(val.classes.names))
        run_phase(module, policy, out / f"phase{number}", recipe.trainer, progress=progress)
    save_weights(policy, out / WEIGHTS)
    save_recipe(recipe, out)
    report = policy_report(policy, val, tolerance=recipe.tolerance)
    save_json(report, out / "val.json")
    return report


def train_segmenter(recipe: SegmenterRecipe, *, progress: bool = True) -> StepSegmenter:
    """Train a segmenter with the policy of ``recipe.policy_weights`` and write it to ``out``.

    Raises:
        TokenstepError: the data, the policy's folder or the recipe is at fault.
    """
    folder = LabelledFolder(
        recipe.data.root, recipe.data.train_split, names=recipe.data.train_names
    )
    classes = folder.classes
    policy_config, state, patch = load_policy(Path(recipe.policy_weights))
    config = ModelConfig(classes.names, classes.palette, recipe.vit, policy_config, recipe.settings)
    torch.manual_seed(recipe.trainer.seed)
    try:
        model = StepSegmenter(config)
    except ValueError as error:
        raise TokenstepError(f"recipe: {error}") from error
    if model.patch != patch:
        raise TokenstepError(
            f"{recipe.policy_weights}: the policy was trained for patches of {patch} px but the "
            f"recipe's ViT has {model.patch} px: train one for it, or set vit.patch = {patch}"
        )
    model.policy.load_state_dict(state)
    model.policy.requires_grad_(False)
    model.train()  # which leaves the frozen policy in eval mode; Lightning does not call it
    weight = torch.ones(len(classes.names))
    if recipe.class_balance > 0:
        weight = class_weights(count_pixels(folder), recipe.class_balance)
    look = LabelledFolder(recipe.data.root, recipe.data.val_split, names=recipe.data.val_names)
    val = DataLoader(look, batch_size=1)
    out = Path(recipe.out)
    for number, phase in enumerate(recipe.phases):
        module = SegmenterModule(recipe, phase, model, weight)
        run_phase(module, model, out / f"phase{number}", recipe.trainer, val=val, progress=progress)
    model.save_pretrained(out)
    save_recipe(recipe, out)
    return model.eval()


def load_policy(folder: Path) -> tuple[PolicyConfig, dict[str, Tensor], int]:
    """Settings, weights and patch of a policy that :func:`train_policy` wrote.

    Raises:
        TokenstepError: the folder holds no such policy.
    """
    try:
        recipe = json.loads((folder / "recipe.json").read_text())
        state = load_file(folder / WEIGHTS)
        patch = int(recipe["patch"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise TokenstepError(
            f"{folder}: holds no trained policy ({error}): run tokenstep train policy first"
        ) from error
    return from_dict(PolicyConfig, recipe["policy"], str(folder / "recipe.json")), state, patch


def count_pixels(folder: LabelledFolder) -> Tensor:
    """Pixels of each class over a folder, ``(C,)`` int64."""
    total = torch.zeros(256, dtype=torch.int64)
    for _, label in folder:
        total += torch.bincount(label.flatten().long(), minlength=256)
    return total[: len(folder.classes.names)]


def save_recipe(recipe: PolicyRecipe | SegmenterRecipe, out: Path) -> None:
    """Write the recipe as it was resolved beside the weights."""
    save_json(dataclasses.asdict(recipe), out / "recipe.json")


def save_json(data: object, path: Path) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=1) + "\n")
