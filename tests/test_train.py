"""train.py, from its command line to its checkpoints; other tests share the helpers."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import recognize
import train
from command import InputError
from manifest import read_manifest

ROOT = Path(__file__).parents[1]
TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone"
ZERO = f"--deepspeed {ROOT}/ds_config_zero3.json"
RECIPE = """\
    --llm_model_name_or_path Qwen2-1.5B-Instruct --whisper_model_name_or_path tiny.pt
    --data_path train.jsonl --bf16 True --output_dir Qwen-1.5B-Instruct-whisper-tiny
    --num_train_epochs 5 --per_device_train_batch_size 8 --per_device_eval_batch_size 1
    --gradient_accumulation_steps 8 --evaluation_strategy "no" --save_strategy "steps"
    --save_steps 100 --save_total_limit 10 --learning_rate 3e-4 --weight_decay 0.01
    --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type "cosine" --logging_steps 1
    --report_to "none" --model_max_length 512 --gradient_checkpointing
    --dataloader_num_workers 4 --dataloader_prefetch_factor 10"""


def launch(command: str, folder: Path) -> subprocess.Popen:
    """Start a command line in `folder`, where `printed` gets all that it prints."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "start_new_session": True}
    with open(folder / "printed", "w") as printed:
        options |= {"stdout": printed, "stderr": subprocess.STDOUT}
        return subprocess.Popen(shlex.split(command), **options)


def finish(command: str, folder: Path) -> str:
    """Run a command line in `folder` to its good end, and return what it printed."""
    process = launch(command, folder)
    process.wait(timeout=300)
    printed = (folder / "printed").read_text()
    assert process.returncode == 0, printed[-4000:]
    return printed


def wait_until(process: subprocess.Popen, happened) -> None:
    """Wait until `happened()`, before which the process must not end."""
    end = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, "it ended before it was to be stopped"
        assert time.monotonic() < end
        time.sleep(0.005)


def flags(paths, output_dir: Path, options: str) -> list[str]:
    """The arguments of a training of the tiny models; `options` come last and win."""
    models = f"--llm_model_name_or_path {paths.qwen} --whisper_model_name_or_path {paths.whisper}"
    rest = "--per_device_train_batch_size 4 --report_to none --disable_tqdm True --logging_steps 1"
    command = f"{models} --data_path {paths.manifest} --output_dir {output_dir} {rest} {options}"
    return shlex.split(command)


def run(paths, output_dir: Path, options: str) -> dict[str, torch.Tensor]:
    """Train in this process, and return the last weights that are saved."""
    train.main(flags(paths, output_dir, options))
    return load_file(output_dir / "model.safetensors")


