import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import recognize
import train
from model import InputError

ROOT = Path(__file__).parents[1]
RECIPE = """\
    --llm_model_name_or_path Qwen2-1.5B-Instruct \
    --whisper_model_name_or_path tiny.pt \
    --data_path train.jsonl \
    --bf16 True \
    --output_dir Qwen-1.5B-Instruct-whisper-tiny \
    --num_train_epochs 5 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 100 \
    --save_total_limit 10 \
    --learning_rate 3e-4 \
    --weight_decay 0.01 \
    --adam_beta2 0.95 \
    --warmup_ratio 0.01 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --report_to "none" \
    --model_max_length 512 \
    --gradient_checkpointing \
    --dataloader_num_workers 4 \
    --dataloader_prefetch_factor 10"""


def shell(command, folder):
    """Run a command line in `folder`, and return its standard output; fail if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run(paths, output_dir, *options):
    """Call train.main with the tiny models, and return the last weights it saved."""
    arguments = ["--llm_model_name_or_path", paths.qwen, "--data_path", paths.manifest]
    arguments += ["--whisper_model_name_or_path", paths.whisper, "--output_dir", str(output_dir)]
    arguments += ["--report_to", "none", "--disable_tqdm", "True", "--logging_steps", "1"]
    train.main([*arguments, "--per_device_train_batch_size", "4", *options])
    return load_file(output_dir / "model.safetensors")


def log(output_dir, key):
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_published_recipe_runs_flag_for_flag(tmp_path, processes):
    tiny.make_llm(tmp_path / "Qwen2-1.5B-Instruct", "qwen")
    tiny.make_whisper(tmp_path / "tiny.pt")
    shutil.copy(tiny.make_manifest(tmp_path), tmp_path / "train.jsonl")
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nnodes=1"
    shell(f"{torchrun} --nproc_per_node={processes} {ROOT}/train.py {RECIPE}", tmp_path)
    output_dir = tmp_path / "Qwen-1.5B-Instruct-whisper-tiny"
    newest = output_dir / "checkpoint-5"
    assert len(list(newest.glob("rng_state*.pth"))) == processes
    assert equal(
        load_file(newest / "model.safetensors"), load_file(output_dir / "model.safetensors")
    )
    rates = [
        entry for entry in json.loads((newest / "trainer_state.json").read_text())["log_history"]
    ]
    assert [entry["epoch"] for entry in rates if "loss" in entry] == [1, 2, 3, 4, 5]

    shell(
        f"{sys.executable} {ROOT}/recognize.py --llm_model_name_or_path Qwen2-1.5B-Instruct"
        " --whisper_model_name_or_path tiny.pt --data_path train.jsonl --result_path result.txt"
        f" --projector_model_path {newest}/model.safetensors",
        tmp_path,
    )
    assert len((tmp_path / "result.txt").read_text(encoding="utf-8").splitlines()) == 8


def test_eight_utterances_are_learnt_word_for_word_and_the_rest_stays_frozen(
    paths, tmp_path, monkeypatch, capsys
):
    models = []

    def load(**options):
        model, tokenizer = train_load(**options)
        models.append((model, {k: v.clone() for k, v in model.state_dict().items()}))
        return model, tokenizer

    train_load = train.load
    monkeypatch.setattr(train, "load", load)
    steps = ["--max_steps", "300", "--per_device_train_batch_size", "8", "--save_strategy", "no"]
    run(paths, tmp_path, *steps, "--learning_rate", "5e-3", "--lr_scheduler_type", "cosine")
    capsys.readouterr()
    for beams in ("1", "3"):
        arguments = ["--projector_model_path", str(tmp_path / "model.safetensors")]
        arguments += ["--data_path", paths.manifest, "--result_path", str(tmp_path / "out.txt")]
        recognize.main([*arguments, "--num_beams", beams])
        assert (tmp_path / "out.txt").read_text().splitlines() == tiny.TEXTS
        assert capsys.readouterr().out.startswith("WER 0.00 % of 8 words")

    [(model, before)] = models
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("projector."), name


def test_the_same_command_resumes_exactly_from_the_newest_checkpoint(paths, tmp_path):
    options = ["--max_steps", "6", "--save_steps", "2", "--learning_rate", "1e-2"]
    whole = run(paths, tmp_path, *options)
    losses = log(tmp_path, "loss")
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "model.safetensors").unlink()
    assert equal(run(paths, tmp_path, *options), whole)
    assert log(tmp_path, "loss") == losses and len(losses) == 6


def test_the_last_weights_are_saved_between_two_save_steps(paths, tmp_path):
    last = run(paths, tmp_path, "--max_steps", "3", "--save_steps", "2", "--learning_rate", "1e-2")
    assert not equal(last, load_file(tmp_path / "checkpoint-2" / "model.safetensors"))


def test_training_goes_on_from_a_projector(paths, projector, tmp_path):
    nothing = ["--max_steps", "1", "--learning_rate", "0", "--save_strategy", "no"]
    again = run(paths, tmp_path, *nothing, "--projector_model_path", projector)
    assert equal(again, load_file(projector))


def test_evaluation_loss_is_that_of_the_evaluation_manifest(paths, tmp_path):
    options = [
        "--num_train_epochs",
        "2",
        "--eval_data_path",
        paths.manifest,
        "--save_strategy",
        "no",
    ]
    run(paths, tmp_path, *options, "--evaluation_strategy", "epoch", "--learning_rate", "1e-2")
    losses = log(tmp_path, "eval_loss")
    assert len(losses) == 3 and losses[2] == losses[1] < losses[0]


def test_the_older_flags_mean_what_they_meant(paths, tmp_path):
    options = [
        "--max_steps",
        "4",
        "--warmup_ratio",
        "0.5",
        "--lr_scheduler_type",
        "constant_with_warmup",
    ]
    run(paths, tmp_path, *options, "--learning_rate", "1e-3", "--save_strategy", "no")
    assert log(tmp_path, "learning_rate") == [0, 5e-4, 1e-3, 1e-3]


def test_several_gpus_in_one_process_are_refused(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(train.TrainingArguments, "n_gpu", 4)
    with pytest.raises(InputError, match="torchrun --nproc_per_node=4"):
        run(paths, tmp_path)


def test_bad_input_ends_in_one_line_before_any_model_loads(tmp_path):
    (tmp_path / "m.jsonl").write_text("hello")
    command = [sys.executable, ROOT / "train.py", "--data_path", "m.jsonl", "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "train.py: m.jsonl:1: not a JSON object: hello"
    assert "Traceback" not in done.stderr
