import pytest
import torch
from conftest import CLASSES, TinyModel
from hypothesis import given
from hypothesis import strategies as st
from samples import labelled_folder

from tokenstep.config import Thresholds
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.measure.reliability import exit_logits, fit_exits, fit_temperature, reliability


def drawn(temperature: float, count: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are too sure by ``temperature``, and labels drawn from what is honest."""
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(count, 4, generator=generator)
    labels = torch.multinomial(honest.softmax(1), 1, generator=generator).flatten()
    return honest * temperature, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.05)


def test_honest_logits_have_no_gap_and_others_do() -> None:
    assert reliability(*drawn(1.0))["ece"] < 0.01
    assert reliability(*drawn(3.0))["ece"] > 0.08
    found = reliability(*drawn(1.0))
    assert sum(found["share"]) == pytest.approx(1)
    for confidence, accuracy, share in zip(
        found["confidence"], found["accuracy"], found["share"], strict=True
    ):
        assert share < 0.02 or confidence == pytest.approx(accuracy, abs=0.06)


@given(st.integers(1, 30), st.floats(0, 50))
def test_the_gap_is_within_bounds(count: int, scale: float) -> None:
    logits = scale * torch.randn(count, 3)
    assert 0 <= reliability(logits, torch.randint(3, (count,)))["ece"] <= 1


def test_every_valid_sub_cell_is_seen_once_per_exit(tiny_model: TinyModel, tmp_path) -> None:
    model = tiny_model(cells=2)
    folder = LabelledFolder(labelled_folder(tmp_path, CLASSES, [(32, 48), (24, 24)]), "test")
    logits, labels = exit_logits(model, folder, Thresholds())
    assert len(logits) == len(model.exits.after)
    valid = sum(int((label[2::4, 2::4] != 255).sum()) for _, label in folder)
    assert len(labels) == valid and all(len(found) == valid for found in logits)
    few, fewer = exit_logits(model, folder, Thresholds(), most=10)
    assert len(fewer) == 10 and all(len(found) == 10 for found in few)


def test_a_temperature_makes_an_exit_more_honest(tiny_model: TinyModel, tmp_path) -> None:
    model = tiny_model()
    with torch.no_grad():
        for head in model.exits.heads:
            head.linear.weight *= 30
    folder = LabelledFolder(labelled_folder(tmp_path, CLASSES, [(64, 96)]), "test")
    report = fit_exits(model, folder, ())
    assert list(report) == ["1", "2"]
    for one in report.values():
        assert one["temperature"] > 1 and one["after"]["ece"] < one["before"]["ece"]
