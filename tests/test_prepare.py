"""Manifests of corpora: miniatures of each, in the lines that its own tools write."""

import gzip
import json
import os
import re
from pathlib import Path
from typing import get_args

import pytest
import tiny

from command import InputError
from manifest import read_manifest
from tools import prepare


def make_sound(path, seconds=1.0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return str(tiny.make_sound(path, seconds, 300))


def write(path, *lines):
    """Lines as they are, or objects as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join([*texts, ""]), encoding="utf-8")
    return path


def run(source, corpus, *flags):
    """The rows of the manifest, which train.py can read."""
    manifest = Path(source).parent / "out" / "m.jsonl"
    command = ["--corpus", corpus, "--source", str(source), "--manifest", str(manifest)]
    prepare.main([*command, *flags])
    return [x.row for x in read_manifest([str(manifest)])]


def shorten(rows):
    """Of each row what is read, what is said, and by whom."""
    return [(row["wav"], row.get("start"), row.get("end"), row["txt"], row["spk"]) for row in rows]


def test_librispeech(tmp_path, capsys):
    chapter = tmp_path / "corpus" / "train" / "19" / "198"
    first = make_sound(chapter / "19-198-0000.flac")
    second = make_sound(chapter / "19-198-0001.flac")
    make_sound(chapter / "19-198-0002.flac")
    (chapter / "._19-198-0000.flac").write_bytes(b"of macOS")
    (chapter / "._19-198.trans.txt").write_bytes(b"of macOS")
    write(chapter / "19-198.trans.txt", "19-198-0001 GO ON", "19-198-0000 STOP", "X Y")
    assert run(tmp_path / "corpus", "librispeech", "--part", "train") == [
        {"wav": first, "txt": "stop", "key": "19-198-0000", "spk": "19", "duration": 1.0},
        {"wav": second, "txt": "go on", "key": "19-198-0001", "spk": "19", "duration": 1.0},
    ]
    head, *rejected = capsys.readouterr().out.splitlines()
    assert head.endswith("m.jsonl: utterances: 2, hours: 0.00, speakers: 1")
    assert rejected == [
        "1 rejected: no such audio file (X)",
        "1 rejected: no text (19-198-0002)",
    ]


def test_aishell(tmp_path):
    wav = make_sound(tmp_path / "wav" / "dev" / "S1" / "B1.wav")
    make_sound(tmp_path / "wav" / "test" / "S2" / "B2.wav")
    text = tmp_path / "transcript" / "aishell_transcript_v0.8.txt"
    write(text, "B1 广州 市 房地产", "B2 一 个", "B3 无")
    rows = run(tmp_path, "aishell", "--part", "dev")
    assert shorten(rows) == [(wav, None, None, "广州市房地产", "S1")]


def test_kaldi(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths in wav.scp are relative to it
    wav = make_sound(tmp_path / "a b.wav")
    folder = tmp_path / "data"
    write(folder / "wav.scp", "u1 a b.wav", "u2 missing.wav", "u3 flac -d -c c.flac |")
    write(folder / "text", "u1\tIt's ON", "u2 off", "u3 up")
    [row] = run(folder, "kaldi")
    assert row == {"wav": wav, "txt": "It's ON", "key": "u1", "duration": 1.0}
    [row] = run(folder, "kaldi", "--lower_case", "True")
    assert row["txt"] == "it's on"


def test_kaldi_with_segments_by_its_own_rules(tmp_path, capsys):
    """extract-segments cuts an end that is at most 0.5 s behind the file, and refuses others."""
    wav = make_sound(tmp_path / "r.wav", 4.0)
    folder = tmp_path / "data"
    write(folder / "wav.scp", f"r {wav}", "command sph2pipe -f wav r.sph |")
    segments = {
        "s1-a": "r 0.5 1.75",
        "s1-b": "r 2 -1",
        "s1-c": "r 3 4.4",
        "s1-d": "r 3 4.6",
        "s1-e": "r 2 2",
        "s1-f": "r 1 2 1",
        "s1-g": "r one two",
        "s1-h": "command 0 1",
        "s1-i": "r 4.1 4.2",
        "s1-j": "other 0 1",
    }
    write(folder / "segments", *[f"{key} {value}" for key, value in segments.items()])
    write(folder / "text", *[f"{key} go" for key in segments], "s1-z lost")
    write(folder / "utt2spk", *[f"{key} s1" for key in segments])
    assert shorten(run(folder, "kaldi")) == [
        (wav, 0.5, 1.75, "go", "s1"),
        (wav, 2.0, 4.0, "go", "s1"),
        (wav, 3.0, 4.0, "go", "s1"),
    ]
    assert capsys.readouterr().out.splitlines()[1:] == [
        "1 rejected: a channel of its own: write it as a file first (s1-f)",
        "1 rejected: ends over 0.5 s after the end of its file (s1-d)",
        "1 rejected: no audio for the text (s1-z)",
        "1 rejected: no such audio file (s1-j)",
        "1 rejected: segments has no RECORDING START END (s1-g)",
        "2 rejected: start and end have nothing between them in the file (s1-e, s1-i)",
        "1 rejected: wav.scp has a command, not a file: run it first (s1-h)",
    ]


def test_nemo(tmp_path, capsys):
    wav = make_sound(tmp_path / "wavs" / "a.wav", 4.0)
    line = {"audio_filepath": "wavs/a.wav", "text": "go", "speaker": 5}
    manifest = write(
        tmp_path / "train_manifest.json",
        line | {"offset": 0.5, "duration": 1.25},
        line | {"duration": 3.99},  # a rounded duration of the whole file
        line | {"duration": 2.0},
        line | {"offset": "0.5", "duration": 1},
        {"duration": 4.0, "text": "go"},
        '{"audio_filepath": ',
        [line],
        line | {"text": None},
        line | {"text": 7},
        line | {"text": "x\ud800"},
    )
    assert shorten(run(manifest, "nemo")) == [
        (wav, 0.5, 1.75, "go", "5"),
        (wav, None, None, "go", "5"),
        (wav, 0.0, 2.0, "go", "5"),
    ]
    rejected = capsys.readouterr().out.splitlines()[1:]
    assert rejected[0].startswith('1 rejected: "txt" has \\ud800 alone')
    assert rejected[1:] == [
        "1 rejected: no audio_filepath (train_manifest.json:5)",
        "1 rejected: no text (train_manifest.json:8)",
        "1 rejected: not JSON (train_manifest.json:6)",
        "1 rejected: not a JSON object (train_manifest.json:7)",
        "1 rejected: offset is no number of seconds (train_manifest.json:4)",
        "1 rejected: text is no text (train_manifest.json:9)",
    ]


def test_wenet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # paths in a list are relative to it
    wav = make_sound(tmp_path / "a.wav", 4.0)
    line = {"key": "B1", "wav": "a.wav", "txt": "一 个", "spk": "S1"}
    path = write(tmp_path / "lists" / "data.list", line, line | {"start": 0.5, "end": 1.75})
    assert shorten(run(path, "wenet")) == [
        (wav, None, None, "一 个", "S1"),
        (wav, 0.5, 1.75, "一 个", "S1"),
    ]
    write(path, "shards/shards_000000000.tar", line)
    assert len(run(path, "wenet")) == 1
    reason = "1 rejected: a tar of a shard: unpack it, and read it by --corpus pairs (data.list:1)"
    assert capsys.readouterr().out.splitlines()[-1] == reason


def make_cut(wav, **changes):
    """A cut of two seconds from second 1 on, as lhotse 1.33 writes it."""
    recording = {
        "id": "r1",
        "sources": [{"type": "file", "channels": [0], "source": wav}],
        "sampling_rate": 16000,
        "num_samples": 64000,
        "duration": 4.0,
        "channel_ids": [0],
    }
    supervision = {
        "id": "r1-a",
        "recording_id": "r1",
        "start": 0.5,
        "duration": 1.25,
        "channel": 0,
        "text": "Go on",
        "language": "English",
        "speaker": "s1",
    }
    cut = {"id": "r1-0", "start": 1, "duration": 2.0, "channel": 0, "type": "MonoCut"}
    return {**cut, "supervisions": [supervision], "recording": recording | changes}


def test_lhotse(tmp_path, capsys):
    wav = make_sound(tmp_path / "a.wav", 4.0)
    cut = make_cut(wav)
    rounded = {**cut["supervisions"][0], "start": 0.77}
    behind = {**rounded, "start": 0.9}  # the cut ends before it, as cut_into_windows leaves it
    before = {**rounded, "start": -0.1}
    resampled = make_cut(wav, transforms=[{"name": "Resample", "kwargs": {}}])
    cuts = [
        cut | {"supervisions": [*cut["supervisions"], rounded]},
        cut | {"supervisions": [behind, before]},
        resampled,
        make_cut(wav, transforms=[{"name": "Speed", "kwargs": {"factor": 0.9}}]),
        make_cut(wav, sources=[{"type": "command", "channels": [0], "source": "cat a.wav"}]),
        make_cut(wav, sources=[{"type": "file", "channels": [0, 1], "source": wav}]),
        cut | {"supervisions": []},
        {"id": "x", "tracks": [{"cut": cut, "type": "MonoCut", "offset": 0}], "type": "MixedCut"},
        cut | {"supervisions": [{"id": "no-times"}]},
        cut | {"supervisions": "s1"},
    ]
    path = tmp_path / "cuts.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, cuts)).encode()))
    assert shorten(run(path, "lhotse")) == [
        (wav, 1.5, 2.75, "Go on", "s1"),
        (wav, 1.77, 3.0, "Go on", "s1"),
        (wav, 1.5, 2.75, "Go on", "s1"),
    ]
    reasons = capsys.readouterr().out.splitlines()[1:]
    assert reasons.pop(5) == (
        "2 rejected: its cut holds a part of the supervision, but all of its text (r1-a, r1-a)"
    )
    lines = [reason.split("cuts.jsonl.gz:", 1)[1] for reason in reasons]
    assert lines == ["7)", "9, cuts.jsonl.gz:10)", "6)", "5)", "4)", "8)"]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="cannot read .*cuts.jsonl.gz"):
        run(path, "lhotse")


def test_common_voice(tmp_path, capsys):
    columns = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender "
    columns += "accents variant locale segment"
    first = make_sound(tmp_path / "clips" / "common_voice_en_1.mp3")
    second = make_sound(tmp_path / "clips" / "common_voice_en_2.mp3")
    rest = "\t".join(["", "2", "0", "", "", "", "", "en", ""])
    write(
        tmp_path / "train.tsv",
        columns.replace(" ", "\t"),
        f'c1\tcommon_voice_en_1.mp3\tid1\t"Go" on.\t{rest}',
        f'c2\tcommon_voice_en_2\tid2\t"Stop\t{rest}',
        f"c2\tcommon_voice_en_3.mp3\tid3\tGone\t{rest}",
        "c2\tcut.mp3",
        "c3",
    )
    assert shorten(run(tmp_path, "common_voice", "--part", "train")) == [
        (first, None, None, '"Go" on.', "c1"),
        (second, None, None, '"Stop', "c2"),
    ]
    assert capsys.readouterr().out.splitlines()[1:] == [
        "1 rejected: no path (train.tsv:6)",
        "2 rejected: no such audio file (common_voice_en_3, cut)",
    ]


def test_audiofolder(tmp_path, capsys):
    folder = tmp_path / "corpus"
    first = make_sound(folder / "train" / "clips" / "a.wav")
    second = make_sound(folder / "test" / "b.flac")
    make_sound(folder / "train" / "c.wav")
    write(
        folder / "train" / "metadata.csv",
        "file_name,transcription,speaker_id",
        'clips/a.wav,"Say ""on"", then\nstop",7',
        "c.wav,,7",
        ",go,7",
    )
    write(
        folder / "test" / "metadata.jsonl",
        {"file_name": "b.flac", "text": "Go", "speaker_id": 8},
        {"file_name": "b.flac", "label": 1},
    )
    assert shorten(run(folder, "audiofolder")) == [
        (first, None, None, 'Say "on", then stop', "7"),
        (second, None, None, "Go", "8"),
    ]
    rejected = capsys.readouterr().out.splitlines()[1:]
    assert "no column of text: wanted is one of transcription, " in rejected[0]
    assert rejected[1:3] == [
        "1 rejected: no file_name (metadata.csv:5)",
        "1 rejected: no text (c.wav)",
    ]
    assert len(run(folder, "audiofolder", "--part", "test")) == 1


def test_plain_pairs(tmp_path, capsys):
    folder = tmp_path / "corpus"
    wav = make_sound(folder / "s1" / "1.5.wav")
    make_sound(folder / "s1" / "alone.FLAC")
    write(folder / "s1" / "1.5.txt", "go", "on")
    make_sound(folder / "latin.wav")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "broken.wav").write_bytes(b"no audio")
    write(folder / "broken.txt", "go")
    write(folder / "lost.txt", "go")
    name = os.fsdecode(b"caf\xe9")  # in Latin-1
    other = str(folder / "s2" / f"{name}.wav")
    (folder / "s2").mkdir()
    os.rename(make_sound(folder / "s2.wav"), other)
    write(folder / "s2" / f"{name}.txt", "go")
    rows = shorten(run(folder, "pairs"))
    assert rows == [(wav, None, None, "go on", "s1"), (other, None, None, "go", "s2")]
    assert capsys.readouterr().out.splitlines()[1:] == [
        "1 rejected: no audio for the text (lost)",
        "1 rejected: no text (s1/alone)",
        "1 rejected: text is not UTF-8 (latin)",
        "1 rejected: the file cannot be read as audio, or holds none (broken)",
    ]


def test_durations_have_bounds_and_many_keys_are_cut_short(tmp_path, capsys):
    line = {"audio_filepath": make_sound(tmp_path / "a.wav", 9.0), "text": "go"}
    seconds = [0.5, 1.0, 2.0, *[3.0] * 12]
    path = write(tmp_path / "m.json", *[line | {"duration": x} for x in seconds])
    rows = run(path, "nemo", "--min_duration", "1", "--max_duration", "2")
    assert [row["duration"] for row in rows] == [1.0, 2.0]
    shorter, longer = sorted(capsys.readouterr().out.splitlines()[1:])
    assert shorter == "1 rejected: shorter than --min_duration 1.0 (m.json:1)"
    assert longer.startswith("12 rejected: longer than --max_duration 2.0 (m.json:4, ")
    assert longer.endswith("m.json:13, ...)")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Don't stop, it's 3.5 — or 10:30!", "Don't stop it's 3.5 or 10:30"),
        ("'Quoted' twenty-one... end.", "Quoted twenty one end"),
        ("你好，世界。", "你好 世界"),
        ("...", ""),
    ],
)
def test_punctuation_is_left_out_but_in_words_and_numbers(text, wanted):
    assert " ".join(prepare.remove_punctuation(text).split()) == wanted


def test_train_and_dev_share_no_speaker(tmp_path, capsys):
    wav = make_sound(tmp_path / "a.wav")
    lines = []
    for speaker in range(10):
        lines += [{"audio_filepath": wav, "text": "go", "speaker": speaker}] * (1 + speaker % 3)
    path = write(tmp_path / "m.json", *lines, {"audio_filepath": wav, "text": "go"})
    dev_path = tmp_path / "dev.jsonl"
    flags = ["--dev_manifest", str(dev_path), "--dev_share", "0.2"]
    train = run(path, "nemo", *flags)
    dev = [x.row for x in read_manifest([str(dev_path)])]
    assert len(train) + len(dev) == 19
    assert 4 <= len(dev) <= 6  # 0.2 of 19, and at most one speaker more
    assert not {row["spk"] for row in train} & {row["spk"] for row in dev}
    assert "1 rejected: no speaker, but --dev_manifest splits by speaker" in capsys.readouterr().out
    write(path, lines[0])
    with pytest.raises(InputError, match="needs two speakers or more"):
        run(path, "nemo", *flags)


ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
# where the lines in of the docs go; in a folder, each names its own file
PLACES = {
    "librispeech": ("LibriSpeech/dev-clean/84/121123/84-121123.trans.txt", "LibriSpeech"),
    "aishell": ("data_aishell/transcript/aishell_transcript_v0.8.txt", "data_aishell"),
    "kaldi": ("kaldi", "kaldi"),
    "nemo": ("nemo.json", "nemo.json"),
    "wenet": ("data.list", "data.list"),
    "lhotse": ("cuts.jsonl", "cuts.jsonl"),
    "common_voice": ("cv/train.tsv", "cv"),
    "audiofolder": ("folder/train/metadata.csv", "folder"),
    "pairs": ("pairs", "pairs"),
}


@pytest.mark.parametrize("corpus", get_args(prepare.CORPORA))
def test_the_line_in_of_the_docs_becomes_the_line_out(tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    section = DOCS.split(f"### {corpus}\n")[1].split("\n#")[0]
    given, made = re.findall(r"```(?:json)?\n(.+?)\n```", section, re.DOTALL)
    row = json.loads(made.replace("/data/", f"{tmp_path}/"))
    make_sound(row["wav"], 60.0 if "end" in row else row["duration"])
    place, source = PLACES[corpus]
    if place == corpus:
        for line in given.splitlines():
            name, content = line.split(":", 1)
            write(tmp_path / place / name, content.strip())
    else:
        write(tmp_path / place, given)
    part = ["--part", "train"] if corpus in ("aishell", "common_voice") else []
    assert run(tmp_path / source, corpus, *part) == [row]


def test_the_first_command_of_the_docs_prints_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command, printed = re.findall(r"```(?:bash)?\n(.+?)```", DOCS, re.DOTALL)[:2]
    flags = command.replace("\\\n", " ").split()[3:]
    flags[flags.index("--manifest") + 1] = str(tmp_path / "train.jsonl")
    prepare.main(flags)
    assert capsys.readouterr().out.replace(f"{tmp_path}/", "") == printed


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["kaldi", "--part", "missing"], "no such folder: .*missing"),
        (["kaldi"], "no utterance of .*: 1 rejected: wav.scp has a command"),
        (["librispeech"], "no utterance of .*: there is nothing; is --corpus right"),
        (["aishell"], "--corpus aishell needs --part"),
        (["aishell", "--part", "dev"], "cannot read .*aishell_transcript_v0.8.txt"),
        (["common_voice"], "--corpus common_voice needs --part"),
        (["common_voice", "--part", "dev"], "cannot read .*dev.tsv"),
        (["common_voice", "--part", "bad"], "bad.tsv has no column path, sentence"),
        (["audiofolder"], "no metadata.csv and no metadata.jsonl in "),
        (["nemo"], "--corpus nemo is one file, and .* is none"),
        (["pairs", "--dev_share", "1"], "--dev_share must be between 0 and 1"),
        (["pairs", "--min_duration", "5", "--max_duration", "1"], "--max_duration 1.0 leaves"),
    ],
)
def test_what_is_no_such_corpus_is_refused(tmp_path, flags, reason):
    write(tmp_path / "wav.scp", "u1 flac -d a.flac |")
    write(tmp_path / "text", "u1 go")
    write(tmp_path / "bad.tsv", "client_id\tage")
    if flags[0] in ("pairs", "audiofolder", "librispeech"):
        (tmp_path / "text").unlink()
    with pytest.raises(InputError, match=reason):
        run(tmp_path, *flags)
