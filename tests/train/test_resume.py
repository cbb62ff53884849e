"""A training that is killed with -9 and started again ends with the very same weights."""

import dataclasses
import itertools
import signal
from functools import cache
from pathlib import Path

import pytest
from killed import Place, Recipe, run
from running import assert_same_weights
from training import TRAINER, VIT, policy_recipe, segmenter_recipe

from tokenstep.train.recipe import Phase

KINDS = ("policy", "segmenter")


class Runs:
    """Trainings of one data set: whole ones, made once, and killed ones."""

    def __init__(self, folder: Path, data: Path, policy: Path) -> None:
        self.folder = folder
        self.data = data
        self.policy = policy
        self.whole = cache(self._whole)

    def recipe(self, out: Path, kind: str, *, steps: int, devices: int) -> Recipe:
        """Two phases of ``steps``; everything random that a training has is on."""
        trainer = dataclasses.replace(
            TRAINER, save_every=1, val_every=3, val_pictures=3, devices=devices
        )
        phase = Phase(steps=steps, batch=2, crop=(64, 64), warmup=2, dense_share=0.5)
        second = dataclasses.replace(
            phase, pruning=True, optimizer="muon", head_lr=4.0, layer_decay=0.8, average=0.7
        )
        if kind == "policy":
            made = policy_recipe(self.data, out, steps)
            return dataclasses.replace(
                made, phases=(phase, second), trainer=trainer, class_weight=0.5
            )
        made = segmenter_recipe(self.data, self.policy, out, phase, second)
        vit = dataclasses.replace(VIT, drop_path=0.3, policy_features=True)
        # Dropped tokens are supervised too, where the second phase prunes.
        thresholds = dataclasses.replace(made.thresholds, reducers=("random:share=0.2",))
        return dataclasses.replace(
            made, vit=vit, trainer=trainer, class_balance=0.4, thresholds=thresholds
        )

    def _whole(self, kind: str, steps: int, devices: int) -> Path:
        out = self.folder / f"{kind}-{steps}-{devices}"
        assert run(self.recipe(out, kind, steps=steps, devices=devices)) == 0
        return out

    def killed(self, kind: str, place: Place, *, steps: int, devices: int) -> Path:
        """A training that is killed at ``place`` and then runs to its end."""
        phase, step = place
        out = self.folder / f"{kind}-{steps}-{devices}-killed-at-{phase}-{step}"
        recipe = self.recipe(out, kind, steps=steps, devices=devices)
        assert run(recipe, die_at=place) == -signal.SIGKILL, "it lived until then"
        ends = [(out / f"phase{number}" / "end.safetensors").exists() for number in range(2)]
        assert ends == [number < phase for number in range(2)], "the phase was not finished"
        assert (out / f"phase{phase}" / "last.ckpt").exists() == (step > 0)
        assert run(recipe) == 0
        return out


@pytest.fixture(scope="module")
def runs(drawn: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), drawn, policy)


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_ends_with_the_same_weights(runs: Runs, kind: str, phase: int) -> None:
    broken = runs.killed(kind, (phase, 1), steps=4, devices=1)
    assert_same_weights(runs.whole(kind, 4, 1), broken)


@pytest.mark.slow
@pytest.mark.parametrize("place", [(0, 2), (1, 0), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("devices", [1, 2])
def test_it_does_so_in_the_middle_between_phases_and_on_two_devices(
    runs: Runs, devices: int, kind: str, place: Place
) -> None:
    broken = runs.killed(kind, place, steps=4, devices=devices)
    assert_same_weights(runs.whole(kind, 4, devices), broken)


@pytest.mark.slow
@pytest.mark.parametrize("place", list(itertools.product(range(2), range(12))))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("devices", [1, 2])
def test_it_does_so_at_every_step(runs: Runs, devices: int, kind: str, place: Place) -> None:
    broken = runs.killed(kind, place, steps=12, devices=devices)
    assert_same_weights(runs.whole(kind, 12, devices), broken)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("devices", [1, 2])
def test_it_does_so_killed_at_every_step_in_turn(runs: Runs, devices: int, kind: str) -> None:
    out = runs.folder / f"{kind}-12-{devices}-killed-at-every-step"
    recipe = runs.recipe(out, kind, steps=12, devices=devices)
    for place in itertools.product(range(2), range(12)):
        assert run(recipe, die_at=place) == -signal.SIGKILL, place
        assert not (out / f"phase{place[0]}" / "end.safetensors").exists()
    assert run(recipe) == 0
    assert_same_weights(runs.whole(kind, 12, devices), out)
