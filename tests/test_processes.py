"""Several processes: they learn what one learns, end together and go on as they were."""

import shlex
import shutil
import socket
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file
from test_train import (
    ROOT,
    TORCHRUN,
    ZERO,
    equal,
    evaluate,
    finish,
    flags,
    launch,
    log,
    wait_until,
)
from torch.utils.data import DataLoader
from transformers import Trainer

import train
from checkpoints import check_checkpoint, count_steps, find_checkpoint
from command import InputError

# Processes, gradient accumulation and further flags: each takes steps of eight utterances. Neither
# the encoder's outputs on disk nor gradient checkpointing are to change a loss.
SETUPS = {
    "one": (1, 4, ""),
    "ddp": (2, 2, "--encoder_cache cache"),
    "zero": (2, 2, f"{ZERO} --gradient_checkpointing"),
}
# CTC alone for three steps of twelve, two evaluations, and checkpoints within an epoch and after
# one. Where a gradient is rounding, Adam makes a step of it unless epsilon is greater.
OPTIONS = """\
    --max_steps 12 --ctc_first 0.25 --learning_rate 1e-4 --adam_epsilon 1e-2
    --lr_scheduler_type cosine --warmup_steps 2 --per_device_train_batch_size 2 --save_steps 3
    --eval_strategy steps --eval_steps 9 --eval_hypotheses 3 --per_device_eval_batch_size 2"""
# of checkpoints and runs: how many processes, and whether with ZeRO
KINDS = [(1, False), (2, False), (1, True), (2, True)]
TRAINED = ("loss", "llm_loss", "ctc_loss", "grad_norm", "learning_rate")
ERROR_RATE = ("eval_wer", "eval_substitutions", "eval_deletions", "eval_insertions")


def make_command(paths, folder: Path, setup: str) -> str:
    """The command of one of SETUPS, with a manifest of two steps an epoch in `folder`."""
    (folder / "data").mkdir(parents=True)
    # of two processes one may have windows of one size, and the other of two
    manifest = tiny.make_manifest(folder / "data", tiny.TEXTS * 2, longer=0.2)
    processes, accumulation, further = SETUPS[setup]
    options = f"{OPTIONS} --data_path {manifest} --eval_data_path {paths.manifest} {further}"
    options += f" --gradient_accumulation_steps {accumulation}"
    start = f"{TORCHRUN} --nproc_per_node={processes}" if processes > 1 else sys.executable
    return f"{start} {ROOT}/train.py {shlex.join(flags(paths, Path('out'), options))}"


@pytest.fixture(scope="module")
def straight(paths, tmp_path_factory):
    """A folder with a whole run of each of SETUPS, in out/ of its own folder."""
    folder = tmp_path_factory.mktemp("straight")
    for setup in SETUPS:
        finish(make_command(paths, folder / setup, setup), folder / setup)
    return folder


def assert_about_the_same(one: Path, other: Path) -> None:
    for key in TRAINED:
        expected = log(one, key)
        assert len(expected) == (9 if key == "llm_loss" else 12)
        # ZeRO adds up a norm in another order
        tolerance = 3e-5 if key == "grad_norm" else 1e-5
        assert log(other, key) == pytest.approx(expected, rel=tolerance), key
    # as exact as the two losses whose difference it is
    gaps = log(one, "eval_listening_gap")
    assert log(other, "eval_listening_gap") == pytest.approx(gaps, abs=1e-4)
    assert abs(gaps[0]) > 0.01
    for key in ERROR_RATE:
        assert log(other, key) == log(one, key), key
        assert len(log(one, key)) == 2
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("setup", ["ddp", "zero"])
def test_two_processes_learn_what_one_learns_with_accumulation(straight, setup):
    assert_about_the_same(straight / "one" / "out", straight / setup / "out")


