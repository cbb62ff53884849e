"""The two dataflows compute the same, and the one for GPUs does so in few operations and syncs."""

import pytest
import timm
import torch
from conftest import CLASSES, PALETTE, TinyModel
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import Operations
from support import random_partition, scramble
from torch import Tensor

from tokenstep.config import DENSE, Budget, PolicyConfig, Spending, Thresholds, VitConfig
from tokenstep.core.partition import grid_of
from tokenstep.model import grid
from tokenstep.model.config import ModelConfig
from tokenstep.model.label_map import label_maps
from tokenstep.model.segmented import Segmented
from tokenstep.model.segmenter import Segmenter
from tokenstep.model.spending import as_keyword

STEP = Thresholds(merge=(0.5, 0.5), exits=(0.4, 0.4), spare=1)
SIZES = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4)
MODELS: dict[str, dict[str, object]] = {
    "linear stem": {"cells": 4},
    "conv stem": {"stem": "conv", "cells": 2, "policy_features": True},
    "conv stem, patches of 14 px": {"stem": "conv", "patch": 14},
    "what is within a superpatch": {"sub_patches": True, "policy_features": True},
    "mask decoder": {"decoder": "mask"},
}


def both(model: Segmenter, pictures: list[Tensor], spending: Spending) -> list[Segmented]:
    found = []
    for dataflow in ("windows", "grid"):
        model.use(dataflow=dataflow, backend="padded" if dataflow == "grid" else "loop")
        with torch.no_grad():
            found.append(model(pictures, **as_keyword(spending)))
    assert [one.flow for one in found] == ["windows", "grid"]
    return found


@pytest.fixture(scope="module", params=MODELS)
def model(tiny_model: TinyModel, request: pytest.FixtureRequest) -> Segmenter:
    model = tiny_model(**MODELS[request.param])
    scramble(model)
    return model


