"""One process at a time in an output folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path

from tokenstep.data.whole_files import require_writable, sweep
from tokenstep.errors import TokenstepError

NAME = ".lock"
_HELD: set[Path] = set()  # by this process, whose second lock the system would let in


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other processes out of a folder while this one writes there.

    The lock names its holder. It ends with the process, however that ends; what a killed one left
    half-written in the folder is removed.

    Raises:
        TokenstepError: another process holds it, or the folder takes no files.
    """
    require_writable(out)
    path = out.resolve() / NAME
    if path in _HELD:
        raise TokenstepError(f"{out}: this process is at work there already; choose another out")
    try:
        file = _locked(path, out)
    except OSError as error:
        reason = f"cannot be locked ({error.strerror}); remove it, or choose another out"
        raise TokenstepError(f"{path}: {reason}") from error
    _HELD.add(path)
    try:
        sweep(out)
        yield
    finally:
        _HELD.discard(path)
        path.unlink(missing_ok=True)
        file.close()


def _locked(path: Path, out: Path) -> TextIOWrapper:
    """The file of a lock that this process now holds, with its name in it."""
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            # A lock of the process, not of the open file, which data workers would keep alive.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise TokenstepError(
                f"{out}: {holder} is at work there; wait for it, or choose another out"
            ) from error
        # The holder before may have removed the file between our opening and our locking it.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    since = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} (since {since})")
    file.flush()
    return file
