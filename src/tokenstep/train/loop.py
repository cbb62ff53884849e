"""The training loop of the phases of a run: checkpoints that resume, and how a run ends."""

import errno
import io
import logging
import os
import signal
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tokenstep.data.whole_files import write_whole
from tokenstep.errors import Terminated, TokenstepError
from tokenstep.model.weight_files import save_weights
from tokenstep.train.phase import PhaseModule
from tokenstep.train.progress import Progress
from tokenstep.train.recipe import TrainerConfig
from tokenstep.train.run_folder import damaged, load_weights

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
LAST = "last.ckpt"


class Loop:
    """Runs the phases of one training one after the other in the folder ``out``."""

    # Lightning's, of the processes that train with this one; a policy's loop starts those of the
    # segmenter that follows it.
    launchers: ClassVar[list[Any]] = []

    def __init__(self, out: Path, settings: TrainerConfig, progress: Progress) -> None:
        self.out = out
        self.settings = settings
        self.progress = progress

    def run(self, module: PhaseModule, network: nn.Module) -> None:
        """Train ``network`` through the phase of ``module``, or load its end if there is one.

        A run that was killed goes on from the phase's last checkpoint.

        Raises:
            TokenstepError: a file of the data or of the run is at fault, the disk is full, there is
                no such device, or the loss is not finite.
            Terminated: the process was told to end.
            KeyboardInterrupt: it was interrupted; says where it goes on.
        """
        folder = self.out / f"phase{module.number}"
        end = folder / "end.safetensors"
        if end.is_file():
            load_weights(network, end)
            return
        watch = Watch(self.progress, module, self.settings.save_every)
        trainer = make_trainer(module, folder, self.settings, watch)
        self.launchers.append(trainer.strategy.launcher)
        try:
            self._fit(trainer, module, folder / LAST, watch)
        except BaseException:
            # Its data workers too: from within a look at val, Lightning leaves them alive.
            trainer.fit_loop.teardown()
            self._end_others()
            raise
        finally:
            self.progress.end()
        if trainer.global_step < module.phase.steps:
            raise TokenstepError(f"{folder}: stopped at step {trainer.global_step}; start it again")
        if is_main():
            save_weights(network, end)
        trainer.strategy.barrier()
        if watch.told:  # in the last step
            raise watch.ending(trainer, saved=trainer.global_step)

    def _fit(self, trainer: pl.Trainer, module: PhaseModule, last: Path, watch: "Watch") -> None:
        with warnings.catch_warnings():
            # Lightning's own use of torch 2.15.
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            # Lightning cannot know that the stream starts at the step of the checkpoint.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
            # save_every may have changed meanwhile, which makes it another callback to Lightning.
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint")
            # The frozen policy is meant to be.
            warnings.filterwarnings("ignore", "Found .* in eval mode")
            try:
                trainer.fit(module, ckpt_path=last if last.is_file() else None)
            except TokenstepError as error:
                # A data worker's comes wrapped in its traceback, of which it is the last line.
                line = str(error).strip().splitlines()[-1]
                raise TokenstepError(line.rpartition("TokenstepError: ")[2]) from error
            except SystemExit as end:
                if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's answer to Ctrl-C
                    raise KeyboardInterrupt(watch.where(trainer, "interrupted")) from None
                raise
            except OSError as error:
                remedy = (
                    "free some space and start it again" if _is_full(error) else "start it again"
                )
                reason = f"{error.filename or last.parent}: {error.strerror or error}"
                raise TokenstepError(f"{reason}; {remedy}") from error
            except RuntimeError as error:
                if watch.told:  # and so was another process, whose end shows first
                    raise watch.ending(trainer) from error
                if "DataLoader worker" in str(error):
                    raise TokenstepError(
                        "a data worker was killed, perhaps for want of memory: lower data.workers "
                        "or set data.cache=false, and start it again"
                    ) from error
                if any(process.poll() is not None for process in self._others()):
                    raise TokenstepError(
                        "another process of this training ended, as it says itself: start it again"
                    ) from error
                raise

    def _others(self) -> list[Any]:
        """The processes that this one started to train with it."""
        return [one for launcher in self.launchers for one in getattr(launcher, "procs", [])]

    def _end_others(self) -> None:
        """End the processes that train with this one; they would wait for it."""
        for process in self._others():
            process.send_signal(signal.SIGKILL)
            # Reaped here, or Lightning takes the end for a fault and kills this process as well.
            with suppress(ChildProcessError):
                os.waitpid(process.pid, 0)


