"""What the files of a labelled folder hold: a corrected label is not taken for the old one."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.data.whole_files import write_text
from tokenstep.errors import TokenstepError

CLASSES = "classes.json"
FILES = "files.json"  # the usual name of a cache, in the folder that the results go to

Mark = tuple[int, int, str]  # size in bytes, time of change in ns, sha256


def digests_of(
    folders: Sequence[LabelledFolder], cache: Path, *, write: bool = True
) -> dict[str, str]:
    """The sha256 of each picture and label of folders of one root, by the path below the root.

    The classes count too. A file is read only where ``cache`` does not know it with this size and
    time of change; what is found is added there.

    Raises:
        TokenstepError: a file cannot be read, or ``cache`` is damaged or takes no files.
    """
    known = _read(cache)
    marks = {
        name: _mark(path, known.get(name))
        for folder in folders
        for name, path in _files(folder).items()
    }
    if write and not marks.items() <= known.items():
        write_text(cache, json.dumps({**known, **marks}, indent=0) + "\n")
    found = {name: digest for name, (_, _, digest) in marks.items()}
    classes = folders[0].classes
    said = json.dumps([classes.names, classes.palette])  # what they are, not how the file says it
    return {**found, CLASSES: hashlib.sha256(said.encode()).hexdigest()}


def of_folder(folder: LabelledFolder, found: Mapping[str, str]) -> dict[str, str]:
    """What :func:`digests_of` found of one folder's files and the classes."""
    return {name: found[name] for name in (*_files(folder), CLASSES)}


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """What differs, as "train/labels/003.png and 4 more changed"; empty where nothing does."""
    changed = [name for name in before if name in after and before[name] != after[name]]
    gone = [name for name in before if name not in after]
    new = [name for name in after if name not in before]
    return ", ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {verb}"
        for names, verb in ((changed, "changed"), (gone, "gone"), (new, "added"))
        if names
    )


def _files(folder: LabelledFolder) -> dict[str, Path]:
    paths = [*folder.paths, *folder.labels]
    return {path.relative_to(folder.root).as_posix(): path for path in paths}


def _read(cache: Path) -> dict[str, Mark]:
    if not cache.is_file():
        return {}
    try:
        return {
            name: (int(size), int(time), str(digest))
            for name, (size, time, digest) in json.loads(cache.read_text()).items()
        }
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        remedy = "remove it to have the files read anew"
        raise TokenstepError(f"{cache}: is damaged; {remedy}") from error


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
