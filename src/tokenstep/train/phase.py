"""One phase of a training as Lightning sees it: its pictures, its optimiser, and where it goes on.

Everything random is drawn from the seed and the step. The step of the checkpoint alone says where a
killed run was; Lightning's count of batches and the stream both follow it.
"""

import signal
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from tokenstep.core.partition import padded_labels
from tokenstep.core.unmerge import unmerge
from tokenstep.data.augment import TrainTransform, normalise
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.measure.metrics import confusion_matrix, iou_of
from tokenstep.model.label_map import label_maps
from tokenstep.model.segmenter import Segmenter
from tokenstep.policies.dcts import DCTS
from tokenstep.reducers.exit_heads import DeepSupervision
from tokenstep.train.losses import (
    distillation_loss,
    homogeneity_loss,
    homogeneity_targets,
    naming_loss,
    segmentation_loss,
)
from tokenstep.train.optimiser import optimise
from tokenstep.train.recipe import PolicyRecipe, SegmenterRecipe, normal_of
from tokenstep.train.stream import Places, Stream, share_of


class PhaseModule(pl.LightningModule):
    """What both trainings share: the stream of pictures, the optimiser, and resuming at a step.

    ``find_unused`` says that a batch may leave parameters without a gradient, which training on
    several devices has to know. ``looks`` says that it looks at val on the way.
    """

    heads: tuple[str, ...] = ()  # what learns at the heads' rate, by the start of its name
    find_unused = False
    looks = False

    def below(self, name: str) -> int:
        """How many layers a parameter lies below the last; only a stack of blocks has layers."""
        return 0

    def __init__(self, recipe: PolicyRecipe | SegmenterRecipe, number: int) -> None:
        super().__init__()
        self.number = number
        self.data = recipe.data
        self.phase = recipe.phases[number]
        # Each phase draws anew, else a later one would show the same pictures cut alike.
        self.seed = recipe.trainer.seed + 7919 * number
        # What a phase adds to the network starts alike, whatever ran before in this process.
        torch.manual_seed(self.seed)
        self.done_steps = 0

    def seed_step(self) -> None:
        """Draw from the step and the device alone, so that a resumed run draws the same."""
        place = self.global_step * self.trainer.world_size + self.global_rank
        torch.manual_seed(self.seed * 1_000_003 + place)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note where the killed run was, so that the stream goes on from there."""
        self.done_steps = int(checkpoint["global_step"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The phase as one epoch, of which a resumed run takes the rest."""
        data, phase, world = self.data, self.phase, self.trainer.world_size
        transform = TrainTransform(
            phase.crop, scale=data.scale, flip=data.flip, colour=data.colour, rotate=data.rotate
        )
        folder = LabelledFolder(
            data.root,
            data.train_split,
            names=data.train_names,
            transform=transform,
            cache=data.cache,
        )
        places = Places(
            steps=phase.steps,
            batch=phase.batch,
            first=self.done_steps,
            rank=self.global_rank,
            world=world,
        )
        return DataLoader(
            Stream(folder, seed=self.seed, length=phase.steps * phase.batch * world),
            batch_sampler=places,
            num_workers=data.workers,
            persistent_workers=data.workers > 0,  # so that Lightning knows them, and ends them
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_ending_to_main,
        )

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at the first loss that is no number: nothing after it would be."""
        if not bool(loss.isfinite()):
            raise TokenstepError(
                f"the loss is not finite at step {self.global_step}: lower lr, or train with "
                "trainer.precision=fp32"
            )

    def configure_optimizers(self) -> Any:
        """What Lightning wants: the optimiser, and its schedule step by step."""
        optimizer, schedule = optimise(self.named_parameters(), self.phase, self.heads, self.below)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class PolicyModule(PhaseModule):
    """Trains a :class:`Policy` on whether superpatches share one class."""

    def __init__(self, recipe: PolicyRecipe, number: int, policy: DCTS, classes: int) -> None:
        super().__init__(recipe, number)
        if self.phase.head_lr != 1:  # at 1 the optimiser's groups stay as runs of 0.1 saved them
            self.heads = ("policy.lateral.", "policy.smooth.", "policy.heads.", "namer.")
        self.recipe = recipe
        self.policy = policy
        mean, std = normal_of(recipe)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        # The heads of superpatches that do not fit into a crop learn nothing from it.
        whole = max(recipe.policy.sizes) * recipe.patch
        self.find_unused = min(self.phase.crop) <= whole - recipe.patch
        self.classes = classes
        self.namer = nn.Conv2d(policy.channels, classes, 1) if recipe.class_weight > 0 else None

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Loss of one batch."""
        self.seed_step()
        images, labels = batch
        targets = homogeneity_targets(
            labels,
            patch=self.recipe.patch,
            sizes=self.recipe.policy.sizes,
            classes=self.classes,
            tolerance=self.recipe.tolerance,
        )
        normal = normalise(images, cast(Tensor, self.mean), cast(Tensor, self.std))
        features = self.policy.features(normal)
        loss = homogeneity_loss(self.policy.score(features), targets)
        self.log("loss", loss, prog_bar=True)
        if self.namer is not None:
            named = self.namer(self.policy.on_grid(features))
            aside = naming_loss(named, padded_labels(labels, self.recipe.patch))
            self.log("naming", aside, prog_bar=True)
            loss = loss + self.recipe.class_weight * aside
        return loss


