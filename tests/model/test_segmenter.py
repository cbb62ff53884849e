"""Saving, loading, and pictures in, results out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModel
from PIL import Image
from safetensors.torch import load_file, save_file
from support import scramble

from tokenstep.config import DENSE, Thresholds
from tokenstep.data.pictures import read_picture, to_tensor
from tokenstep.data.scaling import scaled_down
from tokenstep.errors import TokenstepError
from tokenstep.hub import load
from tokenstep.model import segmenter as segmenter_module
from tokenstep.model.segmenter import Segmenter

STEP = Thresholds(merge=(0.5, 0.5), exits=(0.5, 0.5), spare=1)
STREET = Path(__file__).parents[2] / "examples" / "street.jpg"


@pytest.fixture
def model(tiny_model: TinyModel) -> Segmenter:
    model = tiny_model(cells=2, stem="conv", sub_patches=True)
    scramble(model)
    return model


@pytest.fixture
def saved(model: Segmenter, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    return folder


def logits(model: Segmenter) -> torch.Tensor:
    torch.manual_seed(8)
    with torch.no_grad():
        return model([torch.rand(3, 40, 33), torch.rand(3, 9, 70)], thresholds=STEP).logits


def test_saved_is_loaded(model: Segmenter, saved: Path) -> None:
    for loaded in (load(saved), load(str(saved)), Segmenter.from_pretrained(str(saved))):
        assert loaded.config == model.config
        assert not loaded.training
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("device", ["cpu", "auto", torch.device("cpu")])
def test_loaded_onto_a_device(saved: Path, device: str | torch.device) -> None:
    wanted = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu"
    assert {one.device.type for one in load(saved, device=device).parameters()} == {wanted}


@pytest.mark.parametrize("device", ["mps", "mps:0", "cuda:99", "gpu", torch.device("meta")])
def test_a_device_that_is_none_of_ours_is_named(saved: Path, device: str | torch.device) -> None:
    with pytest.raises(TokenstepError, match=f"device {device}: .*cpu") as caught:
        load(saved, device=device)
    assert "\n" not in str(caught.value)


def test_only_safetensors_and_json_are_written(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    state = load_file(saved / "model.safetensors")
    assert not {"mean", "std"} & set(state)


def test_what_is_saved_are_the_settings_of_now(model: Segmenter, tmp_path: Path) -> None:
    model.config = replace(model.config, thresholds=STEP)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.thresholds == STEP


def test_saving_again_writes_over(saved: Path) -> None:
    loaded = load(saved)
    loaded.decoder.linear.weight.data.zero_()
    loaded.save_pretrained(saved)
    assert not load(saved).decoder.linear.weight.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_into_fp32(
    model: Segmenter, tmp_path: Path, dtype: torch.dtype
) -> None:
    before = logits(model)
    model.to(dtype).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in state.values()} == {dtype, torch.int64}  # batch counts
    loaded = load(tmp_path)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    after = logits(loaded)
    if after.shape == before.shape:  # else a token near its threshold went another way
        assert torch.allclose(after, before, atol=0.1 * float(before.abs().max()))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def overwrite(path: Path) -> None:
    path.write_bytes(b"these are no weights")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_one(path: Path) -> None:
    state = load_file(path)
    state.pop("decoder.linear.weight")
    save_file(state, path)


def rename_one(path: Path) -> None:
    state = load_file(path)
    state["decoder.other.weight"] = state.pop("decoder.linear.weight")
    save_file(state, path)


@pytest.mark.parametrize("damage", [cut, overwrite, empty, Path.unlink, lose_one, rename_one])
def test_damaged_weights_are_one_line(saved: Path, damage) -> None:
    damage(saved / "model.safetensors")
    with pytest.raises(TokenstepError, match=r"model\.safetensors") as caught:
        load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", ["a", "b"]),
        ("classes", 3),
        ("colour", 1),
        ("vit", {"name": "no_such_vit"}),
        ("vit", {"name": "test_resnet"}),
        ("vit", {"name": "test_vit.foo"}),
        ("vit", {"name": "test_vit", "image_size": [4, 4]}),
        ("policy", {"trunk": "no_such_cnn"}),
        ("policy", {"trunk": "resnet18.foo"}),
        ("policy", {"trunk": "test_efficientnet", "width": -1}),
        ("settings", {"merge": [0.5]}),
    ],
)
def test_a_damaged_config_is_one_line(saved: Path, key: str, value: object) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(TokenstepError) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"'])
def test_a_config_that_is_no_json_is_one_line(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(TokenstepError) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_for_other_classes_is_one_line(saved: Path) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["classes"] = ["a", "b"]
    config["palette"] = [[0, 0, 0], [1, 1, 1]]
    path.write_text(json.dumps(config))
    with pytest.raises(TokenstepError, match="do not fit") as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenstepError, match=r"config\.json is missing"):
        load(tmp_path)
    with pytest.raises(TokenstepError, match=r"config\.json is missing"):
        Segmenter.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "/no/such/folder"])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(TokenstepError, match="not known") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_folder_of_pictures_does_not_hide_a_shipped_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenstep.hub.SHIPPED", saved.parent)
    here = tmp_path / "here"
    (here / saved.name).mkdir(parents=True)
    monkeypatch.chdir(here)
    shipped = load(saved.name)
    assert shipped.config.classes == load(saved).config.classes

    own = replace(shipped.config, classes=("x", "y", "z"))
    shipped.config = own
    shipped.save_pretrained(here / saved.name)
    assert load(saved.name).config.classes == own.classes, "a model in a folder goes first"


def test_segment_takes_paths_images_arrays_and_tensors(model: Segmenter, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    image.save(tmp_path / "picture.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [tmp_path / "picture.png", str(tmp_path / "picture.png"), image, array, tensor]
    kinds.append(tensor.float() / 255)
    results = [model.segment(kind, thresholds=STEP) for kind in kinds]
    for result in results:
        assert result.labels.shape == (30, 45)
        assert result.labels.dtype == np.uint8
        assert np.array_equal(result.labels, results[0].labels)


def test_segment_gives_a_list_for_a_list(model: Segmenter) -> None:
    pictures = [torch.rand(3, 40, 33), torch.rand(3, 9, 70)]
    together = model.segment(pictures, thresholds=STEP)
    assert isinstance(together, list)
    for picture, result in zip(pictures, together, strict=True):
        alone = model.segment(picture, thresholds=STEP)
        assert (alone.labels != result.labels).mean() < 0.005
        assert alone.tokens.start == result.tokens.start
        assert alone.tokens.halted == result.tokens.halted


def test_token_counts_add_up(model: Segmenter) -> None:
    picture = torch.rand(3, 60, 45)
    dense, reduced = (model.segment(picture, thresholds=used) for used in (DENSE, STEP))
    assert dense.tokens.grid == dense.tokens.start == dense.tokens.end == 8 * 6
    assert sum(dense.tokens.halted.values()) == 0
    assert reduced.tokens.start < reduced.tokens.grid
    assert reduced.tokens.start == reduced.tokens.end + sum(reduced.tokens.halted.values())
    sides = 4.0 ** -reduced.tokens.level.astype(float)
    assert sides.sum() == reduced.tokens.start
    assert set(np.unique(reduced.tokens.layer)) <= {1, 2, 3}
    assert reduced.cost.blocks < dense.cost.blocks
    assert dense.cost == dense.dense_cost == reduced.dense_cost


def test_each_cell_knows_its_token_whatever_the_batch(model: Segmenter) -> None:
    together = model.segment_batch([torch.rand(3, 40, 33), torch.rand(3, 80, 70)], thresholds=STEP)
    for result in together:
        use = result.tokens
        tokens, cells = np.unique(use.owner, return_counts=True)
        assert len(tokens) == use.start and cells.sum() == use.grid
        # A token is named by its first cell, and all of its cells share a size and a depth.
        flat = use.owner.ravel()
        assert np.array_equal(flat[flat], flat) and (flat <= np.arange(use.grid)).all()
        for per_cell in (use.level.ravel(), use.layer.ravel()):
            assert np.array_equal(per_cell[flat], per_cell)
        halted = {after: int((use.layer.ravel()[tokens] == after).sum()) for after in use.halted}
        assert halted == use.halted


def test_a_trained_model_gives_a_picture_the_same_result_in_any_batch() -> None:
    model = load("road")
    street = to_tensor(scaled_down(read_picture(STREET), 320))
    pictures = [street, street.flip(2), street[:, 40:, 30:250], street[:, :, ::2]]
    for picture, together in zip(pictures, model.segment_batch(pictures), strict=True):
        (alone,) = model.segment_batch([picture])
        assert np.array_equal(together.tokens.level, alone.tokens.level)
        # Products of other shapes may round differently: a pixel between two equal classes flips.
        assert (together.labels != alone.labels).mean() < 1e-4
        assert (together.tokens.layer != alone.tokens.layer).mean() < 1e-2


def test_live_tokens_fall_only_at_exits(model: Segmenter) -> None:
    use = model.segment_batch([torch.rand(3, 80, 70)], thresholds=STEP)[0].tokens
    assert len(use.live) == use.depth and use.live[0] == use.start
    after = [*use.live[1:], use.end]
    lost = {block: use.live[block - 1] - after[block - 1] for block in range(1, use.depth + 1)}
    assert lost == {block: use.halted.get(block, 0) for block in lost}


def test_no_pictures_give_no_results(model: Segmenter) -> None:
    assert model.segment([]) == []


def test_the_policys_time_is_the_policys_in_the_dense_model_too(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(policy_features=True)
    looked: list[str] = []
    stages: list[str] = []
    lap, look = segmenter_module._Clock.lap, model.policy.look
    monkeypatch.setattr(
        segmenter_module._Clock, "lap", lambda self, stage: (stages.append(stage), lap(self, stage))
    )
    monkeypatch.setattr(
        model.policy, "look", lambda images: (looked.append(",".join(stages)), look(images))[1]
    )
    for thresholds in (DENSE, Thresholds((0.5, 0.5))):
        stages.clear()
        results = model.segment([torch.rand(3, 24, 40)] * 2, thresholds=thresholds)
        assert looked.pop() == "prepare" and not looked
        assert results[0].milliseconds == results[1].milliseconds
        assert results[0].milliseconds is not results[1].milliseconds