class Watch(Callback):
    """Tells of each step, and ends the training in order when the process is told to end."""

    def __init__(self, progress: Progress, module: PhaseModule, save_every: int) -> None:
        self.progress = progress
        self.module = module
        self.save_every = save_every
        self.told = False

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Take SIGTERM over from Lightning, whose handler talks to other processes from within."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._tell)  # until Lightning puts the old one back
        self.progress.begin(self.module.number, trainer.global_step, trainer.max_steps)

    def _tell(self, *_: object) -> None:
        self.told = True

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """End here if any process was told to: all must leave at the same step."""
        if trainer.strategy.reduce_boolean_decision(self.told, all=False):
            raise self.ending(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Tell of a step."""
        self.progress.step(trainer.global_step, float(outputs["loss"]))

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """End here if told to; several processes go on together to the next step."""
        if self.told and trainer.world_size == 1:
            raise self.ending(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Tell of a look at val."""
        self.progress.looked(float(trainer.callback_metrics["val_miou"]))

    def ending(self, trainer: pl.Trainer, saved: int = 0) -> SystemExit:
        """What ends the process; the main one says where the same command goes on."""
        if not is_main():
            return SystemExit(0)  # or Lightning kills the main one before it could
        return Terminated(self.where(trainer, "told to end", saved))

    def where(self, trainer: pl.Trainer, what: str, saved: int = 0) -> str:
        """A line that says what happened at which step, and where the same command goes on.

        It is the last checkpoint, if not the step that is ``saved`` otherwise.
        """
        step, every = trainer.global_step, self.save_every
        saved = max(saved, step // every * every, self.module.done_steps)
        return (
            f"{self.progress.log.parent}: {what} at step {step} of phase {self.module.number + 1}; "
            f"the same command goes on after step {saved}"
        )


class Checkpoints(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all, and read without unpickling code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write beside the last checkpoint, then take its place."""
        held = io.BytesIO()
        torch.save(checkpoint, held)
        write_whole(Path(path), lambda temporary: temporary.write_bytes(held.getbuffer()))

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint onto the CPU.

        Raises:
            TokenstepError: the file is damaged.
        """
        try:
            read: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # on damaged files torch raises errors of nearly any type
            raise damaged(Path(path)) from error
        return read


def make_trainer(
    module: PhaseModule, folder: Path, settings: TrainerConfig, watch: Watch
) -> pl.Trainer:
    """Lightning's trainer of one phase.

    Raises:
        TokenstepError: there is no such device, or no such precision on it.
    """
    checkpoint = ModelCheckpoint(
        folder,
        every_n_train_steps=settings.save_every,
        save_last=True,
        save_top_k=0,
        enable_version_counter=False,  # one last.ckpt, which is the newest
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # tips and device lists
    ddp = "ddp_find_unused_parameters_true" if module.find_unused else "ddp"
    try:
        return pl.Trainer(
            max_steps=module.phase.steps,
            log_every_n_steps=1,
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy=ddp if settings.devices > 1 else "auto",
            use_distributed_sampler=False,  # it would shuffle; the stream has its own order
            precision=PRECISIONS[settings.precision],  # type: ignore[arg-type]
            callbacks=[watch, checkpoint, *averaging(module.phase.average)],
            plugins=[Checkpoints(), *_scheduler()],
            default_root_dir=folder,
            logger=TensorBoardLogger(folder.parent, name="log", version=folder.name),
            val_check_interval=settings.val_every if module.looks else None,
            limit_val_batches=None if module.looks else 0,
            check_val_every_n_epoch=None if module.looks else 1,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise TokenstepError(f"recipe: trainer: {reason}") from error


def averaging(decay: float) -> list[Callback]:
    """Lightning's moving average of the weights, which leaves a frozen part as it is.

    At first it forgets faster than by ``decay``, so that a short phase does not end half-way to
    where it began.
    """
    if decay == 0:
        return []

    def average(averaged: Any, current: Any, count: Tensor) -> None:
        done = float(count)
        keep = min(decay, (1 + done) / (10 + done))
        get_ema_multi_avg_fn(keep)(averaged, current, count)  # type: ignore[no-untyped-call]

    return [WeightAveraging(use_buffers=False, multi_avg_fn=average)]


def _scheduler() -> list[SLURMEnvironment]:
    """Where SLURM started this, that without its requeueing, whose checkpoints are of no phase."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_main() -> bool:
    """Whether this process writes and prints: the first, where several train together."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]  # set by Lightning


def meet() -> None:
    """Wait for the other processes, where several train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
