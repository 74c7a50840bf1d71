"""The experiments and the measurements of bench/, on tiny models."""

import json
import random
import subprocess
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import tiny
import torch
from safetensors.torch import load_file

from bench import memory, speed, startup
from command import InputError
from experiments import (
    ablate,
    augment,
    ctc_probe,
    graft,
    hours,
    long_audio,
    rare_words,
    silence,
    word_times,
)
from loading import read_config
from manifest import read_manifest


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_cells(table):
    """The cells of a Markdown table's rows by their first cell."""
    rows = {}
    for line in table.splitlines():
        if line.startswith("|"):
            first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[first] = cells
    return rows


@pytest.fixture
def inputs(projector, paths):
    return ["--projector_model_path", projector, "--data_path", paths.manifest]


@pytest.fixture
def training(paths, tmp_path):
    """Arguments of train.py for two steps and two evaluations."""
    models = f"--llm_model_name_or_path {paths.qwen} --whisper_model_name_or_path {paths.whisper}"
    data = f"--data_path {paths.manifest} --eval_data_path {paths.manifest}"
    evaluation = "--eval_strategy steps --eval_steps 1 --eval_hypotheses 2"
    rest = f"--max_steps 2 --report_to none --output_dir {tmp_path}/out"
    return f"{models} {data} {evaluation} {rest}".split()


def test_an_ablation_trains_with_the_given_config_and_writes_its_curve(training, tmp_path):
    ablate.main(["blank_threshold=2", "hidden_dim=64", "prompt=Say = it", "--", *training])
    rows = read_cells((tmp_path / "out/curve.md").read_text())
    assert list(rows) == ["utterances", "---", "8", "16"]
    assert rows["utterances"] == ["loss", "listening gap", "WER %"]
    config = read_config(tmp_path / "out/model.safetensors")
    assert (config.blank_threshold, config.hidden_dim) == (2, 64)
    assert config.prompt == "Say = it"


def test_a_model_that_is_shown_no_audio_has_no_listening_gap(training, tmp_path):
    gaps = []
    for threshold in (2, -2):  # no cosine is 2 or more, and all are -2 or more
        folder = tmp_path / str(threshold)
        given = [f"blank_threshold={threshold}", "--", *training]
        ablate.main([*given, "--output_dir", str(folder)])
        rows = read_cells((folder / "curve.md").read_text())
        gaps.append(float(rows["16"][1]))
    assert gaps[0] != 0
    assert gaps[1] == 0


def test_an_ablation_refuses_what_makes_no_curve(training):
    all_fields = "prompt, stride, hidden_dim, blank_threshold, ctc_sharpness"
    with pytest.raises(InputError, match=all_fields):
        ablate.main(["blank=2", "--", *training])
    with pytest.raises(InputError, match="of type int"):
        ablate.main(["hidden_dim=wide", "--", *training])
    with pytest.raises(InputError, match="wanted a --"):
        ablate.main(training)
    with pytest.raises(InputError, match="steps or epoch"):
        ablate.main(["--", *training, "--eval_strategy", "no"])


def test_greedy_ctc_merges_repetitions_and_drops_blanks():
    embeddings = torch.eye(4)
    heard = embeddings[[3, 3, 0, 3, 1, 1, 2, 0]]
    tokens = ctc_probe.decode_greedily(heard, embeddings, blank_id=0)
    assert tokens.tolist() == [3, 3, 1, 2]


def test_the_probe_scores_and_counts_what_has_no_room(projector, capsys, tmp_path):
    texts = ["go", "up" * 9]  # 18 tokens in 7 positions
    manifest = str(tiny.make_manifest(tmp_path, texts))
    kept = tmp_path / "kept.jsonl"
    given = ["--projector_model_path", projector, "--data_path", manifest]
    ctc_probe.main([*given, "--result_path", str(kept)])
    first, second, *table, count = capsys.readouterr().out.splitlines()
    assert first.startswith("go | ")
    assert second.startswith(f"{texts[1]} | ")
    assert table[0].startswith("| WER % | ")
    assert count.startswith("1 of 2 transcripts")
    assert [row["txt"] for row in read_lines(kept)] == texts


def test_utterances_are_joined_until_they_are_long_enough(paths):
    utterances = read_manifest([paths.manifest])  # 0.5 s, 0.63 s and so on
    joined = long_audio.join(utterances, seconds=4.0)
    assert [x.text for x in joined] == ["go no up left", "on ten in", "red"]
    assert joined[2].duration == pytest.approx(0.5 + 7 * 0.13 + 0.5, abs=0.01)  # and silence
    assert len(joined[2].samples) == round(joined[2].duration * 16_000)


