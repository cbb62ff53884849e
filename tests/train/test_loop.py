"""How a training ends: told to, at a fault of the data or the device, in several processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed
import numpy as np
import pytest
import torch
from killed import Call, run, write_recipe
from PIL import Image
from running import assert_same_weights, refused
from training import TRAINER, draw, policy_recipe, segmenter_recipe

from tokenstep.train.recipe import Phase, PolicyRecipe


def command(recipe: PolicyRecipe) -> list[str]:
    """The command line that runs a policy's recipe."""
    return ["train", "policy", str(write_recipe(recipe))]


def long_recipe(root: Path, out: Path, *, workers: int = 0) -> PolicyRecipe:
    """More steps than a test has patience for, saved at each."""
    recipe = policy_recipe(root, out, 10_000)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, workers=workers),
        trainer=dataclasses.replace(TRAINER, save_every=1),
    )


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGINT, 1)]
)
def test_told_to_end_with_all_that_it_started_it_says_so_in_a_line_and_can_go_on(
    drawn: Path, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    words = command(long_recipe(drawn, tmp_path / "out", workers=workers))
    last = tmp_path / "out" / "phase0" / "last.ckpt"
    for again in (False, True):
        before = last.stat().st_mtime_ns if again else 0
        with Call(tmp_path, *words) as call:
            call.wait_until(lambda: "phase 1 of 1" in call.said.read_text())
            # A step of its own: a data worker that is only just starting tells of the signal too.
            call.wait_until(lambda at=before: last.exists() and last.stat().st_mtime_ns > at)
            call.signal_group(number)
            code, said = call.end()
        assert code == 128 + number
        assert "the same command goes on after step" in said[-1], said
        assert not any("Traceback" in line for line in said), said
        assert any("goes on after step" in line for line in said[:-1]) == again, said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_told_to_end_in_a_look_at_val_it_ends_too(
    drawn: Path, policy: Path, tmp_path: Path
) -> None:
    phase = Phase(steps=1000, batch=2, crop=(64, 64))
    recipe = segmenter_recipe(drawn, policy, tmp_path / "out", phase)
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, workers=1),
        trainer=dataclasses.replace(TRAINER, save_every=2, val_every=3),
    )
    words = ["train", "segmenter", str(write_recipe(recipe))]
    with Call(tmp_path, *words, in_look=signal.SIGTERM) as call:
        code, said = call.end()
    assert code == 128 + signal.SIGTERM
    assert "told to end at step 3" in said[-1] and "goes on after step 2" in said[-1]


def test_a_scheduler_s_warning_leaves_no_checkpoint_that_a_phase_could_take_for_its_own(
    drawn: Path, tmp_path: Path
) -> None:
    words = command(long_recipe(drawn, tmp_path / "out"))
    call = [sys.executable, killed.__file__, *words]
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    process = subprocess.Popen(call, env=os.environ | slurm, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / "phase0" / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == -signal.SIGUSR1
    assert not list(tmp_path.rglob("hpc_ckpt*"))


def test_without_a_terminal_it_says_where_it_is(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path / "out", 3)
    with Call(tmp_path, *command(recipe)) as call:
        code, said = call.end()
    assert code == 0
    log = tmp_path / "out" / "log"
    assert "phase 1 of 1" in said[0] and f"tensorboard --logdir {log}" in said[0]
    assert list((log / "phase0").glob("events*"))
    assert any("step 3 of 3: loss " in line for line in said), said


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path / "out", 6)
    assert run(recipe, die_at=(0, 3)) == -signal.SIGKILL
    last = tmp_path / "out" / "phase0" / "last.ckpt"
    before = last.read_bytes()
    # A limit on the size of a file stands for a disk that is full.
    with Call(tmp_path, *command(recipe), largest_file=len(before) // 2) as call:
        code, said = call.end()
    assert code == 2
    assert str(last) in said[-1] and "free some space" in said[-1]
    assert not any("Traceback" in line for line in said), said
    assert last.read_bytes() == before
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    whole = policy_recipe(drawn, tmp_path / "whole", 6)
    assert run(recipe) == run(whole) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


def test_half_written_files_of_a_killed_run_are_removed(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path / "out", 3)
    assert run(recipe, die_at=(0, 2)) == -signal.SIGKILL
    left = tmp_path / "out" / "phase0" / f".{'0' * 32}.ckpt"
    left.write_bytes(b"half")
    own = tmp_path / "out" / ".notes"
    own.write_text("the user's")
    assert run(recipe) == 0
    assert not left.exists() and own.exists()


def test_a_data_worker_that_is_killed_is_one_line(drawn: Path, tmp_path: Path) -> None:
    words = command(long_recipe(drawn, tmp_path / "out", workers=1))
    with Call(tmp_path, *words) as call:
        call.wait_until((tmp_path / "out" / "phase0" / "last.ckpt").exists)
        children = Path(f"/proc/{call.process.pid}/task/{call.process.pid}/children")
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGKILL)
        code, said = call.end()
    assert code == 2
    assert "data.workers" in said[-1] and not any("Traceback" in line for line in said), said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_spoilt_after_the_check_is_one_line_from_a_worker_too(
    tmp_path: Path, workers: int
) -> None:
    root = draw(tmp_path / "data", {"train": 1, "val": 1})
    recipe = policy_recipe(root, tmp_path / "out", 1)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=workers))
    absent = dataclasses.replace(TRAINER, accelerator="abacus")
    refused(dataclasses.replace(recipe, trainer=absent), "abacus")  # but the data are checked
    spoil(root / "train" / "labels" / "000.png")
    line = refused(recipe, "77")
    assert line.startswith(str(root)), line


