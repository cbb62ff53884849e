"""Segmentation models of transformers as commands take them: by their own processors."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import call, refused
from PIL import Image
from samples import labelled_folder, pattern, save_pattern
from support import scramble
from torch.utils.flop_counter import FlopCounterMode

from tokenstep.accelerated.cost import macs_of
from tokenstep.accelerated.crops import beside
from tokenstep.accelerated.load import load_foreign
from tokenstep.accelerated.segmenter import AcceleratedSegmenter
from tokenstep.config import DENSE, Budget, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.policies.entropy import Entropy
from tokenstep.reducers.tome import ToMe

transformers = pytest.importorskip("transformers", reason="pip install '.[hf]'")

NAMES = {0: "road", 1: "tree", 2: "sky"}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
MERGING = Thresholds(merge=(0.2, 0.3))


def eomt() -> tuple[Any, Any]:
    """Takes squares of 64 px, which its processor cuts out of a picture."""
    size = {"image_size": 64, "patch_size": 8, "hidden_size": 48, "num_attention_heads": 3}
    queries = {"num_queries": 7, "num_blocks": 2, "num_register_tokens": 2}
    config = transformers.EomtConfig(
        **size, **queries, num_hidden_layers=4, mlp_ratio=2, id2label=NAMES
    )
    model = transformers.EomtForUniversalSegmentation(config)
    model.attn_mask_probs.zero_()
    processor = transformers.EomtImageProcessor(
        size={"shortest_edge": 64, "longest_edge": None}, do_split_image=True, **HALF
    )
    return model, processor


def uper_net() -> tuple[Any, Any]:
    """Its processor scales all pictures to 64x96."""
    backbone = transformers.Dinov2Config(
        **{"image_size": 64, "patch_size": 8, "hidden_size": 48, "num_attention_heads": 3},
        **{"num_hidden_layers": 3, "mlp_ratio": 2, "out_features": ["stage1", "stage3"]},
    )
    model = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=backbone,
            hidden_size=16,
            auxiliary_in_channels=48,
            use_auxiliary_head=False,
            id2label=NAMES,
        )
    )
    return model, transformers.SegformerImageProcessor(size={"height": 64, "width": 96}, **HALF)


@pytest.fixture(scope="module", params=[eomt, uper_net])
def parts(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    torch.manual_seed(3)
    model, processor = request.param()
    scramble(model)
    return model.eval(), processor


def photos() -> list[np.ndarray]:
    """Two of one size, and one of another; the left half of each is of one colour."""
    made = [pattern(40, 60), pattern(40, 60)[::-1].copy(), pattern(50, 50)]
    for one in made:
        one[:, : one.shape[1] // 2] = 90
    return made


def test_dense_label_maps_are_those_that_its_user_gets(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    results = AcceleratedSegmenter(model, processor).segment_batch(photos())
    for photo, result in zip(photos(), results, strict=True):
        given = processor(images=Image.fromarray(photo), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**given)
        (expected,) = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[photo.shape[:2]]
        )
        assert np.array_equal(result.labels, expected.numpy())
        assert result.cost == result.dense_cost and result.tokens.end == result.tokens.grid


def test_a_batch_gives_what_its_pictures_give_alone(parts: tuple[Any, Any]) -> None:
    model = AcceleratedSegmenter(*parts)
    together = model.segment_batch(photos(), thresholds=MERGING)
    for photo, result in zip(photos(), together, strict=True):
        (alone,) = model.segment_batch([photo], thresholds=MERGING)
        assert np.array_equal(alone.labels, result.labels)
        assert np.array_equal(alone.tokens.owner, result.tokens.owner)
        assert alone.cost.total == pytest.approx(result.cost.total)


def test_each_token_is_counted_once_and_costs_what_it_saw(parts: tuple[Any, Any]) -> None:
    model = AcceleratedSegmenter(*parts)
    spendings = [MERGING, Thresholds(reducers=("tome:share=0.2",))]
    spendings.append(Thresholds(merge=MERGING.merge, reducers=("evit:blocks=[2],fuse=false",)))
    for thresholds in spendings:
        for result in model.segment_batch(photos(), thresholds=thresholds):
            use = result.tokens
            assert use.level.size == use.grid >= use.start == use.live[0] >= use.live[-1] >= use.end
            if not thresholds.reducers:
                assert len(np.unique(use.owner)) == use.start == use.end
            assert result.seen is not None
            assert result.seen.shape[:2] == tuple(side * model.patch for side in use.level.shape)
            assert result.cost.total < result.dense_cost.total
            assert result.cost.decoder == result.dense_cost.decoder


def test_the_dense_cost_is_all_that_torch_counts(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    (result,) = AcceleratedSegmenter(model, processor).segment_batch(photos()[:1])
    given = processor(images=photos()[0], return_tensors="pt")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**given)
    assert result.dense_cost.total == pytest.approx(counter.get_total_flops() / 2e9, rel=1e-6)
    assert result.dense_cost.blocks < result.dense_cost.total


def test_budgets_serve_it_and_partitions_from_outside_do_not(parts: tuple[Any, Any]) -> None:
    model = AcceleratedSegmenter(*parts)
    results = model.segment_batch(photos(), budget=Budget(merge={2: 0.5}))
    for result in results:
        assert (result.tokens.level == 1).mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(TokenstepError, match="no partition"):
        model.segment_batch(photos(), partition=torch.zeros(3, 8, 8, dtype=torch.int8))
    with pytest.raises(TokenstepError, match="no threshold or one per superpatch size"):
        model.segment_batch(photos(), thresholds=Thresholds(merge=(0.5,)))
    with pytest.raises(TokenstepError, match="exit"):
        model.segment_batch(photos(), thresholds=Thresholds(exits=(0.5,)))


def test_reducers_that_look_on_see_every_block(parts: tuple[Any, Any]) -> None:
    seen: list[int] = []

    class Looking(ToMe):
        def __call__(self, tokens: Any, block: int, attended: Any) -> None:
            seen.append(block)

    model = AcceleratedSegmenter(*parts)
    (looked,) = model.segment_batch(photos()[:1], thresholds=DENSE, reducers=[Looking(share=0.1)])
    (plain,) = model.segment_batch(photos()[:1], thresholds=DENSE)
    assert seen == list(range(1, model.depth + 1))
    assert (looked.labels == plain.labels).mean() > 0.999


def test_crops_beside_each_other_keep_their_tokens_apart() -> None:
    torch.manual_seed(3)
    model, processor = eomt()
    (result,) = AcceleratedSegmenter(model, processor).segment_batch(
        [photos()[0]], thresholds=MERGING
    )
    owner = result.tokens.owner
    assert owner.shape == (8, 16), "a picture of 2:3 is cut in two"
    assert not set(owner[:, :8].ravel()) & set(owner[:, 8:].ravel())
    assert (owner.ravel()[np.unique(owner)] == np.unique(owner)).all(), "named by first cells"
    assert beside([result.tokens]) is result.tokens


def test_a_broken_model_is_refused() -> None:
    torch.manual_seed(3)
    model, processor = eomt()
    with torch.no_grad():
        model.layernorm.bias[0] = torch.nan
    for thresholds in (DENSE, MERGING):
        with pytest.raises(TokenstepError, match="NaN"):
            AcceleratedSegmenter(model, processor).segment_batch(photos(), thresholds=thresholds)


def test_what_is_no_segmenter_is_refused() -> None:
    backbone = uper_net()[0].backbone
    with pytest.raises(TokenstepError, match="no semantic segmenter"):
        AcceleratedSegmenter(backbone, uper_net()[1])
    with pytest.raises(TokenstepError, match="no semantic segmenter"):
        AcceleratedSegmenter(uper_net()[0], transformers.ViTImageProcessor())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model, processor = eomt()
    scramble(model)
    where = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return where


def test_commands_take_its_folder(folder: Path, tmp_path: Path) -> None:
    data = labelled_folder(tmp_path / "data", tuple(NAMES.values()), [(40, 56), (30, 50)])
    own = ["--model", folder, "--policy", "entropy:bits=[6,5]", "--threads", 1]
    call_of = ["evaluate", *own, "--reducer", "mpm:blocks=[1]", "--data", data]
    code, _, err = call(*call_of, "--json", tmp_path / "eval.json")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["settings"]["reducers"] == ["mpm:blocks=[1]"] and report["settings"]["merge"]
    assert report["reduced"]["gmac"]["total"] < report["dense"]["gmac"]["total"]
    picture = save_pattern(tmp_path / "p.png", 40, 60)
    code, _, err = call("segment", picture, *own, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "out" / "p.labels.png") as labels:
        assert labels.size == (60, 40)
    code, _, err = call("compare", *own, "--data", data, "--out", tmp_path / "compare")
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "compare" / "compare.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "STEP"]
    code, _, err = call("explain", picture, *own, "--out", tmp_path / "report")
    assert (code, err) == (0, "")
    timed = ["--size", "40x30", "--batch", 1, "--seconds", 0, "--force"]
    code, _, err = call("bench", picture, *own, *timed, "--json", tmp_path / "bench.json")
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"dense", "STEP"}


def test_an_accelerator_does_what_its_options_did(folder: Path, tmp_path: Path) -> None:
    import tokenstep

    model = transformers.EomtForUniversalSegmentation.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    policy, reducer = Entropy(bits=(6.0, 5.0)), "mpm:blocks=[1]"
    tokenstep.accelerate(model, processor, policy=policy, reducers=[reducer]).save_pretrained(
        tmp_path / "fast"
    )
    data = labelled_folder(tmp_path / "data", tuple(NAMES.values()), [(40, 56)])
    ways = {
        "options": ["--policy", "entropy:bits=[6,5]", "--reducer", reducer],
        "folder": ["--accelerator", tmp_path / "fast"],
    }
    found = {}
    for name, options in ways.items():
        target = tmp_path / f"{name}.json"
        code, _, err = call(
            "evaluate", "--model", folder, "--data", data, *options, "--json", target
        )
        assert (code, err) == (0, "")
        found[name] = json.loads(target.read_text())["reduced"]
        del found[name]["seconds"]
    assert found["options"] == found["folder"]


def test_calls_that_do_not_fit_it_are_refused(folder: Path, tmp_path: Path) -> None:
    data = labelled_folder(tmp_path / "data", tuple(NAMES.values()), [(40, 56)])
    picture = save_pattern(tmp_path / "p.png", 40, 60)
    own = ["--model", folder]
    assert "choose from entropy" in refused("segment", picture, *own, "--policy", "zebra")
    assert "bits" in refused("segment", picture, *own, "--policy", "entropy:bits=[1]")
    assert "holds no accelerator" in refused("segment", picture, *own, "--accelerator", data)
    both = ["--policy", "entropy", "--accelerator", data]
    assert "give one of both" in refused("segment", picture, *own, *both)
    assert "--data" in refused("explain", *own, "--data", data, "--out", tmp_path / "o")
    assert "--tile" in refused("segment", picture, *own, "--tile", 512)
    for options in (["--rival", "torch"], ["--backbone", "vit_tiny_patch16_224"]):
        assert options[0] in refused("bench", picture, *own, *options)
    oracle = ["--partition", "oracle", "--policy", "entropy"]
    assert "no partition" in refused("evaluate", *own, "--data", data, *oracle)
    assert "is one of transformers" in refused(
        "calibrate", *own, "--data", data, "--split", "test", "--out", tmp_path / "c"
    )


def test_pictures_that_hang_over_whole_patches_have_whole_maps(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, _ = uper_net()
    processor = transformers.SegformerImageProcessor(size={"height": 61, "width": 99}, **HALF)
    for thresholds in (DENSE, MERGING):
        (result,) = AcceleratedSegmenter(model, processor).segment_batch(
            [photos()[0]], thresholds=thresholds
        )
        assert result.tokens.level.shape == (7, 12) and result.tokens.grid == 84
        assert result.seen is not None and result.seen.shape == (56, 96, 3)


def test_a_picture_that_its_processor_does_not_take_is_one_line() -> None:
    torch.manual_seed(3)
    model, _ = uper_net()
    processor = transformers.SegformerImageProcessor(do_resize=False, **HALF)
    segmenter = AcceleratedSegmenter(model, processor)
    for thresholds in (DENSE, MERGING):
        with pytest.raises(TokenstepError, match=r"pictures? .*1"):
            segmenter.segment_batch([pattern(1, 1)], thresholds=thresholds)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
    ],
)
def test_the_policy_sees_pixels_as_they_were_however_they_are_normalised(
    changes: dict[str, Any],
) -> None:
    torch.manual_seed(3)
    model, _ = uper_net()
    given = {"size": {"height": 64, "width": 96}, **HALF, **changes}
    processor = transformers.SegformerImageProcessor(**given)
    (result,) = AcceleratedSegmenter(model, processor).segment_batch(
        [photos()[0]], thresholds=MERGING
    )
    plain = transformers.SegformerImageProcessor(size={"height": 64, "width": 96}, **HALF)
    (expected,) = AcceleratedSegmenter(model, plain).segment_batch(
        [photos()[0]], thresholds=MERGING
    )
    assert np.array_equal(result.tokens.level, expected.tokens.level)
    assert result.seen is not None and expected.seen is not None
    assert np.abs(result.seen.astype(int) - expected.seen).max() <= 1


def test_threads_may_share_a_model() -> None:
    torch.manual_seed(3)
    model = AcceleratedSegmenter(*uper_net())
    spendings = [DENSE, MERGING, Thresholds(reducers=("tome:share=0.2",))] * 3

    def cost(thresholds: Thresholds) -> float:
        (result,) = model.segment_batch(photos()[:1], thresholds=thresholds)
        return result.cost.total

    alone = [cost(thresholds) for thresholds in spendings]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(cost, spendings)) == alone


def test_a_16_bit_folder_is_costed_as_its_32_bit_original(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, processor = uper_net()
    full = macs_of(model, (64, 96))
    model.half().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert macs_of(load_foreign(str(tmp_path))[0], (64, 96)) == full


def copied(folder: Path, where: Path) -> Path:
    return Path(shutil.copytree(folder, where / "copy"))


def test_no_code_and_no_pickle_of_a_folder_is_run(folder: Path, tmp_path: Path) -> None:
    evil = copied(folder, tmp_path)
    touched = tmp_path / "touched"
    (evil / "evil.py").write_text(f"open({str(touched)!r}, 'w')\nclass Evil: pass\n")
    preprocessor = evil / "preprocessor_config.json"
    kept = preprocessor.read_text()
    named = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    preprocessor.write_text(json.dumps(named))
    with pytest.raises(TokenstepError, match="cannot be loaded"):
        load_foreign(str(evil))
    assert not touched.exists()
    preprocessor.write_text(kept)
    (evil / "model.safetensors").rename(evil / "weights.bin")
    index = {"metadata": {}, "weight_map": {"query.weight": "weights.bin"}}
    (evil / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TokenstepError, match=r"names weights\.bin, which is no safetensors"):
        load_foreign(str(evil))


def test_a_damaged_folder_is_one_line_that_names_it(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-100])
    assert str(broken) in refused("segment", broken, "--model", broken)
    held = safetensors.torch.load(weights)
    held.pop("query.weight")
    safetensors.torch.save_file(held, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TokenstepError, match=r"lack 1 of the model's.*query\.weight"):
        load_foreign(str(broken))


def test_classes_without_a_name_are_refused() -> None:
    model, processor = uper_net()
    model.config.id2label = {0: "road", 2: "sky"}
    with pytest.raises(TokenstepError, match="id2label"):
        AcceleratedSegmenter(model, processor)
