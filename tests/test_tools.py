"""The commands in tools/: score, whisper_baseline, plot."""

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
from whisper import Whisper
from whisper.audio import N_SAMPLES
from whisper.tokenizer import get_tokenizer

import scoring
from command import InputError
from loading import load_whisper
from manifest import read_manifest
from tools import plot, score, whisper_baseline


def write_results(path, *results):
    lines = [json.dumps({"wav": "a.wav", "duration": 2.0, **result}) for result in results]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read_results(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_table(printed, tmp_path):
    path = tmp_path / "printed.md"
    path.write_text(printed, encoding="utf-8")
    return plot.read_table(path)


def make_sound(path, pitch=300):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return str(tiny.make_sound(path, 0.1, pitch))


def test_results_have_a_row_each_and_keep_their_rates(tmp_path, capsys):
    refusal = "I apologize, but it appears that there is no speech to transcribe"
    first = {"txt": "go on", "hyp": "go on"}
    second = {"txt": "go on", "hyp": refusal, "duration": 9.0}
    untranscribed = {"txt": None, "hyp": "x", "id": 7}
    a = write_results(tmp_path / "a.jsonl", first, second, untranscribed)
    b = write_results(tmp_path / "b.jsonl", first)
    score.main(["--result_path", str(a), str(b)])
    printed = capsys.readouterr().out
    rows = read_table(printed, tmp_path)
    assert [row["result"] for row in rows] == [str(a), str(b)]
    # 12 words for 2: 2 substituted and 10 inserted, of 4 words in all
    assert [row["WER %"] for row in rows] == ["300.00", "0.00"]
    assert [row["WER % filtered"] for row in rows] == ["0.00", "0.00"]
    assert f"{a}: a.wav: refusal: go on | {refusal}" in printed.splitlines()
    scored = read_results(a)
    assert [x["rate"] for x in scored[:2]] == [0, 600]
    assert [x["hallucination"] for x in scored[:2]] == [None, "refusal"]
    assert scored[2] == {"wav": "a.wav", "duration": 2.0, **untranscribed}
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "flags, head, rate",
    [
        ([], "WER %", "50.00"),  # the basic normaliser keeps the accent
        (["--normalizer", "english"], "WER %", "0.00"),
        (["--metric", "CER", "--normalizer", "none"], "CER %", "33.33"),  # C and é of 6 letters
    ],
)
def test_metric_and_normaliser_can_be_given(tmp_path, capsys, flags, head, rate):
    path = write_results(tmp_path / "a.jsonl", {"txt": "Café au", "hyp": "cafe au"})
    score.main(["--result_path", str(path), *flags])
    [row] = read_table(capsys.readouterr().out, tmp_path)
    assert row[head] == rate


def test_results_are_grouped_by_a_key_or_by_duration(tmp_path, capsys):
    right = {"txt": "go on", "hyp": "go on", "spk": "anna", "duration": 17.0}
    wrong = {"txt": "go on", "hyp": "go", "spk": "bob", "duration": 1.9}
    other = {"txt": "go on", "hyp": "on on"}  # of nobody; 2 seconds
    path = write_results(tmp_path / "a.jsonl", right, wrong, other)
    score.main(["--result_path", str(path), "--by", "spk"])
    rows = read_table(capsys.readouterr().out, tmp_path)
    assert [(row["spk"], row["WER %"]) for row in rows] == [
        ("anna", "0.00"),
        ("bob", "50.00"),
        ("none", "50.00"),
    ]
    score.main(["--result_path", str(path), "--by", "duration"])
    rows = read_table(capsys.readouterr().out, tmp_path)
    assert [row["duration"] for row in rows] == ["0 to 2 s", "2 to 4 s", "17 s and more"]
    first = write_results(tmp_path / "first.jsonl", {"txt": "go", "hyp": "go", "src": "x"})
    before = first.read_text()
    with pytest.raises(InputError, match="--by src: no line has that key; .* spk"):
        score.main(["--result_path", str(first), str(path), "--by", "src"])
    assert first.read_text() == before


def test_results_that_call_for_different_scores_are_left_as_they_are(tmp_path):
    english = write_results(tmp_path / "english.jsonl", {"txt": "and you", "hyp": "you"})
    chinese = write_results(tmp_path / "chinese.jsonl", {"txt": "今天", "hyp": "今"})
    french = write_results(tmp_path / "french.jsonl", {"txt": "l'été", "hyp": "l'ete"})
    before = english.read_text()
    with pytest.raises(InputError, match="english.jsonl calls for WER, .*chinese.jsonl for CER"):
        score.report([english, chinese])
    with pytest.raises(InputError, match="french.jsonl for basic: .*--normalizer"):
        score.report([english, french])
    assert english.read_text() == before
    assert "| CER % |" in score.report([english, chinese], "CER", "basic")


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("hyp", None, "a text, got null"),
        ("txt", 5, "a text, got 5"),
        ("wav", None, "a text, got null"),
        ("duration", None, "a positive number of seconds, got null"),
        ("duration", "7", 'a positive number of seconds, got "7"'),
    ],
)
def test_what_is_no_result_is_refused_by_file_and_line(tmp_path, key, value, wanted):
    good = {"txt": "go", "hyp": "go"}
    path = write_results(tmp_path / "a.jsonl", good, {**good, key: value})
    with pytest.raises(InputError, match=f'a.jsonl:2: "{key}" must be {wanted}'):
        score.report([path])


