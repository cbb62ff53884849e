"""Measure a model on a labelled split: dense and reduced, side by side in one run."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tokenstep.config import DENSE, Settings
from tokenstep.data import LabelledFolder
from tokenstep.measure import Measured, require_same_classes
from tokenstep.model import superpatches
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
    require_same_classes(model, folder)
    names = model.config.classes
    halves = {"dense": Measured(len(names))} if dense else {}
    halves["reduced"] = Measured(len(names))
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
