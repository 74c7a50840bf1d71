"""Moments of failure: signals, full disks, and many steps on end.

Those marked `long` (20 kills at random moments, 2,000 steps) have a command of their own:

    bash tests/run.sh -m long -s
"""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file
from test_train import ROOT, equal, finish, flags, launch, log, wait_until

OFTEN = "--per_device_train_batch_size 2 --learning_rate 1e-2 --lr_scheduler_type cosine"


def make_command(paths, options: str) -> str:
    """A training of small steps, with its output in out/."""
    arguments = shlex.join(flags(paths, Path("out"), f"{OFTEN} {options}"))
    return f"{sys.executable} {ROOT}/train.py {arguments}"


def whole_checkpoints(out: Path) -> list[int]:
    """The steps of the whole checkpoints, of which the newest can be read."""
    steps = []
    for state in out.glob("checkpoint-*/trainer_state.json"):
        if state.read_text().endswith("\n}\n"):
            steps.append(int(state.parent.name.removeprefix("checkpoint-")))
    steps.sort()
    if steps:
        assert load_file(out / f"checkpoint-{steps[-1]}" / "model.safetensors")
    return steps


def newest_checkpoint(out: Path) -> int:
    """The step of the newest checkpoint, whole or not."""
    return max((int(path.name[11:]) for path in out.glob("checkpoint-*")), default=0)


def interrupt(command: str, folder: Path, sent: int, step: int, delay: float = 0) -> str:
    """Start in `folder`, send a signal, and return what was printed.

    The signal comes `delay` s after there is a checkpoint of `step` or later, maybe half written.
    """
    process = launch(command, folder)
    wait_until(process, lambda: newest_checkpoint(folder / "out") >= step)
    time.sleep(delay)
    os.killpg(process.pid, sent)  # data workers get it, too, as from a terminal
    process.wait(timeout=60)
    printed = (folder / "printed").read_text()
    assert process.returncode != 0, printed
    return printed


def assert_same(one: Path, other: Path, steps: int) -> None:
    """Both runs logged the same and ended with the same weights."""
    for key in ("loss", "grad_norm", "learning_rate"):
        assert log(one / "out", key) == log(other / "out", key), key
        assert len(log(one / "out", key)) == steps
    weights = [load_file(folder / "out" / "model.safetensors") for folder in (one, other)]
    assert equal(*weights)


def test_a_run_that_is_stopped_by_any_signal_goes_on_exactly(paths, tmp_path):
    options = "--max_steps 100 --save_steps 5 --save_total_limit 2 --dataloader_num_workers 1"
    command = make_command(paths, options)
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    # a run in the background ignores Ctrl-C, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals = {10: signal.SIGINT, 30: signal.SIGTERM, 50: signal.SIGKILL}
    printed = {}
    for step, sent in signals.items():
        printed[sent] = interrupt(command, stopped, sent, step)
        assert step - 5 <= max(whole_checkpoints(stopped / "out")) < 100
    assert printed[signal.SIGINT].endswith("\nstopped by Ctrl-C\n")
    assert not any("Traceback" in text for text in printed.values())
    left = 100 - max(whole_checkpoints(stopped / "out"))
    assert finish(command, stopped).count("'loss': ") == left
    assert finish(command, straight).count("'loss': ") == 100
    assert_same(stopped, straight, 100)


@pytest.mark.long
def test_twenty_kills_at_random_moments_change_nothing(paths, tmp_path):
    command = make_command(paths, "--max_steps 2000 --save_steps 3 --save_total_limit 2")
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    finish(command, straight)
    rng, resumed = random.Random(0), []
    for _ in range(20):
        step = newest_checkpoint(stopped / "out") + 1
        interrupt(command, stopped, signal.SIGKILL, step, delay=rng.uniform(0, 1.5))
        resumed.append(max(whole_checkpoints(stopped / "out")))
    assert finish(command, stopped).count("'loss': ") == 2000 - resumed[-1]
    assert_same(stopped, straight, 2000)
    print(f"\n20 kills; the newest whole checkpoint after each: {resumed}")


@pytest.mark.long
def test_memory_and_open_files_do_not_grow(paths, tmp_path):
    options = "--max_steps 2000 --save_steps 50 --save_total_limit 3 --eval_strategy steps"
    options += f" --eval_steps 50 --eval_data_path {paths.manifest}"
    training = launch(make_command(paths, options), tmp_path)
    process = psutil.Process(training.pid)
    steps, memory, files = [], [], []
    while training.poll() is None:
        step = newest_checkpoint(tmp_path / "out")
        if step >= 500 and (not steps or step > steps[-1]):
            steps.append(step)
            memory.append(process.memory_info().rss / 1024)
            files.append(process.num_fds())
        time.sleep(0.02)
    assert training.returncode == 0
    slope = np.polyfit(steps, memory, 1)[0]
    print(f"\nfrom step 500 on {slope:.2f} KiB a step, open files {min(files)} to {max(files)}")
    # a batch's log-mel alone has 96 KiB; a file that is being written may be open
    assert slope < 4
    assert max(files) - min(files) <= 3
    assert whole_checkpoints(tmp_path / "out") == [1900, 1950, 2000]


def test_a_full_disk_ends_training_and_leaves_whole_checkpoints(paths, tmp_path):
    mount = "mount -t tmpfs -o size=32m tmpfs out"
    (tmp_path / "out").mkdir()
    alone = ["unshare", "-rm", "sh", "-c"]
    if subprocess.run([*alone, mount], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this system lets no user mount a small disk")
    command = make_command(paths, "--max_steps 40 --save_steps 1")
    # the disk goes with the process, and so what is on it is copied
    script = f"{mount} && (trap 'cp -r out copied' EXIT; {command})"
    process = launch(shlex.join([*alone, script]), tmp_path)
    assert process.wait(timeout=300) == 1
    assert len(whole_checkpoints(tmp_path / "copied")) > 2
    # whichever file of a checkpoint it is that has no more room
    printed = (tmp_path / "printed").read_text()
    assert "No space left on device" in printed or "file write failed" in printed, printed
