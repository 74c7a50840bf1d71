import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import recognize
from data import read_manifest
from model import InputError, load


def run(projector, data_path, result_path, *options):
    arguments = ["--projector_model_path", projector, "--data_path", str(data_path)]
    recognize.main([*arguments, "--result_path", str(result_path), *options])
    return result_path.read_text(encoding="utf-8").splitlines()


def test_wer_worked_out_by_hand():
    references = ["THE CAT SAT", "It's two o'clock!"]
    hypotheses = ["the cat sad down", "it is 2 o'clock"]
    line = "WER 28.57 % in 2 utterances: 6 right, 1 substituted, 0 deleted, 1 inserted"
    assert recognize.score(references, hypotheses) == line


def test_cer_worked_out_by_hand_for_text_without_word_boundaries():
    line = "CER 50.00 % in 1 utterances: 3 right, 1 substituted, 0 deleted, 1 inserted"
    assert recognize.score(["今天天气。"], ["今天 天汽好"]) == line
    assert recognize.score(["\uf900\ufa0e"], ["\uf900\ufa0e"]).startswith("CER 0.00 %")


def test_empty_hypotheses_and_references_count():
    line = "WER 100.00 % in 2 utterances: 0 right, 0 substituted, 2 deleted, 0 inserted"
    assert recognize.score(["go on", ""], ["", ""]) == line
    assert recognize.score(["go", ""], ["go", "now"]).startswith(
        "WER 100.00 % in 2 utterances: 1 right,"
    )


def test_languages_other_than_english_keep_their_letters_apart_from_case_and_punctuation():
    assert recognize.score(["Où est l'été?"], ["où est l'ete"]).startswith(
        "WER 25.00 % in 1 utterances: 3 right"
    )


def test_jsonl_keeps_every_key_in_the_order_of_the_manifest(paths, projector, tmp_path, capsys):
    results = run(projector, paths.manifest, tmp_path / "out.jsonl")
    results = [json.loads(line) for line in results]
    assert [result["wav"] for result in results] == [f"{i}.wav" for i in range(8)]
    assert [result["txt"] for result in results] == tiny.TEXTS
    assert all(set(result) == {"wav", "txt", "hyp"} for result in results)
    printed = capsys.readouterr()
    assert "WER" in printed.out and " 1/1 [" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_batch_size_changes_no_hypothesis(paths, projector, tmp_path):
    small = ["--num_beams", "2", "--batch_size"]
    one = run(projector, paths.manifest, tmp_path / "1.txt", *small, "1")
    assert one == run(projector, paths.manifest, tmp_path / "3.txt", *small, "3")
    assert len(one) == 8 and len(set(one)) > 1


def test_large_files_come_first_and_results_in_the_order_of_the_manifest(
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
    rows = read_manifest([str(manifest)], default="")

    class InProcess(torch.utils.data.DataLoader):
        def __init__(self, *args, num_workers=0, **options):
            super().__init__(*args, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", InProcess)
    done = [row["wav"] for row in recognize.recognize(model.eval(), rows, 1, 1)]
    assert done == order == ["1.wav", "2.wav", "0.wav"]
    assert [row["wav"] for row in rows] == ["0.wav", "1.wav", "2.wav"]
    assert all("hyp" in row for row in rows)


def test_without_transcripts_there_is_no_score(projector, tmp_path, capsys):
    tiny.make_sound(tmp_path / "a.wav", 0.4, 300)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"wav": "a.wav"}\n' * 2)
    assert len(run(projector, manifest, tmp_path / "new/out.txt")) == 2
    assert capsys.readouterr().out == ""
    manifest.write_text('{"wav": "a.wav"}\n{"wav": "a.wav", "txt": "go on", "path": 1}')
    results = run(projector, manifest, tmp_path / "out.jsonl")
    assert json.loads(results[1])["path"] == 1
    [edits] = re.findall(r"WER .* % in 1 utterances: (.*)", capsys.readouterr().out)
    assert sum(map(int, re.findall(r"(\d+) (?:right|substituted|deleted)", edits))) == 2  # words


def test_audio_that_cannot_be_read_is_named_and_finished_hypotheses_are_kept(projector, tmp_path):
    tiny.make_sound(tmp_path / "a.wav", 0.4, 300)
    (tmp_path / "b.wav").write_text("not audio")
    manifest = tmp_path / "m.jsonl"
    # large files come first, and while one batch is recognised the next is read
    manifest.write_text('{"wav": "b.wav"}\n' + '{"wav": "a.wav"}\n' * 2)
    with pytest.raises(InputError, match=r"b.wav: cannot be decoded"):
        run(projector, manifest, tmp_path / "out.txt", "--batch_size", "1")
    assert not (tmp_path / "out.txt").exists()
    assert len((tmp_path / "out.txt.part").read_text(encoding="utf-8").splitlines()) == 1


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
    assert done.stdout.count("WER") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]
