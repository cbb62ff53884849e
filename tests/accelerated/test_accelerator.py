"""An accelerator: saved without the model, and put on top of its unchanged weights again."""

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import save_model
from support import scramble
from torch import Tensor, nn

import tokenstep
from tokenstep.accelerated.accelerator import Accelerator, read_accelerator
from tokenstep.config import OperatingPoint, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.policies.entropy import Entropy
from tokenstep.reducers.evit import EViT
from tokenstep.reducers.mpm import MPM

transformers = pytest.importorskip("transformers", reason="pip install '.[hf]'")

PROCESSOR = SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
SIZE = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_attention_heads": 3}
REDUCED: dict[str, Any] = {
    "policy": Entropy(bits=(4.0, 3.0)),
    "reducers": [EViT(0.7, (2,), fuse=False), MPM((3,))],
}


def dinov2(**changes: Any) -> Any:
    config = transformers.Dinov2Config(
        **{**SIZE, "num_hidden_layers": 3, "mlp_ratio": 2, **changes}
    )
    torch.manual_seed(3)
    built = transformers.Dinov2Model(config).eval()
    scramble(built)
    return built


def uper_net() -> Any:
    backbone = transformers.Dinov2Config(
        **SIZE, num_hidden_layers=3, mlp_ratio=2, out_features=["stage1", "stage2", "stage3"]
    )
    torch.manual_seed(3)
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=16, num_labels=4, auxiliary_in_channels=48
        )
    ).eval()


def pictures() -> Tensor:
    torch.manual_seed(4)
    drawn = torch.randn(2, 3, 32, 48)
    drawn[..., :24] = 0.3
    return drawn


def last_of(output: Any) -> Tensor:
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


@pytest.mark.parametrize("build", [dinov2, uper_net])
def test_a_saved_accelerator_makes_the_same_model_just_as_cheap(build: Any, tmp_path: Path) -> None:
    """Once on the model in memory, once on a folder of it."""
    model = build()
    cheap = tokenstep.accelerate(model, PROCESSOR, **REDUCED)
    cheap.save_pretrained(tmp_path / "fast")
    model.save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessor(
        image_mean=PROCESSOR.image_mean, image_std=PROCESSOR.image_std
    ).save_pretrained(tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "fast").iterdir())
    assert names == ["README.md", "accelerator.json"], "the model itself is not in it"
    again = tokenstep.accelerate(model, PROCESSOR, accelerator=tmp_path / "fast")
    loaded = tokenstep.load(tmp_path / "model", accelerator=tmp_path / "fast")
    with torch.no_grad():
        dense, expected = last_of(model(pictures())), last_of(cheap(pictures()))
        assert not torch.allclose(dense, expected, atol=1e-3)
        for one in (again, loaded):
            assert torch.allclose(last_of(one(pictures())), expected, atol=1e-5)


def test_other_weights_are_warned_of_and_other_models_refused(tmp_path: Path) -> None:
    tokenstep.accelerate(dinov2(), PROCESSOR, **REDUCED).save_pretrained(tmp_path)
    other = dinov2()
    with torch.no_grad():
        other.layernorm.bias[0] += 1
    with pytest.warns(UserWarning, match="other weights"):
        tokenstep.accelerate(other, PROCESSOR, accelerator=tmp_path)
    with pytest.raises(TokenstepError, match=r"is for a Dinov2Model of .* weights"):
        tokenstep.accelerate(dinov2(num_hidden_layers=2), PROCESSOR, accelerator=tmp_path)
    with pytest.raises(TokenstepError, match="its own policy and reducers"):
        tokenstep.accelerate(other, PROCESSOR, reducers=["mpm"], accelerator=tmp_path)


