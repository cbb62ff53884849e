"""The README of a model or run folder: classes, how it was made, and what it was measured to do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenstep.config import ModelConfig
from tokenstep.data.labelled_folder import Classes
from tokenstep.data.whole_files import write_text
from tokenstep.train.recipe import Phase, PolicyRecipe, SegmenterRecipe

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
        f"`{policy.trunk}`, {exits}."
    )
    use = 'import tokenstep\n\nresult = tokenstep.load("THIS FOLDER").segment("picture.jpg")'
    classes = f"{len(config.classes)} classes: {', '.join(config.classes)}."
    lines = [HEAD, OURS, "", "# A tokenstep segmenter", "", what, "", classes, ""]
    lines += ["```python", use, "```", "", *made, *scores, *_points(config)]
    return "\n".join(lines).rstrip() + "\n"


def run_card(recipe: SegmenterRecipe, config: ModelConfig, scores: dict[str, Any]) -> str:
    """The card of a segmenter that was just trained; ``scores`` as in its val.json, or empty."""
    rows = []
    if scores:
        rows = [
            "## What it scores",
            "",
            f"On {scores['images']} pictures of {scores['split']}, at the recipe's own thresholds, "
            "not calibrated; means per picture.",
            "",
            "| | mIoU | tokens | GMAC |",
            "|---|---|---|---|",
        ]
        for name in ("dense", "reduced"):
            half = scores[name]
            miou = "none" if half["miou"] is None else f"{100 * half['miou']:.2f}"
            rows.append(
                f"| {name} | {miou} | {half['tokens']['start']:.0f} | {half['gmac']['total']:.2f} |"
            )
        rows.append("")
    return model_card(config, _recipe(recipe, "segmenter"), rows)


def policy_card(recipe: PolicyRecipe, classes: Classes, report: dict[str, Any]) -> str:
    """The card of a policy that was just trained; ``report`` as in its val.json."""
    rows = [
        "| superpatch | precision | recall | purity | tokens, one in |",
        "|---|---|---|---|---|",
    ]
    for size, row in report["sizes"].items():
        held = (row[key] for key in ("precision", "recall", "purity", "reduction"))
        rows.append(f"| {size}x{size} | {' | '.join(map(_number, held))} |")
    rows.append(f"| all | | | | {_number(report['all']['reduction'])} |")
    lines = [
        *(OURS, "", "# A tokenstep policy", ""),
        f"A CNN (`{recipe.policy.trunk}`) that says which superpatches of {recipe.patch} px "
        f"patches hold one class only. The labels had {len(classes.names)} classes: "
        f"{', '.join(classes.names)}.",
        "",
        *_recipe(recipe, "policy"),
        *("## What it scores", ""),
        f"On {report['images']} pictures of {recipe.data.val_split}, at the threshold "
        f"{report['threshold']}.",
        *("", *rows),
    ]
    return "\n".join(lines) + "\n"


def _recipe(recipe: PolicyRecipe | SegmenterRecipe, verb: str) -> list[str]:
    data, trainer = recipe.data, recipe.trainer
    folder = Path(data.root).resolve().name
    return [
        "## Recipe",
        "",
        f"`tokenstep train {verb}` on the split {data.train_split} of {folder} (pictures "
        f"{', '.join(data.train_names)}), seed {trainer.seed}, {trainer.precision}, "
        f"{trainer.devices} device(s); all values are in recipe.json.",
        "",
        *(f"- {_phase(phase)}" for phase in recipe.phases),
        "",
    ]


def _phase(phase: Phase) -> str:
    height, width = phase.crop
    return (
        f"{phase.steps} steps of {phase.batch} crops of {width}x{height} px a device, "
        f"{phase.optimizer} at {phase.lr:g}"
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


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
