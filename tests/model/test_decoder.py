"""Decoders classify live tokens, each picture on its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import grid_tokens, halt, scramble

from tokenstep.hosts.timm_block import BlockSettings
from tokenstep.model.decoder import LinearDecoder, MaskDecoder


def mask_decoder(side: int = 1) -> MaskDecoder:
    torch.manual_seed(1)
    decoder = MaskDecoder(24, 3, side, heads=2, settings=BlockSettings(size_bias=True))
    scramble(decoder)
    return decoder.eval()


@pytest.mark.parametrize("side", [1, 2])
def test_decoders_classify_live_tokens(side: int) -> None:
    tokens = grid_tokens([(3, 2), (1, 4)], dim=24)
    tokens = halt(tokens, torch.rand(len(tokens.x)) < 0.4, torch.zeros(len(tokens.x), 1, 3), 1)
    for decoder in (LinearDecoder(24, 3, side), mask_decoder(side)):
        assert decoder(tokens).shape == (len(tokens.x), side**2, 3)


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=3))
def test_the_mask_decoder_does_not_see_the_batch(grids: list[tuple[int, int]]) -> None:
    decoder = mask_decoder(2)
    tokens = grid_tokens(grids, dim=24)
    with torch.no_grad():
        together = decoder(tokens)
        for index, grid in enumerate(grids):
            rows = slice(tokens.offsets[index], tokens.offsets[index + 1])
            alone = decoder(grid_tokens([grid], dim=24).with_features(tokens.x[rows]))
            assert torch.allclose(together[rows], alone, atol=1e-5)


def test_the_mask_decoder_lets_tokens_and_classes_meet() -> None:
    decoder = mask_decoder()
    tokens = grid_tokens([(2, 2)], dim=24)
    changed = tokens.x.clone()
    changed[3] += torch.randn(24)
    difference = decoder(tokens.with_features(changed)) - decoder(tokens)
    assert (difference.abs().amax((1, 2)) > 1e-4).all()


def test_the_mask_decoder_runs_without_live_tokens() -> None:
    tokens = grid_tokens([(1, 2), (2, 2)], dim=24, prefix=0)
    empty = halt(tokens, torch.ones(6, dtype=torch.bool), torch.zeros(6, 1, 3), 1)
    assert mask_decoder()(empty).shape == (0, 1, 3)
    assert LinearDecoder(24, 3, 2)(empty).shape == (0, 4, 3)


def test_the_mask_decoder_runs_under_autocast() -> None:
    tokens = grid_tokens([(2, 2)], dim=24)
    decoder = mask_decoder()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = decoder(tokens)
    assert torch.allclose(half.float(), decoder(tokens), atol=0.2)


def test_every_part_of_the_mask_decoder_learns() -> None:
    decoder = mask_decoder()
    decoder(grid_tokens([(2, 2)], dim=24)).square().sum().backward()
    assert not [name for name, weight in decoder.named_parameters() if weight.grad is None]
