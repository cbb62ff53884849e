"""What the files of a labelled folder hold: a corrected label is not taken for the old one."""

import hashlib
import json
from pathlib import Path

from tokenstep.data import LabelledFolder
from tokenstep.errors import TokenstepError
from tokenstep.pictures import write_text

CLASSES = "classes.json"

Mark = tuple[int, int, str]  # size in bytes, time of change in ns, sha256
Marks = dict[str, Mark]  # by the path below the root


def contents(folder: LabelledFolder, cache: Path) -> dict[str, str]:
    """The sha256 of each picture and label, by its path below the root, and of the classes.

    A file is read only where ``cache`` does not know it with this size and time of change; what is
    found is written there.

    Raises:
        TokenstepError: a file cannot be read, or ``cache`` is damaged or takes no files.
    """
    marks = mark(folder, read_marks(cache))
    write_marks(marks, cache)
    return {name: digest for name, (_, _, digest) in marks.items()}


def mark(folder: LabelledFolder, known: Marks) -> Marks:
    """Marks of a folder's files and classes; those ``known`` by size and time are not read again.

    Raises:
        TokenstepError: a file cannot be read.
    """
    marks: Marks = {}
    for path in [*folder.paths, *folder.labels]:
        name = path.relative_to(folder.root).as_posix()
        marks[name] = _mark(path, known.get(name))
    # What the classes are, not how the file says it.
    classes = json.dumps([folder.classes.names, folder.classes.palette]).encode()
    marks[CLASSES] = (len(classes), 0, hashlib.sha256(classes).hexdigest())
    return marks


def changes(before: Marks, after: Marks) -> str:
    """What differs, as "train/labels/003.png and 4 more changed"; empty where nothing does."""
    changed = [name for name in before if name in after and before[name][2] != after[name][2]]
    gone = [name for name in before if name not in after]
    new = [name for name in after if name not in before]
    return ", ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {verb}"
        for names, verb in ((changed, "changed"), (gone, "gone"), (new, "added"))
        if names
    )


def read_marks(path: Path) -> Marks:
    """What :func:`write_marks` wrote; nothing where there is no such file.

    Raises:
        TokenstepError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return {
            name: (int(size), int(time), str(digest))
            for name, (size, time, digest) in json.loads(path.read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TokenstepError(
            f"{path}: is damaged; remove it to have the files read anew"
        ) from error


def write_marks(marks: Marks, path: Path) -> None:
    """Write marks as JSON, whole or not at all."""
    write_text(path, json.dumps(marks, indent=0) + "\n")


def _mark(path: Path, known: Mark | None) -> Mark:
    try:
        state = path.stat()
        if known is not None and known[:2] == (state.st_size, state.st_mtime_ns):
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); check its rights"
        raise TokenstepError(f"{path}: {reason}") from error
    return state.st_size, state.st_mtime_ns, digest
