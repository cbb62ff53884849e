"""Reducers by their names, as the command line and a model's config hold them."""

import dataclasses
import tomllib
from typing import Any

from tokenstep.errors import TokenstepError
from tokenstep.from_dict import from_dict
from tokenstep.reducers.algm import ALGM
from tokenstep.reducers.base import Reducer
from tokenstep.reducers.evit import EViT
from tokenstep.reducers.exits import Exits
from tokenstep.reducers.mctf import MCTF
from tokenstep.reducers.mpm import MPM
from tokenstep.reducers.random_drop import RandomDrop
from tokenstep.reducers.tome import ToMe

REDUCERS: dict[str, type[Any]] = {
    "exits": Exits,
    "tome": ToMe,
    "evit": EViT,
    "algm": ALGM,
    "mctf": MCTF,
    "mpm": MPM,
    "random": RandomDrop,
}


def reducer_of(text: str) -> Reducer | Exits:
    """The reducer that a text such as ``tome:share=0.1`` or ``evit:keep=0.7,blocks=[4,7]`` names.

    Raises:
        TokenstepError: there is no such reducer or setting, or a value is out of range.
    """
    name, _, settings = text.partition(":")
    kind = REDUCERS.get(name)
    if kind is None:
        raise TokenstepError(f"reducer {name}: choose from {', '.join(REDUCERS)}")
    known = ", ".join(field.name for field in dataclasses.fields(kind))
    try:
        # An inline table of TOML reads numbers, lists and true or false.
        if not settings.isprintable():
            raise ValueError("more than a line")
        given: dict[str, Any] = tomllib.loads(f"settings = {{{settings}}}")["settings"]
    except ValueError as error:  # TOML's own is one
        raise TokenstepError(
            f"reducer {name}: give settings as {name}:KEY=VALUE,KEY=VALUE, of {known}; a list as "
            "[4,7]"
        ) from error
    reducer: Reducer | Exits = from_dict(kind, given, f"reducer {name}")
    return reducer