@pytest.mark.parametrize("setup", SETUPS)
def test_the_loss_is_the_sum_of_both_losses(straight, setup):
    out = straight / setup / "out"
    losses, ctc_losses, llm_losses = log(out, "loss"), log(out, "ctc_loss"), log(out, "llm_loss")
    for loss, llm_loss, ctc_loss in zip(losses, [0] * 3 + llm_losses, ctc_losses, strict=True):
        assert loss == pytest.approx(llm_loss + 0.3 * ctc_loss, rel=1e-5)


@pytest.mark.parametrize("setup", ["ddp", "zero"])
def test_the_evaluation_of_two_processes_is_that_of_one(paths, straight, tmp_path, setup):
    *_, loss = log(straight / setup / "out", "eval_loss")
    weights = straight / setup / "out" / "model.safetensors"
    options = f"--eval_data_path {paths.manifest} --per_device_eval_batch_size 4"
    figures = evaluate(paths, tmp_path, f"{options} --projector_model_path {weights}")
    assert figures["eval_loss"] == pytest.approx(loss, rel=1e-5)


def copy_first_checkpoint(out: Path, folder: Path) -> None:
    """What a run that was stopped soon after its third step has left, in out/ of `folder`."""
    shutil.copytree(out / "checkpoint-3", folder / "out" / "checkpoint-3")


@pytest.mark.parametrize("setup", ["ddp", "zero"])
def test_a_killed_process_ends_the_other_and_their_run_goes_on_exactly(
    paths, straight, tmp_path, setup
):
    command = make_command(paths, tmp_path, setup)
    process = launch(command, tmp_path)
    # while a checkpoint is written or soon after it
    wait_until(process, (tmp_path / "out" / "checkpoint-6").exists)
    workers = psutil.Process(process.pid).children()
    workers[-1].kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert process.wait(timeout=60) != 0
    steps = [int(path.parent.name[11:]) for path in tmp_path.glob("out/*/trainer_state.json")]
    printed = finish(command, tmp_path)
    assert printed.count("'loss': ") == 12 - max(steps)
    assert max(steps) in (3, 6)
    for key in TRAINED + ERROR_RATE + ("eval_loss", "eval_listening_gap"):
        assert log(tmp_path / "out", key) == log(straight / setup / "out", key), key
    ended, whole = (
        load_file(x / "out" / "model.safetensors") for x in (tmp_path, straight / setup)
    )
    assert equal(ended, whole)


