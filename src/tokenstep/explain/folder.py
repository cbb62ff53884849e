"""Where a labelled folder's tokens go, and what that costs, as rows of tables."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenstep.config import DENSE, Thresholds
from tokenstep.data.faults import class_warnings
from tokenstep.data.labelled_folder import IGNORE, LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.explain.folder_sums import FolderSums, ratio
from tokenstep.explain.picture import Rows, depth_name, view_of
from tokenstep.measure.quality import require_same_classes
from tokenstep.measure.reliability import reliability_of
from tokenstep.model.any_segmenter import AnySegmenter

STEP = "step"  # the method that is explained; the others are compared with it


def methods_of(thresholds: Thresholds) -> dict[str, Thresholds]:
    """The methods by name: dense, the merging of ``thresholds`` alone, and ``thresholds``."""
    methods = {"dense": DENSE}
    if thresholds.merge and thresholds.exits:
        methods["merging_alone"] = thresholds.without_exits()
    return {**methods, STEP: thresholds}


def explain_folder(
    model: AnySegmenter,
    folder: LabelledFolder,
    thresholds: Thresholds,
    *,
    on_picture: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Give every number about a folder's tokens as plain data: the rows of tables.

    A picture that cannot be read or segmented is named in ``faults`` and the others go on.
    ``warnings`` are lines on classes without a pixel.

    Raises:
        TokenstepError: the folder's classes are not the model's, no picture can be read, or no
            pixel has a label.
    """
    require_same_classes(model, folder)
    methods = methods_of(thresholds)
    sums = FolderSums(model, tuple(methods))
    faults: Rows = []
    for index, path in enumerate(folder.paths):
        try:
            image, label = folder[index]
            others = [
                model.segment_batch([image], thresholds=settings)[0]
                for method, settings in methods.items()
                if method != STEP
            ]
            view = view_of(model, image, thresholds)
        except TokenstepError as error:
            faults.append({"file": str(path), "name": path.stem, "error": str(error)})
        else:
            sums.add(path.name, view, others, label)
        on_picture()
    if not sums.pictures:
        raise TokenstepError(faults[0]["error"])
    counts = torch.zeros(256, dtype=torch.int64)
    counts[: len(sums.names)] = torch.from_numpy(sums.class_pixels[:-1])
    counts[IGNORE] = int(sums.class_pixels[-1])
    warnings = class_warnings(folder, counts)
    return {**rows_of(sums), "warnings": warnings, "faults": faults}


def worst(pictures: Sequence[dict[str, Any]], most: int = 10) -> list[str]:
    """Names of the ``most`` pictures that lost most points against dense, the worst first."""
    known = [row for row in pictures if row["points_lost"] is not None]
    return [row["picture"] for row in sorted(known, key=lambda row: -row["points_lost"])[:most]]


def rows_of(sums: FolderSums) -> dict[str, Any]:
    """The rows of all tables of a folder.

    Raises:
        TokenstepError: no pixel has a label.
    """
    return {
        "images": len(sums.pictures),
        "ways": _method_rows(sums),
        "live": _live_rows(sums),
        "classes": _class_rows(sums),
        "class_depths": _class_depth_rows(sums),
        "depths": _depth_rows(sums),
        "reliability": _reliability_rows(sums),
        "sizes": _size_rows(sums),
        "boundary": _boundary_rows(sums),
        "bands": _band_rows(sums),
        "pictures": sums.pictures,
    }


def _method_rows(sums: FolderSums) -> Rows:
    rows: Rows = []
    dense = sums.tallies["dense"].scores().miou
    for method, gmac in zip(sums.methods, np.mean(sums.gmac, axis=0).tolist(), strict=True):
        scores = sums.tallies[method].scores()
        rows.append(
            {
                "way": method,
                "miou": scores.miou,
                "points_lost": 100 * (dense - scores.miou),
                "accuracy": scores.accuracy,
                "boundary_iou": scores.boundary_iou,
                "gmac": gmac,
            }
        )
    return rows


def _live_rows(sums: FolderSums) -> Rows:
    patches = sum(row["patches"] for row in sums.pictures)
    return [
        {
            "block": block,
            "mean_tokens": float(column.mean()),
            "p5_tokens": float(np.percentile(column, 5)),
            "p95_tokens": float(np.percentile(column, 95)),
            "dense_share": float(column.sum() / patches),
        }
        for block, column in enumerate(np.array(sums.live).T, start=1)
    ]


