"""Each fault of a user's input ends in one line that says what, where and what to do.

All of them as they are printed: bash tests/run.sh tests/test_faults.py -rP
"""

import json
import os
import pickle
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import tiny
import torch
from safetensors.torch import load_file, save_file

import model
import recognize
import train
from data import load_audio, read_manifest

GOOD = '{"wav": "a.wav", "txt": "go"}'
VALID = r"available models = \['tiny.en', 'tiny'"


@pytest.fixture
def here(paths, projector, tmp_path, monkeypatch):
    """A folder to work in, with a.wav and what the cases name."""
    monkeypatch.chdir(tmp_path)
    tiny.make_sound(tmp_path / "a.wav", 0.4, 300)
    whole = (tmp_path / "a.wav").read_bytes()
    for name, content in {"zero": b"", "cut": whole[:30], "text": b"hello"}.items():
        Path(f"{name}.wav").write_bytes(content)
    Path("noise.raw").write_bytes(bytes(800))
    soundfile.write("none.wav", np.zeros(0), 16_000)
    soundfile.write("endless.flac", np.zeros(8000), 16_000)
    flac = bytearray(Path("endless.flac").read_bytes())
    flac[21:26] = flac[21] & 0xF0, 0, 0, 0, 0  # the number of samples, which streams do not know
    Path("endless.flac").write_bytes(flac)
    nan = np.zeros(8000, np.float32)
    nan[5] = np.nan
    soundfile.write("nan.wav", nan, 16_000, subtype="FLOAT")
    os.mkfifo("fifo.wav")
    Path("folder").mkdir()
    shutil.copy(projector, "good.safetensors")
    Path("truncated.safetensors").write_bytes(Path(projector).read_bytes()[:5000])
    Path("text.safetensors").write_text("hello")
    settings = {**model.DEFAULTS, "format": "9", "llm_model_name_or_path": paths.qwen}
    settings["whisper_model_name_or_path"] = paths.whisper
    save_file(load_file(projector), "newer.safetensors", settings)
    settings |= {"format": model.DEFAULTS["format"], "hidden_dim": "64"}
    save_file(load_file(projector), "narrow.safetensors", settings)
    save_file(load_file(projector), "wide.safetensors", settings | {"hidden_dim": "wide"})
    Path("text.pt").write_text("hello")
    with open("code.pt", "wb") as file:
        pickle.dump({"x": Code()}, file)
    torch.save({"x": Code()}, "code-zip.pt")
    return SimpleNamespace(path=tmp_path, paths=paths)


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch was-run",)


def fail(main, arguments):
    """The line with which a command ends."""
    with pytest.raises(SystemExit) as error:
        model.run(lambda: main(arguments))
    message = str(error.value.code)
    print(message)
    assert message.startswith("error: ")
    return message


def refuse(*flags):
    """The line with which recognition of m.jsonl ends, without a result."""
    arguments = ["--projector_model_path", "good.safetensors", "--data_path", "m.jsonl"]
    message = fail(recognize.main, [*arguments, "--result_path", "out.jsonl", *flags])
    assert not Path("out.jsonl").exists()
    return message


MANIFESTS = {
    "{": r"m.jsonl:1: Expecting property name",
    "[1]": r"m.jsonl:1: 'list' object is not a mapping, in b'\[1\]'",
    '[["wav", "a.wav"]]': r"m.jsonl:1: 'list' object is not a mapping",
    "3": r"m.jsonl:1: 'int' object is not a mapping, in b'3'",
    f"{GOOD}\n\n{{": r"m.jsonl:3: ",
    '{"txt": "x"}': r"m.jsonl:1: \"wav\" must be audio, got None",
    '{"wav": 3, "txt": "x"}': r"m.jsonl:1: \"wav\" must be audio, got 3",
    '{"wav": "a.wav", "txt": 3}': r"m.jsonl:1: .*\"txt\" text, got 3",
    '{"wav": "a.wav", "txt": null}': r"m.jsonl:1: .*\"txt\" text, got None",
    '{"wav": "b.wav", "txt": "x"}': r"m.jsonl:1: \"wav\" must be audio, got b.wav",
    '{"wav": "folder", "txt": "x"}': r"m.jsonl:1: \"wav\" must be audio, got folder",
    '{"wav": "fifo.wav", "txt": "x"}': r"m.jsonl:1: \"wav\" must be audio, got fifo.wav",
    b'{"wav": "a.wav", "txt": "caf\xe9"}': r"m.jsonl:1: 'utf-8' codec can't decode byte 0xe9",
    '{"wav": "a.wav", "txt": "caf\\ud800"}': r"m.jsonl:1: .*surrogates not allowed",
    "": r"m.jsonl.*: 0 good lines, 0 bad",
    "\n \n": r"m.jsonl.*: 0 good lines, 0 bad",
    '{"wav": "zero.wav", "txt": "x"}': r"m.jsonl:1: Error opening 'zero.wav': ",
    '{"wav": "cut.wav", "txt": "x"}': r"m.jsonl:1: Error opening 'cut.wav': ",
    '{"wav": "text.wav", "txt": "x"}': r"m.jsonl:1: Error opening 'text.wav': ",
    '{"wav": "noise.raw", "txt": "x"}': r"m.jsonl:1: samplerate must be specified, in .*noise.raw",
    '{"wav": "none.wav", "txt": "x"}': r"m.jsonl:1: \"wav\" must be audio, got none.wav",
    '{"wav": "endless.flac", "txt": "x"}': r"m.jsonl:1: \"wav\" must be audio, got endless.flac",
    '{"wav": "a.wav", "txt": "x", "duration": -1}': r"m.jsonl:1: .*\"duration\": -1",
    '{"wav": "a.wav", "txt": "x", "duration": NaN}': r"m.jsonl:1: .*\"duration\": NaN",
    '{"wav": "a.wav", "txt": "x", "duration": 1e999}': r"m.jsonl:1: .*\"duration\": 1e999",
    '{"wav": "a.wav", "txt": "x", "duration": "7"}': r"m.jsonl:1: .*\"duration\": \"7\"",
    '{"wav": "noise.raw", "txt": "x", "duration": 1}': r"noise.raw: cannot be decoded as audio: ",
    "[" * 100_000: r"m.jsonl:1: maximum recursion depth exceeded",
    '{"wav": "nan.wav", "txt": "x"}': r"nan.wav: holds no audio, or samples that are no numbers",
}


