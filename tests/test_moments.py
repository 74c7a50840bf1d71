"""Moments of failure: signals, full disks, and many steps on end.

Those marked `long` (20 kills at random moments, 2,000 steps) have a command of their own:

    bash tests/run.sh -m long -s
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.torch import load_file
from test_train import equal, log

ROOT = Path(__file__).parents[1]
# a command of the project, with code before our modules are imported, and after
SCRIPT = """
import signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # is ignored where a shell runs it with &
{before}
import model, recognize, train
{code}
model.run({name}.main)
"""
# writes memory (KiB) and open files after each hundredth step
WATCH = """
import os
step = train.ProjectorTrainer.training_step
def watched(self, *args, **kwargs):
    if self.state.global_step % 100 == 0:
        memory = int(open("/proc/self/statm").read().split()[1]) * 4
        with open("watched", "a") as file:
            print(self.state.global_step, memory, len(os.listdir("/proc/self/fd")), file=file)
    return step(self, *args, **kwargs)
train.ProjectorTrainer.training_step = watched
"""
# kills itself when three hypotheses are written
KILL = """
import os, signal
recognized = recognize.recognize
def killed(*args):
    for i, row in enumerate(recognized(*args)):
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row
recognize.recognize = killed
"""


def command(folder, name, options, code="", before=""):
    """The arguments that run train.py or recognize.py in `folder`, for subprocess."""
    folder.mkdir(exist_ok=True)
    script = SCRIPT.format(root=str(ROOT), name=name, code=code, before=before)
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return {
        "args": [sys.executable, "script.py", *options.split()],
        "cwd": folder,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


def training(paths, options):
    """Flags of a training that saves often."""
    flags = f"--llm_model_name_or_path {paths.qwen} --data_path {paths.manifest}"
    flags += f" --whisper_model_name_or_path {paths.whisper} --output_dir out --report_to none"
    flags += " --per_device_train_batch_size 2 --learning_rate 1e-2 --logging_steps 1"
    return f"{flags} --lr_scheduler_type cosine {options}"


def whole(folder):
    """The steps of the whole checkpoints in `folder`, of which the newest can be read."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    steps = sorted(int(x.parent.name[11:]) for x in states if x.read_text().endswith("\n}\n"))
    assert not steps or load_file(folder / f"checkpoint-{steps[-1]}" / "model.safetensors")
    return steps


def newest(folder):
    """The step of the newest checkpoint in `folder`, whole or not."""
    return max((int(x.name[11:]) for x in folder.glob("checkpoint-*")), default=0)


def interrupt(paths, folder, options, sent, step=0, delay=0):
    """Train in `folder`, send a signal `delay` s after a new checkpoint, and return the output.

    The checkpoint may be half written, and is of `step` or later.
    """
    step, end = max(step, newest(folder / "out") + 1), time.monotonic() + 120
    run = command(folder, "train", training(paths, options))
    with open(folder / "printed", "w+") as file:
        process = subprocess.Popen(**{**run, "stdout": file}, start_new_session=True)
        while process.poll() is None and newest(folder / "out") < step and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it has ended, which it was not to do
            os.killpg(process.pid, sent)  # data workers get it, too, as from a terminal
        process.wait(timeout=60)
        printed = file.seek(0) or file.read()
    assert process.returncode and newest(folder / "out") >= step, printed
    return printed


