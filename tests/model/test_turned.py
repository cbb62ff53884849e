"""A segmenter around a ViT with rotary positions: reduced like any other."""

import pytest
import torch
from conftest import TinyModel
from support import cell_logits, scramble

from tokenstep.config import DENSE, Thresholds
from tokenstep.model.segmenter import Segmenter
from tokenstep.reducers.base import Reducer
from tokenstep.reducers.tome import ToMe

KINDS = {
    "eva-02": {"name": "eva02_tiny_patch14_224", "patch": 14},
    "dinov3": {"name": "vit_tiny_patch16_dinov3_qkvb", "patch": 16},
}
WAYS: dict[str, tuple[Thresholds, list[Reducer]]] = {
    "dense": (DENSE, []),
    "policy": (Thresholds(merge=(0.2, 1.0)), []),
    "exits": (Thresholds(exits=(0.5,), spare=1), []),
    "tome": (DENSE, [ToMe(share=0.2)]),
    "all": (Thresholds((0.2, 1.0), (0.5,), 1), [ToMe(share=0.2)]),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Segmenter:
    model = tiny_model(**KINDS[request.param], depth=2, exits=(1,), image_size=(32, 32))
    scramble(model)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_does_not_depend_on_its_batch(model: Segmenter, way: str) -> None:
    thresholds, reducers = WAYS[way]
    sizes = [(60, 50), (33, 120), (16, 16)]
    pictures = [torch.rand(3, *size) for size in sizes]
    with torch.no_grad():
        together = model(pictures, thresholds=thresholds, reducers=reducers)
        dense = model(pictures, thresholds=DENSE)
        for index, picture in enumerate(pictures):
            alone = model([picture], thresholds=thresholds, reducers=reducers)
            grid = together.grid(index)
            one, other = cell_logits(together, index, grid), cell_logits(alone, 0, grid)
            assert torch.allclose(one, other, atol=1e-4)
    assert (len(together.tokens.x) < len(dense.tokens.x)) == (way != "dense")


def test_where_a_token_lies_is_seen(model: Segmenter) -> None:
    """Two colours on one grid, and the same with their places changed, are not the same scene."""
    if model.tokenise.pos_embed is not None:  # it would tell as well
        torch.nn.init.zeros_(model.tokenise.pos_embed)
    picture = torch.zeros(3, 48, 96)
    picture[:, :, :48] = 1.0
    with torch.no_grad():
        one, other = (model([image], thresholds=DENSE) for image in (picture, picture.flip(2)))
    grid = one.grid(0)
    left, right = cell_logits(one, 0, grid), cell_logits(other, 0, grid).flip(1)
    assert not torch.allclose(left, right, atol=1e-4)


def test_its_folder_brings_it_back(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_model(**KINDS["dinov3"], depth=2, exits=(1,), image_size=(32, 32))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    loaded = Segmenter.from_pretrained(folder).eval()
    picture = torch.rand(3, 50, 40)
    with torch.no_grad():
        assert torch.equal(model([picture]).logits, loaded([picture]).logits)
