"""Manifests: what is read of them, and what is said of each bad line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny

import manifest
from command import InputError
from manifest import Utterance, read_manifest

GOOD = '{"wav": "a.wav", "txt": "go"}'
WAV = '"wav" must be the path of an audio file, got'
TXT = '"txt" must be the text that is said, got'
DURATION = '"duration" must be a positive number of seconds, got'
MESSAGES = {
    "{": "not JSON: Expecting property name",
    "[" * 100_000: "not JSON: ",
    "1" * 5000: "not JSON: ",  # Python reads no integer of so many digits
    "[1]": "not a JSON object: [1]",
    "3": "not a JSON object: 3",
    b'{"wav": "a.wav", "txt": "caf\xe9"}': "not UTF-8: byte 0xe9 in column 29",
    '{"txt": "x"}': f"{WAV} null",
    '{"wav": ["a.wav"], "txt": "x"}': f'{WAV} ["a.wav"]',
    '{"wav": "今天.wav", "txt": "x"}': '"wav" names no file: 今天.wav',
    f'{{"wav": "{"b" * 300}", "txt": "x"}}': '"wav" names no file: ',  # no name is so long
    '{"wav": "folder.wav", "txt": "x"}': '"wav" names no file: folder.wav',
    '{"wav": "fifo.wav", "txt": "x"}': '"wav" names no file: fifo.wav',
    '{"wav": "zero.wav", "txt": "x"}': "zero.wav cannot be read as audio: ",
    '{"wav": "cut.wav", "txt": "x"}': "cut.wav cannot be read as audio: ",
    '{"wav": "text.wav", "txt": "x"}': "text.wav cannot be read as audio: ",
    '{"wav": "noise.raw", "txt": "x"}': "noise.raw cannot be read as audio: ",
    '{"wav": "none.wav", "txt": "x"}': "none.wav has 0.0 s of audio by its header",
    '{"wav": "broken.flac", "txt": "x"}': "broken.flac cannot be read as audio: ",
    '{"wav": "a.wav"}': f"{TXT} null",
    '{"wav": "a.wav", "txt": 5}': f"{TXT} 5",
    '{"wav": "a.wav", "txt": " "}': '"txt" is empty, but training needs what is said',
    '{"wav": "a.wav", "txt": "x\\ud800"}': r'"txt" has \ud800 alone, which is half a character',
    '{"wav": "a.wav", "txt": "x", "duration": -1}': f"{DURATION} -1",
    '{"wav": "a.wav", "txt": "x", "duration": "7"}': f'{DURATION} "7"',
    '{"wav": "a.wav", "txt": "x", "duration": true}': f"{DURATION} true",
    '{"wav": "a.wav", "txt": "x", "duration": NaN}': f"{DURATION} NaN",
    '{"wav": "a.wav", "txt": "x", "duration": 1e999}': f"{DURATION} Infinity",
}


def shorten(line):
    """The name of a case."""
    return str(line[:60])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in with the audio that the cases name."""
    monkeypatch.chdir(tmp_path)
    tiny.make_sound(Path("a.wav"), 0.4, 300)
    Path("zero.wav").write_bytes(b"")
    Path("cut.wav").write_bytes(Path("a.wav").read_bytes()[:30])
    Path("text.wav").write_bytes(b"no audio")
    Path("noise.raw").write_bytes(bytes(800))
    soundfile.write("none.wav", np.zeros(0), 16_000)
    soundfile.write("endless.flac", np.zeros(8000), 16_000)
    flac = bytearray(Path("endless.flac").read_bytes())
    flac[21] &= 0xF0  # here and in what follows is the number of samples; streams do not know it
    flac[22:26] = bytes(4)
    Path("endless.flac").write_bytes(flac)
    Path("broken.flac").write_bytes(flac[:50])
    os.mkfifo("fifo.wav")
    Path("folder.wav").mkdir()


