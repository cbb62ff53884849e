"""What tests of training share: a labelled folder of drawn rectangles, and tiny recipes."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from tokenstep.config import PolicyConfig, Thresholds, VitConfig
from tokenstep.train.recipe import DataConfig, Phase, PolicyRecipe, SegmenterRecipe, TrainerConfig

COLOURS = np.array([[40, 90, 200], [200, 60, 50], [240, 220, 60]])
TRAINER = TrainerConfig(save_every=2, val_every=10_000, accelerator="cpu")
POLICY = PolicyConfig(trunk="test_efficientnet", stages=(1, 2), sizes=(2, 4), width=16, scale=0.5)
VIT = VitConfig(name="test_vit", patch=8, depth=4, image_size=(64, 64), exits=(2,), cells=2)


def draw(root: Path, counts: dict[str, int]) -> Path:
    """A labelled folder of noisy rectangles on a plain ground."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            label = np.zeros((64, 64), np.uint8)
            for value in (1, 2):
                top, left = generator.integers(0, 40, 2)
                height, width = generator.integers(12, 36, 2)
                label[top : top + height, left : left + width] = value
            noise = generator.normal(0, 12, (64, 64, 3))
            image = np.clip(COLOURS[label] + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / split / "images" / f"{index:03}.png")
            Image.fromarray(label).save(root / split / "labels" / f"{index:03}.png")
    classes = {"names": ["ground", "red", "yellow"], "palette": COLOURS.tolist()}
    (root / "classes.json").write_text(json.dumps(classes))
    return root


def data_config(root: Path) -> DataConfig:
    return DataConfig(str(root), scale=(0.8, 1.25), colour=0.1, workers=0)


def policy_recipe(
    root: Path, out: Path, steps: int, optimizer: Literal["adamw", "muon"] = "adamw"
) -> PolicyRecipe:
    phase = Phase(steps=steps, batch=8, crop=(64, 64), lr=5e-3, warmup=5, optimizer=optimizer)
    return PolicyRecipe(data_config(root), (phase,), 8, str(out), POLICY, trainer=TRAINER)


def segmenter_recipe(root: Path, policy: Path, out: Path, *phases: Phase) -> SegmenterRecipe:
    thresholds = Thresholds(merge=(0.5, 0.5), exits=(0.9,), spare=2)
    return SegmenterRecipe(
        data_config(root), phases, str(policy), str(out), thresholds, vit=VIT, trainer=TRAINER
    )
