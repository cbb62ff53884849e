"""The README of a run folder: the recipe, and what the training ended in."""

from pathlib import Path
from typing import Any

from tokenstep.config import InitialWeights
from tokenstep.data.labelled_folder import Classes
from tokenstep.model.card import OURS, model_card, started_from
from tokenstep.model.config import ModelConfig
from tokenstep.train.recipe import Phase, PolicyRecipe, SegmenterRecipe


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


def policy_card(
    recipe: PolicyRecipe,
    classes: Classes,
    report: dict[str, Any],
    initial: InitialWeights | None = None,
) -> str:
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
        *started_from((initial,) if initial else ()),
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


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
