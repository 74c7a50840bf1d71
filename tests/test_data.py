import json

import numpy as np
import pytest
import soundfile
import tiny
import torch
import whisper

from data import collate, load_audio, log_mel, read_manifest
from model import DEFAULTS, IGNORE, build_prompt, encode


def write_manifest(folder, *lines):
    tiny.make_sound(folder / "a.wav", 0.1, 300)
    path = folder / "m.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_manifests_are_read_in_order_and_one_named_twice_counts_twice(paths, tmp_path):
    other = write_manifest(tmp_path, '{"wav": "a.wav", "txt": "one", "spk": 7}', "")
    rows = read_manifest([other, paths.manifest, other])
    assert len(rows) == 1 + len(tiny.TEXTS) + 1
    assert rows[0] == rows[-1]
    audio = tmp_path / "a.wav"
    added = {"_path": str(audio), "_txt": "one", "duration": 0.1}
    assert rows[0] == {"wav": "a.wav", "txt": "one", "spk": 7} | added


def test_audio_whose_duration_the_manifest_has_is_not_opened(tmp_path):
    path = write_manifest(tmp_path, '{"wav": "b.wav", "txt": "one", "duration": 7.125}')
    (tmp_path / "b.wav").write_text("no audio")
    assert read_manifest([path])[0]["duration"] == 7.12


def test_a_manifest_may_have_a_byte_order_mark_and_line_separators_in_its_text(tmp_path):
    path = write_manifest(tmp_path, '\ufeff{"wav": "a.wav", "txt": "one\u2028two"}\r')
    assert read_manifest([path])[0]["txt"] == "one\u2028two"


def test_text_may_be_missing_where_it_is_not_needed(tmp_path):
    path = write_manifest(tmp_path, '{"wav": "a.wav"}')
    assert "txt" not in read_manifest([path], empty="")[0]


