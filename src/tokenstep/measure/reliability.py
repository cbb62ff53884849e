"""How far an exit's confidence equals its accuracy, and the temperature that calibrates it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.config import Thresholds
from tokenstep.core.partition import padded_labels
from tokenstep.core.unmerge import unmerge
from tokenstep.data.labelled_folder import IGNORE, LabelledFolder
from tokenstep.model.segmenter import Segmenter
from tokenstep.reducers.exit_heads import DeepSupervision


@torch.inference_mode(False)
def fit_exits(
    model: Segmenter, folder: LabelledFolder, merge: tuple[float, ...]
) -> dict[str, dict[str, Any]]:
    """Fit the temperature of each exit, on tokens merged by the thresholds ``merge``.

    Returns by exit (its block, as text) the temperature and the reliability before and after it.
    """
    logits_of_exits, labels = exit_logits(model, folder, Thresholds(merge))
    report = {}
    for after, logits in zip(model.exits.after, logits_of_exits, strict=True):
        temperature = round(fit_temperature(logits, labels), 3)
        report[str(after)] = {
            "temperature": temperature,
            "before": reliability(logits, labels),
            "after": reliability(logits / temperature, labels),
        }
    return report


@torch.no_grad()
def exit_logits(
    model: Segmenter, folder: LabelledFolder, thresholds: Thresholds, most: int = 200_000
) -> tuple[list[Tensor], Tensor]:
    """Logits ``(N, C)`` of each exit, and labels ``(N,)``, at sub-cells of a folder's pictures.

    The sub-cells are drawn at random, as many from each picture, and at most ``most`` of them.
    Only sub-cells with a label are drawn.
    """
    device = next(model.parameters()).device
    logits: list[list[Tensor]] = [[] for _ in model.exits.after]
    labels = []
    generator = torch.Generator().manual_seed(0)
    for image, label in folder:
        recorder = DeepSupervision(model.exits)
        out = model([image.to(device)], thresholds=thresholds, reducers=[recorder])
        maps = [unmerge(tokens, rows, out.partition)[0] for tokens, rows in recorder.seen]
        target = sub_cell_labels(label, model.patch, maps[0].shape[:2]).flatten()
        valid = (target != IGNORE).nonzero().flatten()
        drawn = valid[torch.randperm(len(valid), generator=generator)[: most // len(folder)]]
        labels.append(target[drawn])
        for of_exit, map_ in zip(logits, maps, strict=True):
            of_exit.append(map_.flatten(0, 1).cpu().float()[drawn])
    return [torch.cat(of_exit) for of_exit in logits], torch.cat(labels)


def sub_cell_labels(label: Tensor, patch: int, size: Sequence[int]) -> Tensor:
    """The label at each sub-cell's centre, int64, from ``label (h, w)``.

    ``size`` is the number of sub-cells: rows, columns.
    """
    full = padded_labels(label[None], patch)[:, None].float()
    return F.interpolate(full, tuple(size), mode="nearest-exact")[0, 0].long()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature above 0 that makes ``logits (N, C)`` likeliest (Guo et al. 2017)."""
    log = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log.exp(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(log.detach().exp().clamp(0.05, 20))


def reliability(logits: Tensor, labels: Tensor, bins: int = 10) -> dict[str, Any]:
    """Confidence and accuracy of ``logits (N, C)`` in bins of equal width, and their gap.

    ``labels (N,)`` are the true classes. ``ece``, the expected calibration error, is the mean gap
    between confidence and accuracy, 0 to 1. ``share`` is the share of the N in each bin.
    """
    return reliability_of(bin_sums(logits, labels, bins))


def bin_sums(logits: Tensor, labels: Tensor, bins: int = 10) -> Tensor:
    """Sum ``logits (N, C)`` into bins of confidence: ``(3, bins)`` float64.

    The rows are the count, the summed confidence, and the number of right predictions. The sums
    of several pictures may be added.
    """
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.bincount(index, minlength=bins)
    sums = [torch.bincount(index, value.double(), minlength=bins) for value in (confidence, right)]
    return torch.stack([count.double(), *sums])


def reliability_of(sums: Tensor) -> dict[str, Any]:
    """The report of :func:`reliability`, from sums ``(3, bins)`` of :func:`bin_sums`."""
    count = sums[0]
    means = [total / count.clamp(min=1) for total in sums[1:]]
    gap = ((means[0] - means[1]).abs() * count).sum() / count.sum()
    return {
        "ece": float(gap),
        "confidence": means[0].tolist(),
        "accuracy": means[1].tolist(),
        "share": (count / count.sum()).tolist(),
    }
