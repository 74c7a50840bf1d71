import json

import numpy as np
import pytest
import soundfile
import tiny
import torch
import whisper
from tokenizers.processors import TemplateProcessing

from data import Collator, build_prompt, load_audio, log_mel, read_manifest
from model import DEFAULTS, IGNORE, InputError

THINKING = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

GEMMA = """\
<|begin_of_text|>{% for m in messages %}\
{% set role = 'model' if m.role == 'assistant' else m.role %}\
{{ '<|im_start|>' + role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"""


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
    assert rows[0] == {"wav": "a.wav", "txt": "one", "spk": 7, "_path": str(tmp_path / "a.wav")}


def test_a_manifest_may_have_a_byte_order_mark_and_line_separators_in_its_text(tmp_path):
    path = write_manifest(tmp_path, '\ufeff{"wav": "a.wav", "txt": "one\u2028two"}\r')
    assert read_manifest([path])[0]["txt"] == "one\u2028two"


def test_text_may_be_missing_where_it_is_not_needed(tmp_path):
    path = write_manifest(tmp_path, '{"wav": "a.wav"}')
    assert "txt" not in read_manifest([path], need_text=False)[0]


@pytest.mark.parametrize(
    "line, message",
    [
        ("hello", "m.jsonl:2: not a JSON object: hello"),
        ("[1, 2]", "m.jsonl:2: not a JSON object"),
        ('{"txt": "x"}', 'm.jsonl:2: "wav" must be a string, got None'),
        ('{"wav": "a.wav"}', 'm.jsonl:2: "txt" must be a string, got None'),
        ('{"wav": "a.wav", "txt": 5}', 'm.jsonl:2: "txt" must be a string, got 5'),
        ('{"wav": "b.wav", "txt": "x"}', 'm.jsonl:2: "wav" names .*b.wav, which is no file'),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write_manifest(tmp_path, '{"wav": "a.wav", "txt": "one"}', line)
    with pytest.raises(InputError, match=message):
        read_manifest([path])


def test_missing_and_empty_manifests_are_refused(tmp_path):
    with pytest.raises(InputError, match="no.jsonl: cannot be read"):
        read_manifest([str(tmp_path / "no.jsonl")])
    with pytest.raises(InputError, match="no utterance in it"):
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
    with pytest.raises(InputError, match=r"text.wav: cannot be decoded as audio"):
        load_audio(str(tmp_path / "text.wav"))
    for samples in (0, 1):
        soundfile.write(tmp_path / "short.wav", np.zeros(samples), 96_000)
        with pytest.raises(InputError, match=r"short.wav: holds no audio"):
            load_audio(str(tmp_path / "short.wav"))


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_is_whispers_own_in_windows_of_30_s(n_mels):
    audio = np.random.default_rng(0).normal(size=35 * 16_000).astype(np.float32)
    mel = log_mel(audio, n_mels)
    padded = whisper.log_mel_spectrogram(np.pad(audio, (0, 25 * 16_000)), n_mels)
    assert mel.shape == (2, n_mels, 3000)
    assert torch.equal(torch.cat([*mel], dim=1), padded)


@pytest.mark.parametrize(
    "seconds, window", [(0.1, 2), (1.5, 2), (1.6, 4), (27.5, 28), (27.6, 30), (29.6, 30), (30, 30)]
)
def test_a_window_holds_the_speech_and_a_little_silence(seconds, window):
    audio = np.random.default_rng(0).normal(size=int(seconds * 16_000)).astype(np.float32)
    padded = np.pad(audio, (0, window * 16_000 - len(audio)))
    assert torch.equal(log_mel(audio, 80)[0], whisper.log_mel_spectrogram(padded, 80))


def decode_prompt(tokenizer, prompt="Say it."):
    before, after, end_id = build_prompt(tokenizer, prompt)
    return tokenizer.decode(before), tokenizer.decode(after), tokenizer.decode([end_id])


def test_prompt_of_chatml_puts_the_prompt_first_in_the_user_turn():
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|endoftext|>")
    assert decode_prompt(tokenizer) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nSay it.\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    )


def test_prompt_of_llama3_begins_with_bos_and_a_date_that_stays():
    tokenizer = tiny.make_tokenizer(tiny.LLAMA3, "<|endoftext|>")
    assert decode_prompt(tokenizer) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n26 Jul 2024<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSay it.\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    )


