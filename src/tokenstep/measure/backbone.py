"""A large ViT with random weights under a real policy: how fast STEP would run on it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenstep.config import DENSE, Budget, Thresholds, VitConfig
from tokenstep.core.attention import Attended
from tokenstep.core.tokens import PackedTokens
from tokenstep.errors import TokenstepError
from tokenstep.measure.shares import Shares, budget_of
from tokenstep.model.segmenter import Segmenter
from tokenstep.reducers.base import Site, Turn
from tokenstep.reducers.exit_heads import ExitHeads, confidence_of


def with_backbone(model: Segmenter, name: str, exits: Sequence[int] = ()) -> Segmenter:
    """Build a model of the timm ViT ``name`` with random weights and the policy of ``model``.

    ``exits`` are the blocks after which it has one.

    Raises:
        TokenstepError: there is no such ViT, its patches are not those of the policy, or the exits
            do not lie between its blocks.
    """
    config = model.config
    vit = VitConfig(name, cells=config.vit.cells, exits=tuple(exits))
    other = replace(config, vit=vit, thresholds=DENSE, points=(), temperatures=())
    try:
        built = Segmenter.build(other)
    except ValueError as error:
        raise TokenstepError(f"--backbone {name}: {error}") from error
    if built.patch != model.patch:
        raise TokenstepError(
            f"--backbone {name}: has patches of {built.patch} px but the policy knows those of "
            f"{model.patch} px: choose another backbone, or another --model"
        )
    built.policy.load_state_dict(model.policy.state_dict())
    return built.to(model.device, model.dtype).eval()


@torch.inference_mode()
def halting(
    model: Segmenter, pictures: Sequence[Tensor], merge: Sequence[float], shares: Sequence[float]
) -> Thresholds:
    """Thresholds at which each exit halts about its share of the tokens that reach it.

    The confidences of random exits mean nothing, but they have an order: the threshold is the
    one that the share passes, over all ``pictures``. ``merge`` are the policy's thresholds.
    """
    found: list[float] = []
    for index, share in enumerate(shares):
        rest = (1.0,) * (len(shares) - len(found))
        thresholds = Thresholds(tuple(merge), (*found, *rest), spare=0)
        seen = [_Confidences(model.exits, index) for _ in pictures]
        for picture, one in zip(pictures, seen, strict=True):
            model.segment_batch([picture], thresholds=thresholds, reducers=[one])
        every = torch.cat([one.found for one in seen])
        found.append(float(every.quantile(1 - share)))
    return Thresholds(tuple(merge), tuple(found), spare=0)


@torch.inference_mode()
def budget_like(model: Segmenter, pictures: Sequence[Tensor], thresholds: Thresholds) -> Budget:
    """The budget that spends on every picture what ``thresholds`` spend on average."""
    shares = Shares()
    for picture in pictures:
        (result,) = model.segment_batch([picture], thresholds=thresholds)
        shares.add(result.tokens)
    return budget_of(shares.report(), thresholds)


class _Confidences:
    """A reducer that notes how sure one exit is of each token, and halts none."""

    site: Site = "block"

    def __init__(self, exits: ExitHeads, index: int) -> None:
        self.exits = exits
        self.index = index
        self.found = torch.empty(0)

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None) -> None:
        if block == self.exits.after[self.index]:
            logits = self.exits(tokens.x[~tokens.is_prefix], self.index)
            self.found = confidence_of(logits)[0].cpu()

    def macs(self, turn: Turn) -> int:
        """Looking on is no part of the model's compute."""
        return 0