def test_whisper_decodes_the_same_manifest_beside_ours(paths, tmp_path, monkeypatch, capsys):
    decode = Mock(return_value=("go", 0.0))
    monkeypatch.setattr(whisper_baseline, "decode", decode)
    ours = write_results(tmp_path / "ours.jsonl", {"txt": "go", "hyp": "go"})
    out = tmp_path / "new" / "whisper.jsonl"
    command = ["--whisper_model_name_or_path", paths.whisper, "--data_path", paths.manifest]
    command += ["--language", "de", "--result_path", str(out), "--beside", str(ours)]
    whisper_baseline.main(command)
    assert decode.call_args.args[2:] == ("de", 5, [])
    heard = [len(call.args[1]) / 16_000 for call in decode.call_args_list]
    results = read_results(out)
    assert [x["duration"] for x in results] == pytest.approx(heard, abs=0.01)
    assert [x["txt"] for x in results] == tiny.TEXTS
    table = read_table(capsys.readouterr().out, tmp_path)
    assert [row["result"] for row in table] == [str(out), str(ours)]
    assert [row["WER %"] for row in table] == ["87.50", "0.00"]  # one of eight texts is "go"


def test_audio_over_30_s_goes_through_whispers_windows():
    whisper = Mock(device=torch.device("cpu"), dims=Mock(n_mels=80))
    whisper.decode.return_value = Mock(text=" short ", no_speech_prob=0.1)
    segments = [{"no_speech_prob": 0.9}, {"no_speech_prob": 0.2}]
    whisper.transcribe.return_value = {"text": " window by window", "segments": segments}
    audio = np.zeros(N_SAMPLES + 1, np.float32)
    assert whisper_baseline.decode(whisper, audio[1:], "en", 5) == ("short", 0.1)
    mel, options = whisper.decode.call_args.args
    assert mel.shape == (80, 3000)
    assert options.beam_size == 5
    assert whisper_baseline.decode(whisper, audio, "en", 1) == ("window by window", 0.2)
    assert whisper.transcribe.call_args.kwargs["beam_size"] is None


def test_numbers_are_spelled_where_whisper_may_take_no_digits(paths, tmp_path, monkeypatch):
    def decode(model, mel, options):
        may_take = {*tokenizer.encode("20")}.isdisjoint(options.suppress_tokens)
        return Mock(text="20" if may_take else "twenty", no_speech_prob=0.0)

    tokenizer = get_tokenizer(multilingual=False)  # as the tiny Whisper is
    monkeypatch.setattr(Whisper, "decode", decode)
    out = tmp_path / "out.jsonl"
    command = ["--whisper_model_name_or_path", paths.whisper, "--data_path", paths.manifest]
    for spell_numbers, text in [("False", "20"), ("True", "twenty")]:
        more = ["--result_path", str(out), "--spell_numbers", spell_numbers]
        whisper_baseline.main([*command, *more])
        assert {x["hyp"] for x in read_results(out)} == {text}


def test_only_tokens_with_digits_are_kept_from_whisper(paths):
    digits = whisper_baseline.list_digits(load_whisper(paths.whisper))
    tokenizer = get_tokenizer(multilingual=False)  # as the tiny Whisper is
    for text in (" 1969", "5", " 20th"):
        assert {*tokenizer.encode(text)} & {*digits}
    assert not {*tokenizer.encode(" Nineteen sixty-nine, the fifth.")} & {*digits}


