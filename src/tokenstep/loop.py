"""The training loop of one phase: pictures drawn by step, the optimiser, checkpoints that resume.

Everything random is drawn from the seed and the step, so that a run that was killed and started
again goes on as if nothing had happened.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.optimise import optimise
from tokenstep.recipes import PolicyRecipe, SegmenterRecipe, TrainerConfig
from tokenstep.runs import find_checkpoint, load_weights, save_weights
from tokenstep.transforms import TrainTransform

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Stream(Dataset[tuple[Tensor, Tensor]]):
    """The pictures of a phase in the order of training, each drawn from the seed and its place.

    Item ``k`` is the same picture under the same augmentation in every run, whatever came before.
    """

    def __init__(self, folder: LabelledFolder, *, seed: int, first: int, last: int) -> None:
        self.folder = folder
        self.seed = seed
        self.first = first
        self.last = last

    def __len__(self) -> int:
        """Pictures from ``first`` to ``last``."""
        return self.last - self.first

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Picture ``(3, *crop)`` float and label ``(*crop)`` int64."""
        place = self.first + index
        epoch, within = divmod(place, len(self.folder))
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        picture = int(torch.randperm(len(self.folder), generator=shuffle)[within])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + place)
            return self.folder[picture]


class PhaseModule(pl.LightningModule):
    """What both trainings share: the stream of pictures, the optimiser, and resuming at a step.

    ``find_unused`` says that a batch may leave parameters without a gradient, which training on
    several devices has to know.
    """

    heads: tuple[str, ...] = ()  # what learns at the heads' rate, by the start of its name
    find_unused = False

    def __init__(self, recipe: PolicyRecipe | SegmenterRecipe, number: int) -> None:
        super().__init__()
        self.data = recipe.data
        self.phase = recipe.phases[number]
        # Each phase draws anew, else a later one would show the same pictures cut alike.
        self.seed = recipe.trainer.seed + 7919 * number
        self.done_steps = 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note where the killed run was, so that the stream goes on from there."""
        self.done_steps = int(checkpoint["global_step"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The rest of the phase as one epoch."""
        data, phase = self.data, self.phase
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
        share = phase.batch * self.trainer.world_size
        stream = Stream(
            folder, seed=self.seed, first=self.done_steps * share, last=phase.steps * share
        )
        return DataLoader(
            stream,
            batch_size=phase.batch,
            num_workers=data.workers,
            pin_memory=torch.cuda.is_available(),
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
        optimizer, schedule = optimise(self.named_parameters(), self.phase, self.heads)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def run_phase(
    module: PhaseModule,
    network: nn.Module,
    folder: Path,
    settings: TrainerConfig,
    *,
    val: DataLoader[tuple[Tensor, Tensor]] | None = None,
    progress: bool = True,
) -> None:
    """Train ``network`` through one phase, or load its end if ``folder`` has it.

    A run that was killed goes on from the newest checkpoint in ``folder``.

    Raises:
        TokenstepError: a file of the data or of the run is at fault, there is no such device, or
            the loss is not finite.
    """
    end = folder / "end.safetensors"
    if end.is_file():
        load_weights(network, end)
        return
    trainer = make_trainer(module, folder, settings, looks=val is not None, progress=progress)
    _fit(trainer, module, val, find_checkpoint(folder))
    if trainer.global_step < module.phase.steps:
        raise KeyboardInterrupt  # Lightning swallows it to shut down in order
    if is_main():
        save_weights(network, end)
    trainer.strategy.barrier()


def _fit(
    trainer: pl.Trainer,
    module: PhaseModule,
    val: DataLoader[tuple[Tensor, Tensor]] | None,
    last: Path | None,
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning on torch 2.15
        # The stream starts at the step of the checkpoint, which Lightning cannot know.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
        # save_every may have changed meanwhile, which makes it another callback to Lightning.
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint")
        # The frozen policy is meant to be.
        warnings.filterwarnings("ignore", "Found .* in eval mode")
        try:
            trainer.fit(module, val_dataloaders=val, ckpt_path=last)
        except SIGTERMException as stop:
            raise KeyboardInterrupt from stop  # it is an exit with success, which this is not
        except TokenstepError as error:
            # A data worker's comes wrapped in its traceback, of which it is the last line.
            line = str(error).strip().splitlines()[-1]
            raise TokenstepError(line.rpartition("TokenstepError: ")[2]) from error


def make_trainer(
    module: PhaseModule, folder: Path, settings: TrainerConfig, *, looks: bool, progress: bool
) -> pl.Trainer:
    """Lightning's trainer of one phase; ``looks`` if it validates on the way.

    Raises:
        TokenstepError: there is no such device, or no such precision on it.
    """
    callbacks: list[Callback] = [
        ModelCheckpoint(
            folder,
            every_n_train_steps=settings.save_every,
            save_last=True,
            save_top_k=0,
            enable_version_counter=False,  # one last.ckpt, which is the newest
        )
    ]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # tips and device lists
    ddp = "ddp_find_unused_parameters_true" if module.find_unused else "ddp"
    try:
        return pl.Trainer(
            max_steps=module.phase.steps,
            log_every_n_steps=1,
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy=ddp if settings.devices > 1 else "auto",
            precision=PRECISIONS[settings.precision],  # type: ignore[arg-type]
            callbacks=callbacks,
            logger=TensorBoardLogger(folder.parent, name="log", version=folder.name),
            val_check_interval=settings.val_every if looks else None,
            limit_val_batches=settings.val_pictures if looks else 0,
            check_val_every_n_epoch=None if looks else 1,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            enable_progress_bar=progress,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TokenstepError(f"recipe: trainer: {reason}") from error


def is_main() -> bool:
    """Whether this process writes and prints: the first, where several train together."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]  # set by Lightning


def meet() -> None:
    """Wait for the other processes, where several train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
