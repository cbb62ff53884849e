"""Reducers by their names, as the command line and a model's config hold them."""

import dataclasses
import tomllib
from typing import Any, cast

from tokenstep.errors import TokenstepError
from tokenstep.from_dict import from_dict
from tokenstep.reducers.base import Reducer
from tokenstep.reducers.evit import EViT
from tokenstep.reducers.random_drop import RandomDrop
from tokenstep.reducers.tome import ToMe

REDUCERS: dict[str, type[Any]] = {"tome": ToMe, "evit": EViT, "random": RandomDrop}


def reducer_of(text: str) -> Reducer:
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
            f"reducer {name}: give settings as {name}:KEY=VALUE,KEY=VALUE, of {known}"
        ) from error
    reducer: Reducer = from_dict(kind, given, f"reducer {name}")
    return reducer


def text_of(reducer: Reducer) -> str:
    """What :func:`reducer_of` reads as this reducer; settings at their defaults are left out.

    One that has no name in ``REDUCERS`` is told as Python prints it.
    """
    names = [name for name, kind in REDUCERS.items() if type(reducer) is kind]
    if not names:
        return repr(reducer)
    settings = [
        f"{field.name}={_toml(getattr(reducer, field.name))}"
        for field in dataclasses.fields(cast(Any, reducer))
        if getattr(reducer, field.name) != field.default
    ]
    return ":".join([names[0], *([",".join(settings)] if settings else [])])


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(map(_toml, value)) + "]"
    return repr(value)
