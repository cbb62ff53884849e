"""How long each stage of a forward takes, by hooks on its parts; the forward knows of none."""

from collections.abc import Callable
from itertools import pairwise
from threading import get_ident
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from tokenstep.model.build import Parts


class StageTimer:
    """Milliseconds per stage of one forward that runs while the ``with`` lasts, in this thread.

    The stages are "prepare" (moving and normalising), "policy" (its CNN, and the partition),
    "embed", "blocks a-b" up to each exit, "exit b" where tokens may halt, "decode", and "unmerge",
    which ends with the ``with``. A group of blocks holds what other reducers do in it.
    """

    def __init__(self, normalise: nn.Module, parts: Parts, device: torch.device) -> None:
        self.normalise = normalise
        self.parts = parts
        self.clock = Clock(device)
        self.thread = get_ident()  # another thread may run the same model
        self.hooks: list[Any] = []
        self.first = 1  # block of the group that runs
        self.exit = 0  # blocks before the exit that runs, 0: none does

    def __enter__(self) -> Self:
        parts, blocks = self.parts, self.parts.encoder.host_blocks()
        self.hooks = [
            self.normalise.register_forward_hook(self._ends("prepare")),
            parts.tokenise.register_forward_pre_hook(self._ends("policy")),
            parts.tokenise.register_forward_hook(self._ends("embed")),
            parts.exits.register_forward_pre_hook(self._exit_begins),
            *(
                blocks[after].first.register_forward_pre_hook(self._block_begins(after))
                for after in parts.exits.after
            ),
            parts.encoder.register_forward_hook(self._block_begins(len(blocks))),
            parts.decoder.register_forward_hook(self._ends("decode")),
        ]
        self.clock.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clock.end("unmerge")
        for hook in self.hooks:
            hook.remove()

    def milliseconds(self) -> dict[str, float]:
        """Time of each stage, in their order."""
        return self.clock.read()

    def _ends(self, stage: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if get_ident() == self.thread:
                self.clock.end(stage)

        return hook

    def _exit_begins(self, exits: nn.Module, arguments: tuple[Any, ...]) -> None:
        """End the blocks before an exit; it may classify several bands of rows."""
        if get_ident() == self.thread and not self.exit:
            self.exit = self.parts.exits.after[arguments[1]]
            self._end_blocks(self.exit)

    def _block_begins(self, done: int) -> Callable[..., None]:
        """End the exit after ``done`` blocks, or those blocks if nothing may halt there."""

        def hook(*_: object) -> None:
            if get_ident() != self.thread:
                return
            if self.exit == done:
                self.clock.end(f"exit {done}")
            else:
                self._end_blocks(done)
            self.exit = 0

        return hook

    def _end_blocks(self, last: int) -> None:
        self.clock.end(f"blocks {self.first}-{last}")
        self.first = last + 1


class Clock:
    """Marks in time; on a GPU they are events, so that no stage waits for its own end."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.stages: list[str] = []
        self.marks: list[Any] = []

    def _mark(self) -> Any:
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def start(self) -> None:
        """Begin the first stage."""
        self.marks.append(self._mark())

    def end(self, stage: str) -> None:
        """End a stage; the next one begins."""
        self.stages.append(stage)
        self.marks.append(self._mark())

    def read(self) -> dict[str, float]:
        """Milliseconds of each stage."""
        if self.cuda:
            self.marks[-1].synchronize()
            times = [start.elapsed_time(end) for start, end in pairwise(self.marks)]
        else:
            times = [1000 * (end - start) for start, end in pairwise(self.marks)]
        return dict(zip(self.stages, times, strict=True))