def read(content, need_text=True):
    data = content if isinstance(content, bytes) else content.encode()
    Path("m.jsonl").write_bytes(data)
    return read_manifest(["m.jsonl"], need_text)


def refuse(content, need_text=True):
    with pytest.raises(InputError) as error:
        read(content, need_text)
    return str(error.value)


@pytest.mark.parametrize("line", MESSAGES, ids=shorten)
def test_a_bad_line_is_named_by_file_and_number_with_what_is_wrong(folder, line):
    data = line if isinstance(line, bytes) else line.encode()
    counts, message = refuse(b"\n\n".join([GOOD.encode(), data])).split("\n", 1)
    assert counts == "m.jsonl: bad lines: 1, good lines: 1"
    assert message.startswith(f"m.jsonl:3: {MESSAGES[line]}")


def test_all_bad_lines_are_counted_and_ten_are_named(folder):
    head, *named = refuse(f"{GOOD}\n" + "{\n" * 12 + f"{GOOD}\n").splitlines()
    assert head == "m.jsonl: bad lines: 12, good lines: 2"
    assert [line.split()[0] for line in named] == [f"m.jsonl:{i}:" for i in range(2, 12)]


def test_manifests_that_are_missing_folders_or_empty_are_refused(folder):
    for content in ("", "\n \n"):
        assert refuse(content) == "m.jsonl: no utterances; wanted a JSON object a line"
    for path in ("no.jsonl", "folder.wav"):
        with pytest.raises(InputError, match=f"^cannot read {path}: "):
            read_manifest([path])


def test_manifests_are_read_in_order_and_one_named_twice_counts_twice(paths, folder):
    read('{"wav": "a.wav", "txt": "one"}\n\n')
    utterances = read_manifest(["m.jsonl", paths.manifest, "m.jsonl"])
    assert [x.text for x in utterances] == ["one", *tiny.TEXTS, "one"]
    assert utterances[0] == utterances[-1]
    assert (utterances[0].path, utterances[0].duration) == ("a.wav", 0.4)
    assert utterances[1].path == str(Path(paths.manifest).with_name("0.wav"))


def test_a_line_stays_as_it_is_with_the_users_own_keys(folder):
    line = {"wav": "a.wav", "txt": "a▁b", "path": 1, "_path": [2], "_txt": "x", "text": None}
    [utterance] = read(json.dumps(line))
    assert utterance.row == line
    assert (utterance.path, utterance.text) == ("a.wav", "a▁b")


@pytest.mark.parametrize("given, duration", [(0.404, 0.4), (0.9, 0.9), (1e-9, 0.01)])
def test_a_duration_that_may_be_right_is_believed(folder, given, duration):
    [utterance] = read(json.dumps({"wav": "a.wav", "txt": "x", "duration": given}))
    assert utterance.duration == duration


def test_audio_of_unknown_length_is_counted(folder):
    """What a FLAC encoder leaves that writes to a pipe."""
    [utterance] = read('{"wav": "endless.flac", "txt": "x"}')
    assert utterance.duration == 0.5
    assert len(utterance.load()) == 8000
    [utterance] = read('{"wav": "endless.flac", "txt": "x", "start": 0.1, "end": 0.3}')
    assert len(utterance.load()) == 3200