@pytest.mark.parametrize("setup", ["ddp", "zero"])
def test_a_finished_run_only_says_that_it_is_finished(paths, straight, tmp_path, setup):
    command = make_command(paths, tmp_path, setup)
    shutil.copytree(straight / setup / "out", tmp_path / "out")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/**/*")}
    printed = finish(command, tmp_path)
    assert printed.count("out is finished: all of its 12 steps are done") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/**/*")} == files


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("utterances", [16, 17, 23, 31])
@pytest.mark.parametrize("processes, accumulation", [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_steps_are_counted_as_the_trainer_does(utterances, processes, accumulation, drop_last):
    args = SimpleNamespace(max_steps=-1, num_train_epochs=1.5, train_batch_size=2)
    args.gradient_accumulation_steps = accumulation
    args.dataloader_drop_last, args.world_size = drop_last, processes
    loader = DataLoader(range(utterances), args.train_batch_size, drop_last=drop_last)
    loader = prepare_data_loader(loader, num_processes=processes, process_index=0)
    trainer = SimpleNamespace(num_examples=len, get_sp_size=lambda: 1)
    trainer.get_total_train_batch_size = lambda args: None
    *_, steps = Trainer.set_initial_training_values(trainer, args, loader)
    assert count_steps(args, utterances) == steps


@pytest.mark.parametrize("before, after", [("ddp", "one"), ("one", "ddp")])
def test_a_run_without_zero_goes_on_with_another_number_of_processes(
    paths, straight, tmp_path, before, after
):
    copy_first_checkpoint(straight / before / "out", tmp_path)
    printed = finish(make_command(paths, tmp_path, after), tmp_path)
    assert "it goes on as before only if processes x --per_device_train_batch_size x" in printed
    assert printed.count("'loss': ") == 9
    assert_about_the_same(straight / before / "out", tmp_path / "out")


@pytest.mark.parametrize("found", KINDS)
@pytest.mark.parametrize("here", KINDS)
def test_a_checkpoint_whose_optimizer_would_be_lost_is_refused(tmp_path, found, here):
    # what tells by how many processes a checkpoint is; a later one is half written
    for name, state in (("checkpoint-9", "{\n}\n"), ("checkpoint-10", "{\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
        for process in range(found[0]):
            (tmp_path / name / f"rng_state_{process}.pth").touch()
        if found[1]:
            (tmp_path / name / "global_step9").mkdir()
        if not found[1]:
            (tmp_path / name / "optimizer.pt").touch()
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, optim="sgd")
    args.bf16 = False
    args.world_size, args.deepspeed = here[0], "zero.json" if here[1] else None
    checkpoint = str(tmp_path / "checkpoint-9")
    assert find_checkpoint(args) == checkpoint
    with warnings.catch_warnings(record=True) as warned:
        if found == here or not (found[1] or here[1]):
            check_checkpoint(args, checkpoint)
        else:
            names = {True: "with ZeRO", False: "without ZeRO"}
            with pytest.raises(InputError) as error:
                check_checkpoint(args, checkpoint)
            message = str(error.value)
            assert f"9 is of {found[0]} processes {names[found[1]]}, and this run is" in message
            assert f" of {here[0]} {names[here[1]]}: start it as before, or start" in message
            assert f"--projector_model_path {checkpoint}/model.safetensors and another" in message
    assert len(warned) == (found[0] != here[0] and not found[1] and not here[1])


def test_a_checkpoint_of_zero_is_refused_without_it(paths, straight, tmp_path):
    copy_first_checkpoint(straight / "zero" / "out", tmp_path)
    with pytest.raises(InputError, match="checkpoint-3 is of 2 processes with ZeRO, and this run"):
        train.main(flags(paths, tmp_path / "out", "--max_steps 12"))


def test_zero_without_torchrun_is_refused_in_one_line(paths, tmp_path):
    options = shlex.join(flags(paths, tmp_path / "out", ZERO))
    process = launch(f"{sys.executable} {ROOT}/train.py {options}", tmp_path)
    assert process.wait(timeout=60) == 1
    printed = (tmp_path / "printed").read_text()
    assert "Traceback" not in printed
    message = "error: --deepspeed needs torchrun: torchrun --nproc_per_node=1 train.py"
    assert printed.splitlines()[-1].startswith(message)


def test_checkpoints_of_zero_hold_no_frozen_weights(straight, tmp_path):
    checkpoint = straight / "zero" / "out" / "checkpoint-3"
    projector = (checkpoint / "model.safetensors").stat().st_size
    states = list((checkpoint / "global_step3").iterdir())
    # float32 weights and Adam's two moments, and a copy of the projector
    size = sum(path.stat().st_size for path in states)
    assert 3 * projector < size < 4.5 * projector
    for path in checkpoint.glob("global_step3/*model_states.pt"):
        state = torch.load(path, weights_only=False)
        held = [name for name, tensor in state["module"].items() if tensor.numel()]
        assert held == []  # ZeRO has them in its own states
        assert not state["frozen_param_fragments"]
    (tmp_path / "plain").touch()
    for path in (checkpoint / "model.safetensors", *states):
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # the user's umask


@pytest.mark.long
def test_two_nodes_train_together(paths, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc_per_node=1"
    command += f" --rdzv_id=test --rdzv_backend=c10d --rdzv_endpoint=localhost:{port}"
    options = shlex.join(flags(paths, tmp_path / "out", "--max_steps 1"))
    command += f" {ROOT}/train.py {options}"
    for node in [launch(command, tmp_path / name) for name in ("first", "second")]:
        assert node.wait(timeout=300) == 0
    assert len(list((tmp_path / "out" / "checkpoint-1").glob("rng_state_*.pth"))) == 2
    assert len(log(tmp_path / "out", "loss")) == 1