def test_long_audio_is_scored_as_a_whole_and_in_pieces(inputs, paths, capsys, monkeypatch):
    decode = Mock(return_value=("go no", 0.0))
    monkeypatch.setattr(long_audio.whisper_baseline, "decode", decode)
    own = ["--whisper_model_name_or_path", paths.whisper]
    long_audio.main([*inputs, "--seconds", "40", *own])
    rows = read_cells(capsys.readouterr().out)
    # under 30 s the whole is one piece
    assert rows["as a whole"] == rows["in pieces"]
    assert rows["in pieces"][-1] == "1"  # recording
    assert "Whisper's own decoder" in rows


def test_transcripts_become_lower_case_words_and_some_are_left_out(tmp_path):
    texts = ["Philip dropped -- IT'S mine!", "2, 3", "Yes.", "Don’t.", "2 miles", "café", "long"]
    manifest = tiny.make_manifest(tmp_path, texts, longer=0.3)  # 0.5 s to 2.3 s
    out = tmp_path / "out.jsonl"
    command = ["select", "--data_path", str(manifest), "--output_path", str(out)]
    augment.main([*command, "--longest", "2.1"])
    rows = read_lines(out)
    assert [row["txt"] for row in rows] == ["philip dropped it's mine", "yes", "don't"]
    assert rows[1]["wav"] == str(tmp_path / "2.wav")
    augment.main([*command, "--every", "2", "--lower", "False"])
    assert [row["txt"] for row in read_lines(out)] == [texts[0], texts[3], texts[5]]


def test_transcripts_with_case_and_punctuation_are_kept_as_they_are_published(tmp_path):
    manifest = tiny.make_manifest(tmp_path, ["go on", "up", "Left, right.", "on"])
    raw = ["Go on!", "UP", None, "on."]
    rows = read_lines(manifest)
    for row, text in zip(rows, raw):
        if text:
            row["raw"] = text
    manifest.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out.jsonl"
    command = ["select", "--data_path", str(manifest), "--output_path", str(out)]
    augment.main([*command, "--text_key", "raw", "--lower", "False", "--cased", "True"])
    assert [row["txt"] for row in read_lines(out)] == ["Go on!", "Left, right."]


def test_copies_are_faster_and_slower(paths, tmp_path):
    command = ["speed", "--data_path", paths.manifest, "--output_dir", str(tmp_path)]
    augment.main([*command, "--factors", "0.8", "1.25"])
    rows = read_lines(tmp_path / "manifest.jsonl")
    assert [row["txt"] for row in rows[::2]] == tiny.TEXTS
    slow, fast = [soundfile.info(tmp_path / row["wav"]).duration for row in rows[:2]]
    assert slow == pytest.approx(0.5 / 0.8, abs=0.01)
    assert fast == pytest.approx(0.5 / 1.25, abs=0.01)


def test_disturbed_copies_say_the_same_with_something_behind(paths, tmp_path):
    command = f"disturb --data_path {paths.manifest} --output_dir {tmp_path}"
    augment.main(command.split())
    originals = read_manifest([paths.manifest])
    copies = read_manifest([f"{tmp_path}/manifest.jsonl"])
    assert [x.text for x in copies] == [x.text for x in originals]
    for original, copy in zip(originals, copies):
        difference = np.square(copy.load() - original.load()).mean()
        assert difference > np.square(original.load()).mean() / 1000  # 30 dB


def test_a_room_answers_a_click_with_an_echo_that_falls():
    click = np.zeros(16_000)
    click[1000] = 1
    rng = np.random.default_rng(0)
    heard = augment.add_echo(click, rng)
    assert np.abs(heard[:1000]).max() < 1e-9
    assert heard[1000] == pytest.approx(1, abs=0.1)
    early, late = np.abs(heard[1001:2001]).mean(), np.abs(heard[7001:8001]).mean()
    assert early > 10 * late > 0


def test_what_is_behind_is_weaker_by_the_ratio():
    behind = np.array([1.0, -1.0])
    assert augment.find_gain(5 * behind, behind, 20) == pytest.approx(0.5)
    assert augment.find_gain(5 * behind, 0 * behind, 20) == 0


def test_neighbours_of_a_speaker_are_joined_to_long_utterances(tmp_path):
    # seconds and speakers, in the manifest's order
    spoken = [(1, "a"), (1, "a"), (1, "a"), (1, "b"), (3, "b"), (1, None), (1, "c"), (1, "c")]
    rows = []
    for i, (seconds, speaker) in enumerate(spoken):
        wav = tiny.make_sound(tmp_path / f"{i}.wav", seconds, 300)
        row = {"wav": str(wav), "txt": f"{'abcdefgh'[i]}!"}
        if speaker:
            row["spk"] = speaker
        rows.append(row)
    augment.write_manifest(tmp_path / "in.jsonl", rows)
    command = f"join --data_path {tmp_path}/in.jsonl --output_dir {tmp_path}/joined"
    augment.main([*command.split(), "--seconds", "2", "3"])
    joined = read_manifest([f"{tmp_path}/joined/manifest.jsonl"])
    assert {x.text: x.duration for x in joined} == {"a! b!": 2.3, "e!": 3.0, "g! h!": 2.3}


