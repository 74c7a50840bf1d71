"""The cache of encoder outputs, on tiny models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from cached import Cache
from safetensors.torch import load_file
from test_train import equal, log

from data import collate, read_manifest
from model import load

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def model(paths):
    return load(llm_model_name_or_path=paths.qwen, whisper_model_name_or_path=paths.whisper)


def count_calls(model):
    calls, encode = [], model.encoder.forward

    def forward(windows):
        calls.append(len(windows))
        return encode(windows)

    model.encoder.forward = forward
    return calls


def encode(model, mel):
    positions = model.encoder.positional_embedding[: mel.shape[2] // 2]
    return torch.func.functional_call(model.encoder, {"positional_embedding": positions}, mel)


def use(model, folder):
    calls = count_calls(model)
    model.encoder.forward = Cache(model.encoder, folder)
    return calls


def test_each_window_is_encoded_once_and_comes_back_as_it_was(paths, model, tmp_path):
    batch = collate(read_manifest([paths.manifest]), **model.collation)
    plain, _ = model.project(**batch)
    calls = use(model, tmp_path)
    for _ in range(2):
        assert torch.equal(model.project(**batch)[0], plain)
    assert sum(calls) == 8 == len(list(tmp_path.glob("*/*.safetensors")))
    assert not list(tmp_path.glob("*/*.part"))
    other = load(llm_model_name_or_path=paths.qwen, whisper_model_name_or_path=paths.whisper)
    again = use(other, tmp_path)
    assert torch.equal(encode(other, batch["mel"][0]), encode(model, batch["mel"][0]))
    assert not again  # another run finds them


def test_nothing_out_of_date_is_used(paths, model, tmp_path):
    [row] = read_manifest([paths.manifest])[:1]
    mel = collate([row], **model.collation)["mel"][0]
    calls = use(model, tmp_path)
    encode(model, mel)
    tiny.make_sound(tmp_path / "a.wav", 0.5, 300)  # another sound, as long
    other = collate([{"_path": str(tmp_path / "a.wav"), "_txt": ""}], **model.collation)["mel"][0]
    assert other.shape == mel.shape and not torch.equal(encode(model, other), encode(model, mel))
    encode(model, mel.bfloat16())  # another precision
    assert len(calls) == 3
    weights = model.encoder.conv1.weight
    weights.data *= 2  # other weights
    model.encoder.forward = Cache(model.encoder, tmp_path)
    model.encoder.forward.forward = lambda windows: calls.append("new") or mel
    encode(model, mel)
    assert calls[3:] == ["new"]


def test_a_damaged_entry_is_computed_again(paths, model, tmp_path):
    mel = collate(read_manifest([paths.manifest])[:1], **model.collation)["mel"][0]
    calls = use(model, tmp_path)
    encoded = encode(model, mel)
    [entry] = tmp_path.glob("*/*.safetensors")
    for content in (b"", b"not safetensors", entry.read_bytes()[:-1]):
        entry.write_bytes(content)
        assert torch.equal(encode(model, mel), encoded)
    assert len(calls) == 4 and torch.equal(load_file(entry)["encoded"], encoded[0])


def test_a_full_disk_is_said_and_training_goes_on(paths, model, tmp_path, monkeypatch):
    mel = collate(read_manifest([paths.manifest])[:1], **model.collation)["mel"][0]
    use(model, tmp_path)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="gets no new entries: No space left on device"):
        assert encode(model, mel).shape == (1, 75, 32)
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_training_with_the_cache_has_the_losses_of_training_without(paths, tmp_path, processes):
    arguments = ["--llm_model_name_or_path", paths.qwen, "--data_path", paths.manifest]
    arguments += ["--whisper_model_name_or_path", paths.whisper, "--report_to", "none"]
    arguments += ["--max_steps", "4", "--logging_steps", "1", "--save_strategy", "no"]
    arguments += ["--bf16", "True", "--per_device_train_batch_size"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc_per_node={processes}", str(BENCH / "cached.py"), "cache", "train.py"]
    command = [*launch, *arguments, str(4 // processes), "--output_dir", "cached"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(list(tmp_path.glob("cache/*/*.safetensors"))) == 8
    # with as many threads, which change the last digits in float32
    plain = [
        sys.executable,
        str(BENCH.parent / "train.py"),
        *arguments,
        "4",
        "--output_dir",
        "plain",
    ]
    done = subprocess.run(plain, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = log(tmp_path / "plain", "loss")
    assert log(tmp_path / "cached", "loss") == pytest.approx(losses, rel=1e-2 * (processes - 1))
    if processes == 1:
        weights = [load_file(tmp_path / x / "model.safetensors") for x in ("cached", "plain")]
        assert equal(*weights)


def test_recognition_that_is_scored_takes_the_cache_too(paths, projector, tmp_path):
    command = [sys.executable, str(BENCH / "cached.py"), "cache", "bench/score.py", "recognize.py"]
    command += ["--projector_model_path", projector, "--data_path", paths.manifest]
    command += ["--num_beams", "1", "3", "--result_path", "out.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(list(tmp_path.glob("cache/*/*.safetensors"))) == 8
    head, _, *rows = done.stdout.splitlines()
    assert "WER % filtered | dropped" in head
    assert [row.split(" | ")[0] for row in rows[:2]] == ["| 1", "| 3"]
