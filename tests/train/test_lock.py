"""One process at a time in an output folder."""

import os
import time
from pathlib import Path

import pytest
from killed import COPIES

from tokenstep.errors import TokenstepError
from tokenstep.train.lock import held


def _hold(out: Path, ready: Path) -> None:
    with held(out):
        if os.fork() == 0:  # as a data worker that outlives the process that it works for
            time.sleep(60)
            os._exit(0)
        ready.touch()
        time.sleep(60)


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    out, ready = tmp_path / "out", tmp_path / "ready"
    process = COPIES.Process(target=_hold, args=(out, ready))
    process.start()
    while not ready.exists():
        assert process.is_alive()
        time.sleep(0.02)
    with pytest.raises(TokenstepError, match=f"process {process.pid} ") as caught, held(out):
        pass
    assert str(out) in str(caught.value) and "\n" not in str(caught.value)
    process.kill()
    process.join()
    with held(out):
        pass


def test_a_folder_that_was_locked_is_free_again(tmp_path: Path) -> None:
    for _ in range(2):
        with held(tmp_path):
            pass


def test_a_folder_that_takes_no_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TokenstepError, match="file"), held(tmp_path / "file" / "below"):
        pass


def test_a_second_lock_in_one_process_is_refused_and_keeps_the_first(tmp_path: Path) -> None:
    with held(tmp_path):
        with pytest.raises(TokenstepError, match="at work there"), held(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_what_cannot_be_a_lock_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(TokenstepError, match=r"\.lock: cannot be locked"), held(tmp_path):
        pass
