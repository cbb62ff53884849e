"""What the files of numbers have in common: what ran; and `report.json`, whole at any moment."""

from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from tokenstep import __version__
from tokenstep.config import OperatingPoint, Spending, Thresholds
from tokenstep.data.whole_files import write_text
from tokenstep.model.config import ModelConfig
from tokenstep.terminal import as_json

PAUSE = 1.0  # seconds between two writings, at least
SHARE = 0.05  # of the time that may go into writing, however many pictures there are

Entry = dict[str, Any]


def header(
    model: str, config: ModelConfig, spending: Spending, point: OperatingPoint | None
) -> dict[str, Any]:
    """What ran: the model by its name, and what it ran at.

    "thresholds" names each one by what it is of: merging by the side of the superpatch in patches,
    exits by the blocks that have run. "settings" has them as lists. A budget is "budget", and has
    no thresholds.
    """
    ran: dict[str, Any] = {"thresholds": None, "budget": asdict(spending)}
    if isinstance(spending, Thresholds):
        bars = {
            what: dict(zip(map(str, of), given, strict=True)) if given else {}
            for what, of, given in (
                ("merge", config.policy.sizes, spending.merge),
                ("exits", config.vit.exits, spending.exits),
            )
        }
        ran = {"thresholds": {**bars, "spare": spending.spare}}
    return {
        "model": model,
        "version": __version__,
        **ran,
        "settings": asdict(spending),
        "point": point and point.report(),
    }


def classes_of(config: ModelConfig) -> list[dict[str, Any]]:
    """The classes as label maps hold them: each one's index, name and RGB colour."""
    colours = zip(config.classes, config.palette, strict=True)
    return [
        {"index": index, "name": name, "colour": list(colour)}
        for index, (name, colour) in enumerate(colours)
    ]


class ReportFile(AbstractContextManager["ReportFile"]):
    """``report.json`` of a run over many pictures, rewritten whole as they are done.

    So whatever ends the run, the file is valid JSON that names what was done in time. Its
    ``finished`` is true once all pictures have their entry. ``head`` are the keys before
    ``images``, which begins with ``images``.
    """

    def __init__(self, path: Path, head: dict[str, Any], images: list[Entry]) -> None:
        self.path = path
        self.head = head
        self.images = images
        self.due = monotonic()

    def add(self, entry: Entry) -> None:
        """Take the entry of the next picture."""
        self.images.append(entry)
        if monotonic() >= self.due:
            self._write(finished=False)

    def _write(self, *, finished: bool) -> None:
        start = monotonic()
        data = {**self.head, "finished": finished, "images": self.images}
        write_text(self.path, as_json(data) + "\n")
        end = monotonic()
        self.due = end + max(PAUSE, (end - start) / SHARE)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write it a last time."""
        self._write(finished=kind is None)
