"""Reducers by their names, as the command line and a model's config hold them."""

import dataclasses
import json
from typing import Any, cast

from tokenstep.errors import TokenstepError
from tokenstep.from_dict import from_text
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


def text_of(reducer: Reducer | Exits) -> str:
    """The text by which :func:`reducer_of` gives such a reducer again.

    Raises:
        TokenstepError: it is none of those that have a name.
    """
    names = [name for name, kind in REDUCERS.items() if type(reducer) is kind]
    if not names:
        raise TokenstepError(
            f"reducer {type(reducer).__name__}: has no name to be stored by: {', '.join(REDUCERS)}"
        )
    given: dict[str, Any] = dataclasses.asdict(cast(Any, reducer))
    # What TOML and JSON write alike: numbers, true and false, lists of these.
    settings = ",".join(
        f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None
    )
    return f"{names[0]}:{settings}"


def reducer_of(text: str) -> Reducer | Exits:
    """The reducer that a text such as ``tome:share=0.1`` or ``evit:keep=0.7,blocks=[4,7]`` names.

    Raises:
        TokenstepError: there is no such reducer or setting, or a value is out of range.
    """
    return cast(Reducer | Exits, from_text(REDUCERS, text, "reducer"))
