"""The GMAC that are reported against torch's own count of what really ran."""

from collections.abc import Sequence

import pytest
import torch
from conftest import TinyModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenstep.config import DENSE, PolicyConfig, Thresholds
from tokenstep.core.partition import grid_of
from tokenstep.errors import TokenstepError
from tokenstep.model import cost
from tokenstep.model.cost import Cost
from tokenstep.model.result import Result
from tokenstep.model.segmenter import Segmenter
from tokenstep.policies.cnn_cost import count_macs
from tokenstep.reducers.base import Reducer
from tokenstep.reducers.evit import EViT
from tokenstep.reducers.tome import ToMe

REDUCED = Thresholds(merge=(0.2, 0.5), exits=(0.34, 0.34), spare=1)
VARIANTS = (
    {},
    {"cells": 2},
    {"stem": "conv"},
    {"decoder": "mask"},
    {"decoder": "mask", "cells": 4},
    {"size_bias": True},
    {"policy_features": True},
    {"sub_patches": True},
    {"decoder": "mask", "size_bias": True},
    {"name": "vit_tiny_patch16_224", "patch": 16, "depth": 2, "exits": (1,)},
    {"name": "vit_small_patch14_reg4_dinov2", "patch": 14, "depth": 2, "exits": (1,)},
)


def counted(
    model: Segmenter,
    images: list[torch.Tensor],
    thresholds: Thresholds,
    reducers: Sequence[Reducer] = (),
) -> float:
    """GMAC of a forward pass by torch's counter.

    Attention runs on the back end of plain matrix products: for the fused ones on a CPU not every
    torch release has a formula, and what has none counts as nothing.
    """
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        model(images, thresholds=thresholds, reducers=reducers)  # the first looks at its own CNN
        with FlopCounterMode(display=False) as counter:
            model(images, thresholds=thresholds, reducers=reducers)
    return counter.get_total_flops() / 2e9 - interpolated(model, images)


