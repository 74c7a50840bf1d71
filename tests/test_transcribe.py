import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
import transcribe
from whisper.audio import N_SAMPLES

import recognize
from data import read_manifest
from model import load

SCRIPT = Path(transcribe.__file__)


@pytest.fixture(scope="module")
def model(projector):
    return load(projector).eval()


def test_texts_are_those_of_recognize_in_the_order_given(paths, model):
    rows = read_manifest([paths.manifest])
    texts = {row["_path"]: row["hyp"] for row in recognize.recognize(model, rows, 3, 2)}
    files = [*reversed(texts)]
    assert transcribe.transcribe(model, files, 2, 3) == [texts[file] for file in files]
    waveforms = [soundfile.read(file, dtype="float32")[0] for file in files]
    assert transcribe.transcribe(model, waveforms, 2, 8) == [texts[file] for file in files]
    assert transcribe.transcribe(model, []) == []
    with pytest.raises(ValueError, match="audio 1 holds no samples, or such that are no numbers"):
        transcribe.transcribe(model, [waveforms[0], np.full(8000, np.nan, np.float32)])


def test_long_audio_is_cut_in_its_silences_and_nothing_is_lost(model, monkeypatch):
    noise = np.random.default_rng(0).normal(size=70 * 16_000).astype(np.float32)
    for second in (7, 9.9, 15):  # the second silence is not wholly within 10 s
        noise[int(second * 16_000) : int((second + 0.3) * 16_000)] = 0
    pieces = [*transcribe.split(torch.tensor(noise))]
    assert torch.equal(torch.cat(pieces), torch.tensor(noise))
    ends = np.cumsum([len(piece) for piece in pieces]) / 16_000
    assert 7 < ends[0] < 7.3 and 15 < ends[1] < 15.3 and ends[-1] == 70
    assert max(map(len, pieces)) <= 10 * 16_000
    assert len([*transcribe.split(torch.tensor(noise[:N_SAMPLES]))]) == 1
    seen = []
    generate = model.generate

    def counted(beams, top, **batch):
        seen.extend(batch["encoder_lengths"].tolist())
        return generate(beams, top, **batch)

    monkeypatch.setattr(model, "generate", counted)
    [text] = transcribe.transcribe(model, [noise], 1, 2)
    assert sum(seen) >= 70 * 50 and len(seen) == len(pieces)
    assert text == " ".join(" ".join(transcribe.transcribe(model, pieces, 1, 2)).split())


def test_files_and_folders_are_printed_with_their_texts(paths, projector, tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    tiny.make_sound(tmp_path / "folder" / "deep" / "b.flac", 0.4, 300)
    tiny.make_sound(tmp_path / "folder" / "a.wav", 0.5, 200)
    (tmp_path / "folder" / "notes.txt").write_text("no audio")
    tiny.make_sound(tmp_path / "c.wav", 0.5, 300)
    command = [sys.executable, SCRIPT, "--projector_model_path", projector, "--wav", "c.wav"]
    done = subprocess.run([*command, "folder"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [Path(line.split("\t")[0]) for line in done.stdout.splitlines()]
    assert files == [tmp_path / x for x in ("c.wav", "folder/a.wav", "folder/deep/b.flac")]
    with pytest.raises(ValueError, match='d.wav:1: "wav" must be audio'):
        transcribe.main(["--projector_model_path", projector, "--wav", str(tmp_path / "d.wav")])


def sounds(folder):
    """What test sets hold beside speech: name -> file."""
    rng = np.random.default_rng(0)
    silence, noise = np.zeros(16_000), 0.3 * rng.normal(size=16_000)
    tone = 0.3 * np.sin(np.arange(48_000) / 10)
    made = {
        "silence.wav": (silence, 16_000),
        "noise.wav": (noise, 16_000),
        "short.wav": (noise[:1600], 16_000),  # 0.1 s
        "one.wav": (noise[:1], 16_000),
        "8k.wav": (tone[:8000], 8000),
        "48k.flac": (tone, 48_000),
        "stereo.ogg": (np.stack([tone, tone], 1), 48_000),
        "speech.mp3": (tone, 48_000),
    }
    for name, (samples, rate) in made.items():
        soundfile.write(folder / name, samples, rate)
    return [str(folder / name) for name in made]


def test_silence_noise_and_odd_formats_end_no_run(projector, model, tmp_path):
    files = sounds(tmp_path)
    texts = transcribe.transcribe(model, files, 2, 3)
    assert all(isinstance(text, str) for text in texts) and len(texts) == len(files)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({"wav": file, "txt": ""}) + "\n" for file in files))
    arguments = ["--projector_model_path", projector, "--data_path", str(manifest)]
    out = tmp_path / "out.jsonl"
    recognize.main([*arguments, "--result_path", str(out), "--num_beams", "2"])
    assert [json.loads(line)["hyp"] for line in out.read_text().splitlines()] == texts
