"""The precision that "auto" stands for: what the machine computes fast and training bears."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from tokenstep.model.precision import has_bf16
from tokenstep.train.recipe import PolicyRecipe, SegmenterRecipe
from tokenstep.train.run_folder import RECIPE, begun, read_json

R = TypeVar("R", PolicyRecipe, SegmenterRecipe)


def settled(recipe: R) -> R:
    """The recipe with a precision in place of "auto": that of its run, else of this machine.

    Raises:
        TokenstepError: the run's own recipe is damaged.
    """
    trainer = recipe.trainer
    if trainer.precision != "auto":
        return recipe
    out = Path(recipe.out)
    if begun(out) and os.path.isfile(out / RECIPE):
        precision = read_json(out / RECIPE).get("trainer", {}).get("precision", "fp32")
    else:
        precision = "bf16" if trains_in_bf16(trainer.accelerator) else "fp32"
    return replace(recipe, trainer=replace(trainer, precision=precision))


def trains_in_bf16(accelerator: str) -> bool:
    """Whether the device of Lightning's name ``accelerator`` has bf16 arithmetic of its own."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return has_bf16("cuda")
    return accelerator in ("auto", "cpu") and has_bf16("cpu")
