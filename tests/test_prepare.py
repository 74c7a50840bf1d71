import json
from pathlib import Path

import prepare
import pytest
import tiny

from data import read_manifest


def sounds(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.make_sound(path, 0.1, 300)


def rows(path):
    read_manifest([str(path)])  # what train.py reads
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_a_librispeech_tree_becomes_a_manifest(tmp_path, capsys):
    chapter = tmp_path / "train" / "19" / "198"
    sounds(*(chapter / f"19-198-000{i}.flac" for i in range(3)))
    (chapter / "19-198.trans.txt").write_text("19-198-0001 GO ON\n19-198-0000 STOP\nX Y\n")
    prepare.main("librispeech", str(tmp_path / "train"), str(tmp_path / "out" / "train.jsonl"))
    assert rows(tmp_path / "out" / "train.jsonl") == [
        {"wav": str(chapter / "19-198-0000.flac"), "txt": "stop", "key": "19-198-0000"},
        {"wav": str(chapter / "19-198-0001.flac"), "txt": "go on", "key": "19-198-0001"},
    ]
    assert "2 utterances; 1 files without text, 1 texts alone" in capsys.readouterr().out


def test_an_aishell_tree_becomes_a_manifest_of_each_part(tmp_path):
    sounds(tmp_path / "wav" / "dev" / "S1" / "B1.wav", tmp_path / "wav" / "test" / "S2" / "B2.wav")
    (tmp_path / "transcript").mkdir()
    text = "B1 广州 市 房地产\nB2 一 个\nB3 无\n"
    (tmp_path / "transcript" / "aishell_transcript_v0.8.txt").write_text(text, encoding="utf-8")
    prepare.main("aishell", str(tmp_path), "dev", str(tmp_path / "dev.jsonl"))
    wav = str(tmp_path / "wav" / "dev" / "S1" / "B1.wav")
    assert rows(tmp_path / "dev.jsonl") == [{"wav": wav, "txt": "广州市房地产", "key": "B1"}]


def test_a_kaldi_folder_becomes_a_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sounds(tmp_path / "a b.wav")
    (tmp_path / "wav.scp").write_text("u1 a b.wav\nu2 missing.wav\n")
    (tmp_path / "text").write_text("u1 It's ON\nu2 off\n")
    prepare.main("kaldi", ".", "out.jsonl")
    wav = str(tmp_path / "a b.wav")
    assert rows("out.jsonl") == [{"wav": wav, "txt": "It's ON", "key": "u1"}]
    prepare.main("kaldi", ".", "out.jsonl", "lower")
    assert rows("out.jsonl")[0]["txt"] == "it's on"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("kaldi", "missing", "out.jsonl"), "missing: no such folder"),
        (("kaldi", ".", "out.jsonl"), "u1: a command, not a file: flac -d a.flac |"),
        (("kaldi", ".", "out.jsonl", "upper"), "u1: a command"),
        (("librispeech", ".", "out.jsonl"), "no utterance with audio and text: 0 files, 0 texts"),
        (("aishell", ".", "out.jsonl"), "usage"),
        (("aishell", ".", "dev", "out.jsonl"), "No such file or directory: .*transcript"),
        (("timit", ".", "out.jsonl"), "usage"),
    ],
)
def test_what_is_no_such_corpus_ends_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wav.scp").write_text("u1 flac -d a.flac |\n")
    (tmp_path / "text").write_text("u1 go\n")
    with pytest.raises(SystemExit, match=message):
        prepare.main(*arguments)
    assert not (tmp_path / "out.jsonl").exists()
