"""Where one picture's tokens go: its label map, tokens, and the confidence of each exit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenstep.config import Thresholds
from tokenstep.core.unmerge import ends_of_tokens, rows_of_cells, unmerge
from tokenstep.data.labelled_folder import IGNORE
from tokenstep.model.any_segmenter import AnySegmenter
from tokenstep.model.result import Result
from tokenstep.model.segmented import TokenUse
from tokenstep.reducers.exit_heads import DeepSupervision, confidence_of

Rows = list[dict[str, Any]]  # the rows of a table; one key per column


@dataclass(frozen=True, slots=True, eq=False)
class ExitView:
    """What one exit computed of a picture, before it halted tokens."""

    after: int  # blocks run
    threshold: float | None  # tokens with more confidence may halt; None if the exits are off
    confidence: NDArray[np.float32]  # (H, W) of each cell's token, 0..1; NaN: gone before
    logits: Tensor  # (H * side, W * side, C) of sub-cells, divided by temperature, on the CPU


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A segmented picture and what its exits computed."""

    image: NDArray[np.uint8]  # (h, w, 3)
    result: Result
    exits: tuple[ExitView, ...]


@torch.inference_mode()
def view_of(model: AnySegmenter, image: Tensor, thresholds: Thresholds) -> View:
    """Segment ``image (3, h, w)`` uint8 and keep what each exit computed.

    All exits run, also where ``thresholds`` turn them off; then they halt nothing.

    Raises:
        TokenstepError: the logits are not finite.
    """
    recorder = DeepSupervision(model.exits)
    result = model.segment_batch([image], thresholds=thresholds, reducers=[recorder])[0]
    level = torch.from_numpy(result.tokens.level)[None].to(model.device)
    temperatures = model.config.temperatures or (1.0,) * len(model.exits.after)
    exit_thresholds: Sequence[float | None] = thresholds.exits or (None,) * len(model.exits.after)
    views = []
    for after, threshold, temperature, (tokens, logits) in zip(
        model.exits.after, exit_thresholds, temperatures, recorder.seen, strict=True
    ):
        calibrated = logits / temperature
        rows = rows_of_cells(tokens)[0]
        # Cells of tokens that had halted name a row behind the live ones.
        dropped = ends_of_tokens(tokens, 0)[rows] % 2 > 0
        live = (rows < len(tokens.x)) & ~dropped
        confidence = confidence_of(calibrated)[0][rows.clamp(max=len(tokens.x) - 1)]
        views.append(
            ExitView(
                after,
                threshold,
                confidence.masked_fill(~live, torch.nan).cpu().numpy(),
                unmerge(tokens, calibrated, level)[0].float().cpu(),
            )
        )
    seen = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return View(seen if result.seen is None else result.seen, result, tuple(views))


def ends_of(use: TokenUse) -> NDArray[np.int64]:
    """Where each cell's token ended, ``(H, W)``: the blocks that it ran.

    A dropped one has the block that dropped it, plus the blocks of the model.
    """
    return use.layer.astype(np.int64) + use.depth * use.dropped


def depths_of(use: TokenUse) -> list[int]:
    """Where tokens may end, as :func:`ends_of` has it: at the exits, the last block, a drop."""
    drops = np.unique(ends_of(use)[use.dropped]).tolist()
    return [*use.halted, use.depth, *drops]


def depth_name(end: int, depth: int) -> str:
    """The name in tables and figures of the tokens that ended there, of ``depth`` blocks."""
    if end > depth:
        return f"dropped in block {end - depth}"
    return f"ran all {depth} blocks" if end == depth else f"halted after block {end}"


def live_rows(use: TokenUse) -> Rows:
    """Tokens that enter each block, and their share of the dense model's tokens."""
    return [
        {"block": block, "tokens": count, "dense_share": count / use.grid}
        for block, count in enumerate(use.live, start=1)
    ]


def size_rows(use: TokenUse) -> Rows:
    """Superpatches of each size, in patches a side, and the share of the cells under them."""
    tokens = use.level.ravel()[np.unique(use.owner)]
    return [
        {
            "patches_a_side": 1 << level,
            "tokens": int((tokens == level).sum()),
            "cells_share": float((use.level == level).mean()),
        }
        for level in np.unique(use.level).tolist()
    ]


def depth_rows(use: TokenUse) -> Rows:
    """Tokens that end after each exit, after the last block, or are dropped; their cells."""
    ends = ends_of(use)
    tokens = ends.ravel()[np.unique(use.owner)]
    return [
        {
            "depth": depth_name(blocks, use.depth),
            "tokens": int((tokens == blocks).sum()),
            "tokens_share": float((tokens == blocks).mean()),
            "cells_share": float((ends == blocks).mean()),
        }
        for blocks in depths_of(use)
    ]


def exit_rows(view: View) -> Rows:
    """For each exit its live tokens, their confidence, and how many passed and halted."""
    use = view.result.tokens
    rows = []
    first = np.unique(use.owner)
    for exit_view in view.exits:
        confidence = exit_view.confidence.ravel()[first]
        confidence = confidence[~np.isnan(confidence)]
        threshold = exit_view.threshold
        rows.append(
            {
                "exit_after_block": exit_view.after,
                "live_tokens": len(confidence),
                "mean_confidence": float(confidence.mean()) if len(confidence) else None,
                "bar": threshold,
                "above_the_bar": None if threshold is None else int((confidence > threshold).sum()),
                "halted": use.halted[exit_view.after],
            }
        )
    return rows


def explain_picture(view: View) -> dict[str, Any]:
    """Give every number about one picture's tokens as plain data: the rows of tables."""
    report = view.result.report()
    return {
        **{key: report[key] for key in ("width", "height", "gmac", "classes")},
        "live": live_rows(view.result.tokens),
        "sizes": size_rows(view.result.tokens),
        "depths": depth_rows(view.result.tokens),
        "exits": exit_rows(view),
    }


def differences(
    step: NDArray[np.uint8], dense: NDArray[np.uint8], truth: NDArray[np.uint8]
) -> dict[str, NDArray[np.bool_]]:
    """Masks of the labelled pixels where STEP and dense differ, by which is right.

    ``step``, ``dense``, ``truth`` and the masks are ``(h, w)``.
    """
    changed = (step != dense) & (truth != IGNORE)
    return {
        "lost: dense is right": changed & (dense == truth),
        "gained: STEP is right": changed & (step == truth),
        "both wrong": changed & (dense != truth) & (step != truth),
    }


def difference_rows(
    step: NDArray[np.uint8], dense: NDArray[np.uint8], truth: NDArray[np.uint8]
) -> Rows:
    """The pixels of each mask of :func:`differences`, and their share of the labelled ones."""
    labelled = max(1, int((truth != IGNORE).sum()))
    counts = {name: int(mask.sum()) for name, mask in differences(step, dense, truth).items()}
    return [
        {"difference": name, "pixels": count, "labelled_share": count / labelled}
        for name, count in counts.items()
    ]


def over_pixels(cells: NDArray[Any], patch: int, size: Sequence[int]) -> NDArray[Any]:
    """Spread ``cells (H, W)`` over the pixels of a picture of ``size`` (h, w)."""
    height, width = size
    spread: NDArray[Any] = cells[np.arange(height)[:, None] // patch, np.arange(width) // patch]
    return spread
