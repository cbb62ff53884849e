"""One process at a time in an output folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tokenstep.errors import TokenstepError
from tokenstep.pictures import require_writable

NAME = ".lock"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other processes out of a folder while this one writes there.

    The lock names its holder. It ends with the process, however that ends.

    Raises:
        TokenstepError: another process holds it, or the folder takes no files.
    """
    require_writable(out)
    with (out / NAME).open("a+", encoding="utf-8") as file:
        try:
            # A lock of the process, not of the open file, which data workers would keep alive.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise TokenstepError(
                f"{out}: {holder} is at work there; wait for it, or choose another out"
            ) from error
        except OSError as error:
            raise TokenstepError(
                f"{out}: cannot be locked ({error.strerror}); choose a folder on a local disk"
            ) from error
        file.truncate(0)
        since = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} (since {since})")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