def finish(paths, folder, options):
    """Train to the end, and return how many steps that took."""
    done = subprocess.run(**command(folder, "train", training(paths, options)), timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout.count("'loss': ")


def assert_same(one, other, steps):
    """Two runs logged the same and ended with the same weights."""
    for key in ("loss", "grad_norm", "learning_rate"):
        assert log(one / "out", key) == log(other / "out", key), key
        assert len(log(one / "out", key)) == steps
    assert equal(*(load_file(x / "out" / "model.safetensors") for x in (one, other)))


def test_control_c_and_sigterm_leave_a_whole_checkpoint(paths, tmp_path):
    options = "--max_steps 200 --save_steps 5 --save_total_limit 2 --dataloader_num_workers 1"
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    for step, sent in ((10, signal.SIGINT), (60, signal.SIGTERM)):
        printed = interrupt(paths, stopped, options, sent, step)
        assert "Traceback" not in printed
        assert ("error: KeyboardInterrupt()" in printed) == (sent == signal.SIGINT)
        assert max(whole(stopped / "out")) < 200
    left = 200 - whole(stopped / "out")[-1]
    assert finish(paths, stopped, options) == left
    assert finish(paths, straight, options) == 200
    assert_same(stopped, straight, 200)


@pytest.mark.long
def test_twenty_kills_at_random_moments_change_nothing(paths, tmp_path):
    options = "--max_steps 2000 --save_steps 3 --save_total_limit 2"
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    finish(paths, straight, options)
    rng, resumed = random.Random(0), []
    for _ in range(20):
        interrupt(paths, killed, options, signal.SIGKILL, delay=rng.uniform(0, 1.5))
        resumed.append(max(whole(killed / "out")))
    assert finish(paths, killed, options) == 2000 - resumed[-1]
    assert_same(killed, straight, 2000)
    print(f"\n20 kills; the newest whole checkpoint after each: {resumed}")


@pytest.mark.long
def test_memory_and_open_files_do_not_grow(paths, tmp_path):
    options = "--max_steps 2000 --save_steps 50 --save_total_limit 3 --logging_steps 100"
    options += f" --eval_data_path {paths.manifest} --eval_strategy steps --eval_steps 50"
    options = training(paths, options)
    done = subprocess.run(**command(tmp_path, "train", options, WATCH), timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    steps, memory, files = np.loadtxt(tmp_path / "watched").T
    slope = np.polyfit(steps[5:], memory[5:], 1)[0]
    print(f"\nmemory {memory[5:].min() / 1024:.0f} to {memory[5:].max() / 1024:.0f} MiB after step")
    print(f"500, {slope:.2f} KiB a step; open files {files[1:].min():.0f} to {files[1:].max():.0f}")
    # a batch's log-mel alone has 96 KiB
    assert slope < 4 and len(set(files[1:])) == 1
    assert whole(tmp_path / "out") == [1900, 1950, 2000]


def on_a_small_disk(run, size):
    """`run` with out/ on a disk of `size` of its own, of which a copy is left in copied/."""
    mount = f"mount -t tmpfs -o size={size} tmpfs out && (trap 'cp -r out copied' EXIT; \"$@\")"
    (run["cwd"] / "out").mkdir()
    return {**run, "args": ["unshare", "-rm", "sh", "-c", mount, "sh", *run["args"]]}


@pytest.fixture
def unshare():
    mount = "mount -t tmpfs tmpfs /tmp"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a small disk")


# the disk is full when the projector is written, or the optimizer's state
@pytest.mark.parametrize(
    ("size", "message"),
    [("32m", "No space left on device"), ("33m", r"unexpected pos .*\(disk full\?\)")],
)
def test_a_full_disk_ends_training_and_leaves_whole_checkpoints(
    paths, tmp_path, unshare, size, message
):
    run = command(tmp_path, "train", training(paths, "--max_steps 40 --save_steps 1"))
    done = subprocess.run(**on_a_small_disk(run, size), timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert re.search(rf"error: .*{message}", done.stdout)
    assert len(whole(tmp_path / "copied")) > 2


def test_a_killed_recognition_leaves_what_it_has_and_starts_anew(paths, projector, tmp_path):
    options = f"--projector_model_path {projector} --data_path {paths.manifest}"
    options += " --result_path out.jsonl --batch_size 1 --num_beams 1"
    (tmp_path / "out.jsonl").write_text("an earlier result")
    done = subprocess.run(**command(tmp_path, "recognize", options, KILL), timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out.jsonl").read_text() == "an earlier result"
    left = [json.loads(x) for x in (tmp_path / "out.jsonl.part").read_text().splitlines()]
    assert len(left) == 3 and all(isinstance(row["hyp"], str) for row in left)
    done = subprocess.run(**command(tmp_path, "recognize", options), timeout=300)
    rows = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert done.returncode == 0 and len(rows) == len(tiny.TEXTS)
    assert all(row["hyp"] == next(x["hyp"] for x in rows if x["wav"] == row["wav"]) for row in left)


def test_a_full_disk_ends_recognition_in_one_line(paths, projector, tmp_path, unshare):
    # a page of the disk holds 4 KiB, and the result of a manifest is of less than 1
    options = f"--projector_model_path {projector} --data_path {f'{paths.manifest} ' * 12}"
    run = command(tmp_path, "recognize", f"{options} --result_path out/out.jsonl")
    done = subprocess.run(**on_a_small_disk(run, "4k"), timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert re.search(r"error: .*No space left on device", done.stdout)
    assert not (tmp_path / "copied" / "out.jsonl").exists()


def test_training_needs_no_deepspeed_that_it_is_not_asked_for(paths, tmp_path):
    options = training(paths, "--max_steps 1")
    run = command(tmp_path, "train", options, before="sys.modules['deepspeed'] = None")
    done = subprocess.run(**run, timeout=300)
    assert done.returncode == 0 and whole(tmp_path / "out") == [1], done.stdout[-2000:]
