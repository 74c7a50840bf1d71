"""What a user got wrong ends in one line that says where, what was got, what is wanted, what to do.

All of them as they are printed: bash tests/run.sh tests/test_faults.py -rP
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
from test_train import flags

import arguments
import recognize
import train
from command import run_command
from model import Projector


@pytest.fixture
def here(paths, projector, tmp_path, monkeypatch):
    """A folder to work in, with a sound, a manifest, a projector and what the cases name."""
    monkeypatch.chdir(tmp_path)
    tiny.make_sound(Path("a.wav"), 0.4, 300)
    Path("m.jsonl").write_text('{"wav": "a.wav", "txt": "go"}')
    Path("text.pt").write_text("hello")
    Path("folder").mkdir()
    shutil.copy(projector, "good.safetensors")
    # an LLM that has read all it can after 58 positions
    shutil.copytree(paths.qwen, "short")
    config = json.loads(Path("short/config.json").read_text())
    config["max_position_embeddings"] = 58
    Path("short/config.json").write_text(json.dumps(config))
    return paths


def fail(main, arguments: list[str]) -> str:
    """The line with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: main(arguments))
    message = str(ended.value.code)  # Python prints a text, and then the status is 1
    print(message)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


TRAINING = {
    "--whisper_model_name_or_path huge": r"names: tiny.en, tiny, base.en, .*turbo",
    "--whisper_model_name_or_path text.pt": r"no .*openai-whisper.*names: tiny.en",
    "--llm_model_name_or_path no/such/model": r"^error: --llm_model.* cannot be loaded",
    "--model_max_length 3": r"a.wav: audio and transcript take 8 positions, but at most 3 are"
    r" allowed by --model_max_length: raise it, or cut the audio",
    "--stride 0": r"--stride must be at least 1, got 0",
    "--per_device_train_batch_size 0": r"must be at least 1, got 0",
    "--per_device_eval_batch_size 0": r"must be at least 1, got 0",
    "--gradient_accumulation_steps 0": r"must be at least 1, got 0",
    "--eval_strategy epoch": r"needs --eval_data_path",
    "--beams 3": r"unknown arguments --beams 3: --help lists",
    "--max_steps many": r"--max_steps.*int",
    "--projector_model_path good.safetensors --stride 4": r"was trained with --stride 5, got 4",
    "--projector_model_path none.safetensors": r"cannot be read as a projector file",
    "--data_path none.jsonl": r"cannot read .*none.jsonl.*: ",
    "--output_dir a.wav": r"--output_dir",
}


@pytest.mark.parametrize("options", TRAINING)
def test_a_bad_flag_of_training_ends_in_one_line(here, options):
    arguments = flags(here, Path("out"), f"--data_path m.jsonl --max_steps 1 {options}")
    message = fail(train.main, arguments)
    assert re.search(TRAINING[options], message)
    assert not list(Path().glob("out/*"))


RECOGNIZE = "--projector_model_path good.safetensors --data_path m.jsonl --result_path out.jsonl"
RECOGNITION = {
    "--num_beams 0": r"--num_beams must be at least 1, got 0",
    "--num_beams 3 -1": r"--num_beams must be at least 1, got -1",
    "--num_beams many": r"--num_beams.*int",
    "--batch_size 0": r"--batch_size must be at least 1, got 0",
    "--max_new_tokens 0": r"--max_new_tokens must be at least 1, got 0",
    "--metric PER": r"--metric.*WER.*CER",
    "--normalizer german": r"--normalizer.*english.*basic.*none",
    "--wav a.wav": r"unknown arguments --wav a.wav: --help lists",
    "--result_path folder": r"--result_path must be a file, got the folder",
    "--result_path m.jsonl": r"--result_path would replace m.jsonl, which is read",
    "--result_path m.jsonl --data_path m.beam1.jsonl --num_beams 1 3": r"replace m.beam1.jsonl",
    "--result_path o.jsonl --data_path o.jsonl.part": r"replace o.jsonl.part, which is read",
    "--result_path a.wav/out.jsonl": r"--result_path: cannot write a.wav/out.jsonl",
    "--data_path none.jsonl": r"cannot read .*none.jsonl.*: ",
    "--projector_model_path none.safetensors": r"cannot be read as a projector file",
    "--projector_model_path a.wav": r"cannot be read as a projector file",
    "--whisper_model_name_or_path base": r"was trained with --whisper.* '.*tiny.pt'",
}


@pytest.mark.parametrize("options", RECOGNITION)
def test_a_bad_flag_of_recognition_ends_in_one_line(here, options):
    message = fail(recognize.main, f"{RECOGNIZE} {options}".split())
    assert re.search(RECOGNITION[options], message)
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    "main, needed",
    [
        (train.main, ["--llm_model_name_or_path", "--whisper_model_name_or_path", "--data_path"]),
        (recognize.main, ["--projector_model_path", "--data_path", "--result_path"]),
    ],
    ids=["train", "recognize"],
)
def test_missing_flags_are_named(main, needed):
    message = fail(main, [])
    assert all(flag in message for flag in needed)


def test_audio_that_is_too_long_for_the_llm_is_refused_with_both_remedies(here):
    arguments = flags(here, Path("out"), "--data_path m.jsonl --llm_model_name_or_path short")
    message = fail(train.main, arguments)
    wanted = r"a.wav: audio and transcript take 8 positions, but at most \S+ are allowed by the LLM"
    assert re.search(rf"{wanted}.*: take another LLM, or cut the audio$", message)


def test_several_gpus_in_one_process_are_refused_with_both_ways_on(here, monkeypatch):
    monkeypatch.setattr(train.TrainingArguments, "n_gpu", 2)
    message = fail(train.main, flags(here, Path("out"), ""))
    assert "2 GPUs are visible and one process was started: torchrun" in message
    assert message.endswith("--nproc_per_node=2 train.py ..., or CUDA_VISIBLE_DEVICES=0")


def test_deepspeed_that_is_not_installed_is_missed_only_by_its_flag(here, monkeypatch):
    monkeypatch.setattr(arguments, "is_deepspeed_available", lambda: False)
    message = fail(train.main, flags(here, Path("out"), "--deepspeed zero.json"))
    assert message.endswith("--deepspeed needs a package that is not there: pip install deepspeed")
    train.main(flags(here, Path("out"), "--max_steps 1 --save_strategy no"))


def test_half_precision_trains_with_a_warning(here):
    options = "--max_steps 1 --save_strategy no --fp16 True"
    with pytest.warns(UserWarning, match="--fp16: Qwen overflows in it .*; use --bf16"):
        train.main(flags(here, Path("out"), options))


@pytest.mark.parametrize("command", ["train", "recognize"])
def test_a_bug_of_a_users_own_edit_keeps_its_traceback(here, monkeypatch, command):
    def forward(self, x):
        raise RuntimeError("of the user's own")

    monkeypatch.setattr(Projector, "forward", forward)
    with pytest.raises(RuntimeError, match="of the user's own") as error:
        if command == "train":
            run_command(lambda: train.main(flags(here, Path("out"), "")))
        else:
            run_command(lambda: recognize.main(RECOGNIZE.split()))
    assert error.traceback[-1].name == "forward"
