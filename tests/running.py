"""What tests of running trainings share: what a training takes, and how it is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenstep.errors import TokenstepError
from tokenstep.train.phase import PhaseModule
from tokenstep.train.recipe import PolicyRecipe, SegmenterRecipe
from tokenstep.train.train import train_policy, train_segmenter


class Killed(Exception):
    """Stands for kill -9."""


Batch = tuple[torch.Tensor, torch.Tensor]


def watch(
    train: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *, die_at: int | None = None
) -> list[Batch]:
    """The batches that a training takes; it may be stopped dead before step ``die_at``."""
    batches: list[Batch] = []

    def before_step(self: PhaseModule, batch: Batch, index: int) -> None:
        if len(batches) == die_at:
            raise Killed
        batches.append(batch)

    with monkeypatch.context() as patch:
        patch.setattr(PhaseModule, "on_train_batch_start", before_step)
        if die_at is None:
            train()
        else:
            with pytest.raises(Killed):
                train()
    return batches


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def refused(recipe: PolicyRecipe | SegmenterRecipe, match: str) -> str:
    with pytest.raises(TokenstepError, match=match) as caught:
        if isinstance(recipe, PolicyRecipe):
            train_policy(recipe, progress=False)
        else:
            train_segmenter(recipe, progress=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)