def interpolated(model: Segmenter, images: list[torch.Tensor]) -> float:
    """GMAC of scaling the positions: interpolation is not counted, though it runs as products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for grid in {grid_of(image.shape[-2:], model.patch) for image in images}:
            assert model.encoder.host.positions(model.tokenise, grid) is not None
    return counter.get_total_flops() / 2e9


def used(model: Segmenter, image: torch.Tensor, thresholds: Thresholds) -> Result:
    result = model.segment(image, thresholds=thresholds)
    assert isinstance(result, Result)
    return result


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("size", [(64, 96), (37, 90)])
def test_dense_cost_is_what_torch_counts(
    tiny_model: TinyModel, changes: dict[str, object], size: tuple[int, int]
) -> None:
    model, image = tiny_model(**changes), torch.rand(3, *size)
    expected = counted(model, [image], DENSE)
    assert model.costs.dense(size).total == pytest.approx(expected, rel=1e-9)
    result = used(model, image, DENSE)
    assert result.cost == result.dense_cost == model.costs.dense(size)
    assert result.cost.exits == 0
    assert (result.cost.policy > 0) == model.config.vit.policy_features


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_reduced_cost_is_what_torch_counts(
    tiny_model: TinyModel, changes: dict[str, object]
) -> None:
    model, image = tiny_model(**changes), torch.rand(3, 64, 96)
    exits = REDUCED.exits[: len(model.config.vit.exits)]
    thresholds = Thresholds(REDUCED.merge, exits, REDUCED.spare)
    result = used(model, image, thresholds)
    assert result.tokens.end < result.tokens.start < result.tokens.grid, "both must have worked"
    assert result.cost.total == pytest.approx(counted(model, [image], thresholds), rel=1e-9)
    assert min(result.cost.policy, result.cost.exits) > 0


@pytest.mark.parametrize(
    "reducer", [ToMe(r=5), ToMe(share=0.3), EViT(0.6, (1, 2)), EViT(0.6, (1,), fuse=False)], ids=str
)
@pytest.mark.parametrize("size_bias", [False, True])
def test_the_cost_of_a_reducer_is_what_torch_counts(
    tiny_model: TinyModel, reducer: Reducer, size_bias: bool
) -> None:
    model, image = tiny_model(size_bias=size_bias), torch.rand(3, 64, 96)
    (result,) = model.segment_batch([image], thresholds=DENSE, reducers=[reducer])
    expected = counted(model, [image], DENSE, [reducer])
    assert result.cost.total == pytest.approx(expected, rel=1e-9)
    assert 0 < result.cost.reducers < 0.1 * result.cost.total < 0.1 * result.dense_cost.total


def test_evit_costs_more_where_all_rows_ask(tiny_model: TinyModel) -> None:
    model = tiny_model(name="vit_medium_patch16_gap_240", patch=16, depth=2, exits=(1,))
    assert model.tokenise.prefix_count == 0
    image, evit = torch.rand(3, 64, 96), EViT(0.6, (1, 2))
    (result,) = model.segment_batch([image], thresholds=DENSE, reducers=[evit])
    assert result.cost.total == pytest.approx(counted(model, [image], DENSE, [evit]), rel=1e-9)


def test_a_batch_costs_what_its_pictures_cost(tiny_model: TinyModel) -> None:
    model = tiny_model()
    images = [torch.rand(3, 64, 96), torch.rand(3, 30, 41)]
    costs = [result.cost for result in model.segment_batch(images, thresholds=REDUCED)]
    assert costs == [used(model, image, REDUCED).cost for image in images]
    total = sum(cost.total for cost in costs)
    assert total == pytest.approx(counted(model, images, REDUCED), rel=1e-9)


@pytest.mark.parametrize(
    ("trunk", "stages"),
    [
        ("mobilenetv3_small_100", (1, 2, 3)),  # squeeze-excite
        ("tf_efficientnet_lite0", (1, 2, 3)),  # padded on one side where that is enough
        ("test_efficientnet", (1, 2)),
        ("resnet18", (1, 3)),
        ("inception_v3", (0, 1)),  # layers without padding
    ],
)
def test_the_policy_costs_what_torch_counts(
    tiny_model: TinyModel, trunk: str, stages: tuple[int, ...]
) -> None:
    policy = PolicyConfig(trunk, stages=stages, sizes=(2, 4), width=8, scale=0.7)
    model = tiny_model(policy=policy)
    for size in ((64, 96), (37, 431), (350, 29)):
        image = torch.rand(3, *size)
        with torch.no_grad():
            model.policy(image[None])  # the first looks at its own CNN
            with FlopCounterMode(display=False) as counter:
                model.policy(image[None])
        assert used(model, image, REDUCED).cost.policy == counter.get_total_flops() / 2 / 1e9


def test_a_new_picture_size_builds_no_network(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(policy_features=True)

    def stop(*args: object, **options: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr("timm.create_model", stop)
    for size in ((51, 78), (78, 51)):
        assert used(model, torch.rand(3, *size), DENSE).cost.policy > 0


def test_a_trunk_whose_compute_has_no_formula_is_not_trained_but_goes_on_running(
    tiny_model: TinyModel,
) -> None:
    trunk = PolicyConfig("mobilevit_xxs", stages=(1, 2), sizes=(2, 4), width=8)
    model = tiny_model(policy=trunk)
    with pytest.raises(TokenstepError, match=r"policy trunk 'mobilevit_xxs'.*choose a CNN"):
        model.policy.require_growth()
    used(model, torch.rand(3, 64, 64), REDUCED)  # the first looks at its own CNN
    for size in ((64, 64), (61, 127), (64, 64)):
        counted = count_macs(model.policy, torch.rand(1, 3, *size)) / 1e9
        assert used(model, torch.rand(3, *size), REDUCED).cost.policy == pytest.approx(counted)


def test_merging_and_exits_each_save(tiny_model: TinyModel) -> None:
    model, image = tiny_model(depth=6, exits=(1, 2)), torch.rand(3, 96, 96)
    dense = used(model, image, DENSE).cost
    merged = used(model, image, REDUCED.without_exits()).cost
    both = used(model, image, REDUCED).cost
    assert both.blocks < merged.blocks < dense.blocks
    assert merged.embed < dense.embed and both.decoder < merged.decoder < dense.decoder
    assert both.policy == merged.policy > dense.policy == 0 and both.exits > merged.exits == 0


def test_total_is_the_sum_of_the_stages() -> None:
    assert Cost(policy=1, embed=2, blocks=4, exits=8, decoder=16).total == 31


def test_an_unknown_decoder_has_no_cost() -> None:
    with pytest.raises(TypeError, match="Identity"):
        cost.decoder_macs(nn.Identity(), 5)
