"""A training in processes of its own, killed with -9 between two steps.

As a script it is the command line, which several processes need that train together.
"""

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenstep.cli.main import main
from tokenstep.train.phase import PhaseModule, SegmenterModule
from tokenstep.train.recipe import PolicyRecipe, SegmenterRecipe
from tokenstep.train.train import train_policy, train_segmenter

Recipe = PolicyRecipe | SegmenterRecipe
Place = tuple[int, int]  # a phase, counted from 0, and how many of its steps are done

# Its first process imports what training needs, and all others are copies of it.
COPIES = multiprocessing.get_context("forkserver")
COPIES.set_forkserver_preload(["tokenstep.cli.main", "tokenstep.train.train"])


def run(recipe: Recipe, die_at: Place | None = None) -> int:
    """Train in one process, or as many as the recipe says; the exit code."""
    if recipe.trainer.devices > 1:
        return _run_together(recipe, die_at)
    process = COPIES.Process(target=_train, args=(recipe, die_at))
    process.start()
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


class Call:
    """A call of the command line in a process group of its own; its stderr goes to a file."""

    def __init__(
        self,
        folder: Path,
        *words: str,
        largest_file: int | None = None,
        in_look: int | None = None,
        signalled: tuple[int, str, str] | None = None,
    ) -> None:
        """``largest_file`` limits what it may write; ``in_look`` is a signal in a look at val.

        ``signalled`` is a signal, the audit event that it comes at ("open", "os.rename") and how
        the name of the file ends that the event is about.
        """
        self.said = folder / "stderr.txt"
        self.said.write_text("")
        args = (list(words), self.said, largest_file, in_look, signalled)
        self.process = COPIES.Process(target=_call, args=args)
        self.process.start()

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process behind, whatever a test found."""
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def end(self) -> tuple[int, list[str]]:
        """The exit code and the lines of stderr."""
        self.process.join(300)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode, self.said.read_text().splitlines()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds; the process must live until then."""
        until = time.monotonic() + 120
        while not condition():
            assert self.process.is_alive() and time.monotonic() < until, self.said.read_text()
            time.sleep(0.02)

    def signal_group(self, number: int) -> None:
        """Signal the process and all that it started, as timeout and schedulers do."""
        assert self.process.pid is not None and self.process.is_alive()
        os.killpg(self.process.pid, number)


def _call(
    words: list[str],
    said: Path,
    largest_file: int | None,
    in_look: int | None,
    signalled: tuple[int, str, str] | None,
) -> None:
    os.setpgid(0, 0)
    if signalled is not None:
        _signal_at(*signalled)
    if in_look is not None:
        look = SegmenterModule.validation_step

        def interrupted(module: SegmenterModule, *args: Any) -> None:
            os.killpg(0, in_look)
            look(module, *args)

        SegmenterModule.validation_step = interrupted  # type: ignore[method-assign]
    torch.set_num_threads(1)
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["tokenstep", *words]
    main()


def _signal_at(number: int, event: str, ending: str) -> None:
    def watch(name: str, given: tuple[object, ...]) -> None:
        # Renaming is from one name to another: the second counts.
        if name == event and str(given[name == "os.rename"]).endswith(ending):
            os.kill(os.getpid(), number)

    sys.addaudithook(watch)


def _train(recipe: Recipe, die_at: Place | None) -> None:
    torch.set_num_threads(1)
    if die_at is not None:
        _kill_at(die_at)
    if isinstance(recipe, PolicyRecipe):
        train_policy(recipe, progress=False)
    else:
        train_segmenter(recipe, progress=False)


def _kill_at(place: Place) -> None:
    def before_step(module: PhaseModule, *_: object) -> None:
        if (module.number, module.global_step) == place and module.global_rank == 0:
            os.killpg(0, signal.SIGKILL)

    PhaseModule.on_train_batch_start = before_step  # type: ignore[method-assign,assignment]
    if multiprocessing.parent_process() is not None:
        os.setpgid(0, 0)


def _run_together(recipe: Recipe, die_at: Place | None) -> int:
    kind = "policy" if isinstance(recipe, PolicyRecipe) else "segmenter"
    call = [sys.executable, __file__, "train", kind, str(write_recipe(recipe))]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if die_at is not None:
        env["DIE_AT"] = json.dumps(die_at)
    done = subprocess.run(call, env=env, capture_output=True, timeout=300, start_new_session=True)
    if done.returncode > 0:
        print(done.stderr.decode())
    return done.returncode


def write_recipe(recipe: Recipe) -> Path:
    """The recipe as a TOML file beside its folder."""
    path = Path(f"{recipe.out}.toml")
    path.write_text(toml(dataclasses.asdict(recipe)))
    return path


def toml(table: dict[str, object]) -> str:
    """Nested tables as TOML text; None is left out."""
    held = {key: value for key, value in table.items() if value is not None}
    return "".join(f"{key} = {_inline(value)}\n" for key, value in held.items())


def _inline(value: object) -> str:
    if isinstance(value, dict):
        held = (f"{key} = {_inline(one)}" for key, one in value.items() if one is not None)
        return "{" + ", ".join(held) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)


if __name__ == "__main__":
    if "DIE_AT" in os.environ:
        _kill_at(tuple(json.loads(os.environ["DIE_AT"])))
    main()