@pytest.mark.parametrize(
    "keys, start, seconds",
    [
        ({"start": 0, "end": 0.3}, 0, 0.3),  # as in WeNet
        ({"start": 0.5, "end": 1.25, "duration": 2}, 0.5, 0.75),
        ({"offset": 0.5, "duration": 0.25}, 0.5, 0.25),  # as in NeMo
        ({"offset": 0, "duration": 0.25}, 0, 0.25),
        ({"offset": 1.5, "duration": None}, 1.5, 0.5),
        ({"start": 1.5}, 1.5, 0.5),
        ({"end": 1.5}, 0, 1.5),
        ({"start": 1.5, "end": 2.4}, 1.5, 0.9),  # rounded times may end behind the file
        ({"start": None, "end": None}, 0, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_a_part_of_a_file_is_read_alone(folder, keys, start, seconds, suffix):
    rng = np.random.default_rng(0)
    soundfile.write(f"long.{suffix}", rng.uniform(-0.5, 0.5, 32_000), 16_000)
    whole, _ = soundfile.read(f"long.{suffix}", dtype="float32")
    line = {"wav": f"long.{suffix}", "txt": "x", **keys, "other": [1]}
    [utterance] = read(json.dumps(line))
    assert utterance.row == line
    assert utterance.duration == seconds
    first = int(start * 16_000)
    expected = whole[first : first + int(seconds * 16_000)]
    np.testing.assert_allclose(utterance.load(), expected, atol=1e-6)


PARTS = {
    '"duration": 10000': '"duration" is 10000 s, but a.wav has 0.40 s: give that, or none',
    '"duration": 1': '"duration" is 1 s, but a.wav has 0.40 s: give that, or none',
    '"offset": 0, "duration": 1': "a.wav ends before 1.00 s: its part from 0.00 s is too long",
    '"start": 5, "end": 6': "a.wav ends before this part, at 5.00 s, starts",
    '"start": 0.42, "end": 0.8': "a.wav ends before this part, at 0.42 s, starts",
    '"start": 0.4': "a.wav ends before this part, at 0.4 s, starts",
    '"start": 0.2, "end": 0.2': '"end" must be after "start", 0.2, got 0.2',
    '"start": -1, "end": 2': '"start" must be a number of seconds, 0 or more, got -1',
    '"offset": "0:01"': '"offset" must be a number of seconds, 0 or more, got "0:01"',
    '"end": true': '"end" must be a number of seconds, 0 or more, got true',
}


@pytest.mark.parametrize("keys", PARTS)
def test_seconds_that_the_file_does_not_have_are_named(folder, keys):
    good = json.dumps({"wav": "a.wav", "txt": "go", "duration": 0.4})
    line = f'{{"wav": "a.wav", "txt": "x", {keys}}}'
    counts, message = refuse(f"{good}\n\n{line}").split("\n", 1)
    assert counts == "m.jsonl: bad lines: 1, good lines: 1"
    assert message == f"m.jsonl:3: {PARTS[keys]}"


def test_of_a_large_manifest_the_strangest_durations_are_checked(folder, monkeypatch):
    headers = []

    def read_header(path):
        headers.append(path)
        return 0.4

    monkeypatch.setattr(manifest, "read_header", read_header)
    monkeypatch.setattr(manifest, "CHECKED", 10)
    lines = [json.dumps({"wav": "a.wav", "txt": "x", "duration": 0.4})] * 50
    read("\n".join(lines))
    assert len(headers) == 10
    lines[7] = lines[7].replace("0.4", "4")
    lines[29] = lines[29].replace("0.4", "1000")
    _, *named = refuse("\n".join(lines)).splitlines()
    assert [line.split()[0] for line in named] == ["m.jsonl:8:", "m.jsonl:30:"]


def test_a_part_behind_its_file_is_named_when_it_is_read(folder):
    utterance = Utterance("a.wav", 1.0, start=5.0, end=6.0)
    with pytest.raises(InputError, match="^a.wav ends before this part, at 5.00 s, starts"):
        utterance.load()


def test_byte_order_marks_carriage_returns_and_line_separators_are_no_faults(folder):
    utterances = read(f'\ufeff{GOOD}\r\n\r\n{{"wav": "a.wav", "txt": "a\u2028b"}}\r\n')
    assert [x.text for x in utterances] == ["go", "a\u2028b"]


def test_text_may_be_missing_where_it_is_not_needed_but_not_be_a_number(folder):
    utterances = read('{"wav": "a.wav"}\n{"wav": "a.wav", "txt": ""}', need_text=False)
    assert [x.text for x in utterances] == [None, ""]
    assert refuse('{"wav": "a.wav", "txt": 3}', need_text=False).endswith(f"{TXT} 3")
