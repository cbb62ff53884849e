"""How a training goes: a bar on a terminal, and a line every so often where there is none."""

import sys
import time
from pathlib import Path

from rich.progress import Progress as Bar
from rich.progress import TaskID

from tokenstep.terminal import errors, progress_bar

EVERY = 30.0  # seconds between two lines


class Progress:
    """Tells of the phases of a training on stderr; says nothing if ``quiet``.

    A phase that goes on from a checkpoint is told from the step where it goes on. Lines are
    ``every`` so many seconds apart; ``log`` is where TensorBoard's files lie.
    """

    def __init__(
        self, log: Path, *, phases: int, quiet: bool = False, every: float = EVERY
    ) -> None:
        self.log = log
        self.phases = phases
        self.quiet = quiet
        self.every = every
        self.miou: float | None = None
        self.bar: Bar | None = None
        self.task = TaskID(0)

    def begin(self, phase: int, step: int, steps: int) -> None:
        """Phase ``phase``, counted from 0, goes on after ``step`` of its ``steps``."""
        self.title = f"phase {phase + 1} of {self.phases}"
        self.first, self.steps = step, steps
        self.start = self.told = time.monotonic()
        if self.quiet:
            return
        goes_on = f" goes on after step {step}" if step else ""
        errors.print(f"{self.title}{goes_on}: {steps} steps; see: tensorboard --logdir {self.log}")
        if sys.stderr.isatty():
            self.bar = progress_bar()
            self.task = self.bar.add_task(self.title, total=steps, completed=step)
            self.bar.start()

    def step(self, step: int, loss: float) -> None:
        """Step ``step``, counted from 1, had this loss."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(
                self.task, completed=step, description=f"{self.title}, {self._figures(loss)}"
            )
        elif not self.quiet and (now - self.told >= self.every or step == self.steps):
            self.told = now
            pace = (now - self.start) / (step - self.first)  # seconds a step
            rate = f"{1 / pace:.1f} steps/s" if pace < 1 else f"{pace:.1f} s a step"
            left = "" if step == self.steps else f", {spell((self.steps - step) * pace)} left"
            where = f"{self.title}, step {step} of {self.steps}"
            errors.print(f"{where}: {self._figures(loss)}, {rate}{left}")

    def looked(self, miou: float) -> None:
        """The pictures of val had this mIoU, 0 to 1."""
        self.miou = miou

    def end(self) -> None:
        """The phase has ended, or was stopped."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def say(self, line: str) -> None:
        """Print a line."""
        if not self.quiet:
            errors.print(line)

    def _figures(self, loss: float) -> str:
        seen = "" if self.miou is None else f", val mIoU {100 * self.miou:.2f}"
        return f"loss {loss:.4f}{seen}"


def spell(seconds: float) -> str:
    """A duration as a person says it: 40 s, 12 min, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
