"""The static graph equals the model under the same budget, and is one graph."""

from dataclasses import replace

import pytest
import torch
from conftest import TinyModel
from operations import Operations
from support import scramble
from torch import Tensor

from tokenstep.config import Budget
from tokenstep.errors import TokenstepError
from tokenstep.model.segmenter import Segmenter
from tokenstep.runtimes.fixed import FixedGraph, exported, graph

BUDGET = Budget(merge={2: 0.4, 4: 0.3}, exits={1: 0.1, 2: 0.2}, spare=1)
MODELS: list[dict[str, object]] = [
    {"cells": 4, "policy_features": True},
    {"cells": 2, "stem": "conv", "size_bias": True},
]


@pytest.fixture(scope="module", params=MODELS, ids=["linear stem", "conv stem"])
def model(tiny_model: TinyModel, request: pytest.FixtureRequest) -> Segmenter:
    model = tiny_model(**request.param)
    scramble(model)
    return model


def images(batch: int, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(batch, 3, 60, 90)


def different(labels: Tensor, model: Segmenter, pictures: Tensor, budget: Budget) -> float:
    """Share of pixels that differ from those of the packed path."""
    found = [
        torch.from_numpy(result.labels)
        for result in model.segment_batch(list(pictures), budget=budget)
    ]
    return float((labels != torch.stack(found)).float().mean())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("budget", [BUDGET, Budget()], ids=["a budget", "dense"])
def test_it_is_exported_and_equals_the_model(model: Segmenter, batch: int, budget: Budget) -> None:
    program = exported(model, budget, (60, 90), batch)
    with torch.no_grad():
        labels = program.module()(images(batch))
    assert labels.shape == (batch, 60, 90) and labels.dtype == torch.uint8
    assert different(labels, model, images(batch), budget) < 1e-4


def test_it_compiles_as_one_graph(model: Segmenter) -> None:
    run = torch.compile(
        exported(model, BUDGET, (60, 90), 1).module(), fullgraph=True, backend="eager"
    )
    with torch.no_grad():
        for seed in (3, 4):
            assert different(run(images(1, seed)), model, images(1, seed), BUDGET) < 1e-4


@pytest.mark.slow
def test_it_compiles_to_machine_code(model: Segmenter) -> None:
    run = torch.compile(exported(model, BUDGET, (60, 90), 1).module(), fullgraph=True)
    with torch.no_grad():
        assert different(run(images(1)), model, images(1), BUDGET) < 1e-3


def test_nothing_waits_for_the_host(model: Segmenter) -> None:
    fixed = FixedGraph(model, BUDGET)
    with torch.no_grad():
        fixed(images(2))
        with Operations() as counts:
            fixed(images(2))
    assert not counts.syncs


def test_the_model_goes_on_as_it_was(tiny_model: TinyModel) -> None:
    model = tiny_model().train()
    before, modes = set(model.state_dict()), [part.training for part in model.modules()]
    FixedGraph(model, BUDGET).double()
    assert model.dataflow == "auto" and set(model.state_dict()) == before
    assert [part.training for part in model.modules()] == modes
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_it_is_made_of_a_model_that_ran_before_and_in_16_bits(tiny_model: TinyModel) -> None:
    model = tiny_model(cells=2)
    scramble(model)
    model.use(precision="bf16")
    found = model.segment_batch(list(images(2)), budget=BUDGET)
    with torch.no_grad():
        labels = exported(model, BUDGET, (60, 90), 2).module()(images(2))
    expected = torch.stack([torch.from_numpy(one.labels) for one in found])
    assert (labels != expected).float().mean() < 0.05


def test_what_a_tracer_makes_is_not_kept(tiny_model: TinyModel) -> None:
    model, pictures = tiny_model(), torch.rand(1, 3, 72, 104)
    with torch.no_grad():
        torch.export.export(FixedGraph(model, BUDGET), (pictures,), strict=False)
    model.use(dataflow="grid")
    (result,) = model.segment_batch(list(pictures), budget=BUDGET)
    assert result.labels.shape == (72, 104)


def test_what_does_not_fit_is_refused(model: Segmenter) -> None:
    with pytest.raises(TokenstepError, match="superpatch size"):
        FixedGraph(model, Budget({8: 0.1}))
    with pytest.raises(TokenstepError, match=r"random:share=0\.2"):
        FixedGraph(model, replace(BUDGET, reducers=("random:share=0.2",)))
    with pytest.raises(TokenstepError, match="GPU"):
        graph(model, (60, 90), 1, budget=BUDGET)


@pytest.mark.gpu
def test_a_captured_graph_equals_the_model(model: Segmenter) -> None:
    on_gpu = model.cuda()
    try:
        run = graph(on_gpu, (60, 90), 2, budget=BUDGET)
        for seed in (3, 4):
            labels = run(images(2, seed).cuda()).cpu()
            assert different(labels, on_gpu, images(2, seed), BUDGET) < 1e-3
        with pytest.raises(TokenstepError, match="GiB"):
            graph(on_gpu, (60, 90), 2, budget=BUDGET, limit_gib=0.0)
    finally:
        model.cpu()
