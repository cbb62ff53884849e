"""Multiply-adds of layers, by formula."""

from torch import nn


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds of all linear layers of a module for one row."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
