"""Train a policy from label maps, then a segmenter with that policy frozen."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokenstep.config import ModelConfig, Settings
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.loop import PhaseModule, is_main, meet, run_phase
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
from tokenstep.policy_report import policy_report
from tokenstep.recipes import PolicyRecipe, SegmenterRecipe, resolved
from tokenstep.runs import (
    claim,
    digest_of_pictures,
    digest_of_weights,
    load_policy,
    save_json,
    save_weights,
)
from tokenstep.segmenter import WEIGHTS, StepSegmenter


class PolicyModule(PhaseModule):
    """Trains a :class:`Policy` on whether superpatches share one class."""

    def __init__(self, recipe: PolicyRecipe, number: int, policy: Policy, classes: int) -> None:
        super().__init__(recipe, number)
        self.recipe = recipe
        self.policy = policy
        # The heads of superpatches that do not fit into a crop learn nothing from it.
        whole = max(recipe.policy.sizes) * recipe.patch
        self.find_unused = min(self.phase.crop) <= whole - recipe.patch
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
        self, recipe: SegmenterRecipe, number: int, model: StepSegmenter, weight: Tensor
    ) -> None:
        super().__init__(recipe, number)
        # A batch without superpatches leaves their projection out.
        self.find_unused = recipe.vit.sub_patches
        self.recipe = recipe
        self.model = model
        self.register_buffer("weight", weight, persistent=False)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross-entropy of the decoder and, as deep supervision, of every exit."""
        images, labels = batch
        labels = padded_labels(labels, self.model.patch)
        settings = self.recipe.settings
        # Drawn from the step and the device alone, so that a resumed run draws the same.
        place = self.global_step * self.trainer.world_size + self.global_rank
        torch.manual_seed(self.seed * 1_000_003 + place)
        normal = self.model.normalise(images)
        sights = self.model.look(normal)
        level = self.model.partition(normal, settings, sights)
        dense = torch.rand(len(images), device=level.device) < self.phase.dense_share
        level = torch.where(dense.view(-1, 1, 1), level.clamp(max=0), level)
        watch = DeepSupervision(self.model.exits)
        used = settings if self.phase.pruning else Settings()
        out = self.model.encode(normal, level, settings=used, sights=sights, reducers=[watch])
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
        predicted = self.model.label_maps(self.model(images, settings=used))[0]
        self.confusion += confusion_matrix(predicted, labels[0], len(self.model.config.classes))

    def on_validation_epoch_start(self) -> None:
        """Forget the counts of the last look."""
        classes = len(self.model.config.classes)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log mIoU from the summed counts of all devices.

        Where they cannot share the pictures evenly, Lightning has one counted twice.
        """
        confusion = cast(Tensor, self.all_gather(self.confusion))
        confusion = confusion.view(-1, *self.confusion.shape).sum(0)
        self.log("val_miou", iou_of(confusion).nanmean().float(), prog_bar=True)


def train_policy(recipe: PolicyRecipe, *, progress: bool = True) -> dict[str, Any]:
    """Train a policy and write it to ``recipe.out``; returns its scores on val.

    Where several processes train together, only the main one writes and has scores to return.

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
    whose = resolved(recipe, pictures=digest_of_pictures(training_folder(recipe)))
    claim(out, whose, write=is_main())
    for number in range(len(recipe.phases)):
        module = PolicyModule(recipe, number, policy, len(val.classes.names))
        run_phase(module, policy, out / f"phase{number}", recipe.trainer, progress=progress)
    report: dict[str, Any] = {}
    if is_main():
        save_weights(policy, out / WEIGHTS)
        report = policy_report(policy, val, tolerance=recipe.tolerance)
        save_json(report, out / "val.json")
    meet()
    return report


def train_segmenter(recipe: SegmenterRecipe, *, progress: bool = True) -> StepSegmenter:
    """Train a segmenter with the policy of ``recipe.policy_weights`` and write it to ``out``.

    Raises:
        TokenstepError: the data, the policy's folder or the recipe is at fault.
    """
    folder = training_folder(recipe)
    model = build_segmenter(recipe, folder)
    policy = digest_of_weights(Path(recipe.policy_weights))
    whose = resolved(recipe, pictures=digest_of_pictures(folder), policy=policy)
    out = Path(recipe.out)
    claim(out, whose, write=is_main())
    weight = torch.ones(len(folder.classes.names))
    if recipe.class_balance > 0:
        weight = class_weights(count_pixels(folder), recipe.class_balance)
    look = LabelledFolder(recipe.data.root, recipe.data.val_split, names=recipe.data.val_names)
    val = DataLoader(look, batch_size=1)
    for number in range(len(recipe.phases)):
        module = SegmenterModule(recipe, number, model, weight)
        run_phase(module, model, out / f"phase{number}", recipe.trainer, val=val, progress=progress)
    if is_main():
        model.save_pretrained(out)
    meet()
    return model.eval()


def build_segmenter(recipe: SegmenterRecipe, folder: LabelledFolder) -> StepSegmenter:
    """The segmenter as it begins: an untrained ViT, and the policy frozen.

    Raises:
        TokenstepError: the policy's folder or the recipe is at fault.
    """
    policy_config, state, patch = load_policy(Path(recipe.policy_weights))
    classes = folder.classes
    config = ModelConfig(
        *(classes.names, classes.palette, recipe.vit, policy_config, recipe.settings),
        long_side=folder.median_long_side() if recipe.scale_by == "side" else None,
    )
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
    model.use(checkpointing=recipe.trainer.checkpointing)
    model.train()  # which leaves the frozen policy in eval mode; Lightning does not call it
    return model


def training_folder(recipe: PolicyRecipe | SegmenterRecipe) -> LabelledFolder:
    """The pictures that a recipe trains on, as they are."""
    data = recipe.data
    return LabelledFolder(data.root, data.train_split, names=data.train_names)


def count_pixels(folder: LabelledFolder) -> Tensor:
    """Pixels of each class over a folder, ``(C,)`` int64."""
    total = torch.zeros(256, dtype=torch.int64)
    for _, label in folder:
        total += torch.bincount(label.flatten().long(), minlength=256)
    return total[: len(folder.classes.names)]
