"""Policies by their names, as a model's config holds them."""

from collections.abc import Callable

from tokenstep.config import Channels, PolicyConfig
from tokenstep.policies.base import Policy
from tokenstep.policies.dcts import DCTS
from tokenstep.policies.entropy import EntropyPolicy

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
