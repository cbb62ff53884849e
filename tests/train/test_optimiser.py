"""Muon: it steps as timm's does, along a matrix whose singular values are all about 1."""

import pytest
import torch
from timm.optim import Muon as TimmMuon
from torch import nn

from tokenstep.train.optimiser import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (1, 20), (20, 1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_singular_values_become_one(shape: tuple[int, int], size: float) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, min(shape)))[0] for side in shape)
    matrix = size * left @ torch.diag(torch.linspace(0.1, 1, min(shape))) @ right.T
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.8 and values.max() < 1.2
    assert torch.nn.functional.cosine_similarity(
        orthogonalised(matrix).flatten(), (left @ right.T).flatten(), dim=0
    ) == pytest.approx(1, abs=0.01)


def test_nothing_to_turn_is_left_as_it_is() -> None:
    assert not orthogonalised(torch.zeros(4, 6)).any()


def test_it_steps_as_timms_does() -> None:
    torch.manual_seed(0)
    shapes = [(24, 40), (40, 24), (8, 3, 4, 4), (24,)]
    start = [torch.randn(shape) for shape in shapes]
    ours, timms = ([nn.Parameter(one.clone()) for one in start] for _ in range(2))
    steps = {"lr": 1e-2, "weight_decay": 0.1}
    one = Muon(
        [
            {"params": ours[:3], "orthogonal": True, **steps},
            {"params": ours[3:], "orthogonal": False, **steps},
        ]
    )
    other = TimmMuon(
        [
            {"params": timms[:3], "use_fallback": False, **steps},
            {"params": timms[3:], "use_fallback": True, **steps},
        ]
    )
    for _ in range(6):
        for mine, theirs in zip(ours, timms, strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        one.step()
        other.step()
    for before, mine, theirs in zip(start, ours, timms, strict=True):
        # timm's works in bf16.
        assert (mine - theirs).norm() < 0.03 * (before - theirs).norm()


def test_what_has_no_gradient_stays() -> None:
    idle = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([{"params": [idle], "lr": 1.0, "weight_decay": 0.5, "orthogonal": True}])
    optimizer.step()
    assert (idle == 1).all()


def test_it_resumes_where_it_was() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(4, 6, 6)

    def run(optimizer: Muon, parameter: nn.Parameter, steps: range) -> None:
        for step in steps:
            parameter.grad = gradients[step].clone()
            optimizer.step()

    def made(value: torch.Tensor) -> tuple[Muon, nn.Parameter]:
        parameter = nn.Parameter(value.clone())
        group = {"params": [parameter], "lr": 0.1, "weight_decay": 0.1, "orthogonal": True}
        return Muon([group]), parameter

    whole, through = made(torch.eye(6))
    run(whole, through, range(4))
    first, before = made(torch.eye(6))
    run(first, before, range(2))
    second, after = made(before.detach())
    second.load_state_dict(first.state_dict())
    run(second, after, range(2, 4))
    assert torch.equal(through, after)