def test_prompt_of_a_thinking_model_does_not_think():
    tokenizer = tiny.make_tokenizer(THINKING, "<|endoftext|>")
    before, after, end = decode_prompt(tokenizer)
    assert before == "<|im_start|>user\nSay it.\n"
    assert after.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert end == "<|im_end|>"


def test_prompt_without_a_chat_template_is_plain():
    tokenizer = tiny.make_tokenizer(None, "<|endoftext|>")
    assert decode_prompt(tokenizer) == ("Say it.\n", "\n", "<|endoftext|>")
    bos = "<|begin_of_text|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    assert decode_prompt(tokenizer) == (f"{bos}Say it.\n", "\n", "<|endoftext|>")


def test_prompt_of_gemma_has_the_roles_and_the_end_of_its_template():
    tokenizer = tiny.make_tokenizer(GEMMA, "<|endoftext|>")
    assert decode_prompt(tokenizer) == (
        "<|begin_of_text|><|im_start|>user\nSay it.\n",
        "<|im_end|>\n<|im_start|>model\n",
        "<|im_end|>",
    )


HAND_WRITTEN = {
    # template, end of turn -> text before the audio, text after it
    "chatml": (
        tiny.CHATML,
        "<|im_end|>",
        "<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "<|im_start|>user\nRepeat the following text:\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        tiny.LLAMA3,
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n26 Jul 2024<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nRepeat the following text:\n",
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
        {"_path": tiny.make_sound(tmp_path / "a.wav", 0.3, 300), "txt": "hi"},  # 15 positions
        {"_path": tiny.make_sound(tmp_path / "b.wav", 0.22, 300), "txt": "a"},  # 11 positions
    ]
    batch = Collator(tokenizer, DEFAULTS, n_mels=80)(rows)
    assert batch["before"].tolist() == ids(before)
    texts = [[*ids("hi"), end_id], [*ids("a"), end_id]]
    assert [x.tolist() for x in batch["after"]] == [ids(after) + text for text in texts]
    assert batch["labels"].tolist() == [[IGNORE, *texts[0]], [IGNORE, IGNORE, *texts[1]]]
    assert [x.tolist() for x in batch["transcripts"]] == [ids(" hi"), ids(" a")]
    assert batch["encoder_lengths"].tolist() == [15, 11]
    assert [mel.shape for mel in batch["mel"]] == [(1, 80, 200)] * 2


def test_decoding_has_the_training_prompt_and_neither_answers_nor_labels(paths):
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|im_end|>")
    rows = read_manifest([paths.manifest])[:1]
    train = Collator(tokenizer, DEFAULTS, n_mels=80)(rows)
    decode = Collator(tokenizer, DEFAULTS, n_mels=80, answers=False)(rows)
    assert set(train) - set(decode) == {"labels", "transcripts"}
    assert torch.equal(train["before"], decode["before"])
    n = len(decode["after"][0])
    assert torch.equal(train["after"][0][:n], decode["after"][0])
    assert torch.equal(train["after"][0][n:], train["labels"][0, 1:])


def test_an_utterance_longer_than_model_max_length_is_refused_by_name(paths):
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|im_end|>")
    rows = read_manifest([paths.manifest])[:1]
    batch = Collator(tokenizer, DEFAULTS, n_mels=80)(rows)
    length = len(batch["before"]) + 5 + len(batch["after"][0])
    Collator(tokenizer, DEFAULTS, n_mels=80, max_length=length)(rows)
    with pytest.raises(InputError, match=rf"0.wav needs {length} positions .* is {length - 1}"):
        Collator(tokenizer, DEFAULTS, n_mels=80, max_length=length - 1)(rows)


def test_extra_keys_of_a_manifest_may_be_anything(tmp_path):
    line = json.dumps({"wav": "a.wav", "txt": "x", "labels": [1], "mel": None})
    rows = read_manifest([write_manifest(tmp_path, line)])
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|im_end|>")
    assert Collator(tokenizer, DEFAULTS, n_mels=80)(rows)["labels"].shape[0] == 1
