"""recognize.py, from its command line to its results and its table."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import soundfile
import tiny
from test_train import ROOT, TORCHRUN, finish, launch, wait_until

import recognize
from cache import Encoder
from command import InputError
from loading import load
from manifest import read_manifest


def run(projector, manifest, result_path: Path, options: str = "") -> list[dict]:
    """Recognise in this process, and return the results that were written under this very name."""
    command = f"--projector_model_path {projector} --data_path {manifest}"
    recognize.main(f"{command} --result_path {result_path} {options}".split())
    return read(result_path)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_table(printed: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, each by the table's head."""
    head, _, *rows = [line for line in printed.splitlines() if line.startswith("|")]
    names = head.strip("| ").split(" | ")
    return [dict(zip(names, row.strip("| ").split(" | "))) for row in rows]


@pytest.fixture
def encoded(monkeypatch):
    """Each window that an encoder encodes, and finds in no cache, from here on."""
    windows = []
    compute = Encoder.compute

    def compute_and_note(self, batch):
        windows.extend(batch)
        return compute(self, batch)

    monkeypatch.setattr(Encoder, "compute", compute_and_note)
    return windows


@pytest.fixture
def nine(paths, tmp_path, monkeypatch):
    """The eight sounds with users' own keys, and six seconds that claim to be a tenth of one."""
    rows = [json.loads(line) for line in Path(paths.manifest).read_text().splitlines()]
    for i, row in enumerate(rows):
        row["wav"] = str(Path(paths.manifest).with_name(row["wav"]))
        row["_path"], row["path"], row["_txt"] = i, f"user/{i}", [i]
    monkeypatch.setattr("manifest.check_claim", lambda utterance: None)
    long = tiny.make_sound(tmp_path / "long.wav", 6, 200)
    rows.insert(3, {"wav": str(long), "txt": "go on", "duration": 0.1})
    manifest = tmp_path / "nine.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for row in rows))
    return manifest


def test_several_beams_are_one_encoding_and_have_a_file_and_a_row_each(
    projector, nine, tmp_path, encoded, capsys
):
    rows = read(nine)
    run(projector, nine, tmp_path / "out.jsonl", "--num_beams 1 3")
    assert len(encoded) == 9
    names = {path.name for path in tmp_path.glob("out*")}
    assert names == {"out.beam1.jsonl", "out.beam3.jsonl"}
    printed = capsys.readouterr().out
    assert "\nmetric: WER; normaliser: basic\n" in printed
    for beams, row in zip((1, 3), read_table(printed), strict=True):
        results = read(tmp_path / f"out.beam{beams}.jsonl")
        assert [result | line for line, result in zip(rows, results, strict=True)] == results
        assert [result["duration"] for result in results[:4]] == [0.5, 0.63, 0.76, 0.1]
        kept = [result["rate"] for result in results if result["hallucination"] is None]
        assert len(kept) > 5
        dropped = str(9 - len(kept))
        assert (row["beam"], row["dropped"], row["utterances"]) == (str(beams), dropped, "9")
        # all but the long one, which is dropped, have a word each: their rate is the mean of theirs
        assert float(row["WER % filtered"]) == round(sum(kept) / len(kept), 2)
        edits = [int(row[name]) for name in ("substitutions", "deletions", "insertions")]
        assert float(row["WER %"]) == 100 * sum(edits) / 10
        assert float(row["RTF"]) > 0
        long = f"{rows[3]['wav']}: more than can be said: go on | {results[3]['hyp']}"
        assert f"\nbeam {beams}: {long}" in printed
    alone = run(projector, nine, tmp_path / "alone.jsonl", "--num_beams 3")
    assert alone == results != read(tmp_path / "out.beam1.jsonl")


def test_metric_and_normalizer_can_be_given(paths, projector, tmp_path, capsys):
    options = "--metric CER --normalizer none --max_new_tokens 1"
    results = run(projector, paths.manifest, tmp_path / "out.jsonl", options)
    printed = capsys.readouterr().out
    # a hypothesis of one token is its end alone
    assert [result["hyp"] for result in results] == [""] * 8
    [row] = read_table(printed)
    letters = sum(len(text) for text in tiny.TEXTS)
    assert (row["CER %"], row["deletions"]) == ("100.00", str(letters))
    assert printed.endswith("metric: CER; normaliser: none\n")


def test_batch_size_changes_no_hypothesis(paths, projector, tmp_path):
    options = "--num_beams 2 --bf16 False --batch_size"  # bfloat16 rounds with the shape
    one = run(projector, paths.manifest, tmp_path / "1.jsonl", f"{options} 1")
    three = run(projector, paths.manifest, tmp_path / "3.jsonl", f"{options} 3")
    assert one == three
    assert len({result["hyp"] for result in one}) == 8


