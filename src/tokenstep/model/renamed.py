"""What earlier versions called things: their files and their callers go on working."""

from typing import TypeVar
from warnings import warn

from tokenstep.errors import TokenstepError

T = TypeVar("T")

KEYS = {"settings": "thresholds"}  # of config.json and of recipes, at any depth: old -> new


def with_new_keys(data: object, where: str) -> object:
    """Parsed JSON or TOML whose keys are of any version, with those of this one.

    Raises:
        TokenstepError: a table has a key under both names.
    """
    if isinstance(data, list):
        return [with_new_keys(entry, where) for entry in data]
    if not isinstance(data, dict):
        return data
    both = [key for key in KEYS if key in data and KEYS[key] in data]
    if both:
        raise TokenstepError(f"{where}: {both[0]} is the former name of {KEYS[both[0]]}: give one")
    return {KEYS.get(key, key): with_new_keys(value, where) for key, value in data.items()}


def renamed(old: str, given: T | None, new: str, value: T | None) -> T | None:
    """The value of a keyword that may have been given under its former name, with a warning.

    Raises:
        TokenstepError: it was given under both names.
    """
    if given is None:
        return value
    if value is not None:
        raise TokenstepError(f"{old} is the former name of {new}: give one of them")
    warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=4)  # inference_mode wraps
    return given
