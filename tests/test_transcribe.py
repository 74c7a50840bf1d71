"""tools/transcribe.py: from sound files, folders and waveforms to texts, JSON and subtitles."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import tiny
import torch
from whisper.audio import N_SAMPLES

from command import InputError
from loading import load
from manifest import read_manifest
from recognize import recognize
from sound import load_audio
from tools import audio, formats
from tools import transcribe as tool
from tools.transcribe import transcribe

ROOT = Path(__file__).parents[1]
FAKE_FFMPEG = """\
#!/bin/sh
echo "$@" > {folder}/arguments
cat {folder}/samples
"""


def make_sound(path, pitch=300, seconds=0.1):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return str(tiny.make_sound(path, seconds, pitch))


@pytest.fixture(scope="module")
def model(projector):
    return load(projector)


@pytest.fixture
def run(projector, model, monkeypatch, capsys):
    """Call the command with flags, and return what it prints; the model is loaded already."""
    monkeypatch.setattr(tool.ModelArguments, "load_model", lambda args: model)

    def run_command(*flags):
        tool.main(["--projector_model_path", projector, "--num_beams", "1", *map(str, flags)])
        return capsys.readouterr().out

    return run_command


def test_texts_are_those_of_recognize_in_the_order_given(paths, model):
    utterances = read_manifest([paths.manifest])
    for _ in recognize(model.eval(), utterances, [2], 3):
        pass
    utterances.reverse()
    files = [x.path for x in utterances]
    wanted = [x.hypotheses[2] for x in utterances]
    assert transcribe(model, files, 2, 3) == wanted
    waveforms = [torch.tensor(load_audio(file)) for file in files]
    assert transcribe(model, waveforms, 2, 8) == wanted
    assert transcribe(model, []) == []


@pytest.mark.parametrize(
    "waveform, reason",
    [
        (np.full(8000, np.nan), "no numbers"),
        (np.zeros((2, 8000)), r"one row of floats.* got float64 of shape \(2, 8000\)"),
        (np.zeros(8000, np.int16), "got int16"),
    ],
)
def test_what_is_no_waveform_is_refused_with_its_index(model, waveform, reason):
    with pytest.raises(InputError, match=f"audio 1 .*{reason}"):
        transcribe(model, [np.zeros(8000), waveform])


def test_long_audio_is_cut_in_its_silences_and_nothing_is_lost(model):
    noise = np.random.default_rng(0).normal(size=70 * 16_000)
    for start in (112_000, 158_400, 240_000):  # the second silence is not wholly within 10 s
        noise[start : start + 4800] = 0
    pieces = [*audio.split(noise)]
    assert np.array_equal(np.concatenate(pieces), noise)
    lengths = [len(piece) for piece in pieces]
    assert 112_000 < lengths[0] < 116_800
    assert 240_000 < lengths[0] + lengths[1] < 244_800
    assert max(lengths) <= 160_000
    [_] = audio.split(noise[:N_SAMPLES])  # up to 30 s it is whole
    [text] = transcribe(model, [noise], 1)
    texts = transcribe(model, pieces, 1)
    assert text == " ".join(x for x in texts if x)
    assert len(transcribe(model, [np.zeros(16_000), np.zeros(1)], 2)) == 2


def test_a_broken_file_is_named_and_the_others_are_printed(projector, model, tmp_path):
    folder = tmp_path / "folder"
    files = [str(tmp_path / "c.wav"), str(folder / "a.wav"), str(folder / "deep" / "b.flac")]
    for file, pitch in zip(files, (200, 600, 1800)):
        make_sound(file, pitch)
    (folder / "notes.txt").write_text("no audio")
    (folder / "broken.wav").write_text("no audio")
    command = [sys.executable, "-m", "tools.transcribe", "--projector_model_path", projector]
    os.rename(files[1], os.fsencode(folder / "a") + b"\xe9.wav")  # as in Latin-1
    command += ["--num_beams", "2", "--bf16", "False", "--wav", files[0], str(folder), "-"]
    with open(files[0], "rb") as sound:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=sound)
    assert done.returncode == 1
    names = [files[0], f"{folder}/a\\udce9.wav", files[2], "-"]
    audios = [files[0], f"{folder}/a\udce9.wav", files[2], files[0]]
    texts = transcribe(model, audios, 2)
    lines = map("\t".join, zip(names, texts))
    assert done.stdout.splitlines() == list(lines)
    assert f"error: {folder}/broken.wav cannot be decoded as audio" in done.stderr
    assert "error: 1 of 5 files have no transcript; they are named above" in done.stderr
    assert " s of audio" in done.stderr  # the bar
    assert "Traceback" not in done.stderr


def test_each_file_is_printed_before_the_next_group_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "GROUP", 0.05)
    files = [make_sound(tmp_path / f"{name}.wav") for name in "abc"]
    events = []
    read = tool.read_audio
    monkeypatch.setattr(tool, "read_audio", lambda path: events.append("read") or read(path))
    monkeypatch.setattr(tool, "write", lambda *args: events.append("written"))
    run("--wav", *files)
    assert events == ["read", "written"] * 3


def test_jsonl_has_the_times_of_pieces_and_words(run, model, tmp_path):
    long = make_sound(tmp_path / "long.wav", seconds=31)
    printed = run("--output", "jsonl", "--word_times", "True", "--wav", long)
    row = json.loads(printed)
    assert (row["wav"], row["duration"]) == (long, 31)
    assert row["hyp"] == transcribe(model, [long], 1)[0]
    segments = row["segments"]
    assert segments[0]["start"] == 0
    assert [x["end"] for x in segments[:-1]] == [x["start"] for x in segments[1:]]
    for segment in segments:
        for word in segment["words"]:
            assert segment["start"] <= word["start"] < word["end"] <= segment["end"] + 0.1
    [row] = map(json.loads, run("--output", "jsonl", "--wav", long).splitlines())
    assert all("words" not in segment for segment in row["segments"])


def test_subtitles_go_to_a_folder_with_a_file_for_each(run, tmp_path):
    files = [make_sound(tmp_path / name, 900, 1) for name in ("a.wav", "b.wav")]
    out = tmp_path / "new" / "out"
    assert run("--output", "srt", "--output_dir", out, "--wav", *files) == ""
    assert {path.name for path in out.iterdir()} == {"a.srt", "b.srt"}
    (out / "a.vtt").mkdir()
    with pytest.raises(InputError, match=f"--output_dir: cannot write {out}/a.vtt: Is a directory"):
        run("--output", "vtt", "--output_dir", out, "--wav", *files)
    cue = r"00:00:00{0}\d\d\d --> 00:00:0[01]{0}\d\d\d\n\S"
    assert re.match("1\n" + cue.format(","), (out / "a.srt").read_text())
    printed = run("--output", "vtt", "--wav", files[0])
    assert re.match("WEBVTT\n\n" + cue.format("[.]"), printed)


def make_words(*times, **options):
    return [{"word": f"w{i}", "start": s, "end": e, **options} for i, (s, e) in enumerate(times)]


def test_cues_keep_to_the_words_and_end_at_pauses():
    words = make_words((0.5, 0.9), (1.0, 1.4), (2.5, 3.0))
    spoken = formats.Segment(0, 4, "w0 w1 w2", words)
    unaligned = formats.Segment(4, 5, "a <b> --> c", make_words((4, 5), aligned=False))
    silent = formats.Segment(5, 6, "", [])
    transcript = formats.Transcript("a.wav", [spoken, unaligned, silent])
    assert formats.list_cues(transcript) == [
        (0.5, 1.4, "w0 w1"),
        (2.5, 3.0, "w2"),
        (4, 5, "a <b> --> c"),
    ]
    printed = formats.format_transcript(transcript, "vtt")
    assert printed.endswith("00:00:04.000 --> 00:00:05.000\na &lt;b&gt; -&gt; c\n")
    printed = formats.format_transcript(transcript, "srt")
    assert printed.endswith("\n3\n00:00:04,000 --> 00:00:05,000\na <b> -> c\n")
    many = make_words(*[(i, i + 1) for i in range(60)])
    cues = formats.join_words(many)
    assert all(len(text) <= 84 for _, _, text in cues)
    assert " ".join(text for _, _, text in cues) == " ".join(word["word"] for word in many)
    chinese = make_words(*[(i, i + 0.5) for i in range(5)])
    for word, text in zip(chinese, ["今", "天，", "好", "ok", "吗"]):
        word["word"] = text
    assert [text for _, _, text in formats.join_words(chinese)] == ["今天，好 ok 吗"]
    long = make_words((3723.0046, 3724))
    segment = formats.Segment(3723, 3725, "w", long)
    printed = formats.format_transcript(formats.Transcript("a", [segment]), "srt")
    assert "01:02:03,005 --> 01:02:04,000" in printed


def test_standard_input_is_a_file_like_others(run, model, tmp_path, monkeypatch):
    path = make_sound(tmp_path / "a.wav")
    [text] = transcribe(model, [path], 1)
    content = io.BytesIO(Path(path).read_bytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=content))
    assert run("--wav", "-") == f"-\t{text}\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"no audio")))
    with pytest.raises(InputError, match="1 of 1 files"):
        run("--wav", "-")
    with pytest.raises(InputError, match="^standard input cannot be decoded as audio"):
        audio.read_stream(io.BytesIO(b""), "standard input")


def test_what_libsndfile_does_not_know_goes_through_ffmpeg(tmp_path, monkeypatch):
    path = tmp_path / "talk.m4a"
    path.write_bytes(b"what libsndfile does not know")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="talk.m4a cannot be .* Install ffmpeg to read m4a"):
        audio.read_audio(str(path))
    program = tmp_path / "ffmpeg"
    program.write_text(FAKE_FFMPEG.format(folder=tmp_path))
    program.chmod(0o755)
    samples = np.linspace(-1, 1, 100, dtype=np.float32)
    (tmp_path / "samples").write_bytes(samples.tobytes())
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert np.array_equal(audio.read_audio(str(path)), samples)
    assert f"-i file:{path} " in (tmp_path / "arguments").read_text()
    program.write_text("#!/bin/sh\necho first >&2\necho bad data >&2\nexit 1")
    with pytest.raises(InputError, match="talk.m4a cannot .* nor by ffmpeg: bad data$"):
        audio.read_audio(str(path))
    # what libsndfile knows is not tried again
    soundfile.write(tmp_path / "nan.wav", [np.nan], 16_000, subtype="FLOAT")
    with pytest.raises(InputError, match="no numbers"):
        audio.read_audio(str(tmp_path / "nan.wav"))
    with pytest.raises(InputError, match="^no such audio file"):
        audio.read_audio(str(tmp_path / "missing.m4a"))


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_ffmpeg_reads_m4a_and_opens_no_playlist(tmp_path):
    wav = make_sound(tmp_path / "a.wav", seconds=1)
    m4a = str(tmp_path / "a.m4a")
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, m4a], check=True)
    assert abs(len(audio.read_audio(m4a)) - 16_000) < 3200
    playlist = tmp_path / "list.m4a"
    playlist.write_text("ffconcat version 1.0\nfile a.m4a\n")
    with pytest.raises(InputError, match="list.m4a cannot be decoded as audio, nor by ffmpeg"):
        audio.read_audio(str(playlist))


def test_what_cannot_be_done_is_refused_before_models_load(tmp_path):
    command = ["--projector_model_path", "none.safetensors", "--wav"]
    with pytest.raises(InputError, match="no such file or folder: .*missing.wav"):
        tool.main([*command, str(tmp_path / "missing.wav")])
    with pytest.raises(InputError, match=f"no audio in {tmp_path}; wanted .wav"):
        tool.main([*command, str(tmp_path)])
    files = [make_sound(tmp_path / "a.wav"), make_sound(tmp_path / "folder" / "a.wav")]
    with pytest.raises(InputError, match="--output srt of 2 files .* give --output_dir"):
        tool.main([*command, *files, "--output", "srt"])
    with pytest.raises(InputError, match=f"{files[0]} and {files[1]} would both be written to"):
        tool.main([*command, *files, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--output_dir: cannot make"):
        tool.main([*command, files[0], "--output_dir", files[1]])


def test_what_systems_keep_in_folders_is_no_audio(tmp_path):
    good = make_sound(tmp_path / ".cache" / "folder" / "a.wav")  # a folder's own name may be hidden
    hidden = ["._a.wav", "__MACOSX/._a.wav", "@eaDir/a.wav/a.wav", "$RECYCLE.BIN/a.wav", ".a/b.wav"]
    for name in hidden:
        path = tmp_path / ".cache" / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no audio")
    assert audio.list_files([str(tmp_path / ".cache" / "folder")]) == [good]


def test_a_flac_of_unknown_length_is_no_audio_of_endless_length(tmp_path):
    path = make_sound(tmp_path / "a.flac")
    flac = bytearray(Path(path).read_bytes())
    flac[21] &= 0xF0  # here and in what follows is the number of samples
    flac[22:26] = bytes(4)
    Path(path).write_bytes(flac)
    assert len(audio.read_audio(path, max_seconds=60)) == 1600
    with pytest.raises(InputError, match="a.flac has 0.00167 minutes of audio, at most 0.000833"):
        audio.read_audio(path, max_seconds=0.05)