def _class_rows(sums: FolderSums) -> Rows:
    tokens, pixels = sums.tokens.sum(0)[:-1].tolist(), sums.class_pixels[:-1].tolist()
    dense, step = (sums.tallies[method].scores().iou for method in ("dense", STEP))
    return [
        {
            "class": name,
            "pixels_share": pixels[k] / sum(pixels),
            "tokens_share": tokens[k] / sum(tokens),
            "tokens_per_1000_patches": 1000 * sums.patch**2 * tokens[k] / pixels[k],
            "dense_iou": dense[k],
            "step_iou": step[k],
        }
        for k, name in enumerate(sums.names)
        if pixels[k]
    ]


def depth_key(end: int, depth: int) -> str:
    """The column of the tokens that ended there, of ``depth`` blocks."""
    return depth_name(end, depth).replace(" ", "_") + "_share"


def _class_depth_rows(sums: FolderSums) -> Rows:
    shown = sums.shown()
    keys = [depth_key(sums.depths[k], sums.depth) for k in shown]
    return [
        {"class": name, **dict(zip(keys, (tokens / tokens.sum())[shown].tolist(), strict=True))}
        for name, tokens in zip(sums.names, sums.tokens.T[:-1], strict=True)
        if tokens.any()
    ]


def _depth_rows(sums: FolderSums) -> Rows:
    tokens = sums.tokens.sum(1).tolist()
    return [
        {
            "depth": depth_name(sums.depths[k], sums.depth),
            "blocks": sums.depths[k] - sums.depth * (sums.depths[k] > sums.depth),
            "tokens_share": tokens[k] / sum(tokens),
            "judged_tokens": int(sums.judged[k, 0]),
            "token_wrong_share": ratio(int(sums.judged[k, 1]), int(sums.judged[k, 0])),
            **_wrong(sums, sums.by_depth, k),
        }
        for k in sums.shown()
    ]


def _reliability_rows(sums: FolderSums) -> Rows:
    """One row per exit and bin that holds sub-cells; ``exit_ece`` is of the whole exit."""
    rows: Rows = []
    for after, binned in zip(
        sums.depths, sums.reliability, strict=False
    ):  # the last depth is no exit
        if not binned.any():
            continue
        report = reliability_of(binned)
        columns = (report[key] for key in ("confidence", "accuracy", "share"))
        for confidence, accuracy, share in zip(*columns, strict=True):
            if share:
                rows.append(
                    {
                        "exit_after_block": after,
                        "confidence": confidence,
                        "accuracy": accuracy,
                        "sub_cells_share": share,
                        "exit_ece": report["ece"],
                    }
                )
    return rows


def _size_rows(sums: FolderSums) -> Rows:
    return [
        {
            "patches_a_side": 1 << level,
            "superpatches": int(count),
            "pure_share": pure / count,
            "mean_purity": purity / count,
            **_wrong(sums, sums.by_level, level),
        }
        for level, (count, pure, purity) in enumerate(sums.purity.tolist())
        if count
    ]


def _boundary_rows(sums: FolderSums) -> Rows:
    near = sums.edges.index(sums.patch) + 1
    both = np.stack([sums.by_band[:near].sum(0), sums.by_band[near:].sum(0)])
    names = (f"boundary: within {sums.patch} px of another class", "interior: all else")
    return [{"where": name, **_wrong(sums, both, k)} for k, name in enumerate(names)]


def _band_rows(sums: FolderSums) -> Rows:
    bounds = zip([0, *sums.edges], [*sums.edges, None], strict=True)
    return [
        {"above_px": above, "to_px": to, **_wrong(sums, sums.by_band, k)}
        for k, (above, to) in enumerate(bounds)
    ]


def _wrong(sums: FolderSums, groups: NDArray[np.int64], k: int) -> dict[str, float | None]:
    """A group's share of the labelled pixels, and the share of them wrong by each method."""
    pixels, *wrong = groups[k].tolist()
    shares = {
        f"{method}_wrong_share": ratio(count, pixels)
        for method, count in zip(sums.methods, wrong, strict=True)
    }
    return {"pixels_share": pixels / int(groups[:, 0].sum()), **shares}
