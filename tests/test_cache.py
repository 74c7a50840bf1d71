"""The cache of encoder outputs."""

import errno
from pathlib import Path

import pytest
import tiny
import torch
import whisper

from cache import Encoder
from manifest import read_manifest


class CountingEncoder(Encoder):
    """Counts the windows that are computed."""

    computed = 0

    def compute(self, windows):
        self.computed += len(windows)
        return super().compute(windows)


@pytest.fixture
def module(paths):
    return whisper.load_model(paths.whisper, "cpu").encoder


def make_windows(count=1, frames=100):
    torch.manual_seed(0)
    return torch.randn(count, 80, frames)


def entries(folder):
    return sorted(folder.glob("*/*"))


def test_each_window_is_computed_once_and_comes_back_as_it_was(module, tmp_path):
    windows = make_windows(3)
    cached = CountingEncoder(module, tmp_path)
    some = cached(windows[:2])
    every = cached(windows)  # two of them kept, one computed
    assert torch.allclose(every, Encoder(module)(windows), atol=1e-5)
    assert torch.equal(every[:2], some)
    assert torch.equal(cached(windows.flip(0)), every.flip(0))
    assert cached.computed == 3
    again = CountingEncoder(module, tmp_path)  # another run
    assert torch.equal(again(windows), every)
    assert again.computed == 0
    assert [x.suffix for x in entries(tmp_path)] == [".safetensors"] * 3


def test_a_model_with_the_cache_embeds_the_same_audio(paths, tmp_path):
    plain = tiny.make_model(paths)
    batch = plain.collator()(read_manifest([paths.manifest]))
    cached = tiny.make_model(paths)
    cached.encoder = Encoder(cached.encoder.module, tmp_path)
    wanted = plain.embed_audio(batch["mel"], batch["lengths"])
    for _ in range(2):
        audio = cached.embed_audio(batch["mel"], batch["lengths"])
        assert torch.equal(torch.cat(audio), torch.cat(wanted))
    assert len(entries(tmp_path)) == len(tiny.TEXTS)


def test_nothing_out_of_date_is_used(module, paths, tmp_path):
    windows = make_windows()
    cached = CountingEncoder(module, tmp_path)
    cached(windows)
    cached(windows + 1e-3)  # another sound
    cached(windows[:, :, :98])  # a part of it
    cached(windows.bfloat16())  # other precisions
    with torch.autocast("cpu", torch.bfloat16):
        assert cached(windows).dtype == torch.bfloat16
    assert cached.computed == 5
    module.conv1.weight.data *= 2  # other weights
    other = CountingEncoder(module, tmp_path)
    assert torch.equal(other(windows), Encoder(module)(windows))
    assert other.computed == 1


def test_a_damaged_entry_is_computed_again_and_mended(module, tmp_path):
    windows = make_windows()
    cached = CountingEncoder(module, tmp_path)
    plain = cached(windows)
    [entry] = entries(tmp_path)
    whole = entry.read_bytes()
    for content in (b"", b"not safetensors", whole[:-1]):
        entry.write_bytes(content)
        assert torch.equal(cached(windows), plain)
        assert entry.read_bytes() == whole
    assert cached.computed == 4


def test_a_full_disk_is_said_and_the_work_goes_on(module, tmp_path, monkeypatch):
    windows = make_windows()
    cached = Encoder(module, tmp_path)

    def fill(path, data):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.warns(UserWarning, match="gets no new entries: No space left on device"):
        output = cached(windows)
    assert torch.equal(output, Encoder(module)(windows))
    assert entries(tmp_path) == []


def test_the_encoder_learns_nothing(module):
    encoder = Encoder(module)
    assert not encoder.module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert (encoder.n_mels, encoder.width) == (80, 32)
