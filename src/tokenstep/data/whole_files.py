"""Output files: written whole or not at all."""

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenstep.errors import TokenstepError

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}(\..*)?")  # names that `_temporary` gives


def require_writable(folder: Path) -> None:
    """Make a folder if needed; raises `TokenstepError` if it does not take files."""
    with _write_faults(folder), _temporary(folder, ""):
        pass


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: `write` gets a temporary path that then takes its place.

    The temporary file lies in the same folder, which is made if needed, and has the same suffix.
    Raises `TokenstepError` if the folder or the disk does not take the file.
    """
    with _write_faults(path), _temporary(path.parent, path.suffix) as temporary:
        write(temporary)
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; raises as `write_whole` does."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sweep(folder: Path) -> None:
    """Remove what `write_whole` left in a folder when its process was killed in the middle."""
    for path in folder.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def _temporary(folder: Path, suffix: str) -> Iterator[Path]:
    """Make an empty file that is hidden and gone at the end, if it has not been moved."""
    temporary = folder / f".{uuid.uuid4().hex}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    temporary.touch()  # an unwritable folder shows here, whatever a writer would raise for it
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _write_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        reason = f"cannot be written ({fault.strerror or fault})"
        remedy = "choose another output folder or free some space"
        raise TokenstepError(f"{path}: {reason}; {remedy}") from fault
