import json
from pathlib import Path

import native
import plot
import pytest
import score
import tiny

import recognize


def write(path, *rows):
    path.write_text("".join(json.dumps({"wav": "a.wav", **row}) + "\n" for row in rows))
    return str(path)


def table(text):
    """The cells of each row by their heads, and what is printed below the table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines[2:]], text.splitlines()[len(lines) :]


@pytest.mark.parametrize(
    "rows",
    [
        [("go ON", "go no"), ("it's two o'clock", "it is 2 o'clock"), ("", "now")],
        [("今天天气。", "今天 天汽好"), ("三", "")],
        [("Où est l'été?", "où est l'ete")],
    ],
)
def test_without_flags_the_rate_is_that_of_recognize(tmp_path, capsys, rows):
    rows = [{"txt": txt, "hyp": hyp} for txt, hyp in rows]
    score.show([write(tmp_path / "a.jsonl", *rows)])
    [cells], _ = table(capsys.readouterr().out)
    wanted = {head: str(cell) for head, cell in recognize.score(rows).items()}
    assert wanted.items() <= cells.items() and cells["dropped"] == "0"


@pytest.mark.parametrize(
    "metric, name, rate",
    [
        (None, None, "0.00"),
        (None, "none", "50.00"),  # "Café" is not "cafe"
        ("WER", "basic", "0.00"),
        ("CER", None, "0.00"),
        ("CER", "none", "33.33"),  # C and é of six letters
    ],
)
def test_metric_and_normaliser_can_be_given(tmp_path, capsys, metric, name, rate):
    path = write(tmp_path / "a.jsonl", {"txt": "Café au", "hyp": "cafe au"})
    if (metric, name) in ((None, None), ("WER", "basic"), ("CER", None)):
        path = write(tmp_path / "a.jsonl", {"txt": "Café au", "hyp": "café au"})
    score.show([path], metric, name)
    [cells], _ = table(capsys.readouterr().out)
    assert list(cells.values())[1] == rate and f"{metric or 'WER'} %" in cells


def test_dropped_hypotheses_are_counted_and_shown_and_rates_are_kept(tmp_path, capsys):
    refusal = "I apologize, but it appears that there is no speech to transcribe"
    rows = [
        {"txt": "go on", "hyp": "go on", "duration": 1.0},
        {"txt": "go on", "hyp": refusal, "duration": 9.0},
        {"hyp": "no transcript"},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    score.show([path])
    [cells], below = table(capsys.readouterr().out)
    # 12 words for 2: 2 substituted and 10 inserted, of 4 words in all
    assert cells["WER %"] == "300.00" and cells["WER % filtered"] == "0.00"
    assert cells["dropped"] == "1" and cells["utterances"] == "2"
    assert below == [f"{path}: a.wav: refusal: go on | {refusal}"]
    scored = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row.get("rate") for row in scored] == [0, 600, None]
    assert [row.get("hallucination") for row in scored] == [None, "refusal", None]
    assert scored[2] == {"wav": "a.wav", **rows[2]}


def test_recognition_in_the_same_command_has_all_in_one_table(
    paths, projector, tmp_path, monkeypatch, capsys
):
    def recognized(model, rows, *options):
        for row, hyp in zip(rows, ["go on", "no speech", "go"]):
            row["hyp"] = hyp
            yield row

    monkeypatch.setattr(recognize, "recognize", recognized)
    lines = [{"wav": str(tmp_path / "a.wav"), "txt": "go on"}] * 2 + [{"wav": "a.wav"}]
    tiny.make_sound(tmp_path / "a.wav", 1, 300)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.jsonl"
    command = ["recognize.py", "--projector_model_path", projector, "--data_path", str(manifest)]
    score.main([*command, "--num_beams", "1", "2", "--metric", "CER", "--result_path", str(out)])
    printed = capsys.readouterr().out
    beams, below = table(printed)
    assert [row["beam"] for row in beams] == ["1", "2"]
    line = f"{tmp_path / 'a.wav'}: refusal: go on | no speech"
    assert below == [f"row 1: {line}", f"row 2: {line}"]
    (tmp_path / "beams.md").write_text(printed)
    assert plot.table(tmp_path / "beams.md") == beams
    for row in beams:
        # of eight letters: "nospeech" has four more than "goon", and shares one o with it
        assert row["CER %"] == "87.50" and row["CER % filtered"] == "0.00"
        assert row["dropped"] == "1" and row["utterances"] == "2" and float(row["RTF"]) >= 0
    for beam in (1, 2):
        path = out.with_stem(f"out.beam{beam}")
        scored = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row.get("hallucination") for row in scored] == [None, "refusal", None]
        assert [row.get("rate") for row in scored] == [0, 175, None]
        score.main(["--result_path", str(path), "--metric", "CER"])  # the same again, without
        [again], _ = table(capsys.readouterr().out)
        assert {**again, **row} == {**row, "result": str(path)}


@pytest.mark.parametrize(
    "hypothesis, reason",
    [
        ("I'm an AI language model", "refusal"),
        ("As an AI, I cannot hear audio.", "refusal"),
        ("I am sorry, but I cannot make that out", "refusal"),
        ("i am sorry but i have to go", None),
        ("he said i am sorry", None),
        ("there is an apology in the speech", None),
        ("no no no no", None),
        ("no no no no no", "loop"),
        ("on the on the on the on the on the hill", "loop"),
        ("对对对对对对对对对对", "loop"),
        ("one zero one zero one zero one", None),
    ],
)
def test_what_counts_as_a_hallucination(hypothesis, reason):
    assert score.hallucination({"hyp": hypothesis, "duration": len(hypothesis) / 25}) == reason


def test_text_that_nobody_can_say_so_fast_is_a_hallucination():
    row = {"hyp": "the quick brown fox jumps over the lazy dog and away"}  # 52 characters
    assert score.hallucination(row) is None  # of unknown duration
    assert score.hallucination({**row, "duration": 1.1}) is None
    assert score.hallucination({**row, "duration": 1.0}) == "more than can be said"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"wav": "a.wav", "txt": "go"}',
        '{"wav": "a.wav", "txt": "go", "hyp": 1}',
        '{"txt": "go", "hyp": "go"}',
        '{"wav": "a.wav", "txt": null, "hyp": "go"}',
        '{"wav": "a.wav", "txt": "go", "hyp": "go", "duration": null}',
        '{"wav": "a.wav", "txt": "go", "hyp": "go", "duration": "7"}',
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="a.jsonl: wanted JSONL with hyp"):
        score.show([str(tmp_path / "a.jsonl")])


def test_whisper_decodes_the_same_manifest_beside_ours(paths, tmp_path, monkeypatch, capsys):
    texts = [" text 0", " text 2"]

    class Whisper:
        dims = type("Dims", (), {"n_mels": 80})

        def decode(self, mel, options):
            assert mel.shape == (80, 3000) and options.beam_size == 5
            return type("Found", (), {"text": texts.pop(0)})

        def transcribe(self, audio, **options):
            assert len(audio) == 31 * 16_000
            return {"text": " all of it"}

    monkeypatch.setattr(native.whisper, "load_model", lambda name, device: Whisper())
    for i, seconds in enumerate([0.5, 31, 1]):
        tiny.make_sound(tmp_path / f"{i}.wav", seconds, 300)
    rows = [{"wav": f"{i}.wav", "txt": "text 0"} for i in range(3)]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    ours = write(tmp_path / "ours.jsonl", *({**row, "hyp": "text 0"} for row in rows))
    out = str(tmp_path / "new" / "native.jsonl")
    arguments = ["--whisper_model_name_or_path", "tiny", "--data_path", str(manifest)]
    native.main([*arguments, "--result_path", out, "--beside", ours])
    results = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [row["hyp"] for row in results] == ["text 0", "all of it", "text 2"]
    assert [row["duration"] for row in results] == [0.5, 31, 1]
    cells, _ = table(capsys.readouterr().out)
    assert [row["result"] for row in cells] == [out, ours]
    assert [row["WER %"] for row in cells] == ["66.67", "0.00"]  # 3 + 1 wrong of 6 words
