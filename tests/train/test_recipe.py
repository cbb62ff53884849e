"""Every recipe in the repository is one that the reader accepts and that names a real model."""

from pathlib import Path

import pytest

from tokenstep.hosts.timm_build import build_vit
from tokenstep.train.recipe import PolicyRecipe, SegmenterRecipe, read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_complete(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert f"recipes/{path.name}" in first, "the first comment is the command"
    if path.stem.endswith("_policy"):
        assert read_recipe(PolicyRecipe, path).patch > 0
        return
    recipe = read_recipe(SegmenterRecipe, path)
    vit = build_vit(recipe.vit)
    assert all(0 < after < len(vit.blocks) for after in recipe.vit.exits)
