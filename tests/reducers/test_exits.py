import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import grid_tokens, scramble
from torch import Tensor

from tokenstep.core.tokens import PackedTokens
from tokenstep.reducers.budget_exits import BudgetPruning
from tokenstep.reducers.exit_heads import DeepSupervision, ExitHeads, confidence_of
from tokenstep.reducers.exits import EarlyPruning

CLASSES = 3
GRIDS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)


def exits(after: tuple[int, ...] = (2, 4), side: int = 1) -> ExitHeads:
    torch.manual_seed(1)
    heads = ExitHeads(after, 5, CLASSES, side)
    scramble(heads)
    return heads


def decide(
    tokens: PackedTokens, threshold: float, spare: int, *, side: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    heads = exits(side=side)
    halt = EarlyPruning(heads, (threshold, threshold), spare)(tokens, 2)
    assert halt is not None
    confidence, predicted = confidence_of(heads(tokens.x, 0))
    return halt.done, confidence, predicted


def naive_halt(
    tokens: PackedTokens, confidence: Tensor, predicted: Tensor, threshold: float, spare: int
) -> list[bool]:
    """Picture by picture and class by class: sort, spare the first, halt the others."""
    done = [False] * len(tokens.x)
    picture = tokens.picture().tolist()
    for number in range(len(tokens.offsets) - 1):
        for label in range(CLASSES):
            passed = [
                row
                for row in range(len(tokens.x))
                if picture[row] == number
                and tokens.anchor[row] >= 0
                and predicted[row] == label
                and confidence[row] > threshold
            ]
            passed.sort(key=lambda row: (-confidence[row].item(), row))
            for row in passed[spare:]:
                done[row] = True
    return done


@given(GRIDS, st.sampled_from([0.0, 0.4, 0.5, 0.7, 1.0]), st.integers(0, 6), st.integers(0, 2))
def test_the_surest_of_each_class_and_picture_are_spared(
    grids: list[tuple[int, int]], threshold: float, spare: int, prefix: int
) -> None:
    tokens = grid_tokens(grids, prefix=prefix)
    done, confidence, predicted = decide(tokens, threshold, spare)
    assert done.tolist() == naive_halt(tokens, confidence, predicted, threshold, spare)


@given(GRIDS, st.integers(0, 3))
def test_exactly_the_smaller_of_spare_and_passing_stay(
    grids: list[tuple[int, int]], spare: int
) -> None:
    tokens = grid_tokens(grids)
    done, confidence, predicted = decide(tokens, 0.5, spare)
    passed = (confidence > 0.5) & ~tokens.is_prefix
    assert not (done & ~passed).any()
    for number in range(len(grids)):
        for label in range(CLASSES):
            group = passed & (tokens.picture() == number) & (predicted == label)
            assert int((group & ~done).sum()) == min(spare, int(group.sum()))


def test_a_threshold_of_one_halts_nothing() -> None:
    tokens = grid_tokens([(4, 4)])
    tokens = tokens.with_features(tokens.x * 1e4)
    done, confidence, _ = decide(tokens, 1.0, 0)
    assert confidence.max() <= 1.0
    assert not done.any()


def test_prefix_rows_never_halt() -> None:
    tokens = grid_tokens([(2, 2), (1, 3)], prefix=2)
    done, _, _ = decide(tokens, 0.0, 0)
    assert torch.equal(done, ~tokens.is_prefix)


def test_it_acts_only_where_there_is_an_exit() -> None:
    tokens = grid_tokens([(3, 3)])
    heads = exits()
    pruning = EarlyPruning(heads, (1.0, 0.0), 0)
    assert [pruning(tokens, blocks) is None for blocks in range(1, 6)] == [True, False] * 2 + [True]
    first, second = pruning(tokens, 2), pruning(tokens, 4)
    assert first is not None
    assert second is not None
    # each exit has its own threshold and its own head
    assert not first.done.any()
    assert second.done.sum() == 9
    assert torch.allclose(second.classify(tokens.x), pruning.exits(tokens.x, 1), atol=1e-6)


def test_one_threshold_per_exit_is_asked_for() -> None:
    with pytest.raises(ValueError, match="one threshold per exit"):
        EarlyPruning(exits(), (0.5,), 0)


def test_confidence_is_the_mean_over_sub_cells_of_the_top_probability() -> None:
    logits = torch.randn(7, 4, CLASSES)
    confidence, predicted = confidence_of(logits)
    probabilities = logits.softmax(-1)
    assert torch.allclose(confidence, probabilities.max(-1).values.mean(1))
    assert torch.equal(predicted, probabilities.sum(1).argmax(1))
    sure = torch.zeros(1, 4, CLASSES)
    sure[0, :2, 0] = sure[0, 2:, 1] = 50.0  # a boundary, both sides sure
    assert confidence_of(sure)[0].item() == pytest.approx(1.0)


def test_confidence_is_taken_in_fp32() -> None:
    logits = torch.tensor([[[9.0, 0.0, 0.0]]], dtype=torch.float16)
    assert confidence_of(logits)[0].dtype == torch.float32


def test_halted_predictions_are_final() -> None:
    tokens = grid_tokens([(3, 3)])
    heads = exits(side=2)
    halt = EarlyPruning(heads, (0.0, 0.0), 1)(tokens, 2)
    assert halt is not None
    after = tokens.halt(halt.done, halt.classify, 2)
    changed = after.with_features(after.x + 1.0)
    again = EarlyPruning(heads, (0.0, 0.0), 0)(changed, 4)
    assert again is not None
    last = changed.halt(again.done, again.classify, 4)
    assert after.halted is not None
    assert last.halted is not None
    before = len(after.halted.anchor)
    assert torch.equal(last.halted.logits[:before], after.halted.logits)
    assert torch.equal(last.halted.anchor[:before], after.halted.anchor)
    assert last.halted.layer.tolist() == [2] * before + [4] * (9 - before)


def test_halted_logits_carry_gradients_to_the_head() -> None:
    tokens = grid_tokens([(3, 3)])
    heads = exits()
    halt = EarlyPruning(heads, (0.0, 0.0), 0)(tokens, 2)
    assert halt is not None
    after = tokens.halt(halt.done, halt.classify, 2)
    assert after.halted is not None
    after.halted.logits.square().sum().backward()
    assert heads.heads[0].linear.weight.grad.abs().sum() > 0


def test_deep_supervision_sees_every_exit_and_halts_nothing() -> None:
    tokens = grid_tokens([(2, 2)])
    watch = DeepSupervision(exits(side=2))
    for block in range(1, 5):
        watch(tokens, block)
    assert [logits.shape for _, logits in watch.seen] == [(5, 4, CLASSES)] * 2


def test_a_temperature_tempers_the_confidence_and_not_the_prediction() -> None:
    tokens = grid_tokens([(4, 5)])
    heads = exits()
    confidence, _ = confidence_of(heads(tokens.x, 0) / 2)
    threshold = float(confidence.median())
    pruning = EarlyPruning(heads, (threshold, 1.0), 0, temperatures=(2.0, 1.0))
    halt = pruning(tokens, 2)
    assert halt is not None
    assert torch.equal(halt.done, (confidence > threshold) & ~tokens.is_prefix)
    assert torch.allclose(halt.classify(tokens.x), heads(tokens.x, 0), atol=1e-6)


def test_so_many_rows_that_they_are_judged_in_bands() -> None:
    tokens = grid_tokens([(60, 60), (30, 20)])
    done, confidence, predicted = decide(tokens, 0.5, 3, side=2)
    assert done.tolist() == naive_halt(tokens, confidence, predicted, 0.5, 3)
    assert 0 < done.sum() < len(done)


@given(GRIDS, st.floats(0, 1), st.integers(0, 3), st.integers(0, 2))
def test_a_budget_halts_its_share_of_every_picture_the_surest_first(
    grids: list[tuple[int, int]], share: float, spare: int, prefix: int
) -> None:
    tokens = grid_tokens(grids, prefix=prefix)
    heads = exits()
    halt = BudgetPruning(heads, {2: share}, spare)(tokens, 2)
    assert halt is not None
    confidence, predicted = confidence_of(heads(tokens.x, 0))
    ranks = BudgetPruning(heads, {}, spare).rank(tokens, confidence, predicted, ~tokens.is_prefix)
    spared = ~tokens.is_prefix & (ranks < spare)
    assert not halt.done[tokens.is_prefix].any()
    for number, (height, width) in enumerate(grids):
        own = (tokens.picture() == number) & ~tokens.is_prefix
        done = halt.done & own
        assert int(done.sum()) == round(share * height * width)
        left = own & ~halt.done & ~spared
        if done.any() and left.any():
            assert confidence[done & ~spared].min() >= confidence[left].max()
        # what is spared halts only where no others are left
        assert not (done & spared).any() or not left.any()


def test_an_exit_without_a_share_halts_nothing() -> None:
    tokens = grid_tokens([(3, 3)])
    pruning = BudgetPruning(exits(), {4: 1.0}, 0)
    first, last = pruning(tokens, 2), pruning(tokens, 4)
    assert first is not None and not first.done.any()
    assert last is not None and last.done.sum() == 9
