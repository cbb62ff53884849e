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
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file, save_file
from timm.optim import Muon  # type: ignore[attr-defined]  # timm re-exports without saying so
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.pictures import write_whole
from tokenstep.recipes import DataConfig, Phase, TrainerConfig
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


TABLES = ("pos_embed", "cls_token", "reg_token")


class PhaseModule(pl.LightningModule):
    """What both trainings share: the stream of pictures, the optimiser, and resuming at a step."""

    heads: tuple[str, ...] = ()  # what learns at the heads' rate, by the start of its name

    def __init__(self, data: DataConfig, phase: Phase, seed: int) -> None:
        super().__init__()
        self.data = data
        self.phase = phase
        self.seed = seed
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

    def configure_optimizers(self) -> Any:
        """AdamW or Muon; norms, biases and position tables are not decayed."""
        phase = self.phase
        groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim < 2 or name.endswith(TABLES)
                head = name.startswith(self.heads)
                decay = 0.0 if plain else phase.weight_decay
                lr = phase.lr * (phase.head_lr if head else 1.0)
                groups.setdefault((lr, decay, plain or head), []).append(parameter)
        optimizer: torch.optim.Optimizer
        if phase.optimizer == "muon":
            optimizer = Muon(
                [
                    {"params": p, "lr": lr, "weight_decay": wd, "use_fallback": adamw}
                    for (lr, wd, adamw), p in groups.items()
                ]
            )
        else:
            optimizer = torch.optim.AdamW(
                [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd, _), p in groups.items()]
            )
        warmup = max(1, self.phase.warmup)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(
                    optimizer, max(1, self.phase.steps - warmup), eta_min=self.phase.lr / 100
                ),
            ],
            milestones=[warmup],
        )
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
        TokenstepError: the checkpoint is of a network of another shape.
    """
    end = folder / "end.safetensors"
    if end.is_file():
        try:
            network.load_state_dict(load_file(end))
        except RuntimeError as error:
            raise _other_recipe(end, folder) from error
        return
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=settings.save_every, save_last=True, save_top_k=0
    )
    callbacks: list[Callback] = [checkpoints]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # tips and device lists
    trainer = pl.Trainer(
        max_steps=module.phase.steps,
        log_every_n_steps=1,
        accelerator=settings.accelerator,
        devices=settings.devices,
        # A batch without superpatches leaves the projection of sub-patches unused.
        strategy="ddp_find_unused_parameters_true" if settings.devices > 1 else "auto",
        precision=PRECISIONS[settings.precision],  # type: ignore[arg-type]
        callbacks=callbacks,
        logger=TensorBoardLogger(folder.parent, name="log", version=folder.name),
        val_check_interval=settings.val_every if val is not None else None,
        limit_val_batches=settings.val_pictures if val is not None else 0,
        check_val_every_n_epoch=None if val is not None else 1,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_progress_bar=progress,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    with warnings.catch_warnings():
        # The stream starts at the step of the checkpoint, which Lightning cannot know.
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning on torch 2.15
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
        # The frozen policy is meant to be.
        warnings.filterwarnings("ignore", "Found .* in eval mode")
        # Our own checkpoint of this very run is the one file that is ever unpickled.
        resumed = last if last.is_file() else None
        try:
            trainer.fit(module, val_dataloaders=val, ckpt_path=resumed)
        except RuntimeError as error:
            if resumed is not None and "loading state_dict" in str(error):
                raise _other_recipe(last, folder) from error
            raise
    if trainer.global_step < module.phase.steps:
        raise KeyboardInterrupt  # Lightning swallows it to shut down in order
    if trainer.is_global_zero:
        save_weights(network, end)
    trainer.strategy.barrier()


def _other_recipe(path: Path, folder: Path) -> TokenstepError:
    return TokenstepError(
        f"{path}: is of another recipe: choose another out, or remove {folder.parent}"
    )


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's state as safetensors, whole or not at all."""
    state = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    write_whole(path, lambda temporary: save_file(state, temporary))
