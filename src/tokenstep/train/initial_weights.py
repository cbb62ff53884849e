"""What a training starts from: its weights, and the mean and std that fit them."""

import dataclasses
import os
from pathlib import Path
from typing import Literal, TypeVar

from tokenstep.config import HALF, InitialWeights
from tokenstep.data.pretrained import WeightFile, find_weights
from tokenstep.errors import TokenstepError
from tokenstep.hosts.timm_build import published_vit
from tokenstep.model.folder import WEIGHTS
from tokenstep.policies.dcts import published_trunk
from tokenstep.train.recipe import PolicyRecipe, SegmenterRecipe
from tokenstep.train.run_folder import begun

R = TypeVar("R", PolicyRecipe, SegmenterRecipe)


def start_of(recipe: R) -> tuple[R, WeightFile | None]:
    """The recipe with its mean and std filled in, and the weights that its network starts from.

    A recipe without a mean and a std takes those of timm's weights where ``pretrained`` is true;
    a file does not say what it was trained with, so its are 0.5 as without weights. None: a random
    start, or a complete run whose weights are not at hand, which needs none.

    Raises:
        TokenstepError: the weights cannot be had, the model is not known, or its name says which
            weights are meant and the recipe does not ask for them.
    """
    part, name, pretrained = _asked(recipe)
    try:
        published = published_vit(name) if part == "vit" else published_trunk(name)
    except ValueError as error:
        raise TokenstepError(f"recipe: {error}") from error
    out, option = Path(recipe.out), f"{part}.pretrained"
    # A run that an earlier version began goes on as it began.
    if "." in name and pretrained is False and not begun(out):
        key = "vit.name" if part == "vit" else "policy.trunk"
        raise TokenstepError(
            f"recipe: {key} {name!r} names weights but would start at random: set {option} = true, "
            f"or leave the tag out ({name.partition('.')[0]})"
        )
    if recipe.mean is None:
        mean, std = (published.mean, published.std) if pretrained is True else (HALF, HALF)
        recipe = dataclasses.replace(recipe, mean=mean, std=std)
    at_hand = isinstance(pretrained, str) and os.path.isfile(pretrained)
    if os.path.isfile(out / WEIGHTS) and not at_hand:
        return recipe, None
    return recipe, find_weights(pretrained, option, published)


def record(weights: WeightFile | None, part: Literal["vit", "policy"]) -> InitialWeights | None:
    """What is written down of the weights that a part of the model starts from."""
    return None if weights is None else InitialWeights(part, weights.source, weights.sha256)


def _asked(recipe: PolicyRecipe | SegmenterRecipe) -> tuple[str, str, bool | str]:
    """The part that a recipe trains, its timm model, and what weights it is to start from."""
    if isinstance(recipe, PolicyRecipe):
        return "policy", recipe.policy.trunk, recipe.policy.pretrained
    return "vit", recipe.vit.name, recipe.vit.pretrained