def spoil(label: Path) -> None:
    """Make all of a label an unknown class behind our back: its size and time stay."""
    before = label.stat()
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(label)
    with label.open("ab") as file:
        file.write(bytes(before.st_size - label.stat().st_size))
    os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "trainer",
    [
        {"accelerator": "abacus"},
        pytest.param(
            {"accelerator": "cuda"},
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    drawn: Path, tmp_path: Path, trainer: dict[str, str]
) -> None:
    recipe = policy_recipe(drawn, tmp_path, 1)
    refused(dataclasses.replace(recipe, trainer=dataclasses.replace(TRAINER, **trainer)), "trainer")


def test_a_loss_that_is_no_number_ends_the_training(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path, 4)
    phase = dataclasses.replace(recipe.phases[0], lr=1e30, warmup=0)
    refused(dataclasses.replace(recipe, phases=(phase,)), "not finite at step")
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["all", "the main one"])
def test_two_processes_told_to_end_say_so_once(drawn: Path, tmp_path: Path, whom: str) -> None:
    recipe = long_recipe(drawn, tmp_path / "out", workers=1)
    recipe = dataclasses.replace(
        recipe, trainer=dataclasses.replace(recipe.trainer, devices=2, save_every=1)
    )
    call = [sys.executable, killed.__file__, *command(recipe)]
    with (tmp_path / "stderr.txt").open("w") as said:
        process = subprocess.Popen(call, stderr=said, start_new_session=True)
        while not (tmp_path / "out" / "phase0" / "last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.1)
        if whom == "all":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    lines = (tmp_path / "stderr.txt").read_text().splitlines()
    assert [line for line in lines if "told to end" in line] == lines[-1:], lines
    assert not any("Traceback" in line for line in lines), lines
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.slow
def test_a_full_disk_ends_two_processes_with_one_line(drawn: Path, tmp_path: Path) -> None:
    recipe = policy_recipe(drawn, tmp_path / "out", 6)
    recipe = dataclasses.replace(
        recipe, trainer=dataclasses.replace(TRAINER, devices=2, save_every=1)
    )
    assert run(recipe, die_at=(0, 3)) == -signal.SIGKILL
    last = tmp_path / "out" / "phase0" / "last.ckpt"
    before = last.read_bytes()
    limit = ["bash", "-c", 'ulimit -f "$1"; shift; exec "$@"', "-", str(len(before) // 2048)]
    call = [*limit, sys.executable, killed.__file__, *command(recipe)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, lines
    assert str(last) in lines[-1] and not any("Traceback" in line for line in lines), lines
    assert last.read_bytes() == before


def test_two_processes_train_one_policy_and_speak_once(drawn: Path, tmp_path: Path) -> None:
    recipe = f"""
    patch = 8
    out = "{tmp_path / "out"}"
    data = {{ root = "{drawn}", workers = 0 }}
    policy = {{ trunk = "test_efficientnet", stages = [1, 2], sizes = [2, 4], width = 8 }}
    trainer = {{ accelerator = "cpu", devices = 2 }}
    phases = [{{ steps = 2, batch = 2, crop = [64, 64] }}]
    """
    (tmp_path / "recipe.toml").write_text(recipe)
    # A file, since Lightning starts the second process by running the first one's again.
    (tmp_path / "run.py").write_text("from tokenstep.cli.main import main\n\nmain()\n")
    call = [sys.executable, tmp_path / "run.py", "train", "policy", tmp_path / "recipe.toml"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 6
    assert "find_unused" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
