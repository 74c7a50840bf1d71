"""One process, two with DDP and two with ZeRO-3 learn the same; faults and resumption."""

import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_train import equal, log

import train
from model import run

ROOT = Path(__file__).parents[1]
ZERO = f"--deepspeed {ROOT}/ds_config_zero3.json"
# processes, gradient accumulation and further flags: each takes steps of eight utterances
SETUPS = {"one": (1, 4, ""), "ddp": (2, 2, ""), "zero": (2, 2, ZERO)}
# runs train.py, counts the forward passes of a layer into a file, and may stop itself on the way
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import model, train

rank = os.environ.get("RANK", "0")
init = model.SpeechLLM.__init__
def counting(self, *args):
    init(self, *args)
    def count(*_):
        with open("forwards-" + rank, "a") as file:
            print("forward", file=file)
    self.llm.model.layers[0].mlp.register_forward_pre_hook(count)
model.SpeechLLM.__init__ = counting

# a method of the Trainer, the step after which it is the last that is done, and in which processes
method, step, *ranks = os.environ.get("KILL_AFTER", "none 0").split()
def kill(original):
    def wrapper(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        if self.state.global_step == int(step) and rank in (ranks or rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return out
    return wrapper
if method != "none":
    setattr(train.ProjectorTrainer, method, kill(getattr(train.ProjectorTrainer, method)))
model.run(train.main)
"""


def start(paths, folder, setup, options, **environment):
    """Train as one of SETUPS in `folder`, and return the finished process."""
    processes, accumulation, flags = SETUPS[setup]
    options = f"--per_device_eval_batch_size {4 // processes} {options}"
    (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={processes}"
    command = f"{sys.executable} {launch if processes > 1 else ''} script.py {flags} {options}"
    (folder / "data").mkdir(exist_ok=True)
    # an epoch of two steps; of two processes one may have windows of one size, the other of two
    manifest = tiny.make_manifest(folder / "data", tiny.TEXTS * 2, longer=0.2)
    command += f" --llm_model_name_or_path {paths.qwen} --data_path {manifest}"
    command += f" --whisper_model_name_or_path {paths.whisper} --output_dir out --logging_steps 1"
    command += f" --gradient_accumulation_steps {accumulation} --per_device_train_batch_size 2"
    command += " --report_to none"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command.split(), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def finish(*args, **environment):
    done = start(*args, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss")


@pytest.fixture(scope="module")
def straight(paths, tmp_path_factory):
    """A step with CTC alone, two with the LLM, and an evaluation in each set-up's own folder."""
    # not Adam, which makes a step of the rounding where a gradient is nothing else
    options = "--max_steps 3 --optim sgd --learning_rate 1e-2 --lr_scheduler_type cosine"
    options += " --warmup_steps 1 --ctc_first 0.3 --save_strategy no --eval_strategy steps"
    options += f" --eval_steps 3 --eval_data_path {paths.manifest}"
    folder = tmp_path_factory.mktemp("straight")
    for setup in SETUPS:
        (folder / setup).mkdir()
        finish(paths, folder / setup, setup, options)
    return folder, options


@pytest.mark.parametrize("setup", ["ddp", "zero"])
def test_two_processes_learn_what_one_learns_with_accumulation(straight, setup):
    folder, _ = straight
    for key in LOGGED:
        single = log(folder / "one" / "out", key)
        assert log(folder / setup / "out", key) == pytest.approx(single, rel=1e-5), key
        assert any(single)
    rates = log(folder / setup / "out", "learning_rate")
    assert rates == log(folder / "one" / "out", "learning_rate") == [0, 0.01, 0.005]
    one, two = (load_file(folder / x / "out" / "model.safetensors") for x in ("one", setup))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_the_listening_gap_does_not_depend_on_the_number_of_processes(paths, straight, tmp_path):
    folder, options = straight
    finish(paths, tmp_path, "one", f"{options} --per_device_eval_batch_size 2")  # the same pairs
    [gap] = log(tmp_path / "out", "eval_listening_gap")
    assert abs(gap) > 0.01
    for setup in ("ddp", "zero"):
        assert log(folder / setup / "out", "eval_listening_gap") == [pytest.approx(gap, rel=1e-3)]


@pytest.fixture(scope="module")
def recognised(paths, straight, tmp_path_factory):
    """As `straight`, but for an evaluation after two steps that recognises 7 of 8 utterances."""
    folder = tmp_path_factory.mktemp("recognised")
    for setup in SETUPS:
        (folder / setup).mkdir()
        options = f"{straight[1]} --eval_steps 2 --eval_hypotheses 7"
        finish(paths, folder / setup, setup, options)
    return folder


@pytest.mark.parametrize("setup", SETUPS)
def test_recognition_between_steps_changes_none(straight, recognised, setup):
    for key in ("loss", "grad_norm"):
        plain = log(straight[0] / setup / "out", key)
        assert log(recognised / setup / "out", key) == pytest.approx(plain, rel=1e-6), key


@pytest.mark.parametrize("setup", ["ddp", "zero"])
def test_the_error_rate_of_evaluation_is_that_of_one_process(recognised, setup):
    for key in ("eval_WER %", "eval_substitutions", "eval_deletions", "eval_insertions"):
        single = log(recognised / "one" / "out", key)
        assert log(recognised / setup / "out", key) == single and len(single) == 2, key


@pytest.mark.parametrize("setup", SETUPS)
def test_gradient_checkpointing_recomputes_and_changes_nothing(paths, straight, tmp_path, setup):
    folder, options = straight
    finish(paths, tmp_path, setup, f"{options} --gradient_checkpointing")
    for key in LOGGED:
        plain = log(folder / setup / "out", key)
        assert log(tmp_path / "out", key) == pytest.approx(plain, rel=1e-5), key
    processes, accumulation, _ = SETUPS[setup]
    evaluation = 2 * 2  # two batches, each with the own audio and another's
    for rank in range(processes):
        # two of the three steps have the LLM; plain, the prompt is read once
        counted = (folder / setup / f"forwards-{rank}").read_text().count("forward")
        assert counted == 1 + 2 * accumulation + evaluation
        counted = (tmp_path / f"forwards-{rank}").read_text().count("forward")
        assert counted == 2 * 2 * accumulation + evaluation


@pytest.mark.parametrize("setup", SETUPS)
def test_bfloat16_trains_in_every_setup(paths, straight, tmp_path, setup):
    folder, options = straight
    finish(paths, tmp_path, setup, f"{options} --bf16 True")
    # the first step learns nothing, so that two have the same weights; a third's gradients show
    # where rounding has led by then
    for key, steps, tolerance in (("loss", 3, 0.01), ("grad_norm", 2, 0.03)):
        exact = log(folder / setup / "out", key)[:steps]
        assert log(tmp_path / "out", key)[:steps] == pytest.approx(exact, rel=tolerance), key
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("setup", SETUPS)
def test_a_killed_run_goes_on_exactly(paths, tmp_path, setup):
    options = "--max_steps 8 --save_steps 3 --learning_rate 1e-2 --dataloader_num_workers 2"
    options += " --ctc_first 0.25 --lr_scheduler_type cosine --save_total_limit 1"
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    finish(paths, tmp_path / "straight", setup, options)
    killed = tmp_path / "killed"
    # in the middle of a save: the checkpoint is no whole one, and the older one is still there
    done = start(paths, killed, setup, options, KILL_AFTER="save_model 6")
    assert done.returncode != 0
    names = {path.name for path in (killed / "out").iterdir()}
    assert names == {"checkpoint-3", "checkpoint-6"}
    assert not (killed / "out" / "checkpoint-6" / "trainer_state.json").exists()
    # between two saves; the one before was within an epoch
    assert start(paths, killed, setup, options, KILL_AFTER="training_step 7").returncode != 0
    done = finish(paths, killed, setup, options)
    assert done.stdout.count("'loss': ") == 2  # from the sixth step of eight
    for key in ("loss", "grad_norm", "learning_rate"):
        whole = log(tmp_path / "straight" / "out", key)
        assert log(killed / "out", key) == whole and len(whole) == 8, key
    straight, resumed = (
        load_file(tmp_path / name / "out" / "model.safetensors") for name in ("straight", "killed")
    )
    assert equal(straight, resumed)


def test_checkpoints_of_zero_hold_no_frozen_weights(paths, tmp_path):
    finish(paths, tmp_path, "zero", "--max_steps 1 --save_steps 1")
    checkpoint = tmp_path / "out" / "checkpoint-1"
    projector = (checkpoint / "model.safetensors").stat().st_size
    states = list((checkpoint / "global_step1").iterdir())
    # float32 weights and Adam's two moments, and a copy of the projector
    assert 3 * projector < sum(path.stat().st_size for path in states) < 4.5 * projector
    for path in checkpoint.glob("global_step1/*model_states.pt"):
        state = torch.load(path, weights_only=False)
        held = {name for name, tensor in state["module"].items() if tensor.numel()}
        assert not held  # ZeRO has them in its own states
        assert not state["frozen_param_fragments"]
    (tmp_path / "plain").write_text("")
    for path in (checkpoint / "model.safetensors", *states):
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def train_here(paths, folder, *options):
    arguments = ["--llm_model_name_or_path", paths.qwen, "--data_path", paths.manifest]
    arguments += ["--whisper_model_name_or_path", paths.whisper, "--output_dir", str(folder)]
    train.main([*arguments, "--report_to", "none", "--max_steps", "1", *options])


@pytest.mark.parametrize(
    "files, found",
    [
        (["rng_state.pth", "global_step1"], "1, 1"),
        (["rng_state_0.pth", "rng_state_1.pth"], "2, 0"),
    ],
)
def test_a_checkpoint_of_another_setup_is_refused(paths, tmp_path, files, found):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    for name in files:
        (checkpoint / name).touch()
    (checkpoint / "trainer_state.json").write_text("{\n}\n")
    message = rf"checkpoint-1: ranks, ZeRO \[{found}\], not \[.*: --projector_model_path"
    with pytest.raises(ValueError, match=message):
        train_here(paths, tmp_path)


def test_a_plain_checkpoint_is_refused_under_zero(paths, tmp_path):
    finish(paths, tmp_path, "ddp", "--max_steps 1 --save_steps 1")
    done = start(paths, tmp_path, "zero", "--max_steps 2")
    message = "checkpoint-1: ranks, ZeRO [2, 0], not [2, True]: --projector_model_path?"
    assert done.returncode != 0 and f"error: out/{message}" in done.stderr
    # its weights can be used all the same
    shutil.move(tmp_path / "out", tmp_path / "before")
    options = "--max_steps 1 --learning_rate 0 --projector_model_path before/model.safetensors"
    finish(paths, tmp_path, "zero", options)
    weights = [load_file(tmp_path / x / "model.safetensors") for x in ("before", "out")]
    assert equal(*weights)


def test_zero_without_torchrun_is_refused_before_models_load(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load", None)
    with pytest.raises(ValueError, match="environment variable RANK expected, but not set"):
        train_here(paths, tmp_path, *ZERO.split())


def test_one_killed_process_ends_the_other(paths, tmp_path):
    options = "--max_steps 500 --save_strategy no"
    done = start(paths, tmp_path, "ddp", options, KILL_AFTER="compute_loss 2 1")
    assert done.returncode != 0 and done.stderr.count("Signal 9 (SIGKILL)") == 1


def test_two_nodes_train_together(paths, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc_per_node=1"
    command += f" --rdzv_id=test --rdzv_backend=c10d --rdzv_endpoint=localhost:{port}"
    command += f" {ROOT}/train.py --llm_model_name_or_path {paths.qwen} --max_steps 1"
    command += f" --data_path {paths.manifest} --whisper_model_name_or_path {paths.whisper}"
    command += " --output_dir out --per_device_train_batch_size 1 --report_to none"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [
        subprocess.Popen(command.split(), cwd=tmp_path, env=environment, **pipes) for _ in range(2)
    ]
    for node in nodes:
        out, _ = node.communicate(timeout=300)
        assert node.returncode == 0, out[-4000:]
    assert len(list((tmp_path / "out" / "checkpoint-1").glob("rng_state_*.pth"))) == 2
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 1


def test_processes_that_do_not_find_one_another_are_one_line():
    # as torch has it when its store times out; half an hour is too long for a test
    store = torch.distributed.TCPStore
    with pytest.raises(SystemExit, match="^error: Timed out after . seconds waiting for cl"):
        run(lambda: store("localhost", 0, 2, True, timeout=timedelta(seconds=1)))
