"""What a model scores and costs on labelled pictures, run in one way or in several in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from tokenstep.config import DENSE, Thresholds
from tokenstep.core import partition as superpatches
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.measure.choices import Partition
from tokenstep.measure.metrics import Tally
from tokenstep.model.result import Result
from tokenstep.model.segmenter import Segmenter


@dataclass(frozen=True)
class Run:
    """One way to run a model: settings, where its partition comes from, and at what resolution.

    ``oracle`` merges by the labels with purity ``tolerance``; ``random`` puts as many
    superpatches as the policy's partition at random places, drawn from ``seed``; ``uniform``
    merges nothing. ``scale`` is that of the picture's sides; the label map is scaled back.
    """

    thresholds: Thresholds = DENSE
    partition: Partition = "policy"
    tolerance: float = 0.0
    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale != 1 and self.partition == "oracle":
            raise TokenstepError("an oracle knows the labels at their own resolution: scale 1")


def measure(
    model: Segmenter,
    folder: LabelledFolder,
    runs: Sequence[Run],
    *,
    on_picture: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Segment a folder in each of several ways, all of them on each picture in turn.

    One report per run: scores, and means per picture of tokens, GMAC and seconds; ``p95`` is the
    95th percentile of the tokens at the start. Seconds are the model's, without reading.

    Raises:
        TokenstepError: the folder's classes are not the model's, a file cannot be read, or no
            pixel has a label.
    """
    names = model.config.classes
    require_same_classes(model, folder)
    sums = [Measured(len(names)) for _ in runs]
    generators = [torch.Generator().manual_seed(run.seed) for run in runs]
    for image, label in folder:
        for run, measured, generator in zip(runs, sums, generators, strict=True):
            measured.add(segment_as(model, image, label, run=run, generator=generator), label)
        on_picture()
    return [measured.report(names) for measured in sums]


def require_same_classes(model: Segmenter, folder: LabelledFolder) -> None:
    """Refuse a folder whose classes are not the model's.

    Raises:
        TokenstepError: names both.
    """
    names = model.config.classes
    if folder.classes.names != names:
        raise TokenstepError(
            f"{folder.root}: has the classes {', '.join(folder.classes.names)} but the model was "
            f"trained for {', '.join(names)}; use a model trained for this data"
        )


def segment_as(
    model: Segmenter, image: Tensor, label: Tensor, *, run: Run, generator: torch.Generator
) -> Result:
    """Segment ``image (3, h, w)`` uint8 in one way; ``label (h, w)`` serves the oracle alone."""
    if run.scale != 1:
        size = [max(1, round(side * run.scale)) for side in label.shape]
        small = tvf.resize(image, size, antialias=True)
        level = _partition(model, small, label, run=run, generator=generator)
        result = model.segment_batch([small], thresholds=run.thresholds, level=level)[0]
        labels = torch.from_numpy(result.labels)[None]
        nearest = InterpolationMode.NEAREST_EXACT
        full = tvf.resize(labels, list(label.shape), interpolation=nearest)[0]
        return replace(result, labels=full.numpy())
    level = _partition(model, image, label, run=run, generator=generator)
    return model.segment_batch([image], thresholds=run.thresholds, level=level)[0]


def _partition(
    model: Segmenter, image: Tensor, label: Tensor, *, run: Run, generator: torch.Generator
) -> Tensor | None:
    """The partition to use in the policy's place, or None for the policy's own."""
    sizes = model.config.policy.sizes
    device = next(model.parameters()).device
    match run.partition:
        case "policy":
            return None
        case "uniform":
            return superpatches.uniform(
                [superpatches.grid_of(image.shape[-2:], model.patch)], device
            )
        case "oracle":
            return superpatches.oracle(
                label[None].to(device),
                patch=model.patch,
                sizes=sizes,
                classes=len(model.config.classes),
                tolerance=run.tolerance,
            )
        case "random":
            with torch.inference_mode():
                normal = model.normalise([image.to(device)])
                learned = model.partition(normal, run.thresholds)
            return superpatches.shuffled(learned, sizes, generator)


class Measured:
    """Sums over the pictures that one run segmented."""

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
