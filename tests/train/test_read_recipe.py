"""A recipe is a TOML file with overrides on top; what is wrong there is named."""

from pathlib import Path

import pytest

from tokenstep.config import PolicyConfig
from tokenstep.errors import TokenstepError
from tokenstep.train.recipe import PolicyRecipe, read_recipe

RECIPE = """
patch = 8
out = "runs/policy"
[data]
root = "camvid"
[policy]
sizes = [2, 4]
[[phases]]
steps = 10
batch = 2
crop = [32, 48]
lr = 1e-3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_is_read(recipe: Path) -> None:
    built = read_recipe(PolicyRecipe, recipe)
    assert built.policy == PolicyConfig(sizes=(2, 4))
    assert built.phases[0].crop == (32, 48)
    assert built.phases[0].lr == 1e-3


def test_overrides_go_on_top(recipe: Path) -> None:
    overrides = [
        "data.root=some/folder with = signs",
        "patch=16",
        "trainer.seed=3",
        "policy.sizes=[2]",
        'out="quoted"',
        "phases.0.steps=5",
    ]
    built = read_recipe(PolicyRecipe, recipe, overrides)
    assert built.data.root == "some/folder with = signs"
    assert built.patch == 16
    assert built.trainer.seed == 3
    assert built.policy.sizes == (2,)
    assert built.out == "quoted"
    assert built.phases[0].steps == 5


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.root", "KEY=VALUE"),
        ("data.rot=x", "rot"),
        ("patch=eight", "patch"),
        ("patch.size=8", "patch"),
        ("phases.steps=8", "phases"),
        ("phases.1.steps=8", r"phases\.1"),
        ("phases.-1.steps=8", r"phases\.-1"),
        ("phases.0.crop.0=8", r"phases\.0\.crop"),
        ("phases.0=8", "phases"),
    ],
)
def test_wrong_overrides_are_named(recipe: Path, override: str, named: str) -> None:
    with pytest.raises(TokenstepError, match=named) as caught:
        read_recipe(PolicyRecipe, recipe, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"patch = ", b"\xff\xfe\x00", b"patch = 8\npatch = 9"])
def test_a_file_that_is_no_toml_is_named(recipe: Path, content: bytes) -> None:
    recipe.write_bytes(content)
    with pytest.raises(TokenstepError, match=r"recipe\.toml") as caught:
        read_recipe(PolicyRecipe, recipe)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(TokenstepError, match=path.name):
            read_recipe(PolicyRecipe, path)


def test_pretrained_is_a_word_or_a_path(recipe: Path) -> None:
    for override, value in (
        ("policy.pretrained=true", True),
        ("policy.pretrained=false", False),
        ("policy.pretrained=weights/w.safetensors", "weights/w.safetensors"),
    ):
        assert read_recipe(PolicyRecipe, recipe, [override]).policy.pretrained == value
    with pytest.raises(TokenstepError, match="pretrained: expected bool or str, got 3"):
        read_recipe(PolicyRecipe, recipe, ["policy.pretrained=3"])
