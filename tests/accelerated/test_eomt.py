"""An EoMT on fewer tokens: queries that join, masked attention, and the original's outputs."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import grid_tokens, scramble
from torch import Tensor, nn

import tokenstep
from tokenstep.core.attention import Attend, Hidden
from tokenstep.errors import TokenstepError
from tokenstep.policies.entropy import Entropy
from tokenstep.reducers.evit import EViT
from tokenstep.reducers.tome import ToMe

transformers = pytest.importorskip("transformers", reason="pip install '.[hf]'")

PROCESSOR = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.25] * 3)
SIZE = {"image_size": 64, "patch_size": 8, "hidden_size": 48, "num_attention_heads": 3}
QUERIES = {"num_queries": 7, "num_blocks": 2, "num_labels": 5, "num_register_tokens": 2}
REDUCED: dict[str, Any] = {
    "policy": Entropy(bits=(4.0, 4.0)),
    "reducers": [ToMe(share=0.1), EViT(0.7, (3,), fuse=False)],
}


def eomt() -> nn.Module:
    config = transformers.EomtConfig(**SIZE, **QUERIES, num_hidden_layers=4, mlp_ratio=2)
    return transformers.EomtForUniversalSegmentation(config)


def eomt_dinov3() -> nn.Module:
    given = {**SIZE, **QUERIES, "num_hidden_layers": 4, "intermediate_size": 64}
    return transformers.EomtDinov3ForUniversalSegmentation(transformers.EomtDinov3Config(**given))


@pytest.fixture(params=[eomt, eomt_dinov3])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(3)
    built = request.param().eval()
    scramble(built)
    return built


def pictures() -> Tensor:
    torch.manual_seed(4)
    drawn = torch.randn(2, 3, 64, 64)
    drawn[..., :32] = 0.3
    return drawn


def assert_alike(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    for name in one:
        left, right = one[name], other[name]
        pairs = zip(left, right, strict=True) if isinstance(left, tuple) else [(left, right)]
        for part, same in pairs:
            assert torch.allclose(part, same, atol=1e-4 * float(part.abs().max())), name


@pytest.mark.parametrize(
    "chances", [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)], ids=str
)
def test_nothing_reduced_gives_every_output_of_the_original(
    model: nn.Module, chances: tuple[float, ...]
) -> None:
    """With masked attention on, off, left over from a block before, and by chance."""
    model.attn_mask_probs.copy_(torch.tensor(chances))
    images, cheap = pictures(), tokenstep.accelerate(model)
    found = []
    for one in (model, cheap):
        torch.manual_seed(5)
        with torch.no_grad():
            found.append(one(images, output_hidden_states=True))
    assert_alike(*found)


def test_masks_change_what_is_found(model: nn.Module) -> None:
    """Or the test above would pass with masks that hide nothing."""
    images, cheap = pictures(), tokenstep.accelerate(model)
    with torch.no_grad():
        masked = cheap(images).masks_queries_logits
        model.attn_mask_probs.zero_()
        assert not torch.allclose(masked, cheap(images).masks_queries_logits, atol=1e-3)


def test_the_loss_is_the_models_own_and_reaches_the_pixels(model: nn.Module) -> None:
    images = pictures()
    masks = [torch.rand(3, 64, 64).round() for _ in images]
    classes = [torch.tensor([0, 2, 4]) for _ in images]
    found = []
    for one in (model, tokenstep.accelerate(model)):
        own = images.clone().requires_grad_()
        torch.manual_seed(6)
        loss = one(own, mask_labels=masks, class_labels=classes).loss
        loss.backward()
        assert own.grad is not None
        found.append((loss.detach(), own.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-3 * float(found[0][1].abs().max()))


def test_fewer_tokens_give_the_same_shapes_and_each_picture_alone(model: nn.Module) -> None:
    images, cheap = pictures(), tokenstep.accelerate(model, PROCESSOR, **REDUCED)
    with torch.no_grad():
        dense, found = model(images), cheap(images)
        for name, value in dense.items():
            assert found[name].shape == value.shape
        for index, image in enumerate(images):
            for name, value in cheap(image[None]).items():
                assert torch.allclose(found[name][index], value[0], atol=1e-4)
    rows = [max(lengths) for lengths in cheap.run.encoded.live]
    assert rows[0] < 64 + 3 and rows[2] == rows[1] + 7 - (rows[1] - 3 - round(0.9 * (rows[1] - 3)))


def test_a_query_sees_a_supertoken_by_its_mean_logit(model: nn.Module) -> None:
    from tokenstep.accelerated.eomt import Queries

    queries = Queries(model)
    tokens = grid_tokens([(8, 8)], dim=48, prefix=3)
    into = torch.arange(len(tokens.x))
    into[[4, 11, 12]] = 3  # the first 2x2 patches
    tokens = tokens.merge(into).join(model.query.weight)
    masks = torch.full((1, 7, 8, 8), -1.0)
    masks[0, 0, :2, :2] = torch.tensor([[4.0, -1.0], [-1.0, -1.0]])  # above 0 on average
    masks[0, 1, :2, :2] = torch.tensor([[2.0, -1.0], [-1.0, -1.0]])
    hidden = queries._hidden(tokens, masks)
    assert (hidden.start, hidden.count) == (3, 7)
    assert hidden.sees[:10].all()
    assert hidden.sees[10].tolist() == [True] + [False] * 6
    assert not hidden.sees[11:].any()


def test_it_stays_as_it_is_and_runs_in_bfloat16(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    cheap = tokenstep.accelerate(model, PROCESSOR, **REDUCED)
    with torch.no_grad():
        cheap(pictures())
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        found = cheap.to(torch.bfloat16)(pictures().bfloat16())
    assert found.masks_queries_logits.isfinite().all()
    assert found.masks_queries_logits.dtype == torch.bfloat16


def test_other_sizes_are_refused(model: nn.Module) -> None:
    with pytest.raises(TokenstepError, match="squares of 64 px"):
        tokenstep.accelerate(model)(torch.rand(1, 3, 64, 72))


@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_hidden_keys_are_not_attended_to(backend: Any) -> None:
    tokens = grid_tokens([(3, 4), (2, 2)], prefix=2)
    q, k, v = torch.randn(3, len(tokens.x), 2, 4)
    sees = torch.rand(len(tokens.x), 1) < 0.5
    sees[tokens.offsets[:-1]] = True
    hidden = Hidden(start=1, count=1, sees=sees)
    attend = Attend(tokens.segments, backend=backend, hidden=hidden)
    found = attend(q, k, v, scale=0.7)
    for start, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True):
        mask = torch.ones(end - start, end - start, dtype=torch.bool)
        mask[1] = sees[start:end, 0]
        own = (part[start:end].transpose(0, 1) for part in (q, k, v))
        expected = F.scaled_dot_product_attention(*own, attn_mask=mask, scale=0.7)
        assert torch.allclose(found[start:end], expected.transpose(0, 1), atol=1e-5)
