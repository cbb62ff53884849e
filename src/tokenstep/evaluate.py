"""Measure a model on a labelled split: dense and reduced, side by side in one run."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenstep.config import DENSE, Settings
from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.metrics import Tally
from tokenstep.model import superpatches
from tokenstep.result import Result
from tokenstep.segmenter import StepSegmenter
from tokenstep.transforms import to_float

Partition = Literal["policy", "uniform", "oracle", "random"]
PARTITIONS: tuple[Partition, ...] = ("policy", "uniform", "oracle", "random")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the reduced half runs: settings, and where its partition comes from.

    ``oracle`` merges by the labels with purity ``tolerance``; ``random`` puts as many
    superpatches as the policy's partition at random places; ``uniform`` merges nothing.
    """

    settings: Settings
    partition: Partition = "policy"
    tolerance: float = 0.0
    seed: int = 0


class Half:
    """Sums of one half of the comparison, dense or reduced."""

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


def evaluate(
    model: StepSegmenter,
    folder: LabelledFolder,
    comparison: Comparison,
    *,
    dense: bool = True,
    on_picture: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run the whole folder, dense and reduced picture by picture, and report both.

    ``dense`` False leaves the dense half out. Tokens, GMAC and seconds are means per picture,
    ``p95`` the 95th percentile of the tokens at the start; seconds are the model's, without
    reading.

    Raises:
        TokenstepError: the folder's classes are not the model's, a file cannot be read, or no
            pixel has a label.
    """
    names = model.config.classes
    if folder.classes.names != names:
        raise TokenstepError(
            f"{folder.root}: has the classes {', '.join(folder.classes.names)} but the model was "
            f"trained for {', '.join(names)}; use a model trained for this data"
        )
    halves = {"dense": Half(len(names))} if dense else {}
    halves["reduced"] = Half(len(names))
    generator = torch.Generator().manual_seed(comparison.seed)
    for image, label in folder:
        if dense:
            halves["dense"].add(model.segment_batch([image], settings=DENSE)[0], label)
        level = _partition(model, image, label, comparison, generator=generator)
        result = model.segment_batch([image], settings=comparison.settings, level=level)[0]
        halves["reduced"].add(result, label)
        on_picture()
    return {
        "images": len(folder),
        "settings": {
            **dataclasses.asdict(comparison.settings),
            "partition": comparison.partition,
            "tolerance": comparison.tolerance,
            "seed": comparison.seed,
        },
        **{name: half.report(names) for name, half in halves.items()},
    }


def _partition(
    model: StepSegmenter,
    image: Tensor,
    label: Tensor,
    comparison: Comparison,
    *,
    generator: torch.Generator,
) -> Tensor | None:
    """The partition to use in the policy's place, or None for the policy's own."""
    sizes = model.config.policy.sizes
    device = next(model.parameters()).device
    match comparison.partition:
        case "policy":
            return None
        case "uniform":
            return superpatches.uniform([model.tokenise.grid_of(image)], device)
        case "oracle":
            return superpatches.oracle(
                label[None].to(device),
                patch=model.patch,
                sizes=sizes,
                classes=len(model.config.classes),
                tolerance=comparison.tolerance,
            )
        case "random":
            with torch.inference_mode():
                normal = model.normalise([to_float(image).to(device)])
                learned = model.partition(normal, comparison.settings)
            return superpatches.shuffled(learned, sizes, generator)