@pytest.mark.parametrize(
    "line, message",
    [
        ("hello", "m.jsonl:2: Expecting value: line 1 column 1 .*, in b'hello'"),
        ("[1, 2]", r"m.jsonl:2: .*, in b'\[1, 2\]'"),
        ('{"txt": "x"}', 'm.jsonl:2: "wav" must be audio, got .*None'),
        ('{"wav": "a.wav"}', 'm.jsonl:2: .*, and "txt" text, got None'),
        ('{"wav": "a.wav", "txt": 5}', 'm.jsonl:2: .*, and "txt" text, got 5, in .*"txt": 5'),
        ('{"wav": "b.wav", "txt": "x"}', 'm.jsonl:2: "wav" must be audio, got .*b.wav, and'),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write_manifest(tmp_path, '{"wav": "a.wav", "txt": "one"}', line)
    with pytest.raises(ValueError, match=message):
        read_manifest([path])


def test_missing_and_empty_manifests_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.jsonl"):
        read_manifest([str(tmp_path / "no.jsonl")])
    with pytest.raises(ValueError, match="m.jsonl.*: 0 good lines, 0 bad"):
        read_manifest([write_manifest(tmp_path, "")])


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_audio_of_any_format_and_rate_becomes_mono_at_16_khz(tmp_path, name, rate):
    time = np.arange(rate) / rate
    left = 0.5 * np.sin(2 * np.pi * 440 * time)
    form = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    soundfile.write(tmp_path / name, np.stack([left, 0 * left], axis=1), rate, **form)
    audio = load_audio(str(tmp_path / name))
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert abs(len(audio) - 16_000) < 2_000  # mp3 pads
    spectrum = np.abs(np.fft.rfft(audio[:16_000] * np.hanning(len(audio[:16_000]))))
    assert abs(spectrum.argmax() * 16_000 / len(audio[:16_000]) - 440) < 5
    assert abs(np.abs(audio[4_000:12_000]).max() - 0.25) < 0.03  # both channels count


def test_what_is_no_audio_is_refused_by_name(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(ValueError, match=r"text.wav: cannot be decoded as audio"):
        load_audio(str(tmp_path / "text.wav"))
    for samples in (0, 1):
        soundfile.write(tmp_path / "short.wav", np.zeros(samples), 96_000)
        with pytest.raises(ValueError, match=r"short.wav: holds no audio"):
            load_audio(str(tmp_path / "short.wav"))


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_is_whispers_own_in_windows_of_30_s(n_mels):
    audio = np.random.default_rng(0).normal(size=35 * 16_000).astype(np.float32)
    mel = log_mel(audio, n_mels)
    padded = whisper.log_mel_spectrogram(np.pad(audio, (0, 25 * 16_000)), n_mels)
    assert mel.shape == (2, n_mels, 3000)
    assert torch.equal(torch.cat([*mel], dim=1), padded)


@pytest.mark.parametrize(
    "seconds, window", [(0.1, 1), (0.5, 1.5), (1.505, 2.5), (29.4, 30), (29.6, 30), (30, 30)]
)
def test_a_window_holds_the_speech_and_half_a_second_to_a_second_of_silence(seconds, window):
    audio = np.random.default_rng(0).normal(size=int(seconds * 16_000)).astype(np.float32)
    padded = np.pad(audio, (0, round(window * 16_000) - len(audio)))
    assert torch.equal(log_mel(audio, 80)[0], whisper.log_mel_spectrogram(padded, 80))


HAND_WRITTEN = {
    # template, end of turn -> text before the audio, text after it
    "chatml": (
        tiny.CHATML,
        "<|im_end|>",
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nRepeat word for word:\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        tiny.LLAMA3,
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n26 Jul 2024<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nRepeat word for word:\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@pytest.mark.parametrize("template", HAND_WRITTEN)
def test_ids_masks_and_labels_of_two_examples_written_by_hand(template, tmp_path):
    chat, end, before, after = HAND_WRITTEN[template]
    tokenizer = tiny.make_tokenizer(chat, end)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # and yet the end of turn is a label

    def ids(text):  # an oracle of its own: specials by name, all else byte by byte
        for special in tiny.SPECIALS:
            text = text.replace(special, f"\0{special}\0")
        parts = [part for part in text.split("\0") if part]
        letters = [[part] if part in tiny.SPECIALS else list(part) for part in parts]
        names = [{" ": "Ġ", "\n": "Ċ"}.get(x, x) for part in letters for x in part]
        return tokenizer.convert_tokens_to_ids(names)

    end_id = ids(end)[0]
    rows = [
        {"_path": tiny.make_sound(tmp_path / "a.wav", 0.3, 300), "_txt": "hi"},  # 15 positions
        {"_path": tiny.make_sound(tmp_path / "b.wav", 0.22, 300), "_txt": "a"},  # 11 positions
    ]
    prompt = build_prompt(tokenizer, DEFAULTS["prompt"].splitlines()[0])
    assert prompt == (ids(before), ids(after), end_id)
    batch = collate(rows, tokenizer, end_id, n_mels=80, stride=5)
    first, second = batch["labels"].tolist()
    assert first == [IGNORE, *ids(" hi"), end_id]
    assert second == [IGNORE, IGNORE, *ids(" a"), end_id]
    assert batch["encoder_lengths"].tolist() == [15, 11]
    assert [mel.shape for mel in batch["mel"]] == [(1, 80, 100), (1, 80, 100)]


def test_what_has_no_transcript_can_be_collated_for_decoding(paths, tmp_path):
    [row] = read_manifest([paths.manifest])[:1]
    [bare] = read_manifest([write_manifest(tmp_path, f'{{"wav": "{row["_path"]}"}}')], empty="")
    options = {"tokenizer": tiny.make_tokenizer(tiny.CHATML, "<|im_end|>"), "end_id": 7}
    options |= {"n_mels": 80, "stride": 5}
    batch, silent = collate([row], **options), collate([bare], **options)
    assert torch.equal(batch["mel"][0], silent["mel"][0])
    assert silent["labels"].tolist() == [[IGNORE, *encode(options["tokenizer"], " "), 7]]


def test_an_utterance_longer_than_model_max_length_is_refused_by_name(paths):
    rows = read_manifest([paths.manifest])[:1]  # " go" in 5 audio positions
    options = {"tokenizer": tiny.make_tokenizer(tiny.CHATML, "<|im_end|>"), "end_id": 7}
    options |= {"n_mels": 80, "stride": 5}
    collate(rows, **options, max_length=9)
    with pytest.raises(ValueError, match=r"0.wav: takes 9 positions, max_length=8 \(flag or LLM\)"):
        collate(rows, **options, max_length=8)


def test_extra_keys_of_a_manifest_may_be_anything(tmp_path):
    line = json.dumps({"wav": "a.wav", "txt": "x", "labels": [1], "mel": None})
    rows = read_manifest([write_manifest(tmp_path, line)])
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|im_end|>")
    assert collate(rows, tokenizer, 7, n_mels=80, stride=5)["labels"].shape[0] == 1