@settings(max_examples=8)
@given(SIZES, st.sampled_from(["dense", "merged", "pruned", "budget"]))
def test_both_dataflows_compute_the_same(
    model: Segmenter, sizes: list[tuple[int, int]], kind: str
) -> None:
    spending = {
        "dense": DENSE,
        "merged": Thresholds(merge=(0.5, 0.5)),
        "pruned": STEP,
        "budget": Budget(merge={2: 0.3, 4: 0.3}, exits={1: 0.2, 2: 0.2}),
    }[kind]
    pictures = [torch.rand(3, *size) for size in sizes]
    windows, grid_ = both(model, pictures, spending)
    assert torch.equal(windows.partition, grid_.partition)
    assert torch.equal(windows.tokens.anchor, grid_.tokens.anchor)
    assert torch.equal(windows.tokens.owner, grid_.tokens.owner)
    assert windows.live == grid_.live
    for ours, theirs in zip(windows.values, grid_.values, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    for ours, theirs in zip(label_maps(windows), label_maps(grid_), strict=True):
        # a pixel may flip where two classes are equal to rounding
        assert int((ours != theirs).sum()) <= 1 + ours.numel() * 1e-5


@settings(max_examples=8)
@given(SIZES)
def test_both_embed_alike(model: Segmenter, sizes: list[tuple[int, int]]) -> None:
    normal = model.normalise([torch.rand(3, *size) for size in sizes])
    level = random_partition([grid_of(size, model.patch) for size in sizes])
    context = None
    if model.tokenise.context is not None:
        channels = model.policy.channels
        context = [
            torch.randn(len(group.places), channels, *grid_of(group.size, model.patch))
            for group in normal
        ]
    with torch.no_grad():
        windows, grid_ = (
            model.tokenise(normal, level, context, flow=flow) for flow in ("windows", "grid")
        )
    assert torch.equal(windows.anchor, grid_.anchor)
    assert torch.equal(windows.size, grid_.size)
    assert torch.allclose(windows.x, grid_.x, atol=1e-5 * float(windows.x.abs().max()))


def test_pictures_beyond_the_memory_are_drawn_in_parts(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(cells=2)
    scramble(model)
    pictures = [torch.rand(3, 40, 48) for _ in range(5)]
    model.use(dataflow="grid")
    with torch.no_grad():
        out = model(pictures, thresholds=STEP)
        whole = label_maps(out)
        for floats in (2.5 * 3 * 40 * 48, 3 * 40 * 40):  # of two pictures, of less than one
            monkeypatch.setattr(grid, "PIXEL_FLOATS", int(floats))
            for ours, theirs in zip(label_maps(out), whole, strict=True):
                assert int((ours != theirs).sum()) <= 1


def test_gradients_flow_through_the_grid(tiny_model: TinyModel) -> None:
    model = tiny_model(policy_features=True).train()
    model.use(dataflow="grid")
    model(torch.rand(2, 3, 64, 80), thresholds=STEP).logits.square().sum().backward()
    for part in (model.tokenise, model.encoder, model.decoder):
        assert not [name for name, weight in part.named_parameters() if weight.grad is None]


def test_a_label_map_does_not_keep_its_batch(tiny_model: TinyModel) -> None:
    results = tiny_model().segment_batch([torch.rand(3, 64, 80) for _ in range(4)])
    for result in results:
        owned = result.labels if result.labels.base is None else result.labels.base
        assert owned.nbytes == result.labels.nbytes


def test_an_unknown_dataflow_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(ValueError, match="dataflow"):
        tiny_model().use(dataflow="spiral")


def counted(model: Segmenter, batch: int, spending: Spending) -> Operations:
    """Of one call on pictures of one size, when one of that size was seen before."""
    model.use(dataflow="grid", backend="padded")
    torch.manual_seed(4)
    coarse = torch.rand(batch, 3, 6, 8)
    pictures = torch.nn.functional.interpolate(coarse, (192, 256), mode="bicubic")
    pictures = list((pictures.clamp(0, 1) * 255).to(torch.uint8))
    model.segment_batch(pictures[:1], **as_keyword(spending))
    with Operations() as counts:
        results = model.segment_batch(pictures, **as_keyword(spending))
    for result in results if spending != DENSE else []:
        assert sum(result.tokens.halted.values()) > 0 and result.tokens.start < result.tokens.grid
    return counts


def like_road(name: str, depth: int, exits: tuple[int, ...], **vit: object) -> Segmenter:
    """A model of the shipped recipes' parts with random weights."""
    torch.manual_seed(1)
    config = ModelConfig(
        CLASSES,
        PALETTE,
        vit=VitConfig(name, patch=16, depth=depth, image_size=(192, 256), exits=exits, **vit),
        policy=PolicyConfig("tf_efficientnet_lite0", sizes=(2, 4, 8, 16)),
    )
    model = Segmenter.build(config).eval()
    scramble(model.exits)
    return model


def thresholds_for(model: Segmenter) -> Thresholds:
    """Thresholds at which a random model merges and halts some."""
    exits = len(model.exits.after)
    return Thresholds(merge=(0.5,) * 4, exits=(0.35,) * exits, spare=1)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("features", [False, True], ids=["", "policy features"])
def test_few_operations_and_syncs(batch: int, features: bool) -> None:
    model = like_road("vit_tiny_patch16_224", 12, (3, 6, 9), cells=4, policy_features=features)
    counts = counted(model, batch, thresholds_for(model))
    assert counts.total <= 25 * 12 + 250, counts.operations
    # the partition, each exit, the result
    assert sum(counts.syncs.values()) <= 1 + 3 + 1, counts.syncs


@pytest.mark.parametrize("batch", [1, 8])
def test_a_dense_pass_is_the_plain_model_and_a_hundred(batch: int) -> None:
    model = like_road("vit_tiny_patch16_224", 12, (3, 6, 9), cells=4)
    counts = counted(model, batch, DENSE)
    plain = timm.create_model(
        "vit_tiny_patch16_224", patch_size=16, img_size=(192, 256), num_classes=0
    ).eval()
    with torch.inference_mode(), Operations() as own:
        plain.forward_features(torch.rand(batch, 3, 192, 256))
    assert counts.total <= own.total + 100, counts.operations
    assert sum(counts.syncs.values()) == 1, counts.syncs


def test_two_blocks_of_a_large_vit() -> None:
    model = like_road("vit_large_patch16_224", 2, (1,))
    counts = counted(model, 1, thresholds_for(model))
    assert counts.total <= 25 * 2 + 250, counts.operations
    assert sum(counts.syncs.values()) <= 3, counts.syncs
