"""Picture and label stay one under augmentation; what a crop may and may not contain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as nnf

from tokenstep.data.augment import TrainTransform, to_float
from tokenstep.data.labelled_folder import IGNORE
from tokenstep.errors import TokenstepError

sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
factors = st.tuples(st.floats(0.1, 8), st.floats(0.1, 8)).map(lambda pair: (min(pair), max(pair)))
seeds = st.integers(0, 2**31)


def ramps(h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """A picture with a pixel's x in red and y in green; the same x and y as label maps."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    image = torch.stack([x, y, torch.zeros_like(x)]).to(torch.uint8)
    return image, x.to(torch.uint8), y.to(torch.uint8)


def draw(seed: int, transform: TrainTransform, image: Tensor, label: Tensor) -> list[Tensor]:
    torch.manual_seed(seed)
    return list(transform(image, label))


@settings(max_examples=60, deadline=None)
@given(size=sizes, crop=sizes, scale=factors, seed=seeds, rotate=st.booleans())
def test_contract_for_any_size(
    size: tuple[int, int],
    crop: tuple[int, int],
    scale: tuple[float, float],
    seed: int,
    rotate: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
    label = torch.randint(5, size, generator=generator, dtype=torch.uint8)
    before = image.clone(), label.clone()
    transform = TrainTransform(crop, scale=scale, rotate=rotate)
    picture, target = draw(seed, transform, image, label)
    assert picture.shape == (3, *crop) and picture.dtype == torch.float32
    assert target.shape == crop and target.dtype == torch.int64
    assert picture.is_contiguous() and target.is_contiguous()
    assert picture.min() >= 0 and picture.max() <= 1
    assert set(target.unique().tolist()) <= {*label.unique().tolist(), IGNORE}
    assert (target != IGNORE).any(), "a crop always shows some of the picture"
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])
    assert (picture[:, target == IGNORE] == 0.5).all()


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(40, 200), st.integers(40, 200)),
    crop=st.tuples(st.integers(20, 120), st.integers(20, 120)),
    seed=seeds,
    rotate=st.booleans(),
)
def test_every_pixel_keeps_its_place_in_both(
    size: tuple[int, int], crop: tuple[int, int], seed: int, rotate: bool
) -> None:
    image, x, y = ramps(*size)
    transform = TrainTransform(crop, scale=(0.5, 2.0), colour=0, rotate=rotate)
    picture, target_x = draw(seed, transform, image, x)
    _, target_y = draw(seed, transform, image, y)
    shown = target_x != IGNORE
    assert torch.equal(shown, target_y != IGNORE)
    # Nearest and bilinear differ by up to half a source step, 0.5 to 1 source pixel, and rounding.
    assert (picture[0] * 255 - target_x)[shown].abs().max() <= 1.5
    assert (picture[1] * 255 - target_y)[shown].abs().max() <= 1.5


@pytest.mark.parametrize("seed", range(8))
def test_picture_drawn_from_its_label_still_agrees(seed: int) -> None:
    torch.manual_seed(seed)
    blocks = torch.randint(4, (6, 7), dtype=torch.uint8)
    label = blocks.repeat_interleave(24, 0).repeat_interleave(24, 1)
    image = torch.stack([label * 60, 255 - label * 60, label * 20])
    picture, target = TrainTransform((96, 80), colour=0, rotate=True)(image, label)
    # Away from edges: the label is the same within four pixels. Padding counts as a value.
    soft = target[None, None].float()
    inside = nnf.max_pool2d(soft, 9, 1, 4) == -nnf.max_pool2d(-soft, 9, 1, 4)
    inside = inside[0, 0] & (target != IGNORE)
    assert inside.any()
    colours = torch.stack([target * 60, 255 - target * 60, target * 20])
    assert torch.allclose(picture[:, inside] * 255, colours[:, inside].float(), atol=1.5)


def test_without_scaling_a_crop_is_a_window_of_the_picture() -> None:
    image, x, _ = ramps(60, 70)
    transform = TrainTransform((20, 30), scale=(1, 1), flip=False, colour=0)
    corners = set()
    for seed in range(30):
        picture, target = draw(seed, transform, image, x)
        left, top = int(picture[0, 0, 0] * 255 + 0.5), int(picture[1, 0, 0] * 255 + 0.5)
        assert torch.equal(picture, to_float(image[:, top : top + 20, left : left + 30]))
        assert torch.equal(target, x[top : top + 20, left : left + 30].long())
        corners.add((top, left))
    assert len(corners) > 20, "windows lie anywhere"


def test_every_window_can_come_up() -> None:
    image, x, _ = ramps(21, 31)
    transform = TrainTransform((20, 30), scale=(1, 1), flip=False, colour=0)
    corners = {
        tuple((draw(seed, transform, image, x)[0][:2, 0, 0] * 255).round().tolist())
        for seed in range(40)
    }
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_label_is_taken_at_the_pixels_centre() -> None:
    image, x, _ = ramps(90, 90)
    transform = TrainTransform((20, 20), scale=(1 / 3, 1 / 3), flip=False, colour=0)
    picture, target = draw(0, transform, image, x)
    inner = (picture[0] * 255 - target)[:, 1:-1]  # at the crop's border the ramp's mean is off
    assert inner.abs().max() < 0.1


