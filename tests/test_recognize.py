import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jiwer
import pytest
import soundfile
import tiny
import torch

import recognize
from data import read_manifest
from model import encode, load


def run(projector, data_path, result_path, *options):
    arguments = ["--projector_model_path", projector, "--data_path", str(data_path)]
    recognize.main([*arguments, "--result_path", str(result_path), *options])
    return result_path.read_text(encoding="utf-8").splitlines()


def score(references, hypotheses):
    rows = [{"txt": txt, "hyp": hyp} for txt, hyp in zip(references, hypotheses)]
    return recognize.score(rows)


def cells(name, rate, substitutions, deletions, insertions):
    edits = {"substitutions": substitutions, "deletions": deletions, "insertions": insertions}
    return {f"{name} %": rate, **edits}


def test_wer_worked_out_by_hand():
    references = ["THE CAT SAT", "It's two o'clock!"]
    hypotheses = ["the cat sad down", "it is 2 o'clock"]
    assert score(references, hypotheses) == cells("WER", "28.57", 1, 0, 1)


def test_wer_is_that_of_jiwer_for_text_that_needs_no_normaliser():
    draw = random.Random(0)
    words = ["go", "up", "on", "now"]
    texts = [[" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(50)] for _ in "ab"]
    assert score(*texts)["WER %"] == f"{100 * jiwer.wer(*texts):.2f}"


def test_cer_worked_out_by_hand_for_text_without_word_boundaries():
    assert score(["今天天气。"], ["今天 天汽好"]) == cells("CER", "50.00", 1, 0, 1)
    assert score(["\uf900\ufa0e"], ["\uf900\ufa0e"]) == cells("CER", "0.00", 0, 0, 0)


def test_empty_hypotheses_and_references_count():
    assert score(["go on", ""], ["", ""]) == cells("WER", "100.00", 0, 2, 0)
    assert score(["go", ""], ["go", "now"]) == cells("WER", "100.00", 0, 0, 1)


def test_languages_other_than_english_keep_their_letters_apart_from_case_and_punctuation():
    assert score(["Où est l'été?"], ["où est l'ete"]) == cells("WER", "25.00", 1, 0, 0)


def test_jsonl_keeps_every_key_in_the_order_of_the_manifest(paths, projector, tmp_path, capsys):
    results = run(projector, paths.manifest, tmp_path / "out.jsonl")
    results = [json.loads(line) for line in results]
    assert [result["wav"] for result in results] == [f"{i}.wav" for i in range(8)]
    assert [result["txt"] for result in results] == tiny.TEXTS
    assert all(set(result) == {"wav", "txt", "hyp", "duration"} for result in results)
    assert [result["duration"] for result in results[:2]] == [0.5, 0.63]
    printed = capsys.readouterr()
    assert "| 3 | " in printed.out and " 1/1 [" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_several_beams_have_a_file_each_and_a_table(paths, projector, tmp_path, capsys):
    for beams in ("1", "3"):
        run(projector, paths.manifest, tmp_path / f"{beams}.jsonl", "--num_beams", beams)
    capsys.readouterr()
    with pytest.raises(FileNotFoundError):
        run(projector, paths.manifest, tmp_path / "out.jsonl", "--num_beams", "1", "3")
    head, line, *rows = capsys.readouterr().out.splitlines()
    heads = ["beam", "WER %", "substitutions", "deletions", "insertions", "RTF", "seconds"]
    assert head == f"| {' | '.join(heads)} |"
    assert line == f"| {' | '.join(['---'] * 7)} |"
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 3"]
    for beams in ("1", "3"):
        alone = (tmp_path / f"{beams}.jsonl").read_text(encoding="utf-8")
        assert (tmp_path / f"out.beam{beams}.jsonl").read_text(encoding="utf-8") == alone
    assert len([*tmp_path.iterdir()]) == 4


def test_batch_size_changes_no_hypothesis(paths, projector, tmp_path):
    small = ["--num_beams", "2", "--batch_size"]
    one = run(projector, paths.manifest, tmp_path / "1.jsonl", *small, "1")
    assert one == run(projector, paths.manifest, tmp_path / "3.jsonl", *small, "3")
    assert len(one) == 8 and len(set(one)) > 1


def test_an_end_that_is_no_special_token_is_not_in_the_text(paths, projector, monkeypatch):
    model = load(projector)
    model.end_id = encode(model.tokenizer, "|")[0]
    ids = torch.tensor([[*encode(model.tokenizer, " go on"), model.end_id, model.end_id]] * 2)
    monkeypatch.setattr(model, "generate", lambda beams, top, **batch: ids)
    rows = read_manifest([paths.manifest])[:2]
    assert [row["hyp"] for row in recognize.recognize(model, rows, 2, 1)] == ["go on"] * 2


def test_long_audio_comes_first_and_results_in_the_order_of_the_manifest(
    paths, projector, tmp_path, monkeypatch
):
    lengths = [0.3, 0.9, 0.5]
    for i, seconds in enumerate(lengths):
        tiny.make_sound(tmp_path / f"{i}.wav", seconds, 300)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({"wav": f"{i}.wav"}) + "\n" for i in range(3)))
    order, original = [], recognize.collate

    def collate(rows, **options):
        order.extend(row["wav"] for row in rows)
        return original(rows, **options)

    monkeypatch.setattr(recognize, "collate", collate)
    model = load(projector)
    rows = read_manifest([str(manifest)], empty="")

    class InProcess(torch.utils.data.DataLoader):
        def __init__(self, *args, num_workers=0, **options):
            super().__init__(*args, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", InProcess)
    done = [row["wav"] for row in recognize.recognize(model.eval(), rows, 1, 1)]
    assert done == order == ["1.wav", "2.wav", "0.wav"]
    assert [row["wav"] for row in rows] == ["0.wav", "1.wav", "2.wav"]
    assert all("hyp" in row for row in rows)


def test_the_most_new_tokens_can_be_given(paths, projector, tmp_path):
    few = run(projector, paths.manifest, tmp_path / "1.jsonl", "--max_new_tokens", "1")
    assert [json.loads(line)["hyp"] for line in few] == [""] * 8  # their end alone
    with pytest.raises(ValueError, match="max_new_tokens.*-1"):
        run(projector, paths.manifest, tmp_path / "2.jsonl", "--max_new_tokens", "-1")


def test_without_transcripts_there_is_no_score(projector, tmp_path, capsys):
    tiny.make_sound(tmp_path / "a.wav", 0.4, 300)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"wav": "a.wav"}\n' * 2)
    assert len(run(projector, manifest, tmp_path / "new/out.jsonl")) == 2
    assert capsys.readouterr().out == ""
    manifest.write_text('{"wav": "a.wav"}\n{"wav": "a.wav", "txt": "go on", "path": 1}')
    results = run(projector, manifest, tmp_path / "out.jsonl")
    assert json.loads(results[1])["path"] == 1
    # of two words, each is wrong and none is missing, or the other way round
    *_, row = capsys.readouterr().out.splitlines()
    rate, substitutions, deletions, insertions = map(float, row.split(" | ")[1:5])
    assert rate == 50 * (substitutions + deletions + insertions)


