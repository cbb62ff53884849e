"""Policies by their names, as a model's config holds them."""

from collections.abc import Callable
from typing import cast

from tokenstep.config import Channels, PolicyConfig
from tokenstep.from_dict import from_text
from tokenstep.policies.base import Policy
from tokenstep.policies.dcts import DCTS
from tokenstep.policies.entropy import Entropy, EntropyPolicy

Build = Callable[[PolicyConfig, int, Channels, Channels], Policy]

POLICIES: dict[str, Build] = {
    "dcts": lambda config, patch, mean, std: DCTS(config, patch),
    "entropy": lambda config, patch, mean, std: EntropyPolicy(
        patch, config.sizes, mean=mean, std=std
    ),
}


def build_policy(config: PolicyConfig, patch: int, mean: Channels, std: Channels) -> Policy:
    """The policy that ``config`` names, for patches of so many pixels of normalised pictures.

    Raises:
        ValueError: the policy cannot be built so.
    """
    return POLICIES[config.kind](config, patch, mean, std)


def policy_of(text: str) -> Entropy:
    """The policy that a text such as ``entropy:bits=[3.5,3.0]`` names, which needs no training.

    Raises:
        TokenstepError: there is no such policy or setting, or a value is out of range.
    """
    return cast(Entropy, from_text({"entropy": Entropy}, text, "policy"))