@pytest.mark.parametrize("axis", [-2, -1])
def test_thinnest_crop_is_a_ramp_between_its_pixels(axis: int) -> None:
    image = torch.tensor([[10, 250], [10, 250]], dtype=torch.uint8).repeat(3, 1, 1)
    image = image.mT if axis == -2 else image
    crop = (9, 1) if axis == -2 else (1, 9)
    transform = TrainTransform(crop, scale=(4, 4), flip=False, colour=0)
    for seed in range(5):
        ramp = draw(seed, transform, image, image[0] // 250)[0].flatten(1) * 255
        assert torch.equal(ramp, ramp.sort().values) and torch.equal(ramp[0], ramp[2])
        assert ramp[0, 0] == pytest.approx(10, abs=1) and ramp[0, -1] == pytest.approx(250, abs=1)


def test_padding_is_ignored_and_the_whole_picture_stays() -> None:
    image, x, _ = ramps(11, 13)
    transform = TrainTransform((40, 50), scale=(1, 1), flip=False, colour=0)
    places = set()
    for seed in range(20):
        picture, target = draw(seed, transform, image, x)
        shown = target != IGNORE
        assert int(shown.sum()) == 11 * 13
        assert torch.equal(picture[:, shown], to_float(image).flatten(1))
        assert torch.equal(target[shown], x.flatten().long())
        assert (picture[:, ~shown] == 0.5).all()
        places.add(tuple(shown.nonzero()[0].tolist()))
    assert len(places) > 10, "the picture lies anywhere on the crop"


def test_ignored_pixels_stay_ignored() -> None:
    image, label = torch.zeros(3, 50, 50, dtype=torch.uint8), torch.full((50, 50), IGNORE)
    target = TrainTransform((30, 30))(image, label.to(torch.uint8))[1]
    assert (target == IGNORE).all()


def orientations(transform: TrainTransform) -> set[tuple[bool, ...]]:
    """How the axes of the crop run in the picture: is x across, does it grow, does y grow."""
    image, x, _ = ramps(30, 30)
    seen = set()
    for seed in range(80):
        red, green, _ = draw(seed, transform, image, x)[0]
        across = bool(red[0, 0] != red[0, -1])
        along, down = (red, green) if across else (green, red)
        seen.add((across, bool(along[0, -1] > along[0, 0]), bool(down[-1, 0] > down[0, 0])))
    return seen


@pytest.mark.parametrize(
    ("flip", "rotate", "count"),
    [(False, False, 1), (True, False, 2), (False, True, 4), (True, True, 8)],
)
def test_flips_and_turns_reach_every_orientation(flip: bool, rotate: bool, count: int) -> None:
    transform = TrainTransform((20, 20), scale=(1, 1), flip=flip, colour=0, rotate=rotate)
    seen = orientations(transform)
    assert len(seen) == count and (True, True, True) in seen


def test_scale_spreads_over_its_range() -> None:
    image, x, _ = ramps(200, 200)
    transform = TrainTransform((40, 40), scale=(0.5, 2.0), flip=False, colour=0)
    spans = []
    for seed in range(60):
        target = draw(seed, transform, image, x)[1]
        spans.append(int(target.max() - target.min()) + 1)
    assert 19 <= min(spans) < 26 and 62 < max(spans) <= 81
    assert 30 < sorted(spans)[30] < 54, "as often smaller as larger"


def test_seed_decides_everything() -> None:
    image, x, _ = ramps(80, 90)
    transform = TrainTransform((32, 48), rotate=True)
    first, again, other = (draw(seed, transform, image, x) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_state_of_the_generator_resumes() -> None:
    image, x, _ = ramps(80, 90)
    transform = TrainTransform((32, 48))
    torch.manual_seed(5)
    transform(image, x)
    state = torch.get_rng_state()
    expected = transform(image, x)
    torch.set_rng_state(state)
    resumed = transform(image, x)
    assert torch.equal(expected[0], resumed[0]) and torch.equal(expected[1], resumed[1])


def test_colour_changes_the_picture_alone() -> None:
    image = torch.randint(256, (3, 60, 60), dtype=torch.uint8)
    label = torch.randint(5, (60, 60), dtype=torch.uint8)
    plain = draw(3, TrainTransform((32, 32), colour=0), image, label)
    jittered = draw(3, TrainTransform((32, 32), colour=0.4), image, label)
    assert torch.equal(plain[1], jittered[1])
    assert not torch.allclose(plain[0], jittered[0], atol=0.01)


def test_to_float_spans_zero_to_one() -> None:
    image = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    scaled = to_float(image)
    assert scaled.dtype == torch.float32
    assert torch.allclose(scaled * 255, image.float(), atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": (0, 8)},
        {"scale": (0.0, 1.0)},
        {"scale": (2.0, 0.5)},
        {"colour": -0.1},
        {"colour": 2.1},
        {"scale": (float("nan"), 1.0)},
    ],
)
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(TokenstepError, match=next(iter(wrong))) as caught:
        TrainTransform(**{"crop": (8, 8), **wrong})
    assert "\n" not in str(caught.value)
