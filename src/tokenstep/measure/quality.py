"""What a model scores and costs on labelled pictures, with one method or several in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from tokenstep.config import DENSE, Spending
from tokenstep.core.partition import grid_of, oracle, shuffled, uniform
from tokenstep.core.same_size import stacked
from tokenstep.data.augment import to_float
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.measure.metrics import Tally
from tokenstep.measure.settings import PartitionSource
from tokenstep.measure.shares import Shares
from tokenstep.model.any_segmenter import AnySegmenter
from tokenstep.model.result import Result
from tokenstep.model.spending import as_keyword, plan_of
from tokenstep.policies.batch import partition_by, policy_features
from tokenstep.policies.entropy import EntropyPolicy


@dataclass(frozen=True)
class Method:
    """How a model segments: what it spends, the source of its partition, and the resolution.

    The source ``policy`` is the model's own. ``uniform`` merges nothing. ``oracle`` merges by the
    labels, and a superpatch may hold the share ``tolerance`` of other classes. ``random`` moves
    the superpatches of the policy's partition to random places, drawn from ``seed``. ``entropy``
    holds the thresholds against the entropy of the pixels (:class:`EntropyPolicy`), whose own cost,
    some four operations a pixel, is not counted.

    The sides of a picture are multiplied by ``scale``. The label map is scaled back.

    Raises:
        TokenstepError: an oracle with another scale than 1.
    """

    spending: Spending = DENSE
    partition: PartitionSource = "policy"
    tolerance: float = 0.0
    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale != 1 and self.partition == "oracle":
            raise TokenstepError("an oracle knows the labels at their own resolution: scale 1")


def measure(
    model: AnySegmenter,
    folder: LabelledFolder,
    methods: Sequence[Method],
    *,
    on_picture: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Segment a folder with each method and give one report per method.

    All methods segment a picture before the next picture is read. A report holds the scores, and
    means per picture of tokens, GMAC and seconds. ``p95`` is the 95th percentile of the tokens at
    the start. The seconds are the model's, without reading the file.

    Raises:
        TokenstepError: the folder's classes are not the model's, a file cannot be read, or no
            pixel has a label.
    """
    names = model.config.classes
    require_same_classes(model, folder)
    sums = [MethodSums(len(names)) for _ in methods]
    generators = [torch.Generator().manual_seed(method.seed) for method in methods]
    for image, label in folder:
        for method, counted, generator in zip(methods, sums, generators, strict=True):
            result = segment_with(model, image, label, method=method, generator=generator)
            counted.add(result, label)
        on_picture()
    return [counted.report(names) for counted in sums]


def require_same_classes(model: AnySegmenter, folder: LabelledFolder) -> None:
    """Refuse a folder whose classes are not the model's.

    Raises:
        TokenstepError: names both.
    """
    names = model.config.classes
    if folder.classes.names != names:
        raise TokenstepError(
            f"{folder.root}: has the classes {', '.join(folder.classes.names)} but the model was "
            f"trained for {', '.join(names)}; use a model trained for this data, or give both the "
            "same names (those of a model of transformers are its id2label)"
        )


def segment_with(
    model: AnySegmenter, image: Tensor, label: Tensor, *, method: Method, generator: torch.Generator
) -> Result:
    """Segment ``image (3, h, w)`` uint8 with one method.

    ``label (h, w)`` is the truth; only an oracle reads it. ``generator`` draws a random partition.
    """
    read = image
    if method.scale != 1:
        size = [max(1, round(side * method.scale)) for side in label.shape]
        read = tvf.resize(image, size, antialias=True)
    (result,) = model.segment_batch(
        [read],
        **as_keyword(method.spending),
        partition=_partition(model, read, label, method=method, generator=generator),
    )
    if method.scale == 1:
        return result
    labels = torch.from_numpy(result.labels)[None]
    nearest = InterpolationMode.NEAREST_EXACT
    full = tvf.resize(labels, list(label.shape), interpolation=nearest)[0]
    return replace(result, labels=full.numpy())


def _partition(
    model: AnySegmenter, image: Tensor, label: Tensor, *, method: Method, generator: torch.Generator
) -> Tensor | None:
    """The partition to use in the policy's place, or None for the policy's own."""
    sizes = model.config.policy.sizes
    device = model.device
    match method.partition:
        case "policy":
            return None
        case "uniform":
            return uniform([grid_of(image.shape[-2:], model.patch)], device)
        case "oracle":
            return oracle(
                label[None].to(device),
                patch=model.patch,
                sizes=sizes,
                classes=len(model.config.classes),
                tolerance=method.tolerance,
            )
        case "random":
            with torch.inference_mode():
                learned = model.partition([image.to(device)], method.spending)
            return shuffled(learned, sizes, generator)
        case "entropy":
            if model.config.policy.kind == "entropy":
                return None
            return _by_entropy(model, image.to(device), method.spending)


@torch.inference_mode()
def _by_entropy(model: AnySegmenter, image: Tensor, spending: Spending) -> Tensor:
    """The partition ``(1, H, W)`` of ``image (3, h, w)`` uint8 by the entropy of its pixels."""
    sizes = model.config.policy.sizes
    # Of pixels as they are: nothing to subtract, and to divide by one.
    policy = EntropyPolicy(model.patch, sizes, mean=(0.0,) * 3, std=(1.0,) * 3).to(image.device)
    groups = stacked(to_float(image)[None])
    plan = plan_of(spending, sizes)
    partition, _ = partition_by(policy, groups, policy_features(policy, groups), plan)
    return partition


class MethodSums:
    """What one method scored and cost, summed over pictures."""

    def __init__(self, classes: int) -> None:
        self.tally = Tally(classes)
        self.pictures: list[dict[str, float]] = []
        self.shares = Shares()

    def add(self, result: Result, label: Tensor) -> None:
        """Count one picture, whose labels are ``label (h, w)``."""
        self.tally.add(torch.from_numpy(result.labels), label)
        self.shares.add(result.tokens)
        self.pictures.append(
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
        """The scores and the means per picture.

        Scores are 0 to 1. The IoU of a class is None where neither labels nor label maps hold it.

        Raises:
            TokenstepError: no pixel has a label.
        """
        scores = self.tally.scores()
        column = {key: np.array([row[key] for row in self.pictures]) for key in self.pictures[0]}
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
            "shares": self.shares.report(),
            "gmac": {"total": mean["gmac"], "policy": mean["policy"]},
            "seconds": mean["seconds"],
        }
