import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import tiny
import torch
from safetensors.torch import load_file

import recognize
import train
from model import DEFAULTS

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


def on_load(monkeypatch, look):
    """Have `look` called with the model that train.main loads, before it trains."""
    original = train.load

    def load(**options):
        model = original(**options)
        look(model)
        return model

    monkeypatch.setattr(train, "load", load)


@pytest.mark.parametrize(
    "processes, deepspeed", [(1, ""), (2, ""), (2, "--deepspeed ds_config_zero3.json")]
)
def test_the_published_recipe_runs_flag_for_flag(tmp_path, processes, deepspeed):
    shutil.copy(ROOT / "ds_config_zero3.json", tmp_path)
    tiny.make_llm(tmp_path / "Qwen2-1.5B-Instruct", "qwen")
    tiny.make_whisper(tmp_path / "tiny.pt")
    shutil.copy(tiny.make_manifest(tmp_path), tmp_path / "train.jsonl")
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nnodes=1"
    shell(f"{torchrun} --nproc_per_node={processes} {ROOT}/train.py {RECIPE} {deepspeed}", tmp_path)
    output_dir = tmp_path / "Qwen-1.5B-Instruct-whisper-tiny"
    newest = output_dir / "checkpoint-5"
    assert len(list(newest.glob("rng_state*.pth"))) == processes
    assert equal(
        load_file(newest / "model.safetensors"), load_file(output_dir / "model.safetensors")
    )
    assert log(newest, "epoch") == [1, 2, 3, 4, 5] and len(log(newest, "loss")) == 5

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

    def whole(model):
        return {**model.state_dict(), **model.encoder.state_dict(prefix="encoder.")}

    def keep(model):
        models.append((model, {k: v.clone() for k, v in whole(model).items()}))

    on_load(monkeypatch, keep)
    monkeypatch.setitem(DEFAULTS, "prompt", "Repeat:")  # a letter is a token here
    steps = ["--max_steps", "1000", "--per_device_train_batch_size", "8", "--save_strategy", "no"]
    steps += ["--ctc_first", "0.25", "--lr_scheduler_type", "cosine", "--learning_rate", "2e-3"]
    steps += ["--eval_data_path", paths.manifest, "--eval_strategy", "steps"]
    steps += ["--eval_steps", "1000"]
    run(paths, tmp_path, *steps)
    assert log(tmp_path, "eval_listening_gap")[0] > 1  # nats a token
    capsys.readouterr()
    for beams in ("1", "3"):
        arguments = ["--projector_model_path", str(tmp_path / "model.safetensors")]
        arguments += ["--data_path", paths.manifest, "--result_path", str(tmp_path / "out.jsonl")]
        recognize.main([*arguments, "--num_beams", beams])
        results = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
        assert [result["hyp"] for result in results] == tiny.TEXTS
        assert f"| {beams} | 0.00 | 0 | 0 | 0 |" in capsys.readouterr().out

    [(model, before)] = models
    for name, tensor in whole(model).items():
        assert torch.equal(tensor, before[name]) != name.startswith("projector."), name


def test_the_same_command_resumes_exactly_from_the_newest_checkpoint(paths, tmp_path, capsys):
    options = ["--max_steps", "6", "--save_steps", "2", "--learning_rate", "1e-2"]
    whole = run(paths, tmp_path, *options)
    losses = log(tmp_path, "loss")
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()  # as if killed while saving it
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-4-kept")  # a user's copy
    (tmp_path / "model.safetensors").unlink()
    capsys.readouterr()
    assert equal(run(paths, tmp_path, *options), whole)
    assert capsys.readouterr().out.count("'loss': ") == 2
    assert log(tmp_path, "loss") == losses and len(losses) == 6


def test_batches_are_of_utterances_about_as_long_in_random_order():
    durations = [int(x) / 100 for x in torch.randint(100, 1_000, (4_003,))]
    rows = [{"duration": seconds, "i": i} for i, seconds in enumerate(durations)]
    rows += rows  # a manifest that is named twice
    ordered = train.by_length(rows, 8, seed=42)
    assert ordered == train.by_length(rows, 8, seed=42) != train.by_length(rows, 8, seed=7)
    assert sorted(row["i"] for row in ordered) == sorted([*range(4_003)] * 2)
    batches = [ordered[start : start + 8] for start in range(0, 8_006, 8)]
    assert len(batches[-1]) == 6
    padded = sum(len(batch) * max(row["duration"] for row in batch) for batch in batches)
    assert padded < 1.1 * 2 * sum(durations)  # and 1.7 times as much in batches at random
    longest = torch.tensor([max(row["duration"] for row in batch) for batch in batches]).float()
    falls = (longest[1:] < longest[:-1]).float().mean()
    assert 0.3 < falls < 0.7  # neither from long to short nor from short to long
    both = sum(len({row["i"] for row in batch}) < len(batch) for batch in batches)
    assert both < len(batches) / 2  # a row and its double are seldom in one batch
    assert train.by_length(rows[:3], 8, seed=42) != [] and len(train.by_length(rows[:8], 8, 0)) == 8