def test_what_whisper_hears_becomes_a_manifest_to_train_on(tmp_path, monkeypatch, capsys):
    rows = [
        {"wav": "a.wav", "spk": "ann"},
        {"wav": "a.wav", "start": 0.2, "end": 0.9},
        {"wav": "a.wav", "txt": "hidden", "start": 0.5},
        {"wav": "silent.wav"},
        {"wav": "loop.wav"},
        {"wav": "music.wav"},
        {"wav": "torn.flac"},
    ]
    for row in rows:
        tiny.make_sound(tmp_path / row["wav"], 1.0, 300)
    torn = tmp_path / "torn.flac"
    torn.write_bytes(torn.read_bytes()[:-100] + b"0" * 100)  # its header is whole
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    heard = ["Go.", "No.", "Up.", "you", "no " * 6, "♪"]
    no_speech = [0.1, 0.1, 0.5, 0.9, 0.1, 0.1]
    decode = Mock(side_effect=zip(heard, no_speech))
    monkeypatch.setattr(whisper_baseline, "decode", decode)
    monkeypatch.setattr(whisper_baseline, "load_whisper", Mock())
    manifest = tmp_path / "new" / "pseudo.jsonl"
    command = ["--whisper_model_name_or_path", "tiny", "--data_path", str(data)]
    command += ["--result_path", str(tmp_path / "whisper.jsonl"), "--as_manifest"]
    whisper_baseline.main([*command, str(manifest)])
    printed = capsys.readouterr().out
    assert f"2 rejected: no speech ({tmp_path}/silent.wav, {tmp_path}/music.wav)" in printed
    assert f"1 rejected: loop ({tmp_path}/loop.wav)" in printed
    assert f"1 rejected: cannot be read ({torn})" in printed
    utterances = read_manifest([str(manifest)])
    assert [x.text for x in utterances] == ["Go.", "No.", "Up."]
    assert [x.duration for x in utterances] == [1, 0.7, 0.5]
    assert [(x.start, x.end) for x in utterances] == [(0, None), (0.2, 0.9), (0.5, 1)]
    assert {x.path for x in utterances} == {str(tmp_path / "a.wav")}
    assert utterances[0].row["spk"] == "ann"
    with pytest.raises(InputError, match="--as_manifest: .*data.jsonl is also another flag's"):
        whisper_baseline.main([*command, str(data)])
    decode.side_effect = zip(heard, no_speech)
    with pytest.raises(InputError, match="torn.flac cannot be decoded"):
        whisper_baseline.main(command[:-1])  # to score a test set, which must be whole
    other = tmp_path / "new" / "other.jsonl"
    with pytest.raises(InputError, match="--as_manifest: .*pseudo.jsonl is also another flag's"):
        whisper_baseline.main([*command, str(manifest), "--beside", str(manifest)])
    with pytest.raises(InputError, match="--result_path would replace .*data.jsonl, which is read"):
        whisper_baseline.main([*command, str(other), "--result_path", str(data)])


def write_state(folder, logs, steps):
    folder.mkdir()
    state = {"train_batch_size": 4, "global_step": steps, "log_history": logs}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return str(folder)


def test_phases_of_a_training_are_one_line_over_all_utterances(tmp_path):
    first = {"step": 5, "eval_loss": 3, "eval_listening_gap": 1}
    second = {"step": 10, "eval_loss": 2, "eval_wer": 90}
    a = write_state(tmp_path / "a", [first, second], 11)
    b = write_state(tmp_path / "b", [first], 10)
    runs = [plot.read_run(f"{b}:64"), plot.read_run(f"{a}+{b}:2")]
    loss, gap, rate = plot.draw_runs(runs).axes
    alone, joined = loss.lines[:2]
    assert [*alone.get_xdata()] == [320]
    assert [*joined.get_xdata()] == [20, 40, 54]  # its second phase begins at 44
    assert [*joined.get_ydata()] == [3, 2, 3]
    assert [*gap.lines[1].get_xdata()] == [20, 54]
    assert [*rate.lines[0].get_xdata()] == [40]
    assert rate.lines[0].get_color() == joined.get_color()
    assert plot.read_run(f"{b}:0").curves["eval_loss"] == [(0, 3)]
    plot.main(["--output", str(tmp_path / "new" / "curves.png"), "--runs", a, b])
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_beams_are_drawn_from_the_printed_table(tmp_path):
    path = tmp_path / "table.md"
    one = {"beam": 1, "WER %": 12.5, "RTF": "0.1"}
    ten = {"beam": 10, "WER %": 11, "RTF": "0.3"}
    path.write_text(scoring.format_report([one, ten], [], "WER", "basic"))
    rate, factor = plot.draw_table(path).axes
    assert [*rate.lines[0].get_xdata()] == [1, 10]
    assert [*rate.lines[0].get_ydata()] == [12.5, 11]
    assert [*factor.lines[0].get_ydata()] == [0.1, 0.3]


def test_what_cannot_be_drawn_is_named(tmp_path):
    silent = write_state(tmp_path / "silent", [{"step": 1, "loss": 2.0}], 1)
    with pytest.raises(InputError, match="silent: nothing was evaluated"):
        plot.read_run(silent)
    with pytest.raises(InputError, match="cannot read .*trainer_state.json"):
        plot.read_run(str(tmp_path))
    results = tmp_path / "results.md"
    results.write_text(scoring.format_table([{"result": "a", "WER %": 1}]))
    with pytest.raises(InputError, match="no numbers in a column 'beam'"):
        plot.draw_table(results)
