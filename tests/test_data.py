"""Audio, log-mels, batches by length, and the collator."""

import numpy as np
import pytest
import soundfile
import tiny
import torch
from whisper import log_mel_spectrogram

from command import InputError
from data import IGNORE, Collator, by_length, log_mel
from manifest import Utterance, read_manifest
from sound import load_audio


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_audio_of_any_format_and_rate_becomes_mono_at_16_khz(tmp_path, name, rate):
    time = np.arange(rate) / rate
    left = 0.5 * np.sin(2 * np.pi * 440 * time)
    form = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    stereo = np.stack([left, 0 * left], axis=1)
    soundfile.write(tmp_path / name, stereo, rate, **form)
    audio = load_audio(str(tmp_path / name))
    assert audio.dtype == np.float32
    assert abs(len(audio) - 16_000) < 2_000  # mp3 pads
    middle = audio[4_000:12_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(8_000)))
    assert abs(spectrum.argmax() * 2 - 440) < 5  # bins of 2 Hz
    assert abs(middle.max() - 0.25) < 0.03  # both channels count


def test_what_is_no_audio_is_refused_by_name(tmp_path):
    for name in ("a.wav", "a.raw"):
        (tmp_path / name).write_bytes(b"no audio")
        with pytest.raises(InputError, match=f"/{name} cannot be decoded as audio: "):
            load_audio(str(tmp_path / name))
    path = str(tmp_path / "a.wav")
    for samples in (0, 1):  # one at 96 kHz is none at 16
        soundfile.write(path, np.zeros(samples), 96_000)
        with pytest.raises(InputError, match="/a.wav holds no samples"):
            load_audio(path)
    for value in (np.nan, np.inf):
        soundfile.write(path, np.full(800, value), 16_000, subtype="FLOAT")
        with pytest.raises(InputError, match="/a.wav holds samples that are no numbers"):
            load_audio(path)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize(
    "seconds, window",
    [
        (0.1, 1),
        (0.5, 1.5),
        (29.6, 30),
        (35, 30),
    ],
)
def test_log_mel_is_whispers_own_of_windows_with_a_little_silence(seconds, window, n_mels):
    rng = np.random.default_rng(0)
    audio = rng.normal(size=int(seconds * 16_000))
    audio = audio.astype(np.float32)
    count = 2 if seconds > 30 else 1
    silence = int(count * window * 16_000) - len(audio)
    whole = log_mel_spectrogram(np.pad(audio, (0, silence)), n_mels)
    mel = log_mel(audio, n_mels)
    assert mel.shape == (count, n_mels, window * 100)
    assert torch.equal(torch.cat([*mel], dim=1), whole)


def test_batches_by_length_come_in_random_order_and_a_short_one_comes_last():
    utterances = [Utterance(str(i), duration=1.5**i) for i in range(10)]
    firsts = set()
    for seed in range(8):
        mixed = by_length(utterances, size=4, seed=seed)
        order = [int(x.path) for x in mixed]
        first = sorted(order[:4])
        assert first in ([0, 1, 2, 3], [4, 5, 6, 7])
        assert sorted(order[:8]) == list(range(8))
        assert sorted(order[8:]) == [8, 9]
        assert mixed == by_length(utterances, size=4, seed=seed)
        firsts.add(first[0])
    assert firsts == {0, 4}


def test_of_one_that_comes_twice_a_batch_seldom_has_both():
    utterances = [Utterance(str(i), duration=5 + i / 100) for i in range(100)]
    mixed = by_length(2 * utterances, size=2, seed=0)
    same = 0
    for first, second in zip(mixed[::2], mixed[1::2]):
        same += first.path == second.path
    assert same < 10


@pytest.fixture
def collator():
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|im_end|>")
    limit = "--flag: raise it"
    return Collator(tokenizer, end_id=7, n_mels=80, stride=5, max_length=9, limit=limit)


@pytest.fixture
def utterance(paths):
    return read_manifest([paths.manifest])[0]  # " go" and its end, in 5 audio positions


def test_samples_are_taken_in_place_of_the_file(collator, utterance):
    samples = load_audio(utterance.path)
    given = Utterance("no file", utterance.duration, "go", samples=samples)
    batches = [collator([given]), collator([utterance])]
    assert torch.equal(batches[0]["mel"][0], batches[1]["mel"][0])
    assert batches[0]["lengths"] == batches[1]["lengths"] == [25]


def test_what_has_no_transcript_can_be_collated_for_decoding(collator, utterance):
    utterance.text = None
    [space] = collator.tokenizer.encode(" ")
    assert collator([utterance])["labels"].tolist() == [[IGNORE, space, 7]]


def test_an_utterance_with_too_many_positions_is_refused_with_the_two_remedies(collator, utterance):
    collator([utterance])
    collator.max_length = 8
    with pytest.raises(InputError) as error:
        collator([utterance])
    assert str(error.value) == (
        f"{utterance.path}: audio and transcript take 9 positions, but at most 8 are allowed by "
        "--flag: raise it, or cut the audio"
    )
