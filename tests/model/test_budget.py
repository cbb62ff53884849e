"""A budget: the same spending on each picture, so that pictures of a size have equal shapes."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import TinyModel
from support import scramble

from tokenstep.config import DENSE, Budget, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.from_dict import from_dict
from tokenstep.model.segmenter import Segmenter
from tokenstep.policies.batch import homogeneity, policy_features

BUDGET = Budget(merge={2: 0.4, 4: 0.3}, exits={1: 0.1, 2: 0.2}, spare=1)


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Segmenter:
    model = tiny_model(cells=2)
    scramble(model)
    return model


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.rand(3, *size) for size in sizes]


def test_nothing_to_spend_less_on_is_the_dense_model(model: Segmenter) -> None:
    images = pictures((64, 96), (40, 72))
    for budget in (Budget(), Budget({2: 0.0}, {1: 0.0})):
        with torch.inference_mode():
            dense, found = model(images, thresholds=DENSE), model(images, budget=budget)
        assert torch.equal(dense.logits, found.logits)
        assert not found.scored


def test_all_pictures_of_a_size_have_the_same_tokens_everywhere(model: Segmenter) -> None:
    with torch.inference_mode():
        found = model(pictures(*[(64, 96)] * 4), budget=BUDGET)
    for rows in found.trace.attention + found.trace.mlp:
        assert len(set(rows)) == 1
    # 8 x 12 patches: 0.3 of them in 4 x 4, 0.4 in 2 x 2; 10 and 19 tokens halt
    before, middle, last = (rows[0] - found.trace.prefix[0] for rows in found.trace.attention)
    assert before == 96 - 2 * 15 - 10 * 3
    assert (before - middle, middle - last) == (10, 19)


def test_a_picture_does_not_depend_on_its_batch(model: Segmenter) -> None:
    images = pictures((64, 96), (40, 72), (64, 96), (33, 50))
    together = model.segment_batch(images, budget=BUDGET)
    for image, one in zip(images, together, strict=True):
        (alone,) = model.segment_batch([image], budget=BUDGET)
        assert (one.labels != alone.labels).mean() < 0.005
        assert (one.tokens.level == alone.tokens.level).all()
        assert one.tokens.live == alone.tokens.live and one.cost == alone.cost
    assert together[0].cost == together[2].cost and together[0].cost.policy > 0


def test_the_best_superpatches_are_those_of_the_policy(model: Segmenter) -> None:
    """As many as thresholds choose, of one size, are the same ones."""
    images = pictures((64, 96))
    with torch.inference_mode():
        (looks,) = policy_features(model.policy, model.normalise(images))
        middle = float(homogeneity(model.policy, looks)[0].median())
        chosen = model.partition(images, Thresholds(merge=(middle, 1.0)))
        share = float((chosen == 1).float().mean())
        assert 0 < share < 1
        assert torch.equal(chosen, model.partition(images, Budget(merge={2: share})))


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        (Budget({8: 0.1}), "superpatch size"),
        (Budget({2: 0.7, 4: 0.7}), "at most 1"),
        (Budget({2: -0.1}), "0 or more"),
        (Budget({}, {3: 0.1}), "exit"),
        (Budget({2: float("nan")}), "0 or more"),
        (Budget(spare=-1), "spare"),
        (Budget(spare=10**30), "spare"),
        (Budget(reducers=("exits:thresholds=[0.5,0.5]",)), "shares"),
        ({"merge": {2: 0.5}}, "tokenstep.Budget"),
    ],
)
def test_a_budget_that_does_not_fit_is_refused(
    model: Segmenter, budget: Budget, named: str
) -> None:
    with pytest.raises(TokenstepError, match=named) as caught:
        model.segment(pictures((32, 32))[0], budget=budget)
    assert "\n" not in str(caught.value)


def test_a_budget_is_instead_of_thresholds(model: Segmenter) -> None:
    (image,) = pictures((32, 32))
    with pytest.raises(TokenstepError, match="one of"):
        model.segment(image, budget=BUDGET, thresholds=DENSE)
    with pytest.raises(TokenstepError, match="one of"):
        model.segment(image, budget=BUDGET, max_loss=0)


TWICE = {"merge": {"2": 0.1, "02": 0.2}}
LONG = {"merge": {"1" * 5000: 0.1}}


def test_a_budget_survives_json() -> None:
    text = json.dumps(asdict(BUDGET))
    assert json.loads(text)["merge"] == {"2": 0.4, "4": 0.3}
    assert from_dict(Budget, json.loads(text), "budget.json") == BUDGET
    for wrong in ({"merge": {"two": 0.5}}, {"merge": [0.5]}, {"merge": {"2": "half"}}, TWICE, LONG):
        with pytest.raises(TokenstepError, match=r"budget\.json: merge"):
            from_dict(Budget, wrong, "budget.json")
