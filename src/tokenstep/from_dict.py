"""Dataclasses from parsed JSON or TOML: unknown keys and wrong types are errors that say where."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tokenstep.errors import TokenstepError

T = TypeVar("T")


def from_dict(kind: type[T], data: object, where: str) -> T:
    """Build the dataclass ``kind`` from parsed JSON or TOML, nested ones too.

    Lists become tuples. Unknown keys and wrong types are errors, which name ``where``.

    Raises:
        TokenstepError: names the key, what was expected and what came.
    """
    return cast(T, _convert(kind, data, where))


def from_text(kinds: Mapping[str, type[Any]], text: str, what: str) -> Any:
    """The dataclass that a text such as ``tome:share=0.1`` names; ``what`` is what it is called.

    Raises:
        TokenstepError: there is none of such a name or setting, or a value is of a wrong type.
    """
    name, _, settings = text.partition(":")
    kind = kinds.get(name)
    if kind is None:
        raise TokenstepError(f"{what} {name}: choose from {', '.join(kinds)}")
    known = ", ".join(field.name for field in fields(kind))
    try:
        # An inline table of TOML reads numbers, lists and true or false.
        if not settings.isprintable():
            raise ValueError("more than a line")
        given: dict[str, Any] = tomllib.loads(f"settings = {{{settings}}}")["settings"]
    except (ValueError, RecursionError) as error:  # TOML's own is the first
        raise TokenstepError(
            f"{what} {name}: give settings as {name}:KEY=VALUE,KEY=VALUE, of {known}; a list as "
            "[4,7]"
        ) from error
    return from_dict(kind, given, f"{what} {name}")


def _convert(kind: Any, value: object, where: str) -> object:
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        kinds = [arg for arg in args if arg is not NoneType]
        fitting = [arg for arg in kinds if type(value) is arg]
        if len(kinds) > 1 and not fitting:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise TokenstepError(f"{where}: expected {wanted}, got {value!r}")
        return _convert((fitting or kinds)[0], value, where)
    if origin is Literal:
        # By type too, since True == 1 == 1.0.
        if (type(value), value) not in [(type(arg), arg) for arg in args]:
            raise TokenstepError(f"{where}: expected one of {list(args)}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TokenstepError(f"{where}: expected a list, got {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise TokenstepError(f"{where}: expected {len(kinds)} values, got {len(value)}")
        return tuple(
            _convert(inner, entry, f"{where}[{index}]")
            for index, (inner, entry) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        return _mapping(args, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise TokenstepError(f"{where}: expected float, got a number too large") from error
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TokenstepError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _mapping(args: tuple[Any, ...], value: object, where: str) -> object:
    """A table whose keys are whole numbers: JSON and TOML write them as text."""
    if not isinstance(value, dict):
        raise TokenstepError(f"{where}: expected a table, got {value!r}")
    for key in value:
        if not (str(key).isascii() and str(key).isdecimal() and len(str(key)) < 10):
            raise TokenstepError(f"{where}: expected keys that are whole numbers, got {key!r}")
    if len({int(key) for key in value}) < len(value):
        raise TokenstepError(f"{where}: expected each key once, got {', '.join(map(str, value))}")
    return {int(key): _convert(args[1], item, f"{where}: {key}") for key, item in value.items()}


def _dataclass(kind: Any, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise TokenstepError(f"{where}: expected a table of settings, got {value!r}")
    hints = get_type_hints(kind)
    known = [entry.name for entry in fields(kind)]
    for key in value:
        if key not in known:
            raise TokenstepError(f"{where}: unknown key {key!r}, known are {', '.join(known)}")
    for entry in fields(kind):
        needed = entry.default is MISSING and entry.default_factory is MISSING
        if needed and entry.name not in value:
            raise TokenstepError(f"{where}: the key {entry.name!r} is missing")
    values = {key: _convert(hints[key], item, f"{where}: {key}") for key, item in value.items()}
    try:
        return kind(**values)
    except TokenstepError as error:
        raise TokenstepError(f"{where}: {error}") from error
