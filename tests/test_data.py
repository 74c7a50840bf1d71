"""Audio, log-mels, batches by length, and the collator."""

from collections import Counter

import numpy as np
import pytest
import soundfile
import tiny
import torch
import whisper

from command import InputError
from data import IGNORE, Collator, by_length, load_audio, log_mel
from manifest import Utterance, read_manifest


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_audio_of_any_format_and_rate_becomes_mono_at_16_khz(tmp_path, name, rate):
    left = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    form = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    soundfile.write(tmp_path / name, np.stack([left, 0 * left], axis=1), rate, **form)
    audio = load_audio(str(tmp_path / name))
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert abs(len(audio) - 16_000) < 2_000  # mp3 pads
    second = audio[:16_000]
    spectrum = np.abs(np.fft.rfft(second * np.hanning(len(second))))
    assert abs(spectrum.argmax() * 16_000 / len(second) - 440) < 5
    assert abs(np.abs(audio[4_000:12_000]).max() - 0.25) < 0.03  # both channels count


def test_what_is_no_audio_is_refused_by_name(tmp_path):
    path = tmp_path / "a.wav"
    path.write_text("no audio")
    with pytest.raises(InputError, match="a.wav cannot be decoded as audio: "):
        load_audio(str(path))
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(800))
    with pytest.raises(InputError, match="a.raw cannot be decoded as audio: "):
        load_audio(str(raw))
    for samples in (0, 1):  # one at 96 kHz is none at 16
        soundfile.write(path, np.zeros(samples), 96_000)
        with pytest.raises(InputError, match="a.wav holds no samples"):
            load_audio(str(path))
    for value in (np.nan, np.inf):
        soundfile.write(path, np.full(800, value), 16_000, subtype="FLOAT")
        with pytest.raises(InputError, match="a.wav holds samples that are no numbers"):
            load_audio(str(path))


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


def test_batches_by_length_hold_each_utterance_once_and_a_short_batch_comes_last():
    utterances = [Utterance(str(i), duration=1.5**i) for i in range(10)]
    mixed = by_length(utterances, size=4, seed=0)
    assert Counter(x.path for x in mixed) == Counter(x.path for x in utterances)
    groups = [sorted(int(x.path) for x in mixed[i : i + 4]) for i in (0, 4, 8)]
    assert sorted(groups[:2]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups[2] == [8, 9]
    assert mixed == by_length(utterances, size=4, seed=0)
    orders = [by_length(utterances, size=4, seed=seed) for seed in range(8)]
    assert {order[0].duration < 4 for order in orders} == {True, False}


def test_of_one_that_comes_twice_a_batch_seldom_has_both():
    utterances = [Utterance(str(i), duration=5 + i / 100) for i in range(100)]
    mixed = by_length(2 * utterances, size=2, seed=0)
    pairs = zip(mixed[::2], mixed[1::2])
    assert sum(first.path == second.path for first, second in pairs) < 10


def make_collator(max_length=99):
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|im_end|>")
    limit = "--flag: raise it"
    return Collator(tokenizer, 7, n_mels=80, stride=5, max_length=max_length, limit=limit)


def test_a_batch_has_mels_and_lengths_of_the_true_audio(paths):
    batch = make_collator()(read_manifest([paths.manifest])[:3])  # 0.5, 0.63 and 0.76 s
    assert batch["lengths"] == [25, 32, 38]
    assert [mel.shape for mel in batch["mel"]] == [(1, 80, 150)] * 3


def test_samples_are_taken_in_place_of_the_file(paths):
    [utterance] = read_manifest([paths.manifest])[:1]
    samples = load_audio(utterance.path)
    given = Utterance("no file", utterance.duration, utterance.text, samples=samples)
    assert torch.equal(make_collator()([given])["mel"][0], make_collator()([utterance])["mel"][0])


def test_what_has_no_transcript_can_be_collated_for_decoding(paths):
    collator = make_collator()
    [utterance] = read_manifest([paths.manifest])[:1]
    utterance.text = None
    [space] = collator.tokenizer.encode(" ")
    assert collator([utterance])["labels"].tolist() == [[IGNORE, space, 7]]


def test_an_utterance_with_too_many_positions_is_refused_with_the_two_remedies(paths):
    [utterance] = read_manifest([paths.manifest])[:1]  # " go" and its end in 5 audio positions
    make_collator(max_length=9)([utterance])
    with pytest.raises(InputError) as error:
        make_collator(max_length=8)([utterance])
    assert str(error.value) == (
        f"{utterance.path}: audio and transcript take 9 positions, but at most 8 are allowed by "
        "--flag: raise it, or cut the audio"
    )
