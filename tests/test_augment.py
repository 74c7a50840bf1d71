import json
from pathlib import Path

import augment
import pytest
import soundfile
import tiny


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_transcripts_become_lower_case_words(tmp_path):
    tiny.make_sound(tmp_path / "a.wav", 0.1, 300)
    row = {"wav": "a.wav", "txt": "Philip dropped -- IT'S mine, 2!", "spk": 1}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    augment.lower(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    wav = str(tmp_path / "a.wav")
    assert rows(tmp_path / "out.jsonl") == [{"wav": wav, "txt": "philip dropped it's mine"}]


def test_copies_are_faster_and_slower(paths, tmp_path):
    augment.speed(paths.manifest, str(tmp_path / "speed"), "0.8", "1.25")
    made = rows(tmp_path / "speed" / "manifest.jsonl")
    assert [row["txt"] for row in made[::2]] == tiny.TEXTS and len(made) == 16
    slow, fast = (soundfile.info(tmp_path / "speed" / row["wav"]).duration for row in made[:2])
    assert slow == pytest.approx(0.5 / 0.8, abs=0.01) and fast == pytest.approx(0.4, abs=0.01)


def test_sentences_and_numbers_are_spoken(tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "NUMBERS", 1)
    (tmp_path / "text.txt").write_text("good night\n")
    augment.speak(str(tmp_path / "text.txt"), str(tmp_path / "spoken"))
    first, second = rows(tmp_path / "spoken" / "manifest.jsonl")
    assert first["txt"] == "good night" and set(second["txt"].split()) <= set(augment.DIGITS)
    for row in (first, second):
        audio, rate = soundfile.read(tmp_path / "spoken" / row["wav"])
        assert rate == 16_000 and 0.3 < len(audio) / rate < 10 and abs(audio).max() > 0.05
