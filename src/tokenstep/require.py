"""Checks that several settings share; a fault is one line."""

from collections.abc import Sequence

from tokenstep.errors import TokenstepError

MOST_CLASSES = 255  # label maps are uint8, and 255 means "no class"


def require(fine: bool, name: str, wanted: str, value: object) -> None:
    """Raise `TokenstepError` that says what ``name`` must be, unless it is ``fine``."""
    if not fine:
        raise TokenstepError(f"{name} must be {wanted}, got {value}")


def require_classes(names: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> None:
    """Raise `TokenstepError` where names and colours do not make a set of classes."""
    if not 1 <= len(names) <= MOST_CLASSES:
        raise TokenstepError(f"{len(names)} class names; give 1 to {MOST_CLASSES}")
    if not all(name.strip() for name in names):
        raise TokenstepError("a class name is empty; give each class a name")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TokenstepError(f"class name {twice!r} comes twice; rename one")
    if len(palette) != len(names):
        counts = f"{len(palette)} colours for {len(names)} names"
        raise TokenstepError(f"{counts}; give one each, or no palette")
    for colour in palette:
        if not all(0 <= value <= 255 for value in colour):
            raise TokenstepError(f"palette has {list(colour)}; give values from 0 to 255")
