"""One picture's tokens: what the exits saw, and rows that add up to what the result says."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TinyModel
from samples import pattern
from support import scramble

from tokenstep.config import DENSE, Thresholds
from tokenstep.core.attention import Attended
from tokenstep.core.tokens import PackedTokens
from tokenstep.explain.picture import View, depths_of, explain_picture, over_pixels, view_of
from tokenstep.model.segmenter import Segmenter
from tokenstep.model.spending import pruning_of
from tokenstep.reducers.exit_heads import DeepSupervision

STEP = Thresholds(merge=(0.4, 0.4), exits=(0.36, 0.36), spare=1)


@pytest.fixture
def model(tiny_model: TinyModel) -> Segmenter:
    model = tiny_model(cells=2)
    scramble(model)
    model.config = replace(model.config, temperatures=(1.5, 0.7))
    return model


def picture(height: int = 70, width: int = 101) -> torch.Tensor:
    return torch.from_numpy(pattern(height, width)).permute(2, 0, 1)


def judged_by(model: Segmenter, thresholds: Thresholds) -> list[np.ndarray]:
    """The confidences that the exits judge by, prefix rows left out, sorted."""
    found = []
    (pruning,) = pruning_of(thresholds, model.exits, model.config.temperatures)

    class Watch(DeepSupervision):
        def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None = None) -> None:
            if block in model.exits.after:
                confidence, _ = pruning.judged(tokens.x, model.exits.after.index(block))
                found.append(np.sort(confidence[~tokens.is_prefix].numpy()))

    watch = Watch(model.exits)
    model.segment_batch([picture()], thresholds=thresholds, reducers=[watch])
    return found


def test_looking_on_changes_nothing(model: Segmenter) -> None:
    view, alone = (
        view_of(model, picture(), STEP),
        model.segment_batch([picture()], thresholds=STEP)[0],
    )
    assert np.array_equal(view.result.labels, alone.labels)
    assert np.array_equal(view.result.tokens.layer, alone.tokens.layer)
    assert view.result.cost == alone.cost
    assert sum(alone.tokens.halted.values()) > 0, "else this says little"


def test_confidences_are_those_that_tokens_halt_by(model: Segmenter) -> None:
    view = view_of(model, picture(), STEP)
    first = np.unique(view.result.tokens.owner)
    for seen, judged in zip(view.exits, judged_by(model, STEP), strict=True):
        of_tokens = seen.confidence.ravel()[first]
        of_tokens = of_tokens[~np.isnan(of_tokens)]
        np.testing.assert_allclose(np.sort(of_tokens), judged, atol=1e-6)


def test_an_exit_sees_what_had_not_halted(model: Segmenter) -> None:
    view = view_of(model, picture(), STEP)
    layer = view.result.tokens.layer
    for seen in view.exits:
        assert np.array_equal(np.isnan(seen.confidence), layer < seen.after)
        assert np.nanmax(seen.confidence) <= 1 + 1e-6
        assert (seen.confidence[layer == seen.after] > STEP.exits[0]).all()


def test_exits_that_are_off_look_on_all_the_same(model: Segmenter) -> None:
    view = view_of(model, picture(), DENSE)
    assert [seen.after for seen in view.exits] == list(model.exits.after)
    for seen in view.exits:
        assert seen.threshold is None and not np.isnan(seen.confidence).any()
    report = explain_picture(view)
    assert all(row["halted"] == 0 and row["above_the_bar"] is None for row in report["exits"])


@pytest.mark.parametrize("thresholds", [STEP, DENSE, STEP.without_exits(), STEP.without_merging()])
def test_the_rows_add_up(model: Segmenter, thresholds: Thresholds) -> None:
    view = view_of(model, picture(), thresholds)
    report, use = explain_picture(view), view.result.tokens
    json.dumps(report, allow_nan=False)
    assert sum(row["tokens"] for row in report["sizes"]) == use.start
    assert sum(row["cells_share"] for row in report["sizes"]) == pytest.approx(1)
    ended = [row["tokens"] for row in report["depths"]]
    assert ended == [*use.halted.values(), use.end]
    for share in ("cells_share", "tokens_share"):
        assert sum(row[share] for row in report["depths"]) == pytest.approx(1)
    assert [row["tokens"] for row in report["live"]] == list(use.live)
    assert report["live"][0]["dense_share"] == use.start / use.grid
    for row in report["exits"]:
        assert row["live_tokens"] == use.live[row["exit_after_block"] - 1]
        assert row["halted"] <= (row["above_the_bar"] or 0)


def test_live_tokens_fall_only_at_exits(model: Segmenter) -> None:
    use = view_of(model, picture(), STEP).result.tokens
    for block, (before, now) in enumerate(pairwise(use.live), start=1):
        assert now <= before and (now == before or block in use.halted)
    assert depths_of(use) == [1, 2, 3]


def test_a_model_merging_alone_has_none_to_show(tiny_model: TinyModel) -> None:
    view: View = view_of(tiny_model(exits=()), picture(), DENSE)
    report = explain_picture(view)
    assert view.exits == () and report["exits"] == []
    assert [row["tokens"] for row in report["depths"]] == [view.result.tokens.grid]


def test_cells_spread_over_their_pixels() -> None:
    spread = over_pixels(np.arange(6).reshape(2, 3), 8, (9, 20))
    assert spread.shape == (9, 20)
    assert spread[0, 0] == 0 and spread[7, 15] == 1 and spread[8, 16] == 5


DROPPING = "evit:keep=0.5,blocks=[2],fuse=false"


@pytest.mark.parametrize("text", ["tome:share=0.2", "random:share=0.3,blocks=[1,3]", DROPPING])
def test_other_reducers_are_explained_too(tiny_model: TinyModel, text: str) -> None:
    """Where each token ended is told once: it halted, was dropped, or ran through all blocks."""
    model = tiny_model(cells=2)
    scramble(model)
    thresholds = replace(STEP, reducers=(text,))
    view = view_of(model, torch.from_numpy(pattern(40, 56)).permute(2, 0, 1), thresholds)
    use, numbers = view.result.tokens, explain_picture(view)
    json.dumps(numbers, allow_nan=False)
    rows = {row["depth"]: row for row in numbers["depths"]}
    tokens = len(np.unique(use.owner))
    assert sum(row["tokens"] for row in rows.values()) == tokens
    assert sum(row["cells_share"] for row in rows.values()) == pytest.approx(1)
    for after, halted in use.halted.items():
        assert rows[f"halted after block {after}"]["tokens"] == halted
    assert rows["ran all 3 blocks"]["tokens"] == use.end
    dropped = [row["tokens"] for name, row in rows.items() if name.startswith("dropped")]
    assert bool(dropped) == use.dropped.any() == (not text.startswith("tome"))
    for exit_view in view.exits:
        gone = use.dropped & (use.layer < exit_view.after)
        assert np.isnan(exit_view.confidence[gone]).all()
        assert exit_view.logits.isfinite().all()