def test_a_checkpoint_of_other_settings_is_not_resumed(paths, tmp_path):
    run(paths, tmp_path, "--max_steps", "1")
    with pytest.raises(ValueError, match="checkpoint-1.* is for stride '5', not '4'"):
        run(paths, tmp_path, "--max_steps", "2", "--stride", "4")


def test_the_best_checkpoint_is_loaded_at_the_end_where_asked_for(paths, tmp_path):
    options = ["--max_steps", "2", "--save_steps", "1", "--eval_data_path", paths.manifest]
    options += ["--eval_strategy", "steps", "--eval_steps", "1", "--learning_rate", "1e-3"]
    # the greatest loss counts as the best, so that it is the first checkpoint's
    options += ["--load_best_model_at_end", "--greater_is_better", "True"]
    last = run(paths, tmp_path, *options, "--metric_for_best_model", "loss")
    assert equal(last, load_file(tmp_path / "checkpoint-1" / "model.safetensors"))
    assert not equal(last, load_file(tmp_path / "checkpoint-2" / "model.safetensors"))


def test_the_last_weights_are_saved_between_two_save_steps(paths, tmp_path):
    last = run(paths, tmp_path, "--max_steps", "3", "--save_steps", "2", "--learning_rate", "1e-2")
    assert not equal(last, load_file(tmp_path / "checkpoint-2" / "model.safetensors"))


def test_training_goes_on_from_a_projector(paths, projector, tmp_path):
    nothing = ["--max_steps", "1", "--learning_rate", "0", "--save_strategy", "no"]
    again = run(paths, tmp_path, *nothing, "--projector_model_path", projector)
    assert equal(again, load_file(projector))


def test_evaluation_loss_is_that_of_the_evaluation_manifest(paths, tmp_path):
    options = ["--num_train_epochs", "2", "--save_strategy", "no"]
    options += ["--eval_data_path", paths.manifest]
    run(paths, tmp_path, *options, "--evaluation_strategy", "epoch", "--learning_rate", "1e-2")
    losses = log(tmp_path, "eval_loss")
    assert len(losses) == 2 and losses[1] < losses[0]


def test_the_listening_gap_is_the_loss_with_audio_of_the_one_before_less_the_loss(paths, tmp_path):
    rows = [json.loads(line) for line in Path(paths.manifest).read_text().splitlines()]
    folder = str(Path(paths.manifest).parent)
    own, swapped = tmp_path / "own.jsonl", tmp_path / "swapped.jsonl"
    wavs = [f"{folder}/{row['wav']}" for row in rows]
    for path, order in ((own, wavs), (swapped, [wavs[-1], *wavs[:-1]])):
        lines = [json.dumps({"wav": w, "txt": row["txt"]}) for w, row in zip(order, rows)]
        path.write_text("\n".join(lines))
    losses = {}
    options = ["--max_steps", "1", "--eval_strategy", "steps", "--dataloader_num_workers", "1"]
    for path in (own, swapped):
        run(paths, tmp_path / path.stem, *options, "--eval_data_path", str(path))
        losses[path] = log(tmp_path / path.stem, "eval_loss")[0]
    [gap] = log(tmp_path / "own", "eval_listening_gap")
    assert gap == pytest.approx(losses[swapped] - losses[own], abs=1e-5) and abs(gap) > 1e-3


def test_evaluation_logs_the_error_rate_that_recognition_has(paths, tmp_path, capsys):
    options = ["--max_steps", "1", "--eval_data_path", paths.manifest, "--eval_strategy", "steps"]
    run(paths, tmp_path, *options, "--eval_hypotheses", "5")
    capsys.readouterr()
    five = Path(paths.manifest).with_stem("five")
    five.write_text("\n".join(Path(paths.manifest).read_text().splitlines()[:5]))
    arguments = ["--projector_model_path", str(tmp_path / "model.safetensors"), "--num_beams", "1"]
    arguments += ["--data_path", str(five), "--result_path", str(tmp_path / "out.jsonl")]
    recognize.main([*arguments, "--bf16", "False"])
    heads, _, cells = (x.split(" | ") for x in capsys.readouterr().out.splitlines()[-3:])
    for head, cell in list(zip(heads, cells))[1:5]:  # WER and edits
        assert log(tmp_path, f"eval_{head}") == [float(cell)]


