"""The parts of a STEP segmenter, built from its settings: sizes live here, and nowhere else."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tokenstep.config import DENSE
from tokenstep.errors import TokenstepError
from tokenstep.hosts.base import BlockSettings, Host
from tokenstep.hosts.timm_named import build_host
from tokenstep.model.config import ModelConfig
from tokenstep.model.decoder import LinearDecoder, MaskDecoder
from tokenstep.model.encoder import Encoder
from tokenstep.model.supertokens import Tokeniser
from tokenstep.policies.base import Policy
from tokenstep.policies.named import build_policy
from tokenstep.reducers.exit_heads import ExitHeads


@dataclass(frozen=True, slots=True)
class Parts:
    """What a segmenter is made of, one part per stage."""

    policy: Policy  # picture -> scores of superpatches
    tokenise: Tokeniser  # picture and partition -> supertokens
    encoder: Encoder  # supertokens through the ViT's blocks
    exits: ExitHeads  # heads between the blocks, for early pruning
    decoder: nn.Module  # tokens -> logits


def step_parts(
    config: ModelConfig, *, host: Host | None = None, policy: Policy | None = None
) -> Parts:
    """Build the parts of a plain ViT segmenter with dCTS and early pruning, untrained.

    ``host`` is the ViT to build around, and ``policy`` what scores superpatches; those of
    ``config.vit`` and ``config.policy`` are built if none is given.

    Raises:
        ValueError: the ViT has a part that packed tokens cannot run, by name; the exits do not lie
            between its blocks; or the policy has other patches.
    """
    host = build_host(config.vit) if host is None else host
    settings = BlockSettings(size_bias=config.vit.size_bias)
    encoder = Encoder(host, settings)
    depth = len(encoder.host_blocks())
    if list(config.vit.exits) != sorted({*config.vit.exits} & {*range(1, depth)}):
        raise ValueError(
            f"exits must be rising counts of blocks from 1 to {depth - 1}, "
            f"got {config.vit.exits} for {depth} blocks"
        )
    if policy is None:
        policy = build_policy(config.policy, host.patch, config.mean, config.std)
    if policy.patch != host.patch:
        raise ValueError(f"the policy has patches of {policy.patch} px, the ViT of {host.patch} px")
    classes, cells, dim = len(config.classes), config.vit.cells, host.dim
    context = policy.channels if config.vit.policy_features else 0
    tokenise = Tokeniser(
        host,
        sides=config.policy.sizes,
        sub_patches=config.vit.sub_patches,
        context=context,
    )
    exits = ExitHeads(config.vit.exits, dim, classes, cells)
    decoder: nn.Module = LinearDecoder(dim, classes, cells)
    if config.vit.decoder == "mask":
        heads = encoder.host_blocks()[0].heads
        decoder = MaskDecoder(dim, classes, cells, heads=heads, settings=settings)
    return Parts(policy, tokenise, encoder, exits, decoder)


def require_described(config: ModelConfig, model: nn.Module) -> None:
    """Refuse to save a model that its settings alone would not build again.

    What they build is given the weights and a picture: some settings of a part that was handed in
    leave no trace in the shape of a weight.

    Raises:
        TokenstepError: parts were handed in that ``config`` does not describe.
    """
    state, modes = model.state_dict(), {part: part.training for part in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn after a save stays as it was
            twin = type(model)(config, step_parts(config)).to(next(model.parameters()))
        twin.load_state_dict(state)
        with torch.no_grad():
            built, own = _probe(twin.eval()), _probe(model.eval())
        same = torch.allclose(built, own, atol=1e-3, rtol=1e-3, equal_nan=True)
    except (ValueError, RuntimeError):  # a host of its own name, or other weights
        same = False
    finally:
        for part, mode in modes.items():
            part.training = mode
    if not same:
        raise TokenstepError(
            "the model has parts of its own, which config.json does not describe: a folder of it "
            "would not load; keep its state_dict, and build it in Python"
        )


def _probe(model: nn.Module) -> Tensor:
    """Logits of a picture of six by eight patches, nothing merged or halted."""
    side = cast(int, model.patch)
    drawn = torch.rand(3, 6 * side, 8 * side, generator=torch.Generator().manual_seed(0))
    tokens: Tensor = model([drawn.to(next(model.parameters()).device)], thresholds=DENSE).logits
    return tokens.float()