def test_max_loss_takes_the_cheapest_point_that_holds_it(tmp_path: Path) -> None:
    model = dinov2()
    tokenstep.accelerate(model, PROCESSOR, policy=Entropy((3.0,), (2,))).save_pretrained(tmp_path)
    measured = {"miou": 0.5, "tokens": 10.0, "halted_share": 0.0, "split": "val", "images": 3}
    points = tuple(
        OperatingPoint(Thresholds(merge=(merge,)), loss=loss, gmac=gmac, **measured)
        for merge, loss, gmac in ((0.2, 2.0, 1.0), (0.5, 0.6, 2.0), (0.9, 0.1, 3.0))
    )
    dataclasses.replace(read_accelerator(tmp_path), points=points).save(tmp_path)

    def merge(max_loss: float) -> float:
        cheap = tokenstep.accelerate(model, PROCESSOR, accelerator=tmp_path, max_loss=max_loss)
        (threshold,) = cheap.run.spending.merge
        return float(threshold)

    assert [merge(loss) for loss in (3, 2, 1, 0.5)] == pytest.approx([0.2, 0.2, 0.5, 0.9])
    for loss in (0, 0.05):
        dense = tokenstep.accelerate(model, PROCESSOR, accelerator=tmp_path, max_loss=loss)
        assert dense.run.policy is None and not dense.run.reducers
    again = tmp_path / "again"
    tokenstep.accelerate(model, PROCESSOR, accelerator=tmp_path).save_pretrained(again)
    assert read_accelerator(again).points == points, "what was measured stays with it"
    with pytest.raises(TokenstepError, match="max_loss"):
        tokenstep.accelerate(model, PROCESSOR, max_loss=0.5)


def test_what_cannot_be_stored_or_read_is_refused(tmp_path: Path) -> None:
    class Mine(MPM):
        pass

    with pytest.raises(TokenstepError, match="Mine"):
        tokenstep.accelerate(dinov2(), reducers=[Mine()]).save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    with pytest.raises(TokenstepError, match="holds no accelerator"):
        tokenstep.accelerate(dinov2(), accelerator=tmp_path)
    (tmp_path / "accelerator.json").write_text('{"base": {"kind": "ViT"}}')
    with pytest.raises(TokenstepError, match=r"accelerator\.json"):
        read_accelerator(tmp_path)


def test_a_model_of_transformers_is_loaded_with_an_accelerator_and_ours_without(
    tmp_path: Path,
) -> None:
    dinov2().save_pretrained(tmp_path / "theirs")
    ours = save_model(tmp_path / "ours")
    with pytest.raises(TokenstepError, match="is one of transformers: give accelerator"):
        tokenstep.load(tmp_path / "theirs")
    with pytest.raises(TokenstepError, match="is one of tokenstep"):
        tokenstep.load(ours, accelerator=tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": [3]},
        {"sizes": [2, 2**40]},
        {"thresholds": {"merge": [10**400, 0.5]}},
        {"thresholds": {"reducers": ["zebra"]}},
        {"thresholds": {"reducers": ["exits:thresholds=[0.5]"]}},
        {"wheels": 4},
    ],
)
def test_wrong_settings_name_the_file(changes: dict[str, Any], tmp_path: Path) -> None:
    tokenstep.accelerate(dinov2(), PROCESSOR, **REDUCED).save_pretrained(tmp_path)
    path = tmp_path / "accelerator.json"
    data = json.loads(path.read_text())
    for key, value in changes.items():
        data[key] = data[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(data))
    with pytest.raises(TokenstepError, match=r"accelerator\.json: "):
        read_accelerator(tmp_path)


def test_nothing_of_a_training_step_is_kept() -> None:
    cheap: Any = tokenstep.accelerate(dinov2(), PROCESSOR, **REDUCED)
    cheap(pictures()).last_hidden_state.sum().backward()
    tokens = cheap.run.encoded.tokens
    assert tokens.x.grad_fn is None and tokens.x.numel() == 0
    assert tokens.dropped is not None and tokens.dropped.x.grad_fn is None
    copy.deepcopy(cheap)


def test_a_card_of_somebodys_own_stays(tmp_path: Path) -> None:
    cheap: nn.Module = tokenstep.accelerate(dinov2(), reducers=["mpm"])
    (tmp_path / "README.md").write_text("mine")
    cheap.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert isinstance(read_accelerator(tmp_path), Accelerator)