def log(output_dir: Path, key: str) -> list[float]:
    """What was logged as `key`, in order."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


def equal(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def on_build(monkeypatch, look) -> None:
    """Have `look` called with each model that train.main builds, before it trains."""
    build = train.build

    def build_and_look(*arguments, **options):
        model = build(*arguments, **options)
        look(model)
        return model

    monkeypatch.setattr(train, "build", build_and_look)


@pytest.mark.parametrize("setup", ["one", "ddp", "zero"])
def test_the_published_command_runs_flag_for_flag(tmp_path, monkeypatch, setup):
    tiny.make_llm(tmp_path / "Qwen2-1.5B-Instruct", "qwen")
    tiny.make_whisper(tmp_path / "tiny.pt")
    tiny.make_manifest(tmp_path).rename(tmp_path / "train.jsonl")
    if setup == "one":
        monkeypatch.chdir(tmp_path)
        train.main(shlex.split(RECIPE))
    else:
        command = f"{TORCHRUN} --nnodes=1 --nproc_per_node=2 {ROOT}/train.py {RECIPE}"
        printed = finish(f"{command} {ZERO}" if setup == "zero" else command, tmp_path)
        assert "each process reads its audio itself" in printed
    output_dir = tmp_path / "Qwen-1.5B-Instruct-whisper-tiny"
    newest = output_dir / "checkpoint-5"
    assert len(list(newest.glob("rng_state*.pth"))) == (1 if setup == "one" else 2)
    saved = load_file(newest / "model.safetensors")
    assert equal(saved, load_file(output_dir / "model.safetensors"))
    assert log(newest, "epoch") == [1, 2, 3, 4, 5]
    assert len(log(newest, "loss")) == 5


def test_eight_utterances_are_learnt_word_for_word_and_the_rest_stays_frozen(
    paths, tmp_path, monkeypatch, capsys
):
    models, before = [], {}

    def weights(model):
        return {**model.state_dict(), **model.encoder.module.state_dict(prefix="encoder.")}

    def keep(model):
        models.append(model)
        for name, tensor in weights(model).items():
            before[name] = tensor.clone()

    on_build(monkeypatch, keep)
    options = "--max_steps 500 --per_device_train_batch_size 8 --save_strategy no --ctc_first 0.25"
    options += " --lr_scheduler_type cosine --learning_rate 2e-3 --logging_steps 100"
    options += " --prompt Repeat: --eval_strategy steps --eval_steps 500"
    run(paths, tmp_path, f"{options} --eval_data_path {paths.manifest}")
    [gap] = log(tmp_path, "eval_listening_gap")
    assert gap > 1  # nats a token

    capsys.readouterr()
    command = f"--projector_model_path {tmp_path}/model.safetensors --data_path {paths.manifest}"
    recognize.main(f"{command} --result_path {tmp_path}/out.jsonl --num_beams 1 3".split())
    printed = capsys.readouterr().out
    for beams in (1, 3):
        lines = (tmp_path / f"out.beam{beams}.jsonl").read_text().splitlines()
        assert [json.loads(line)["hyp"] for line in lines] == tiny.TEXTS
        assert f"| {beams} | 0.00 | 0 | 0 | 0 | 0.00 | 0 | 8 |" in printed

    for name, tensor in weights(models[0]).items():
        is_trained = name.startswith("projector.")
        assert torch.equal(tensor, before[name]) != is_trained, name


def test_the_same_command_goes_on_exactly_from_the_newest_whole_checkpoint(paths, tmp_path, capsys):
    options = "--max_steps 6 --save_steps 2 --learning_rate 1e-2"
    whole = run(paths, tmp_path, options)
    losses = log(tmp_path, "loss")
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:-2])  # as if killed while this was written
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-4-kept")  # a user's copy
    (tmp_path / "model.safetensors").unlink()
    capsys.readouterr()
    assert equal(run(paths, tmp_path, options), whole)
    assert capsys.readouterr().out.count("'loss': ") == 2
    assert log(tmp_path, "loss") == losses
    assert len(losses) == 6


@pytest.mark.parametrize(
    "options, then",
    [
        ("--max_steps 3 --lr_scheduler_type constant", ""),
        ("--max_steps 3 --save_strategy epoch --lr_scheduler_type cosine", ""),
        ("--num_train_epochs 1.5 --save_only_model True", ""),
        ("--max_steps 3", "--max_steps 2"),
        ("--max_steps 3", "--max_steps -1 --num_train_epochs 1"),
        ("--max_steps 3", "--resume_from_checkpoint {}/checkpoint-3"),
    ],
)
def test_a_finished_run_does_nothing_but_say_so(paths, tmp_path, capsys, options, then):
    options += " --save_steps 1 --learning_rate 1e-2"
    whole = run(paths, tmp_path, options)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*")}
    capsys.readouterr()
    assert equal(run(paths, tmp_path, f"{options} {then.format(tmp_path)}"), whole)
    assert capsys.readouterr().out.startswith(f"{tmp_path} is finished: all of its ")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*")} == files


def test_resuming_is_said_and_each_flag_that_differs_is_warned_of(paths, tmp_path, capsys):
    manifest = tmp_path / "m.jsonl"
    wavs = [utterance.path for utterance in read_manifest([paths.manifest])]
    write_manifest(manifest, wavs, tiny.TEXTS)
    constant = f"--data_path {manifest} --lr_scheduler_type constant --save_steps 1"
    run(paths, tmp_path / "out", f"{constant} --max_steps 1 --learning_rate 1e-5")
    checkpoint = tmp_path / "out" / "checkpoint-1"
    manifest.rename(tmp_path / "moved.jsonl")
    constant = constant.replace("m.jsonl", "moved.jsonl")

    capsys.readouterr()
    with pytest.warns(UserWarning) as warned:
        run(paths, tmp_path / "out", f"{constant} --max_steps 2 --learning_rate 1e-2")
    assert log(tmp_path / "out", "learning_rate") == [1e-5, 1e-5]
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"resuming from {checkpoint} at step 1"
    messages = [str(x.message) for x in warned if str(x.message).startswith("--")]
    assert messages == [
        f"--max_steps 2 holds from here on: {checkpoint} had 1",
        f"--learning_rate 0.01 has no effect: {checkpoint} goes on with 1e-05",
    ]

    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    write_manifest(tmp_path / "moved.jsonl", wavs[:4], tiny.TEXTS)
    with pytest.warns(UserWarning, match="--data_path: .*checkpoint-1 had other lines"):
        run(paths, tmp_path / "out", f"{constant} --max_steps 3 --learning_rate 1e-5")


def test_a_checkpoint_that_cannot_be_gone_on_from_is_refused_in_one_line(paths, tmp_path):
    run(paths, tmp_path, "--max_steps 2 --save_steps 1")
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    cases = {
        "": "checkpoint-2 holds no optimizer, as with --save_only_model: start anew from .* --p",
        f"--resume_from_checkpoint {tmp_path}": "is a folder of checkpoints: give one of them",
        "--resume_from_checkpoint none": "there is no folder none; wanted a checkpoint-N, or no",
        "--resume_from_checkpoint True --output_dir none": "there is no whole checkpoint in none",
        f"--resume_from_checkpoint {tmp_path}/checkpoint-1 --optim sgd": "holds the state of adamw",
    }
    for options, message in cases.items():
        with pytest.raises(InputError, match=message):
            run(paths, tmp_path, f"--max_steps 3 {options}")


def test_true_resumes_from_the_newest_checkpoint(paths, tmp_path, capsys):
    run(paths, tmp_path, "--max_steps 1")
    capsys.readouterr()
    run(paths, tmp_path, "--max_steps 2 --resume_from_checkpoint True")
    assert f"resuming from {tmp_path}/checkpoint-1 at step 1" in capsys.readouterr().out


BEST = """\
    --max_steps 3 --save_strategy best --eval_strategy steps --eval_steps 1 --learning_rate 1e-2
    --load_best_model_at_end True --metric_for_best_model loss --greater_is_better True"""


def test_a_finished_run_may_have_no_checkpoint_of_its_last_step(paths, tmp_path, capsys):
    options = f"{BEST} --eval_data_path {paths.manifest}"
    run(paths, tmp_path, options)
    assert not (tmp_path / "checkpoint-3").exists()
    capsys.readouterr()
    run(paths, tmp_path, options)
    assert "'loss': " not in capsys.readouterr().out
    # the folder of another run is not this one's
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    state["log_history"][0]["loss"] = -1
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    run(paths, tmp_path, options)
    assert "'loss': " in capsys.readouterr().out


def test_a_stop_after_the_last_checkpoint_costs_no_weights(paths, tmp_path):
    options = f"{BEST} --save_strategy steps --save_steps 1 --eval_data_path {paths.manifest}"
    best = run(paths, tmp_path, options)
    for name in ("model.safetensors", "trainer_state.json"):
        (tmp_path / name).unlink()
    assert equal(run(paths, tmp_path, options), best)
    last = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert not equal(last, best)
    assert len(log(tmp_path, "loss")) == 3


@pytest.mark.parametrize(
    "other, message",
    [
        ("--stride 4", "was trained with --stride 5, got 4"),
        ("--prompt Answer:", "was trained with --prompt 'Repeat:', got 'Answer:'"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(paths, tmp_path, other, message):
    run(paths, tmp_path, "--max_steps 1 --prompt Repeat:")
    with pytest.raises(InputError, match=f"checkpoint-1/model.safetensors {message}"):
        run(paths, tmp_path, f"--max_steps 2 {other}")


def test_the_best_checkpoint_is_loaded_at_the_end_where_asked_for(paths, tmp_path):
    options = "--max_steps 2 --save_steps 1 --eval_strategy steps --eval_steps 1"
    # the greatest loss counts as the best, so that it is the first checkpoint's
    options += " --load_best_model_at_end --metric_for_best_model loss --greater_is_better True"
    options += f" --learning_rate 1e-3 --eval_data_path {paths.manifest}"
    last = run(paths, tmp_path, options)
    assert equal(last, load_file(tmp_path / "checkpoint-1" / "model.safetensors"))
    assert not equal(last, load_file(tmp_path / "checkpoint-2" / "model.safetensors"))


def test_the_last_weights_are_saved_between_two_save_steps(paths, tmp_path):
    last = run(paths, tmp_path, "--max_steps 3 --save_steps 2 --learning_rate 1e-2")
    assert not equal(last, load_file(tmp_path / "checkpoint-2" / "model.safetensors"))


def test_training_goes_on_from_a_projector(paths, tmp_path):
    first = run(paths, tmp_path / "first", "--max_steps 1 --seed 1 --prompt Repeat:")
    options = f"--projector_model_path {tmp_path}/first/model.safetensors --learning_rate 0"
    again = run(paths, tmp_path / "again", f"--max_steps 1 {options} --prompt Repeat:")
    assert equal(again, first)


def evaluate(paths, folder: Path, options: str) -> dict[str, float]:
    """The figures of the first evaluation, which is of the first weights."""
    run(paths, folder, f"--max_steps 1 --learning_rate 0 --eval_strategy steps {options}")
    state = json.loads((folder / "trainer_state.json").read_text())
    return next(entry for entry in state["log_history"] if "eval_loss" in entry)


def write_manifest(path: Path, wavs: list[str], texts: list[str]) -> Path:
    lines = [json.dumps({"wav": wav, "txt": text}) for wav, text in zip(wavs, texts)]
    path.write_text("\n".join(lines))
    return path


def test_the_listening_gap_is_the_loss_with_the_audio_before_less_the_loss(paths, tmp_path):
    wavs = [utterance.path for utterance in read_manifest([paths.manifest])]
    own = write_manifest(tmp_path / "own.jsonl", wavs, tiny.TEXTS)
    swapped = write_manifest(tmp_path / "swapped.jsonl", [wavs[-1], *wavs[:-1]], tiny.TEXTS)
    with_own = evaluate(paths, tmp_path / "own", f"--eval_data_path {own}")
    with_swapped = evaluate(paths, tmp_path / "swapped", f"--eval_data_path {swapped}")
    difference = with_swapped["eval_loss"] - with_own["eval_loss"]
    assert abs(difference) > 1e-3
    assert with_own["eval_listening_gap"] == pytest.approx(difference, abs=1e-5)


def test_evaluation_one_by_one_warns_that_it_has_no_listening_gap(paths, tmp_path):
    eight = evaluate(paths, tmp_path / "8", f"--eval_data_path {paths.manifest}")
    options = f"--eval_data_path {paths.manifest} --per_device_eval_batch_size 1"
    with pytest.warns(UserWarning, match="no listening gap: --per_device_eval_batch_size must be"):
        one = evaluate(paths, tmp_path / "1", options)
    assert "eval_listening_gap" not in one
    # a mean over batches, so that only utterances of about as many letters make it the same
    assert one["eval_loss"] == pytest.approx(eight["eval_loss"], rel=0.05)


def test_a_last_batch_of_one_leaves_the_gap_of_the_others(paths, tmp_path):
    wavs = [utterance.path for utterance in read_manifest([paths.manifest])]
    seven = write_manifest(tmp_path / "seven.jsonl", wavs[:7], tiny.TEXTS)
    options = "--per_device_eval_batch_size 7 --eval_data_path"
    of_seven = evaluate(paths, tmp_path / "7", f"{options} {seven}")
    of_eight = evaluate(paths, tmp_path / "8", f"{options} {paths.manifest}")
    gap = of_seven["eval_listening_gap"]
    assert of_eight["eval_listening_gap"] == pytest.approx(gap, abs=1e-6)
    assert abs(gap) > 1e-3


def test_evaluation_while_ctc_is_alone_is_of_the_llm(paths, tmp_path):
    options = f"--eval_data_path {paths.manifest} --max_steps 2 --eval_steps 1"
    alone = evaluate(paths, tmp_path / "alone", f"{options} --ctc_first 1")
    both = evaluate(paths, tmp_path / "both", f"{options} --ctc_first 0")
    assert log(tmp_path / "alone", "llm_loss") == []
    assert alone["eval_loss"] == both["eval_loss"]
    assert alone["eval_listening_gap"] == both["eval_listening_gap"]


def test_evaluation_has_the_error_rate_of_recognition(paths, tmp_path, capsys):
    data = f"--eval_data_path {paths.manifest} --eval_hypotheses 5"
    figures = evaluate(paths, tmp_path, data)
    wavs = [utterance.path for utterance in read_manifest([paths.manifest])]
    five = write_manifest(tmp_path / "five.jsonl", wavs[:5], tiny.TEXTS)
    capsys.readouterr()
    command = f"--projector_model_path {tmp_path}/model.safetensors --data_path {five}"
    options = f"--result_path {tmp_path}/out.jsonl --num_beams 1 --bf16 False"
    recognize.main(f"{command} {options}".split())
    head, _, row, *_ = capsys.readouterr().out.splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | ")))
    assert figures["eval_wer"] == float(cells["WER %"])
    for name in ("substitutions", "deletions", "insertions"):
        assert figures[f"eval_{name}"] == float(cells[name])


def test_recognition_between_steps_changes_none(paths, tmp_path):
    options = "--max_steps 4 --eval_strategy steps --eval_steps 2 --learning_rate 1e-2"
    options += f" --save_strategy no --eval_data_path {paths.manifest}"
    plain = run(paths, tmp_path / "plain", options)
    recognised = run(paths, tmp_path / "recognised", f"{options} --eval_hypotheses 8")
    assert len(log(tmp_path / "recognised", "eval_wer")) == 2
    assert equal(plain, recognised)


def test_the_loss_is_a_mean_over_all_answer_tokens_of_a_step(paths, tmp_path):
    options = "--max_steps 2 --ctc_first 0 --save_strategy no --per_device_train_batch_size"
    run(paths, tmp_path / "whole", f"{options} 8")
    run(paths, tmp_path / "parts", f"{options} 2 --gradient_accumulation_steps 4")
    for key in ("loss", "llm_loss", "ctc_loss", "grad_norm"):
        whole = log(tmp_path / "whole", key)
        assert log(tmp_path / "parts", key) == pytest.approx(whole, rel=1e-5), key


def test_the_llm_joins_after_the_first_share_of_the_steps(paths, tmp_path):
    texts = ["go", "no", "up", "on", "in", "ten " * 30]  # the last is too much for its audio
    options = f"--data_path {tiny.make_manifest(tmp_path, texts)} --max_steps 4 --save_strategy no"
    run(paths, tmp_path / "first", f"{options} --ctc_first 0.5")
    assert len(log(tmp_path / "first", "llm_loss")) == 2
    run(paths, tmp_path / "without", f"{options} --ctc_weight 0")
    assert log(tmp_path / "without", "ctc_loss") == []
    assert log(tmp_path / "without", "loss") == log(tmp_path / "without", "llm_loss")
    losses = log(tmp_path / "first", "loss") + log(tmp_path / "without", "loss")
    assert 0 < min(losses) < max(losses) < 100


def test_encoder_outputs_from_the_disk_train_the_same(paths, tmp_path):
    options = "--max_steps 4 --learning_rate 1e-2 --save_strategy no"
    plain = run(paths, tmp_path / "plain", options)
    options += f" --encoder_cache {tmp_path}/cache"
    for name in ("first", "second"):
        assert equal(run(paths, tmp_path / name, options), plain)
        assert log(tmp_path / name, "loss") == log(tmp_path / "plain", "loss")
        assert len(list(tmp_path.glob("cache/*/*.safetensors"))) == 8


def test_the_older_flags_mean_what_they_meant(paths, tmp_path):
    options = "--max_steps 4 --warmup_ratio 0.5 --lr_scheduler_type constant_with_warmup"
    options += f" --evaluation_strategy epoch --eval_data_path {paths.manifest}"
    run(paths, tmp_path, f"{options} --learning_rate 1e-3 --save_strategy no")
    assert log(tmp_path, "learning_rate") == [0, 5e-4, 1e-3, 1e-3]
    assert len(log(tmp_path, "eval_loss")) == 2


def test_gradient_checkpointing_recomputes_and_changes_no_weight(paths, tmp_path, monkeypatch):
    options = "--max_steps 2 --optim sgd --learning_rate 1e-1 --ctc_first 0 --save_strategy no"
    plain = run(paths, tmp_path / "plain", options)
    calls = []

    def count(model):
        layer = model.llm.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_: calls.append("layer"))

    on_build(monkeypatch, count)
    again = run(paths, tmp_path / "again", f"{options} --gradient_checkpointing")
    assert len(calls) == 2 * 2  # forward and recomputation in each of two steps
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=0)


def test_bfloat16_that_is_emulated_becomes_float32_with_one_warning(paths, tmp_path, monkeypatch):
    exact = run(paths, tmp_path / "exact", "--max_steps 1 --save_strategy no")
    models = []
    on_build(monkeypatch, models.append)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.warns(UserWarning, match="processor emulates bfloat16") as warned:
        emulated = run(paths, tmp_path / "emulated", "--max_steps 1 --save_strategy no --bf16 True")
    messages = [str(warning.message) for warning in warned]
    assert sum("emulates" in message for message in messages) == 1
    assert models[0].llm.dtype == torch.float32
    assert equal(emulated, exact)


def test_resuming_on_another_kind_of_processor_warns_that_bits_differ(paths, tmp_path):
    options = "--save_steps 1 --learning_rate 1e-2 --max_steps"
    run(paths, tmp_path, f"{options} 1")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*bit for bit")
        run(paths, tmp_path, f"{options} 2")
    other = "checkpoint-2 was computed by OTHER in float32, and this run is by .*bit for bit"
    (tmp_path / "checkpoint-2" / "arithmetic.txt").write_text("OTHER in float32")
    with pytest.warns(UserWarning, match=other):
        run(paths, tmp_path, f"{options} 3")
    assert len(log(tmp_path, "loss")) == 3
