"""The blocks of somebody else's model on fewer tokens, spread over the grid wherever they are read.

A supertoken's features stand for all of its patches, so that any head behind goes on working.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tokenstep.config import Channels, Spending
from tokenstep.core.attention import Attended
from tokenstep.core.partition import grid_of, uniform
from tokenstep.core.ragged import rows_of
from tokenstep.core.same_size import stacked
from tokenstep.core.tokens import PackedTokens
from tokenstep.core.unmerge import features_of_cells
from tokenstep.errors import TokenstepError
from tokenstep.hosts.base import BlockSettings, Host
from tokenstep.model.dataflow import DATAFLOWS, flow_for
from tokenstep.model.encoder import Encoder, Joining
from tokenstep.model.segmented import Encoded
from tokenstep.model.spending import plan_of
from tokenstep.model.supertokens import Tokeniser
from tokenstep.policies.base import Policy
from tokenstep.policies.batch import partition_by, policy_features, require_finite
from tokenstep.reducers.base import Reducer, Site, Turn


class NamedPolicy(Protocol):
    """A policy by its settings, as :class:`tokenstep.policies.entropy.Entropy` is."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of superpatches in patches."""
        ...

    @property
    def merge(self) -> tuple[float, ...]:
        """The threshold of each size."""
        ...

    def build(self, patch: int, mean: Channels, std: Channels) -> Policy:
        """The policy for patches of so many pixels, of pictures so normalised."""
        ...


class Reading:
    """Looks on: keeps what each cell's token has behind the blocks that are wanted."""

    site: Site = "block"

    def __init__(self, wanted: Collection[int]) -> None:
        self.wanted = wanted
        self.found: dict[int, Tensor] = {}

    def __call__(self, tokens: PackedTokens, block: int, seen: Attended | None) -> None:
        """Keep the rows and cells behind a block; 0 is before the first."""
        if block in self.wanted:
            self.found[block] = spread(tokens)

    def macs(self, turn: Turn) -> int:
        """None."""
        return 0


def spread(tokens: PackedTokens) -> Tensor:
    """Prefix rows and then each cell's features, ``(B, prefix + H * W, D)``, of one grid."""
    cells = features_of_cells(tokens).flatten(1, 2)
    rows = rows_of(tokens.is_prefix, tokens.pictures * tokens.prefix)
    prefix = torch.unflatten(tokens.x[rows], 0, (tokens.pictures, tokens.prefix))
    return torch.cat([prefix, cells], dim=1)


class PackedRun:
    """How the blocks of a model run on fewer tokens: what is merged before and between them."""

    def __init__(
        self,
        policy: Policy | None,
        spending: Spending,
        sizes: Sequence[int],
        reducers: Sequence[Reducer],
    ) -> None:
        self.policy = policy
        self.spending = spending  # of which the policy heeds what it says of merging
        self.sizes = tuple(sizes)
        self.reducers = tuple(reducers)
        self.encoded: Encoded | None = None  # what the last run made, and where its tokens lie

    def __call__(
        self,
        host: Host,
        pixels: Tensor,
        wanted: Collection[int],
        joining: Joining | None = None,
    ) -> dict[int, Tensor]:
        """Features behind the blocks that are ``wanted``, and behind the norm as block -1.

        ``pixels (B, 3, h, w)`` are normalised; what hangs over whole patches is cut off. Each is
        ``(B, prefix + H * W, D)``. ``joining`` is what the model does before some of its blocks.

        Raises:
            TokenstepError: there is no picture, or too small ones; or the policy's scores are not
                finite.
        """
        height, width = (side // host.patch * host.patch for side in pixels.shape[2:])
        if len(pixels) == 0 or pixels.shape[1] != 3 or min(height, width) == 0:
            raise TokenstepError(
                f"pictures {tuple(pixels.shape)}: give (B, 3, h, w) of at least one picture and "
                f"{host.patch} px a side"
            )
        groups = stacked(pixels[:, :, :height, :width])
        level = uniform([grid_of((height, width), host.patch)] * len(pixels), pixels.device)
        flow = flow_for("auto", pixels.device)
        plan = None if self.policy is None else plan_of(self.spending, self.sizes)
        if self.policy is not None and plan is not None:
            policy = self.policy.for_use()
            looks = policy_features(policy, groups, whole=DATAFLOWS[flow].whole)
            level, finite = partition_by(policy, groups, looks, plan)
            require_finite(finite is None or bool(finite))
        # Made anew in each run: so whatever was done to the model's parts meanwhile is done.
        tokens = Tokeniser(host, sides=self.sizes, sub_patches=False)(groups, level, flow=flow)
        reading = Reading(wanted)
        reading(tokens, 0, None)
        encode = Encoder(host, BlockSettings())
        tokens, trace = encode(tokens, [*self.reducers, reading], joining)
        self.encoded = Encoded(
            tokens=tokens.without_features(),
            partition=level,
            trace=trace,
            sizes=((height, width),) * len(pixels),
            patch=host.patch,
            scored=plan is not None,
        )
        return {**reading.found, -1: spread(tokens)}