def test_audio_that_cannot_be_read_is_named_and_finished_hypotheses_are_kept(projector, tmp_path):
    tiny.make_sound(tmp_path / "a.wav", 0.4, 300)
    soundfile.write(tmp_path / "b.wav", [float("nan")] * 1600, 16_000, subtype="FLOAT")
    manifest = tmp_path / "m.jsonl"
    # long audio comes first, and while one batch is recognised the next is read
    manifest.write_text('{"wav": "b.wav"}\n' + '{"wav": "a.wav"}\n' * 2)
    with pytest.raises(ValueError, match=r"b.wav: holds no audio, or samples that are no numbers"):
        run(projector, manifest, tmp_path / "out.jsonl", "--batch_size", "1")
    assert not (tmp_path / "out.jsonl").exists()
    assert len((tmp_path / "out.jsonl.part").read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize("count", [5, 8])
def test_two_processes_recognise_what_one_does_in_the_order_of_the_manifest(
    paths, projector, tmp_path, count
):
    lines = Path(paths.manifest).read_text().splitlines()[:count]  # 5 do not go into batches of 2
    manifest = Path(paths.manifest).with_name("some.jsonl")
    manifest.write_text("\n".join(lines))
    options = ["--projector_model_path", projector, "--data_path", str(manifest)]
    options += ["--num_beams", "2", "--batch_size", "2", "--result_path", "two.jsonl"]
    one = run(projector, manifest, tmp_path / "one.jsonl", "--num_beams", "2", "--batch_size", "2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(Path(recognize.__file__)), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    two = (tmp_path / "two.jsonl").read_text(encoding="utf-8").splitlines()
    assert two == one and len(two) == count and len(set(two)) == count
    assert done.stdout.count("| beam | WER % |") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]


def test_audio_that_is_too_long_for_the_llm_is_refused_by_name(paths, projector):
    model = load(projector)
    assert model.room == 4096 - len(model.before)
    rows = read_manifest([paths.manifest])
    model.room = 13  # the longest, 7.wav, has 71 encoder positions, five of which are joined
    with pytest.raises(ValueError, match=r"7.wav: takes 20 positions, max_length=13 \(flag"):
        list(recognize.recognize(model, rows, 8, 1))


def test_files_and_folders_are_printed_with_their_texts(paths, projector, tmp_path, capsys):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    tiny.make_sound(tmp_path / "folder" / "deep" / "b.flac", 0.4, 300)
    tiny.make_sound(tmp_path / "folder" / "a.wav", 0.5, 200)
    (tmp_path / "folder" / "notes.txt").write_text("no audio")
    tiny.make_sound(tmp_path / "c.wav", 0.7, 300)
    arguments = ["--projector_model_path", projector, "--wav", str(tmp_path / "c.wav")]
    recognize.main([*arguments, str(tmp_path / "folder"), paths.manifest, "--num_beams", "2"])
    printed = capsys.readouterr().out
    lines = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    names = [Path(path).relative_to(tmp_path) for path, _ in lines[:3]]
    assert list(map(str, names)) == ["c.wav", "folder/a.wav", "folder/deep/b.flac"]
    assert len(lines) == 3 + 8 and "| 2 | " in printed  # the manifest's have a score
    results = run(projector, paths.manifest, tmp_path / "out.jsonl", "--num_beams", "2")
    assert [text for _, text in lines[3:]] == [json.loads(line)["hyp"] for line in results]
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "c.wav", "out.jsonl"}


def test_audio_that_is_not_there_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match='d.wav:1: "wav" must be audio'):
        read_manifest([str(tmp_path / "d.wav")], empty="")
    (tmp_path / "empty" / "talk.wav").mkdir(parents=True)  # a folder, too
    with pytest.raises(OSError, match="Is a directory: '.*empty'"):
        read_manifest([str(tmp_path / "empty")], empty="")
    tiny.make_sound(tmp_path / "empty" / "talk.wav" / "a.wav", 0.4, 300)
    [row] = read_manifest([str(tmp_path / "empty")], empty="")
    assert row["_path"] == str(tmp_path / "empty" / "talk.wav" / "a.wav") and "txt" not in row
    with pytest.raises(OSError, match="No such file or directory: ''"):  # not all files from here
        read_manifest([""], empty="")
