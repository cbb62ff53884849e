"""Somebody's timm ViT under a linear head, as a Segmenter."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TinyModel
from support import scramble
from torch import Tensor, nn

import tokenstep
from tokenstep.config import DENSE, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.model.dense import with_policy
from tokenstep.policies.entropy import Entropy

CLASSES = ("road", "tree", "sky")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def vit_of(name: str = "test_vit", **changes: object) -> nn.Module:
    torch.manual_seed(2)
    given = {"depth": 2, "num_classes": 0, "img_size": (32, 48), "dynamic_img_size": True}
    vit = timm.create_model(name, **{**given, **changes}).eval()
    scramble(vit)
    return vit


def head_of(vit: nn.Module, kind: str) -> nn.Module:
    torch.manual_seed(3)
    dim = vit.embed_dim
    return {
        "linear": lambda: nn.Linear(dim, 3),
        "linear without bias": lambda: nn.Linear(dim, 3, bias=False),
        "conv": lambda: nn.Conv2d(dim, 3, 1),
    }[kind]()


def labels_of(vit: nn.Module, head: nn.Module, picture: Tensor) -> Tensor:
    """What its author computes, without a line of ours."""
    normal = (picture - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    patch = vit.patch_embed.patch_size[0]
    height, width = picture.shape[1:]
    tokens = vit.forward_features(normal[None])[:, vit.num_prefix_tokens :]
    maps = tokens.transpose(1, 2).unflatten(2, (height // patch, width // patch))
    conv = isinstance(head, nn.Conv2d)
    logits = head(maps) if conv else head(maps.movedim(1, -1)).movedim(-1, 1)
    full = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
    return full.argmax(1)[0]


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("test_vit", {"patch_size": 8}, "linear"),
        ("test_vit", {"patch_size": 8}, "linear without bias"),
        ("test_vit", {}, "conv"),
        ("vit_tiny_patch16_dinov3_qkvb", {}, "linear"),
    ],
)
def test_until_it_is_told_to_spend_less_it_is_the_dense_model(
    name: str, changes: dict[str, object], kind: str, tmp_path: Path
) -> None:
    vit = vit_of(name, **changes)
    head = head_of(vit, kind)
    with torch.no_grad():  # what all tokens have in common tells no class
        common = vit.forward_features(torch.randn(1, 3, 32, 48))[0].mean(0)
        common = (common / common.norm()).view(-1, *[1] * (head.weight.ndim - 2))
        head.weight -= (head.weight * common).sum(1, keepdim=True) * common
    model = tokenstep.dense(vit, head, CLASSES, mean=MEAN, std=STD)
    model.save_pretrained(tmp_path)
    loaded = tokenstep.load(tmp_path)
    for size in ((32, 48), (64, 32), (80, 96)):
        picture = F.interpolate(torch.rand(1, 3, 4, 5), size, mode="bicubic")[0].clamp(0, 1)
        with torch.no_grad():
            expected = labels_of(vit, head, picture)
        assert len(expected.unique()) > 1
        for one in (model, loaded):
            labels = torch.from_numpy(one.segment(picture).labels)
            assert (labels == expected).float().mean() > 0.999


def test_its_policy_merges_plain_parts_and_the_folder_knows_it(tmp_path: Path) -> None:
    vit, policy = vit_of(patch_size=8), Entropy(bits=(2.0, 1.0))
    model = tokenstep.dense(vit, head_of(vit, "linear"), CLASSES, mean=MEAN, std=STD)
    model.save_pretrained(tmp_path)
    picture = torch.rand(3, 64, 64)
    picture[:, :, :32] = 0.5
    for one in (model, tokenstep.load(tmp_path)):
        result = one.segment(picture, thresholds=Thresholds(merge=policy.merge))
        assert (result.tokens.grid, result.tokens.start) == (64, 32 + 2)
        assert one.segment(picture).tokens.start == 64


def test_timms_own_mean_and_std_are_taken_if_none_are_given() -> None:
    vit = vit_of("vit_tiny_patch16_dinov3_qkvb")
    model = tokenstep.dense(vit, head_of(vit, "linear"), CLASSES)
    assert model.config.mean == tuple(vit.pretrained_cfg["mean"])
    assert len(set(model.config.palette)) == 3


@pytest.mark.parametrize(
    ("head", "classes", "said"),
    [
        (nn.Linear(64, 4), CLASSES, "4 logits of 64 features"),
        (nn.Linear(63, 3), CLASSES, "3 logits of 63 features"),
        (nn.Conv2d(64, 3, 3), CLASSES, "Conv2d"),
        (nn.Sequential(nn.Linear(64, 3)), CLASSES, "Sequential"),
        (nn.Conv2d(64, 3, 1, stride=2), CLASSES, "Conv2d"),
        (nn.Linear(64, 3).half(), CLASSES, "float16"),
        (nn.Linear(64, 3), ("a", "a", "b"), "twice"),
    ],
)
def test_what_does_not_fit_is_refused(head: nn.Module, classes: tuple[str, ...], said: str) -> None:
    with pytest.raises(TokenstepError, match=said):
        tokenstep.dense(vit_of(), head, classes)


def test_a_head_of_its_own_forward_is_refused() -> None:
    class Own(nn.Linear):
        pass

    with pytest.raises(TokenstepError, match="Own"):
        tokenstep.dense(vit_of(), Own(64, 3), CLASSES)


def test_another_kind_of_model_is_refused_by_name() -> None:
    with pytest.raises(TokenstepError, match="ResNet"):
        tokenstep.dense(timm.create_model("test_resnet"), nn.Linear(64, 3), CLASSES)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("test_vit", {"embed_dim": 32, "num_heads": 2}),
        ("test_vit", {"num_heads": 1}),  # which no weight's shape gives away
        ("test_vit", {"act_layer": "relu"}),
        ("vit_tiny_patch16_dinov3_qkvb", {"rope_temperature": 7.0}),
    ],
)
def test_a_vit_that_timm_would_not_build_so_is_not_saved(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    vit = vit_of(name, **changes)
    model = tokenstep.dense(vit, head_of(vit, "linear"), CLASSES, mean=MEAN, std=STD)
    assert model.segment(torch.rand(3, 32, 48)).labels.shape == (32, 48)
    with pytest.raises(TokenstepError, match="would not load"):
        model.save_pretrained(tmp_path)


def test_another_policy_takes_the_place_of_a_models_own(tiny_model: TinyModel) -> None:
    """All else stays: dense it is the same, and it merges what the entropy says."""
    torch.manual_seed(4)
    picture = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    picture[:, :, :24] = 90
    model = tiny_model()
    other = with_policy(model, Entropy(bits=(2.0,), sizes=(2,)))
    for thresholds in (DENSE, Thresholds(exits=(0.36, 0.36))):
        own, same = (one.segment(picture, thresholds=thresholds) for one in (model, other))
        assert (own.labels == same.labels).all() and own.cost.blocks == same.cost.blocks
    merged = other.segment(picture)
    assert (merged.tokens.level[:, :2] == 1).all(), "of one colour"
    assert (merged.tokens.level[:, 3:] == 0).all(), "of noise"
    assert model.config.policy.kind == "dcts"


def test_a_policy_whose_features_the_tokens_take_stays(tiny_model: TinyModel) -> None:
    with pytest.raises(TokenstepError, match="what its own policy saw"):
        with_policy(tiny_model(policy_features=True), Entropy())
