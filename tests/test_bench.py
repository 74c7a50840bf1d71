"""The measurements in bench/, on tiny models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import tiny
import torch

import recognize
from data import read_manifest
from model import SpeechLLM, encode, load

BENCH = Path(__file__).parents[1] / "bench"


def bench(name, *arguments):
    command = [sys.executable, str(BENCH / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_ablation_writes_a_learning_curve_and_encodes_each_window_once(paths, tmp_path):
    arguments = ["--llm_model_name_or_path", paths.qwen, "--output_dir", tmp_path / "out"]
    arguments += ["--whisper_model_name_or_path", paths.whisper, "--data_path", paths.manifest]
    arguments += ["--eval_data_path", paths.manifest, "--eval_strategy", "steps"]
    arguments += ["--eval_steps", "1", "--eval_hypotheses", "2", "--max_steps", "2"]
    encoded = tmp_path / "encoded"
    bench("ablate.py", encoded, "blank=,", "BLANK_COSINE=2", "--", *arguments)
    head, _, *rows = (tmp_path / "out" / "curve.md").read_text().splitlines()
    assert head.startswith("utterances | loss | listening gap")
    assert [row.split(" | ")[0] for row in rows] == ["8", "16"]
    assert all(row.endswith(" %") for row in rows)
    written = {path: path.stat().st_mtime_ns for path in encoded.glob("*/*.safetensors")}
    assert len(written) == 8
    shutil.rmtree(tmp_path / "out")
    bench("ablate.py", encoded, "BLANK_COSINE=-2", "--", *arguments)  # all audio is left out
    assert {path: path.stat().st_mtime_ns for path in encoded.glob("*/*")} == written
    _, _, *rows = (tmp_path / "out" / "curve.md").read_text().splitlines()
    assert [row.split(" | ")[2] for row in rows] == ["0.00", "0.00"]


def test_repeating_is_scored_for_each_prompt(paths):
    lines = bench("repeat.py", paths.qwen, paths.manifest, "Say it.", r"Say it.\nyes").splitlines()
    assert [line.split(" | ")[1] for line in lines] == ["Say it.", r"Say it.\nyes"]
    assert all(line.endswith(" %") for line in lines)


def test_greedy_ctc_merges_repetitions_and_drops_blanks(
    paths, projector, monkeypatch, capsys, tmp_path
):
    monkeypatch.syspath_prepend(str(BENCH))
    import ctc

    def project(model, encoder_lengths, **_):
        ids = [x for token in encode(model.tokenizer, "up") for x in (token, token, model.blank)]
        audio = model.llm.get_input_embeddings()(torch.tensor(ids + ids[:1]))
        rows = len(encoder_lengths)
        return audio.expand(rows, -1, -1), torch.full((rows,), len(ids))  # the last is padding

    monkeypatch.setattr(SpeechLLM, "project", project)
    ctc.main(projector, paths.manifest)
    *lines, score, skipped = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(line.endswith(" | up") for line in lines)
    assert score.startswith("WER %: ") and skipped.startswith("0 of 8 transcripts have more tokens")
    texts = ["go", "up" * 9]  # 18 tokens, and a blank between none of them, in 7 positions
    ctc.main(projector, str(tiny.make_manifest(tmp_path, texts)))
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 of 2 transcripts")


def test_of_a_beam_the_choice_of_recognition_and_the_nearest_are_scored(paths, projector):
    lines = bench("nbest.py", projector, paths.manifest, "3").splitlines()
    head, _, *rows = [line.split(" | ") for line in lines]
    assert head[1:] == ["WER %", "substitutions", "deletions", "insertions"]
    rates = {row[0]: float(row[1]) for row in rows}
    assert len(rates) == 5 * 3 + 1 and min(rates.values()) == rates["nearest"]
    rows = read_manifest([paths.manifest])
    model = load(projector, bf16=True).eval()
    done = list(recognize.recognize(model, rows, 8, 3))
    assert rates["1, 0"] == float(recognize.score(done)["WER %"])


def test_speed_compares_both_flows(paths):
    options = ["--data_path", paths.manifest, "--llm_model_name_or_path", paths.qwen]
    options += ["--whisper_model_name_or_path", paths.whisper, "--rounds", "1", "--batches", "2"]
    options += ["--batch_size", "2", "--num_beams", "2", "--parts", "padding", "training"]
    lines = bench("speed.py", *options, "decoding").splitlines()
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines if " | " in line}
    assert 0 < float(rows["by length"][0].split(" ")[0]) < 100
    assert float(rows["ours, CTC and LLM"][1]) > 1  # times the reference
    assert int(rows["ours, CTC alone"][2]) == 0  # positions that the LLM reads
    assert rows["reference, no more tokens than ours"][2] == rows["ours"][2]


def test_memory_is_computed_for_known_models_and_measured_for_each_process(paths):
    rows = [line.split(" | ") for line in bench("memory.py", "table").splitlines()]
    [row] = [row for row in rows if row[:2] == ["Qwen2-7B", "large-v3"]]
    assert row[2] == "17.32 M"
    sizes = [float(cell) for cell in row[3:]]
    # 7.62e9 parameters of the LLM in bfloat16, 6.4e8 of the encoder in float32
    assert 15 < sizes[0] < 18 and sorted(sizes, reverse=True) == sizes
    lines = bench("memory.py", "measure", paths.manifest, paths.whisper, paths.qwen).splitlines()
    peaks = {line.split(" | ")[0]: line.split(" | ")[3].split(", ") for line in lines[2:5]}
    assert [len(ranks) for ranks in peaks.values()] == [1, 2, 2] and "2, ZeRO-3" in peaks


def test_curves_and_beams_are_drawn(tmp_path):
    logs = [{"step": 5 * i, "eval_loss": 3 - i, "eval_listening_gap": i} for i in (1, 2)]
    for name, rate in (("a", {"eval_WER %": 94.5}), ("b", {})):
        (tmp_path / name).mkdir()
        history = [logs[0], logs[1] | rate, {"step": 11, "train_loss": 1}]
        state = {"train_batch_size": 4, "log_history": history}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    table = "| beam | WER % | RTF |\n| --- | --- | --- |\n| 1 | 12.5 | 0.1 |\n| 3 | 11 | 0.3 |\n"
    (tmp_path / "table.md").write_text(table)
    import plot

    bench("plot.py", tmp_path / "curves.png", tmp_path / "a", f"{tmp_path / 'b'}:64")
    plot.curves([str(tmp_path / "a"), f"{tmp_path / 'b'}:64"])
    loss, gap, rate = plot.pyplot.gcf().axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[20, 40], [320, 640]]
    assert list(gap.lines[0].get_ydata()) == [1, 2] and list(rate.lines[0].get_ydata()) == [94.5]
    assert gap.lines[0].get_color() == rate.lines[0].get_color() != gap.lines[1].get_color()
    plot.beams(tmp_path / "table.md")
    rate, factor = plot.pyplot.gcf().axes
    assert list(rate.lines[0].get_ydata()) == [12.5, 11]
    assert list(factor.lines[0].get_ydata()) == [0.1, 0.3]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_long_audio_is_scored_as_a_whole_and_in_pieces(paths, projector):
    head, whole, pieces = bench("long.py", projector, paths.manifest, "40").splitlines()
    assert head.startswith("1 files, 0.2 minutes")  # 8 utterances and silences, 11.6 s
    assert whole.startswith("whole: {'WER %'")
    # under 30 s it is one piece
    assert whole.removeprefix("whole") == pieces.removeprefix("in pieces")
