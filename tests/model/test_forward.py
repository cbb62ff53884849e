"""The forward: any pictures, batches and thresholds; what it is handed, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from conftest import TinyModel
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_partition, scramble

from tokenstep.config import DENSE, PolicyConfig, Thresholds
from tokenstep.errors import TokenstepError
from tokenstep.model.config import ModelConfig
from tokenstep.model.label_map import label_maps
from tokenstep.model.segmenter import Segmenter
from tokenstep.policies.batch import features_on_grids, policy_features
from tokenstep.reducers.exit_heads import DeepSupervision

STEP = Thresholds(merge=(0.5, 0.5), exits=(0.5, 0.5), spare=1)
ALL = Thresholds(merge=(0.0, 0.0))  # every superpatch that fits
SIZES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=3)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "policy_features"])
def model(tiny_model: TinyModel, request: pytest.FixtureRequest) -> Segmenter:
    model = tiny_model(cells=2, policy_features=request.param)
    scramble(model)
    return model


@settings(max_examples=10)
@given(SIZES)
def test_label_maps_have_the_pictures_sizes_and_do_not_depend_on_the_batch(
    model: Segmenter, sizes: list[tuple[int, int]]
) -> None:
    pictures = [torch.rand(3, *size) for size in sizes]
    with torch.no_grad():
        together = label_maps(model(pictures, thresholds=STEP))
        for picture, labels in zip(pictures, together, strict=True):
            assert labels.shape == picture.shape[1:]
            assert labels.dtype == torch.uint8
            assert labels.max() < 3
            (alone,) = label_maps(model([picture], thresholds=STEP))
            # a pixel may flip where two classes are equal to rounding
            assert (labels != alone).float().mean() < 0.005


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 9), (2000, 5)])
@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_pictures_of_any_size(
    tiny_model: TinyModel, size: tuple[int, int], stem: str, decoder: str
) -> None:
    model = tiny_model(stem=stem, decoder=decoder)
    with torch.no_grad():
        for used in (DENSE, STEP):
            (labels,) = label_maps(model([torch.rand(3, *size)], thresholds=used))
            assert labels.shape == size


def test_a_tensor_and_a_list_are_the_same(model: Segmenter) -> None:
    images = torch.rand(2, 3, 24, 40)
    with torch.no_grad():
        one, other = model(images, thresholds=STEP), model(list(images), thresholds=STEP)
    assert torch.equal(one.logits, other.logits)


def test_bytes_and_floats_are_the_same_and_stay_as_they_are(model: Segmenter) -> None:
    pixels = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    floats = pixels / 255
    given = floats.clone()
    with torch.inference_mode():
        ours, theirs = model([pixels]), model([floats])
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    assert torch.equal(floats, given) and pixels.dtype == torch.uint8


def test_its_own_settings_are_the_default(
    tiny_config: Callable[..., ModelConfig], tiny_model: TinyModel
) -> None:
    model = tiny_model()
    images = torch.rand(1, 3, 24, 40)
    with torch.no_grad():
        assert torch.equal(model(images).logits, model(images, thresholds=DENSE).logits)


def test_a_given_partition_replaces_the_policy(model: Segmenter) -> None:
    level = random_partition([(4, 5)])
    with torch.no_grad():
        out = model(torch.rand(1, 3, 32, 40), thresholds=STEP, partition=level)
    assert torch.equal(out.partition, level)


def test_a_partition_of_another_grid_is_refused(model: Segmenter) -> None:
    with pytest.raises(ValueError, match="partition"):
        model(torch.rand(1, 3, 32, 40), partition=random_partition([(5, 4)]))


def test_reducers_see_the_tokens_before_the_exits_halt_them(model: Segmenter) -> None:
    watch = DeepSupervision(model.exits)
    with torch.no_grad():
        out = model(torch.rand(1, 3, 32, 40), thresholds=STEP, reducers=[watch])
    assert [len(tokens.x) for tokens, _ in watch.seen] == [out.live[0][0], out.live[1][0]]
    assert out.live[2][0] < out.live[0][0]


def test_the_policy_stays_in_eval_mode(tiny_model: TinyModel) -> None:
    model = tiny_model()
    model.train()
    assert model.training
    assert model.encoder.training
    assert not any(part.training for part in model.policy.modules())
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model(torch.rand(2, 3, 40, 40), thresholds=STEP)
    assert all(torch.equal(before[key], value) for key, value in model.policy.state_dict().items())


def test_the_back_end_is_chosen_for_the_decoder_too(tiny_model: TinyModel) -> None:
    model = tiny_model(decoder="mask", size_bias=True)
    pictures = [torch.rand(3, 40, 48), torch.rand(3, 16, 24)]
    expected = model(pictures, thresholds=STEP).logits
    model.use(backend="padded", checkpointing=True)
    assert model.encoder.settings == model.decoder.settings
    assert model.encoder.settings.backend == "padded" and model.encoder.settings.size_bias
    assert torch.allclose(model(pictures, thresholds=STEP).logits, expected, atol=1e-4)


@pytest.mark.parametrize("part", ["encoder", "exits", "decoder", "tokenise"])
def test_nan_weights_are_an_error_and_no_label_map(tiny_model: TinyModel, part: str) -> None:
    model = tiny_model()
    next(iter(getattr(model, part).parameters())).data.fill_(float("nan"))
    # thresholds of 0: every token halts, so that the exits' logits are what counts
    used = Thresholds(exits=(0.0, 0.0), spare=0) if part == "exits" else DENSE
    with torch.no_grad(), pytest.raises(TokenstepError, match="NaN") as caught:
        label_maps(model(torch.rand(1, 3, 24, 24), thresholds=used))
    assert "\n" not in str(caught.value)


def test_a_nan_policy_is_an_error_and_no_dense_run(tiny_model: TinyModel) -> None:
    model = tiny_model()
    model.policy.heads[0].weight.data.fill_(float("nan"))
    with torch.no_grad(), pytest.raises(TokenstepError, match="policy"):
        model(torch.rand(1, 3, 40, 40), thresholds=STEP)


@pytest.mark.parametrize("exits", [(0,), (3,), (2, 1), (1, 1), (-1,)])
def test_exits_must_lie_between_the_blocks(
    tiny_config: Callable[..., ModelConfig], exits: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="exits"):
        Segmenter.build(tiny_config(exits=exits))


def test_thresholds_must_fit_the_model(model: Segmenter) -> None:
    image = torch.rand(1, 3, 24, 24)
    with pytest.raises(ValueError, match="sizes"):
        model(image, thresholds=Thresholds(merge=(0.5,)))
    with pytest.raises(ValueError, match="exit"):
        model(image, thresholds=Thresholds(exits=(0.5,)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_half_precision_weights_run(
    tiny_model: TinyModel, dtype: torch.dtype, stem: str, decoder: str
) -> None:
    model = tiny_model(stem=stem, decoder=decoder, sub_patches=True, size_bias=True).to(dtype)
    with torch.no_grad():
        out = model([torch.rand(3, 40, 40), torch.rand(3, 9, 50)], thresholds=STEP)
        assert out.logits.dtype == dtype
        assert len(label_maps(out)) == 2


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_autocast_runs_forward_and_backward(tiny_model: TinyModel, stem: str, decoder: str) -> None:
    model = tiny_model(stem=stem, decoder=decoder, sub_patches=True, size_bias=True).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.rand(2, 3, 40, 40), thresholds=STEP)
    out.logits.float().square().sum().backward()
    assert model.tokenise.pos_embed.grad.isfinite().all()


def test_back_ends_agree_in_the_whole_model(model: Segmenter) -> None:
    pictures = [torch.rand(3, 40, 40), torch.rand(3, 9, 50)]
    outs = []
    for backend in ("loop", "padded"):
        model.use(backend=backend)
        with torch.no_grad():
            outs.append(model(pictures, thresholds=STEP).logits)
    model.use()
    assert torch.allclose(*outs, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_cuda_agrees_with_the_cpu(tiny_model: TinyModel, dtype: torch.dtype, decoder: str) -> None:
    model = tiny_model(decoder=decoder, size_bias=True, sub_patches=True, stem="conv")
    scramble(model)
    pictures = [torch.rand(3, 140, 90), torch.rand(3, 30, 200)]
    with torch.no_grad():
        level = model.partition(pictures, STEP)
        expected = model(pictures, thresholds=DENSE, partition=level)
        cuda = model.to("cuda", dtype)
        got = cuda(
            [picture.cuda() for picture in pictures], thresholds=DENSE, partition=level.cuda()
        )
        scale = float(expected.logits.abs().max())
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        error = (got.logits.float().cpu() - expected.logits).abs().mean()
        assert error < tolerance * scale
        for used in (DENSE, STEP):
            maps = label_maps(cuda([p.cuda() for p in pictures], thresholds=used))
            assert [one.shape for one in maps] == [(140, 90), (30, 200)]


@pytest.mark.gpu
def test_training_on_cuda_reaches_every_live_weight(tiny_model: TinyModel) -> None:
    model = tiny_model(policy=PolicyConfig("test_efficientnet", stages=(1, 2), sizes=(2, 4)))
    model = model.cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        out = model(torch.rand(2, 3, 64, 80, device="cuda"), thresholds=STEP)
    out.logits.float().square().sum().backward()
    for part in (model.tokenise, model.encoder, model.decoder):
        assert not [name for name, weight in part.named_parameters() if weight.grad is None]


def test_a_picture_has_its_own_policy_features_in_any_batch(tiny_model: TinyModel) -> None:
    model = tiny_model(policy_features=True)
    sizes = [(40, 56), (56, 40), (37, 56), (40, 56), (33, 50), (56, 40)]  # two of one size, twice
    pictures = [torch.rand(3, *size) for size in sizes]
    with torch.no_grad():
        together = model(pictures, thresholds=STEP).tokens
        for index, picture in enumerate(pictures):
            alone = model([picture], thresholds=STEP).tokens
            assert alone.offsets[1] == together.offsets.diff()[index]
            rows = slice(together.offsets[index], together.offsets[index + 1])
            assert torch.allclose(together.x[rows], alone.x, atol=1e-5)


def test_policy_features_reach_every_token_and_leave_the_policy_alone(
    tiny_model: TinyModel,
) -> None:
    model = tiny_model(policy_features=True)
    pictures = [torch.rand(3, 32, 48), torch.rand(3, 17, 40)]
    normal = model.normalise(pictures)
    partition = model.partition(pictures, STEP)
    context = features_on_grids(model.policy, policy_features(model.policy, normal))
    channels = model.policy.channels
    assert [one.shape for one in context] == [(1, channels, 4, 6), (1, channels, 3, 5)]
    tokens = model.tokenise(normal, partition, context)
    noise = [torch.randn_like(features) for features in context]
    other = model.tokenise(normal, partition, noise)
    changed = (tokens.x != other.x).any(dim=1)
    assert torch.equal(changed, ~tokens.is_prefix)

    model(pictures, thresholds=DENSE).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.tokenise.context.parameters())
    assert all(weight.grad is None for weight in model.policy.parameters())
    with pytest.raises(ValueError, match="context"):
        model.tokenise(normal, partition)
    with pytest.raises(ValueError, match="context"):
        tiny_model().tokenise(normal, partition, context)


def test_unmerged_pictures_keep_all_of_their_patches(model: Segmenter) -> None:
    pictures = [torch.rand(3, 40, 56), torch.rand(3, 24, 40), torch.rand(3, 40, 56)]
    with torch.no_grad():
        merged = model(pictures, thresholds=ALL)
        some = model(pictures, thresholds=ALL, unmerged=torch.tensor([False, False, True]))
    assert merged.live[0][2] < some.live[0][2] == 5 * 7 + merged.trace.prefix[0]
    assert merged.live[0][:2] == some.live[0][:2]
    assert torch.equal(merged.partition[:2], some.partition[:2])


def test_the_partition_alone_is_that_of_the_forward(model: Segmenter) -> None:
    pictures = [torch.rand(3, 40, 56), torch.rand(3, 17, 90)]
    with torch.no_grad():
        for used in (STEP, DENSE):
            expected = model(pictures, thresholds=used).partition
            assert torch.equal(model.partition(pictures, used), expected)