class SegmenterModule(PhaseModule):
    """Trains a :class:`Segmenter` with its policy frozen, on merged tokens."""

    heads = ("model.exits.", "model.decoder.", "model.tokenise.context.")
    looks = True

    def __init__(
        self, recipe: SegmenterRecipe, number: int, model: Segmenter, weight: Tensor
    ) -> None:
        super().__init__(recipe, number)
        # A batch without superpatches leaves their projection out.
        self.find_unused = recipe.vit.sub_patches
        self.recipe = recipe
        self.model = model
        self.register_buffer("weight", weight, persistent=False)

    def below(self, name: str) -> int:
        """A block lies below those after it, the embedding below all of them."""
        depth = len(self.model.encoder.host_blocks())
        before, found, rest = name.partition("model.encoder.blocks.")
        if found and not before:
            return depth - 1 - int(rest.partition(".")[0])
        return depth if name.startswith("model.tokenise.") else 0

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross-entropy of the decoder and, as deep supervision, of every exit."""
        images, labels = batch
        labels = padded_labels(labels, self.model.patch)
        thresholds = self.recipe.thresholds
        self.seed_step()
        unmerged = torch.rand(len(images), device=images.device) < self.phase.dense_share
        watch = DeepSupervision(self.model.exits)
        used = thresholds if self.phase.pruning else thresholds.without_exits()
        out = self.model(images, thresholds=used, unmerged=unmerged, reducers=[watch])
        partition = out.partition
        weight = cast(Tensor, self.weight)
        live = out.logits[: len(out.tokens.x)]
        loss = segmentation_loss(out.tokens, live, partition, labels, weight)
        self.log("loss", loss, prog_bar=True)
        taught, told = self.recipe.exit_distil, 1 - self.recipe.exit_distil
        last = unmerge(out.tokens, live, partition) if taught else None
        for tokens, logits in watch.seen:
            share = self.recipe.exit_weight / len(watch.seen)
            if told:
                aside = segmentation_loss(tokens, logits, partition, labels, weight)
                loss = loss + share * told * aside
            if last is not None:
                apart = distillation_loss(tokens, logits, partition, last, labels)
                loss = loss + share * taught * apart
        return loss

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """This device's share of the pictures to look at while training, one by one."""
        data = self.data
        folder = LabelledFolder(data.root, data.val_split, names=data.val_names)
        count = min(len(folder), self.recipe.trainer.val_pictures)
        share = share_of(count, rank=self.global_rank, world=self.trainer.world_size)
        return DataLoader(Subset(folder, share), batch_size=1)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Count the pixels of one picture, merged and (if in this phase) pruned."""
        images, labels = batch
        thresholds = self.recipe.thresholds
        used = thresholds if self.phase.pruning else thresholds.without_exits()
        predicted = label_maps(self.model(images, thresholds=used))[0]
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


def _leave_ending_to_main(worker: int) -> None:
    """A data worker ends when the main process does, else that one would see a fault."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