@pytest.mark.parametrize(
    "command, message",
    [
        ("select --data_path D/in.jsonl --output_path D/in.jsonl", "in.jsonl is in --data_path"),
        ("disturb --data_path D/manifest.jsonl --output_dir D", "manifest.jsonl is in --data_path"),
        ("join --data_path D/in.jsonl --output_dir D/new --seconds 20", "least and most.* 20 28"),
        ("select --data_path D/in.jsonl --output_path o --every 0", "--every must be at least 1"),
    ],
)
def test_flags_that_would_lose_data_or_mean_nothing_are_refused(command, message, tmp_path):
    with pytest.raises(InputError, match=message):
        augment.main(command.replace("D", str(tmp_path)).split())


def test_sentences_are_found_in_what_an_llm_writes():
    story = 'Tom said: "Go home!" He went. Why? In 1990 it rained. ' + "So " * 13 + "on."
    assert augment.find_sentences(story) == ["go home", "he went"]


def test_words_of_a_vocabulary_are_drawn_equally_often_the_common_ones_first(tmp_path, monkeypatch):
    tokens = ["Ġ", "Ġno", "Ġgo", "x", "ĠAnna", "Ġa1", "Ġanna", "Ġrare"]
    ids = {token: place for place, token in enumerate(tokens)}
    tokenizer = SimpleNamespace(get_vocab=lambda: dict(sorted(ids.items())))
    monkeypatch.setattr(augment.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    output = tmp_path / "words.txt"
    given = f"draw --llm_model_name_or_path any --output_path {output} --words 3 --times 20"
    augment.main(given.split())
    rows = [line.split() for line in output.read_text().splitlines()]
    assert Counter(chain(*rows)) == {"no": 20, "go": 20, "anna": 20}
    assert max(len(row) for row in rows) <= 3  # all that are drawn at a time


def test_errors_are_sorted_by_how_often_training_has_heard_the_word(tmp_path, capsys):
    texts = ["go on one two"] * 3 + ["go"]
    manifest = str(tiny.make_manifest(tmp_path, texts))
    result = {"wav": "a.wav", "txt": "go on one two now", "hyp": "go and on 12", "duration": 1.0}
    path = tmp_path / "result.jsonl"
    path.write_text(json.dumps(result))
    rare_words.main(["--result_path", str(path), "--data_path", manifest])
    rows = read_cells(capsys.readouterr().out)
    assert rows["0"] == ["20.00", "100.00", "20.00"]  # now
    assert rows["3 to 9"] == ["80.00", "0.00", "0.00"]


def test_every_kind_of_sound_without_speech_is_made_alike_in_each_run():
    sounds = silence.make_sounds()
    again = silence.make_sounds()
    assert [len(clips) for clips in sounds.values()] == [10] * 6
    for kind, clips in sounds.items():
        for clip, same in zip(clips, again[kind]):
            assert np.array_equal(clip, same)
            assert 1 <= len(clip) / 16_000 <= 15
            assert abs(clip).max() <= 1
        loudest = max(abs(clip).max() for clip in clips)
        assert loudest > (1e-5 if kind == "silence" else 0.02)


def test_a_graft_keeps_all_but_the_last_layer(projector, paths, tmp_path):
    output = tmp_path / "start.safetensors"
    given = ["--projector_model_path", projector, "--llm_model_name_or_path", paths.llama]
    graft.main([*given, "--output_path", str(output)])
    assert read_config(str(output)).llm_model_name_or_path == paths.llama
    before, after = load_file(projector), load_file(output)
    for name, tensor in before.items():
        same = tensor.shape == after[name].shape and torch.equal(tensor, after[name])
        assert same == ("output" not in name)


def test_error_rates_are_drawn_over_hours(tmp_path, capsys, monkeypatch):
    def read_hours(paths):
        hours_of_part = float(Path(paths[0]).stem.removeprefix("hours-"))
        return [SimpleNamespace(duration=3600 * hours_of_part)]

    monkeypatch.setattr(hours, "read_manifest", read_hours)
    for part, recognised in (("hours-16", "go on"), ("hours-4", "go")):
        (tmp_path / part).mkdir()
        long = {"wav": "a.wav", "txt": "go on", "hyp": recognised, "duration": 2.0}
        short = {"wav": "b.wav", "txt": "on and on", "hyp": "on and on", "duration": 1.0}
        for name in hours.SETS:
            lines = [json.dumps(long), json.dumps(short)]
            (tmp_path / part / f"{name}.jsonl").write_text("\n".join(lines))
    output = tmp_path / "hours.png"
    hours.main(["--folder", str(tmp_path), "--output", str(output)])
    rows = read_cells(capsys.readouterr().out)
    assert rows["4.0"] == ["20.00", "0.00", "50.00"] * 3  # of all, the shorter, the longer half
    assert rows["16.0"] == ["0.00"] * 9
    assert list(rows)[2:] == ["4.0", "16.0"]
    assert output.stat().st_size > 1000


def test_sentences_and_numbers_are_spoken(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("good night\n")
    command = ["speak", "--text_path", str(text), "--output_dir", str(tmp_path)]
    augment.main([*command, "--numbers", "1"])
    sentence, number = read_lines(tmp_path / "manifest.jsonl")
    assert sentence["txt"] == "good night"
    assert set(number["txt"].split()) <= set(augment.DIGITS)
    audio, rate = soundfile.read(tmp_path / sentence["wav"])
    assert 0.3 < len(audio) / rate < 10
    assert abs(audio).max() > 0.05


def test_padding_is_what_shorter_utterances_lack(tmp_path):
    tiny.make_sound(tmp_path / "a.wav", 4, 300)
    manifest = tmp_path / "manifest.jsonl"
    with manifest.open("w") as file:
        for seconds in (1, 4, 1, 4):
            print(json.dumps({"wav": "a.wav", "txt": "go", "end": seconds}), file=file)
    args = startup.Arguments("unused", [str(manifest)], batch_size=2)
    assert read_cells(startup.measure_padding(args))["by length"] == ["0.0 %"]
    args.batch_size = 4  # 10 s in four rows of 4 s
    assert read_cells(startup.measure_padding(args))["at random"] == ["37.5 %"]


def test_both_flows_train_and_decode(inputs, capsys):
    sizes = ["--rounds", "1", "--batches", "2", "--batch_size", "2", "--num_beams", "2"]
    speed.main([*inputs, *sizes, "--parts", "training", "decoding"])
    training, decoding = capsys.readouterr().out.split("limit: ")
    rows = read_cells(training)
    assert float(rows["ours, CTC and LLM"][1]) > 1  # times the reference
    assert rows["ours, CTC alone"][2] == "0"  # positions that the LLM reads
    rows = read_cells(decoding)
    assert int(rows["reference"][2]) == int(rows["ours"][2]) > 1  # tokens


def test_memory_is_computed_for_known_models():
    lines = memory.make_table().splitlines()
    [line] = [x for x in lines if x.startswith("| Qwen2-7B | large-v3 |")]
    sizes = [float(cell) for cell in line.strip("| ").split("|")[3:]]
    # 7.62e9 parameters of the LLM in bfloat16, 6.4e8 of the encoder in float32
    assert 15 < sizes[0] < 18
    assert sorted(sizes, reverse=True) == sizes


def test_memory_is_measured_in_each_process(training, monkeypatch):
    monkeypatch.setattr(memory, "SETUPS", {"2, ZeRO-3": memory.SETUPS["2, ZeRO-3"]})
    rows = read_cells(memory.measure(training))
    for cell in rows["2, ZeRO-3"]:
        sizes = [float(size) for size in cell.split(", ")]
        assert len(sizes) == 2
        assert min(sizes) > 0.1


def test_scripts_have_no_mistakes_of_syntax():
    for script in Path(ablate.__file__).parent.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)


def test_word_times_are_compared_with_when_the_voice_speaks(projector, monkeypatch, capsys):
    tone = np.sin(np.arange(24_000)).astype(np.float32)  # a second, between two halves of silence
    silence = np.zeros(12_000, np.float32)
    voice = np.concatenate([silence, tone, silence])
    monkeypatch.setattr(word_times, "Hibari", lambda: lambda text, seed: voice)
    samples, times = word_times.make_recording(word_times.Hibari(), ["a", "b"], random.Random(0))
    for start, end in times:
        assert end - start == pytest.approx(1, abs=0.02)
        assert abs(samples[round(16_000 * start) :][:160]).max() > 0.5
    assert times[1][0] - times[0][1] >= 0.2
    flags = ["--recordings", "2", "--utterances", "1", "--utterance", "word"]
    word_times.main(["--projector_model_path", projector, *flags])
    cells = read_cells(capsys.readouterr().out)
    assert cells["start"][0] == cells["end"][0]
    assert float(cells["end"][1]) >= 0