def test_a_second_run_takes_its_encodings_from_the_disk(paths, projector, tmp_path, encoded):
    options = f"--num_beams 1 --encoder_cache {tmp_path}/cache"
    first = run(projector, paths.manifest, tmp_path / "1.jsonl", options)
    assert len(encoded) == 8
    second = run(projector, paths.manifest, tmp_path / "2.jsonl", options)
    assert len(encoded) == 8
    plain = run(projector, paths.manifest, tmp_path / "plain.jsonl", "--num_beams 1")
    assert first == second == plain


def test_utterances_without_txt_are_recognised_and_not_scored(projector, tmp_path, capsys):
    tiny.make_sound(tmp_path / "a.wav", 0.4, 300)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"wav": "a.wav"}\n{"wav": "a.wav"}')
    results = run(projector, manifest, tmp_path / "new" / "out.jsonl")
    keys = {"wav", "duration", "hyp", "hallucination"}
    assert [set(result) for result in results] == [keys, keys]
    assert capsys.readouterr().out == ""
    manifest.write_text('{"wav": "a.wav"}\n{"wav": "a.wav", "txt": "go on"}')
    unscored, scored = run(projector, manifest, tmp_path / "out.jsonl")
    assert "rate" not in unscored
    [row] = read_table(capsys.readouterr().out)
    assert row["utterances"] == "1"
    assert float(row["WER %"]) == scored["rate"]


def test_long_audio_comes_first_and_keeps_its_hypotheses(paths, projector):
    utterances = read_manifest([paths.manifest])
    order = []
    for done, seconds in recognize.recognize(load(projector).eval(), utterances, [1, 2], 3):
        order.extend(done)
        assert set(seconds) == {1, 2}
    assert order == utterances[::-1]  # each sound of the manifest is longer than the last
    assert all(set(utterance.hypotheses) == {1, 2} for utterance in utterances)


def test_hypotheses_before_audio_that_cannot_be_read_are_kept(projector, tmp_path):
    names = ["short", "shorter", "nan", "long", "longer"]
    for name, seconds in zip(names, (0.4, 0.3, 0.5, 0.6, 0.7), strict=True):
        tiny.make_sound(tmp_path / f"{name}.wav", seconds, 300)
    soundfile.write(tmp_path / "nan.wav", [float("nan")] * 8000, 16_000, subtype="FLOAT")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(json.dumps({"wav": f"{name}.wav"}) for name in names))
    with pytest.raises(InputError, match=r"nan.wav holds samples that are no numbers"):
        run(projector, manifest, tmp_path / "out.jsonl", "--batch_size 1")
    assert not (tmp_path / "out.jsonl").exists()
    # while one is recognised the next is read, so that the one before the bad one is lost
    part = read(tmp_path / "out.jsonl.part")
    assert [result["wav"] for result in part] == ["longer.wav"]


def test_a_killed_recognition_leaves_its_hypotheses(paths, projector, tmp_path):
    (tmp_path / "out.jsonl").write_text("an earlier result")
    command = f"{sys.executable} {ROOT}/recognize.py --projector_model_path {projector}"
    manifests = f"{paths.manifest} " * 100  # so many that it cannot be done before it is killed
    process = launch(
        f"{command} --data_path {manifests} --result_path out.jsonl --batch_size 2", tmp_path
    )
    part = tmp_path / "out.jsonl.part"
    wait_until(process, lambda: part.exists() and part.read_bytes().count(b"\n") >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert (tmp_path / "out.jsonl").read_text() == "an earlier result"
    *whole, _ = part.read_text(encoding="utf-8").split("\n")
    results = [json.loads(line) for line in whole]
    assert 3 <= len(results) < 800
    assert results[0]["wav"] == "7.wav"  # the longest
    assert all(isinstance(result["hyp"], str) for result in results)


def test_two_processes_recognise_what_one_does(paths, projector, tmp_path):
    # five, which do not go into two processes' batches of two
    lines = Path(paths.manifest).read_text().splitlines()[:5]
    manifest = Path(paths.manifest).with_name("five.jsonl")
    manifest.write_text("\n".join(lines))
    options = "--num_beams 1 2 --batch_size 2 --bf16 False"
    run(projector, manifest, tmp_path / "one.jsonl", options)
    command = f"{TORCHRUN} --nproc_per_node=2 {ROOT}/recognize.py {options}"
    command += f" --projector_model_path {projector} --data_path {manifest}"
    printed = finish(f"{command} --result_path two.jsonl", tmp_path)
    for beams in (1, 2):
        one = read(tmp_path / f"one.beam{beams}.jsonl")
        assert read(tmp_path / f"two.beam{beams}.jsonl") == one
        assert len({result["hyp"] for result in one}) == 5
    assert len(read_table(printed)) == 2
    assert not list(tmp_path.glob("*.part"))
