"""The entropy policy against a naive histogram, and what its thresholds mean."""

import math

import pytest
import torch
from conftest import TinyModel
from torch import Tensor

from tokenstep.config import Thresholds
from tokenstep.model.build import step_parts
from tokenstep.model.segmenter import Segmenter
from tokenstep.policies.entropy import EntropyPolicy, threshold_of

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def normalised(pictures: Tensor) -> Tensor:
    return (pictures - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def naive_bits(picture: Tensor) -> float:
    """Of a picture ``(3, h, w)`` of whole levels, 0 to 255."""
    red, green, blue = picture.double()
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    bins = (2 * grey).round().flatten().tolist()
    shares = [bins.count(one) / len(bins) for one in set(bins)]
    return -sum(share * math.log2(share) for share in shares)


def test_bits_are_those_of_the_grey_values() -> None:
    levels = torch.randint(0, 256, (2, 3, 32, 48)) // torch.tensor([1, 40]).view(2, 1, 1, 1)
    grey = (levels * torch.tensor([598, 1174, 228]).view(3, 1, 1)).sum(1, keepdim=True)
    levels = levels * (grey % 1000 != 500)  # no pixel between two bins, where rounding decides
    policy = EntropyPolicy(4, (2, 4), mean=MEAN, std=STD)
    found = policy.bits(policy.features(normalised(levels / 255)))
    for size, bits in zip((2, 4), found, strict=True):
        side = size * 4
        for picture, row, column in ((0, 0, 0), (0, 1, 2), (1, 1, 1)):
            own = levels[picture, :, row * side :, column * side :][:, :side, :side]
            assert float(bits[picture, row, column]) == pytest.approx(naive_bits(own), abs=1e-3)


@pytest.mark.parametrize("shade", [0.0, 77 / 255, 1.0])
def test_one_colour_has_no_entropy_at_any_size(shade: float) -> None:
    """Also where the picture ends within a patch."""
    policy = EntropyPolicy(8, (2, 4), mean=MEAN, std=STD)
    seen = policy.features(normalised(torch.full((1, 3, 61, 77), shade)))
    assert [tuple(bits.shape[1:]) for bits in policy.bits(seen)] == [(4, 5), (2, 2)]
    assert all(not bits.any() for bits in policy.bits(seen))
    assert all((score.sigmoid() > 0.999).all() for score in policy.score(seen))


def test_a_threshold_merges_what_has_fewer_bits() -> None:
    policy = EntropyPolicy(8, (2,))
    # Squares of 16 px with 1, 2, 4 and 8 grey values, evenly: 0, 1, 2 and 3 bits.
    levels = torch.arange(16 * 16).view(16, 16)
    squares = [30 * (levels % count) / 255 for count in (1, 2, 4, 8)]
    picture = torch.cat(squares, dim=1).expand(1, 3, 16, 64)
    (score,) = policy.score(policy.features(picture * 2 - 1))
    for bits, merged in ((0.5, 1), (1.5, 2), (2.5, 3), (3.5, 4)):
        assert (score.sigmoid() > threshold_of(bits)).flatten().tolist() == [
            index < merged for index in range(4)
        ]


def test_a_segmenter_takes_it_in_the_place_of_the_learned_policy(tiny_model: TinyModel) -> None:
    config = tiny_model().config
    sizes, mean, std = config.policy.sizes, config.mean, config.std
    model = Segmenter(
        config, step_parts(config, policy=EntropyPolicy(8, sizes, mean=mean, std=std))
    ).eval()
    picture = torch.rand(3, 64, 64)
    picture[:, :, :32] = 0.5  # plain on the left, noise on the right
    merging = Thresholds(merge=(threshold_of(4.0),) * len(sizes))
    (result,) = model.segment_batch([picture], thresholds=merging)
    side = 2**result.tokens.level
    assert (side[:, :4] == max(sizes)).all()
    assert (side[:, 4:] == 1).all()
    (dense,) = model.segment_batch([picture])
    assert dense.cost.policy == 0 < result.cost.policy