def test_the_llm_joins_after_the_first_share_of_the_steps(paths, tmp_path, monkeypatch):
    texts = ["go", "no", "up", "on", "in", "ten " * 30]  # the last is too much for its audio
    options = ["--data_path", str(tiny.make_manifest(tmp_path, texts)), "--max_steps", "4"]
    options += ["--per_device_train_batch_size", "6", "--save_strategy", "no"]
    calls = []

    def count(model):
        def hook(llm, args, kwargs):
            calls.extend([1] * ("labels" in kwargs))  # and not for the prompt

        model.llm.register_forward_pre_hook(hook, with_kwargs=True)

    on_load(monkeypatch, count)
    run(paths, tmp_path / "first", *options, "--ctc_first", "0.5")
    assert len(calls) == 2
    run(paths, tmp_path / "off", *options, "--ctc_weight", "0")
    assert len(calls) == 2 + 4
    for name in ("first", "off"):
        assert all(0 < loss < 100 for loss in log(tmp_path / name, "loss"))


def test_the_older_flags_mean_what_they_meant(paths, tmp_path):
    options = ["--max_steps", "4", "--warmup_ratio", "0.5"]
    options += ["--lr_scheduler_type", "constant_with_warmup"]
    run(paths, tmp_path, *options, "--learning_rate", "1e-3", "--save_strategy", "no")
    assert log(tmp_path, "learning_rate") == [0, 5e-4, 1e-3, 1e-3]


def test_gradient_checkpointing_recomputes_and_changes_no_weight(paths, tmp_path, monkeypatch):
    options = ["--max_steps", "2", "--optim", "sgd", "--learning_rate", "1e-1"]
    options += ["--ctc_first", "0", "--save_strategy", "no"]
    plain = run(paths, tmp_path / "plain", *options)
    counts = []

    def count(model):
        model.llm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: counts.append(1))

    on_load(monkeypatch, count)
    again = run(paths, tmp_path / "again", *options, "--gradient_checkpointing")
    assert len(counts) == 2 * 2  # forward and recomputation in each of two steps
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_several_gpus_in_one_process_are_refused(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(train.TrainingArguments, "n_gpu", 4)
    with pytest.raises(ValueError, match="args.n_gpu=4: start by torchrun"):
        run(paths, tmp_path)


@pytest.mark.parametrize(
    "manifest, message",
    [
        # before any model loads
        ("hello", "['m.jsonl']: 0 good lines, 1 bad\nm.jsonl:1: Expecting value: line 1 column 1"),
        # in a data worker
        (
            '{"wav": "nan.wav", "txt": "x"}',
            "nan.wav: holds no audio, or samples that are no numbers",
        ),
    ],
)
def test_bad_input_ends_in_one_line(paths, tmp_path, manifest, message):
    (tmp_path / "m.jsonl").write_text(manifest)
    soundfile.write(tmp_path / "nan.wav", [float("nan")] * 1600, 16_000, subtype="FLOAT")
    command = [sys.executable, ROOT / "train.py", "--data_path", "m.jsonl", "--output_dir", "out"]
    command += ["--llm_model_name_or_path", paths.qwen, "--dataloader_num_workers", "1"]
    command += ["--whisper_model_name_or_path", paths.whisper, "--disable_tqdm", "True"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    [*_, head] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr[done.stderr.index(head) :].startswith(f"error: {message}")
    assert "Traceback" not in done.stderr


def test_bfloat16_that_is_emulated_becomes_float32_with_one_warning(paths, tmp_path, monkeypatch):
    models, options = [], ["--max_steps", "1", "--save_strategy", "no", "--bf16", "True"]
    on_load(monkeypatch, models.append)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.warns(UserWarning, match="processor emulates bfloat16") as warned:
        run(paths, tmp_path / "emulated", *options)
    assert len([x for x in warned if "emulates" in str(x.message)]) == 1
    [model] = models
    assert model.llm.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    exact = run(paths, tmp_path / "exact", *options[:-2])
    assert equal(load_file(tmp_path / "emulated" / "model.safetensors"), exact)


def test_half_precision_trains_with_a_warning(paths, tmp_path, capsys):
    assert run(paths, tmp_path, "--max_steps", "1", "--fp16", "True")
    assert "warning: Qwen overflows in --fp16" in capsys.readouterr().out
