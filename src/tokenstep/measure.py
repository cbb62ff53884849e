"""What one setting of a model scores and costs on labelled pictures."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenstep.config import Settings
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.metrics import Tally
from tokenstep.result import Result
from tokenstep.segmenter import StepSegmenter


class Measured:
    """Sums over the pictures of a split that one setting of a model segmented."""

    def __init__(self, classes: int) -> None:
        self.tally = Tally(classes)
        self.results: list[dict[str, float]] = []

    def add(self, result: Result, label: Tensor) -> None:
        """Count one picture."""
        self.tally.add(torch.from_numpy(result.labels), label)
        self.results.append(
            {
                "grid": result.tokens.grid,
                "start": result.tokens.start,
                "end": result.tokens.end,
                "halted": sum(result.tokens.halted.values()),
                "gmac": result.cost.total,
                "policy": result.cost.policy,
                "seconds": sum(result.milliseconds.values()) / 1000,
            }
        )

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Scores from 0 to 1, None where nothing defines one; the rest as means per picture."""
        scores = self.tally.scores()
        column = {key: np.array([row[key] for row in self.results]) for key in self.results[0]}
        mean = {key: float(values.mean()) for key, values in column.items()}
        return {
            "miou": scores.miou,
            "iou": dict(zip(names, scores.iou, strict=True)),
            "accuracy": scores.accuracy,
            "boundary_iou": scores.boundary_iou,
            "tokens": {
                "grid": mean["grid"],
                "start": mean["start"],
                "end": mean["end"],
                "p95": float(np.percentile(column["start"], 95)),
            },
            "halted_share": mean["halted"] / mean["start"],
            "gmac": {"total": mean["gmac"], "policy": mean["policy"]},
            "seconds": mean["seconds"],
        }


def measure(
    model: StepSegmenter,
    folder: LabelledFolder,
    settings: Settings,
    *,
    on_picture: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Segment a whole folder with ``settings``, picture by picture, and report.

    Raises:
        TokenstepError: a file cannot be read, or no pixel has a label.
    """
    measured = Measured(len(model.config.classes))
    for image, label in folder:
        measured.add(model.segment_batch([image], settings=settings)[0], label)
        on_picture()
    return measured.report(model.config.classes)


def require_same_classes(model: StepSegmenter, folder: LabelledFolder) -> None:
    """Refuse a labelled folder of other classes.

    Raises:
        TokenstepError: the folder's classes are not the model's, in the same order.
    """
    names = model.config.classes
    if folder.classes.names != names:
        raise TokenstepError(
            f"{folder.root}: has the classes {', '.join(folder.classes.names)} but the model was "
            f"trained for {', '.join(names)}; use a model trained for this data"
        )
