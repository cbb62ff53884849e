"""The dense model in other forms gives the dense model's label maps."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyModel
from torch import Tensor

from tokenstep.config import DENSE
from tokenstep.errors import TokenstepError
from tokenstep.model.segmenter import Segmenter
from tokenstep.runtimes.dense import DenseGraph, eager, onnx_runtime, openvino_runtime

SIZE = (50, 75)


def smooth(batch: int) -> Tensor:
    """Pictures without noise, so that classes are told apart by more than rounding."""
    return F.interpolate(torch.rand(batch, 3, 4, 6), SIZE, mode="bicubic").clamp(0, 1)


def agreement(model: Segmenter, labels: Tensor, images: Tensor) -> float:
    """Share of pixels that are as the dense model has them."""
    results = model.segment_batch(list(images), thresholds=DENSE)
    expected = torch.stack([torch.from_numpy(one.labels) for one in results])
    assert labels.shape == expected.shape and labels.dtype == torch.uint8
    assert len(expected.unique()) > 1
    return float((labels == expected).float().mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stem": "conv"},
        {"policy_features": True, "cells": 4, "stem": "conv"},
        {"cells": 2, "image_size": (64, 64)},
        {"name": "vit_wee_patch16_reg1_gap_256", "patch": 16, "exits": (1,), "depth": 2},
        {"name": "vit_small_patch14_reg4_dinov2", "patch": 14, "exits": (1,), "depth": 2},
        {"name": "eva02_tiny_patch14_224", "patch": 14, "exits": (1,), "depth": 2},
        {"name": "vit_tiny_patch16_dinov3_qkvb", "patch": 16, "exits": (1,), "depth": 2},
    ],
)
def test_the_twin_is_the_dense_model(tiny_model: TinyModel, changes: dict[str, object]) -> None:
    model = tiny_model(**changes)
    images = smooth(2)
    with torch.inference_mode():
        labels = eager(model, SIZE, 2)(images)
    assert agreement(model, labels, images) > 0.999


def test_a_plain_model_is_timms_own(tiny_model: TinyModel) -> None:
    """With no code of ours between the picture and its features."""
    assert DenseGraph(tiny_model(), SIZE).vit is not None
    assert DenseGraph(tiny_model(policy_features=True), SIZE).vit is None
    assert DenseGraph(tiny_model(stem="conv"), SIZE).vit is None


def test_turned_tokens_that_get_more_than_timms_own_have_no_twin(tiny_model: TinyModel) -> None:
    """Its blocks would run without their turns, which no shape gives away."""
    eva = {"name": "eva02_tiny_patch14_224", "patch": 14, "exits": (1,), "depth": 2}
    assert DenseGraph(tiny_model(**eva), SIZE).vit is not None
    with pytest.raises(TokenstepError, match="TimmEva"):
        DenseGraph(tiny_model(**eva, policy_features=True), SIZE)


def test_a_mask_decoder_has_no_twin(tiny_model: TinyModel) -> None:
    with pytest.raises(TokenstepError, match="linear decoder"):
        DenseGraph(tiny_model(decoder="mask"), SIZE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("package", "make"), [("onnxruntime", onnx_runtime), ("openvino", openvino_runtime)]
)
def test_other_runtimes_agree(tiny_model: TinyModel, package: str, make: object) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[bench]'")
    pytest.importorskip("onnxscript", reason="pip install '.[bench]'")
    model = tiny_model(policy_features=True, cells=4, stem="conv")
    images = smooth(2)
    with torch.inference_mode():
        labels = make(model, SIZE, 2)(images)  # type: ignore[operator]
    # They round otherwise, which shows where two classes are nearly even.
    assert agreement(model, labels, images) > 0.99
