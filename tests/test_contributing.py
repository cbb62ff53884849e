"""The reducer, the policy and the host that CONTRIBUTING shows work as they stand there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TinyModel
from guide import example
from support import cell_logits
from torch import nn

from tokenstep.config import DENSE, Thresholds, VitConfig
from tokenstep.errors import TokenstepError
from tokenstep.model.build import step_parts
from tokenstep.model.config import ModelConfig
from tokenstep.model.segmenter import Segmenter


def test_the_example_reducer_merges_and_does_not_see_the_batch(tiny_model: TinyModel) -> None:
    model = tiny_model()
    pairs = example("Pairs")(after=(1,), similarity=-1.0)
    pictures = [torch.rand(3, 40, 48), torch.rand(3, 16, 24)]
    with torch.no_grad():
        together = model(pictures, thresholds=DENSE, reducers=[pairs])
        assert all(late < early for early, late in zip(*together.live[:2], strict=True))
        for index, picture in enumerate(pictures):
            alone = model([picture], thresholds=DENSE, reducers=[pairs])
            grid = tuple(-(-side // model.patch) for side in picture.shape[1:])
            got, expected = cell_logits(together, index, grid), cell_logits(alone, 0, grid)
            assert torch.allclose(got, expected, atol=1e-4)


def test_off_it_changes_nothing(tiny_model: TinyModel) -> None:
    model = tiny_model()
    picture = torch.rand(1, 3, 40, 48)
    with torch.no_grad():
        plain = model(picture, thresholds=DENSE).logits
        off = model(picture, thresholds=DENSE, reducers=[example("Pairs")()])
    assert torch.equal(off.logits, plain)


def test_the_example_policy_merges_what_is_even(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config(exits=())
    policy = example("Contrast")(8, config.policy.sizes)
    model = Segmenter(config, step_parts(config, policy=policy)).eval()
    picture = torch.full((3, 64, 64), 0.5)
    picture[:, :, 32:] = torch.rand(3, 64, 32)
    (result,) = model.segment_batch([picture], thresholds=Thresholds(merge=(0.5, 0.5)))
    assert (result.tokens.level[:, :4] == 2).all() and (result.tokens.level[:, 4:] == 0).all()
    assert result.cost.policy == 64 * 64 * 2 / 1e9


def test_a_segmenter_can_be_built_around_the_example_host(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    layer = nn.TransformerEncoderLayer(24, 3, 32, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 3, nn.LayerNorm(24), enable_nested_tensor=False)
    config = replace(tiny_config(), vit=VitConfig("own", exits=(1, 2), cells=2))
    model = Segmenter(config, step_parts(config, host=example("TorchViT")(8, encoder))).eval()
    step = Thresholds((0.0, 0.0), (0.4, 0.4), 1, ("tome:share=0.1",))
    dense, found = (
        model.segment_batch([torch.rand(3, 40, 64)], thresholds=thresholds)[0]
        for thresholds in (DENSE, step)
    )
    assert dense.labels.shape == found.labels.shape == (40, 64)
    assert found.cost.blocks < dense.cost.blocks
    names = {name.split(".")[1] for name, _ in model.encoder.named_parameters(prefix="encoder")}
    assert names == {"layers", "last"}, "its parts are held by its own names"


def test_a_model_with_parts_of_its_own_is_not_saved_as_a_folder_that_would_not_load(
    tiny_config: Callable[..., ModelConfig], tiny_model: TinyModel, tmp_path: Path
) -> None:
    config = tiny_config()
    policy = example("Contrast")(8, config.policy.sizes)
    own = Segmenter(config, step_parts(config, policy=policy))
    with pytest.raises(TokenstepError, match="parts of its own"):
        own.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own" / "model.safetensors").exists()
    tiny_model().save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").exists()


def test_saving_draws_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, drawn = tiny_model(), torch.random.get_rng_state()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), drawn)
