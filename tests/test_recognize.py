import json

import pytest
import tiny

import recognize
from model import InputError


def run(projector, data_path, result_path, *options):
    arguments = ["--projector_model_path", projector, "--data_path", str(data_path)]
    recognize.main([*arguments, "--result_path", str(result_path), *options])
    return result_path.read_text(encoding="utf-8").splitlines()


def test_wer_worked_out_by_hand():
    references = ["THE CAT SAT", "It's two o'clock!"]
    hypotheses = ["the cat sad down", "it is 2 o'clock"]
    line = "WER 28.57 % of 7 words in 2 utterances: 1 substituted, 0 deleted, 1 inserted"
    assert recognize.score(references, hypotheses) == line


def test_cer_worked_out_by_hand_for_text_without_word_boundaries():
    line = "CER 50.00 % of 4 characters in 1 utterances: 1 substituted, 0 deleted, 1 inserted"
    assert recognize.score(["今天天气。"], ["今天 天汽好"]) == line


def test_empty_hypotheses_and_references_count():
    line = "WER 100.00 % of 2 words in 2 utterances: 0 substituted, 2 deleted, 0 inserted"
    assert recognize.score(["go on", ""], ["", ""]) == line
    assert recognize.score(["go", ""], ["go", "now"]).startswith("WER 100.00 % of 1 words")


def test_languages_other_than_english_keep_their_letters_apart_from_case_and_punctuation():
    assert recognize.score(["Où est l'été?"], ["où est l'ete"]).startswith("WER 25.00 % of 4")


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


def test_without_transcripts_there_is_no_score(projector, tmp_path, capsys):
    tiny.make_sound(tmp_path / "a.wav", 0.4, 300)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"wav": "a.wav"}\n' * 2)
    assert len(run(projector, manifest, tmp_path / "new/out.txt")) == 2
    assert capsys.readouterr().out == ""
    manifest.write_text('{"wav": "a.wav"}\n{"wav": "a.wav", "txt": "go on", "path": 1}')
    results = run(projector, manifest, tmp_path / "out.jsonl")
    assert json.loads(results[1])["path"] == 1
    assert "of 2 words in 1 utterances" in capsys.readouterr().out


def test_audio_that_cannot_be_read_is_named_and_finished_hypotheses_are_kept(projector, tmp_path):
    tiny.make_sound(tmp_path / "a.wav", 0.4, 300)
    (tmp_path / "b.wav").write_text("not audio")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"wav": "a.wav"}\n{"wav": "b.wav"}')
    with pytest.raises(InputError, match=r"b.wav: cannot be decoded"):
        run(projector, manifest, tmp_path / "out.txt", "--batch_size", "1")
    assert not (tmp_path / "out.txt").exists()
    assert len((tmp_path / "out.txt.part").read_text(encoding="utf-8").splitlines()) == 1


def test_several_processes_are_refused(paths, projector, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="not torchrun"):
        run(projector, paths.manifest, tmp_path / "out.txt")