def test_all_bad_lines_are_counted_and_ten_are_named(here):
    Path("m.jsonl").write_text(f"{GOOD}\n" + "{\n" * 12 + f"{GOOD}\n")
    head, *named = refuse().splitlines()
    assert head == "error: ['m.jsonl']: 2 good lines, 12 bad"
    assert [line.split(" ")[0] for line in named] == [f"m.jsonl:{i}:" for i in range(2, 12)]


def test_bad_audio_counts_as_bad_lines_before_models_load(here, monkeypatch):
    monkeypatch.setattr(recognize, "load", None)
    names = ("zero.wav", "cut.wav", "text.wav", "none.wav", "noise.raw", "folder", "fifo.wav")
    lines = [json.dumps({"wav": name, "txt": "x"}) for name in names]
    Path("m.jsonl").write_text("\n".join([GOOD, *lines]))
    head, *named = refuse().splitlines()
    assert head == "error: ['m.jsonl']: 1 good lines, 7 bad"
    assert [name in line for name, line in zip(names, named, strict=True)] == [True] * 7


@pytest.mark.parametrize("manifest", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_bad_manifest_or_its_audio_is_named(here, manifest):
    Path("m.jsonl").write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    message = refuse()
    assert re.search(MANIFESTS[manifest], message), message


MODELS = {
    # flags of recognize.py -> its line
    "--projector_model_path missing.safetensors": r"load missing.safetensors: .*No such file",
    "--projector_model_path folder": r"cannot load folder: OSError",
    "--projector_model_path a.wav": r"cannot load a.wav: .*Error while deserializing header",
    "--projector_model_path text.safetensors": r"load text.safetensors: .*deserializing",
    "--projector_model_path truncated.safetensors": r"load truncated.safetensors: .*incomplete",
    "--projector_model_path newer.safetensors": r"newer.safetensors is for format '9', not '4'",
    "--projector_model_path narrow.safetensors": r"cannot load narrow.safetensors: .*size mismatch",
    "--projector_model_path wide.safetensors": r"invalid literal.*projector: wide.safetensors",
    "--llm_model_name_or_path other": r"for llm_model_name_or_path '.*qwen', not 'other'",
    "--whisper_model_name_or_path base": r"for whisper_model_name_or_path '.*tiny.pt', not 'base'",
    "--num_beams 0": r"wanted num_beams, batch_size >= 1, .*, got .*num_beams=\[0\]",
    "--num_beams 3 -1": r"wanted num_beams, batch_size >= 1, .*, got .*num_beams=\[3, -1\]",
    "--batch_size 0": r"wanted num_beams, batch_size >= 1, .*, got .*batch_size=0",
    "--result_path folder": r"wanted .*result_path no folder, got "
    r".*result_path=PosixPath\('folder'\)",
    "--result_path a.wav/out.jsonl": r"File exists: 'a.wav'",
    "--result_path /proc/out.jsonl": r"No such file or directory: '/proc/out.jsonl.part'",
    "--data_path missing.jsonl": r"No such file or directory: 'missing.jsonl'",
}


@pytest.mark.parametrize("flags", MODELS)
def test_bad_models_and_arguments_of_recognition_end_in_one_line(here, flags):
    Path("m.jsonl").write_text(GOOD)
    message = refuse(*flags.split())
    assert re.search(MODELS[flags], message), message


TRAINING = {
    # flags of train.py -> its line
    "--whisper_model_name_or_path huge": rf"Model huge not found; {VALID}",
    "--whisper_model_name_or_path missing.pt": rf"Model missing.pt not found; {VALID}",
    "--whisper_model_name_or_path text.pt": r"cannot load text.pt: KeyError",
    "--whisper_model_name_or_path code.pt": r"cannot load code.pt: .*Weights only load failed",
    "--whisper_model_name_or_path code-zip.pt": r"load code-zip.pt: .*Weights only load",
    "--llm_model_name_or_path no/such/model": r"cannot load no/such/model: OSError",
    "--output_dir a.wav": r"File exists: 'a.wav'",
    "--output_dir /proc/exp": r"No such file or directory: '/proc/exp'",
    "--model_max_length 3": r"a.wav: takes 8 positions, max_length=3 \(flag or LLM\)",
    "--stride -1": r"not >= 1: step=8, args.stride=-1",
    "--stride 0": r"not >= 1: step=8, args.stride=0",
    "--per_device_train_batch_size 0": r"not >= 1: step=0, ",
    "--gradient_accumulation_steps 0": r"not >= 1: step=0, ",
    "--eval_data_path m.jsonl --eval_on_start True --per_device_eval_batch_size 0": r"batch_size=0",
    "--report_to wandb": r"requires wandb to be installed",
    "--learning_rate -1": r"Invalid learning rate: -1.0",
    "--eval_strategy epoch": r"you didn't pass an `eval_dataset`",
    "--beams 3": r"not used by the HfArgumentParser: \['--beams', '3'\]",
    "--projector_model_path good.safetensors --stride 4": r"is for stride '5', not '4'",
    "--data_path none.jsonl": r"No such file or directory: 'none.jsonl'",
    "--data_path empty.jsonl": r"empty.jsonl:1: .*\"txt\" text, got ' '",
    "--eval_data_path bad.jsonl": r"bad.jsonl:1: .*\"txt\" text, got None",
}


@pytest.mark.parametrize("flags", TRAINING)
def test_bad_models_and_arguments_of_training_end_in_one_line(here, flags):
    Path("m.jsonl").write_text(GOOD)
    Path("bad.jsonl").write_text('{"wav": "a.wav"}')
    Path("empty.jsonl").write_text('{"wav": "a.wav", "txt": " "}')
    arguments = ["--llm_model_name_or_path", here.paths.qwen, "--data_path", "m.jsonl"]
    arguments += ["--whisper_model_name_or_path", here.paths.whisper, "--output_dir", "exp"]
    arguments += ["--max_steps", "1", "--report_to", "none", *flags.split()]
    message = fail(train.main, arguments)
    assert re.search(TRAINING[flags], message), message
    assert not Path("was-run").exists() and not list(Path().glob("exp/*"))


def test_byte_order_marks_carriage_returns_and_duplicates_are_no_faults(here):
    Path("m.jsonl").write_bytes(f"\ufeff{GOOD}\r\n{GOOD}\r\n\r\n".encode())
    assert [row["txt"] for row in read_manifest(["m.jsonl"])] == ["go", "go"]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to six random changes, most of them near the beginning, where headers are."""
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(max(1, min(len(content), rng.choice([60, len(content)]))))
        junk = bytes(rng.randrange(256) for _ in range(rng.randint(0, 8)))
        end = place + rng.choice([0, 1, rng.randint(1, 30), len(content)])
        content = content[:place] + junk + content[end:]
    return content


def hear(path: str) -> None:
    """Read the header of audio, as for a manifest, and then the whole."""
    Path("m.jsonl").write_text(json.dumps({"wav": path, "txt": "x"}))
    with suppress(ValueError):
        read_manifest(["m.jsonl"])
    load_audio(path)


@pytest.mark.parametrize("name, count", [("jsonl", 600), ("safetensors", 200), ("audio", 1200)])
def test_damaged_files_end_in_our_error_or_are_read(here, name, count):
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    tone = 0.3 * np.sin(np.arange(16_000) / 20)
    for suffix, kind in {"wav": None, "flac": None, "mp3": None, "ogg": "OPUS"}.items():
        soundfile.write(f"tone.{suffix}", tone, 16_000, subtype=kind)
    Path("good.jsonl").write_text(f"{GOOD}\n" * 3)
    audio = [f"tone.{suffix}" for suffix in ("wav", "flac", "mp3", "ogg")]
    readers = {"audio": hear, "jsonl": lambda path: read_manifest([path])}
    read = readers.get(name, model.load)
    for _ in range(count):
        source = Path(rng.choice(audio) if name == "audio" else f"good.{name}")
        path = Path(f"damaged{source.suffix}")
        path.write_bytes(mutate(source.read_bytes(), rng))
        try:
            read(str(path))
            outcomes["read"] += 1
        except ValueError:
            outcomes["refused"] += 1
    print(name, outcomes)
    assert sum(outcomes.values()) == count and outcomes["refused"] > count / 4
    assert outcomes["read"]
