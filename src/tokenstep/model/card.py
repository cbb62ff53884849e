"""The README of a model folder: classes, what it was made from, and its operating points."""

from collections.abc import Sequence
from pathlib import Path

from tokenstep.config import InitialWeights
from tokenstep.data.whole_files import write_text
from tokenstep.model.config import ModelConfig

CARD = "README.md"
OURS = "<!-- Written by tokenstep, each time anew. To keep your own text, remove this line. -->"
HEAD = """---
library_name: tokenstep
pipeline_tag: image-segmentation
tags: [image-segmentation]
---
"""


def write_card(folder: Path, text: str) -> None:
    """Write a folder's README, unless it holds one that somebody else wrote."""
    path = folder / CARD
    if not path.exists() or OURS in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, text)


def model_card(config: ModelConfig, made: Sequence[str] = (), scores: Sequence[str] = ()) -> str:
    """The card of a segmenter; ``made`` and ``scores`` are sections on its training, as lines."""
    vit, policy = config.vit, config.policy
    depth = f"{vit.depth} blocks" if vit.depth else "all blocks"
    exits = f"exits after blocks {', '.join(map(str, vit.exits))}" if vit.exits else "no exits"
    what = (
        f"A plain ViT segmenter with merged tokens and early exits: `{vit.name}`, {depth}, patches "
        f"of {vit.patch or 'its own number of'} px, superpatches of "
        f"{', '.join(f'{size}x{size}' for size in policy.sizes) or 'no size'} patches chosen by "
        f"{'their entropy' if policy.kind == 'entropy' else f'`{policy.trunk}`'}, {exits}."
    )
    use = 'import tokenstep\n\nresult = tokenstep.load("THIS FOLDER").segment("picture.jpg")'
    classes = f"{len(config.classes)} classes: {', '.join(config.classes)}."
    lines = [HEAD, OURS, "", "# A tokenstep segmenter", "", what, "", classes, ""]
    lines += started_from(config.initial)
    if vit.stem == "conv" and any(one.part == "vit" for one in config.initial):
        stem = "The convolutional stem started at random: the file's patch embedding is not used."
        lines += [stem, ""]
    lines += ["```python", use, "```", "", *made, *scores, *_points(config)]
    return "\n".join(lines).rstrip() + "\n"


def started_from(initial: Sequence[InitialWeights]) -> list[str]:
    """What the training started from, where that was not at random."""
    names = {"vit": "the ViT", "policy": "the policy's CNN"}
    parts = [f"{names[one.part]} from `{one.source}` (sha256 {one.sha256[:12]})" for one in initial]
    return (
        [f"Training started {' and '.join(parts)}; all other parts at random.", ""] if parts else []
    )


def _points(config: ModelConfig) -> list[str]:
    if not config.points:
        return []
    first = config.points[0]
    return [
        "## Operating points",
        "",
        f"Measured on {first.images} pictures of {first.split}; points of mIoU below the best that "
        "calibration found there.",
        "",
        "| points lost | mIoU | tokens | halted | GMAC |",
        "|---|---|---|---|---|",
        *(
            f"| {point.loss:.2f} | {100 * point.miou:.2f} | {point.tokens:.0f} | "
            f"{100 * point.halted_share:.0f} % | {point.gmac:.2f} |"
            for point in config.points
        ),
        "",
    ]
