"""The cache of encoder outputs."""

import errno
from pathlib import Path

import pytest
import torch
import whisper

from cache import Encoder


class CountingEncoder(Encoder):
    """Counts the windows that are computed."""

    computed = 0

    def compute(self, windows):
        self.computed += len(windows)
        return super().compute(windows)


@pytest.fixture
def module(paths):
    return whisper.load_model(paths.whisper, "cpu").encoder


@pytest.fixture
def windows():
    torch.manual_seed(0)
    return torch.randn(3, 80, 100)


def test_each_window_is_computed_once_and_comes_back_as_it_was(module, windows, tmp_path):
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
    assert [x.suffix for x in tmp_path.glob("*/*")] == [".safetensors"] * 3


def test_nothing_out_of_date_is_used(module, windows, tmp_path):
    cached = CountingEncoder(module, tmp_path)
    [window] = windows[:1].split(1)
    cached(window)
    cached(window + 1e-3)  # another sound
    cached(window[:, :, :98])  # a part of it
    cached(window.bfloat16())  # other precisions
    with torch.autocast("cpu", torch.bfloat16):
        assert cached(window).dtype == torch.bfloat16
    assert cached.computed == 5
    module.conv1.weight.data *= 2  # other weights
    other = CountingEncoder(module, tmp_path)
    assert torch.equal(other(window), Encoder(module)(window))
    assert other.computed == 1


def test_a_damaged_entry_is_computed_again_and_mended(module, windows, tmp_path):
    cached = CountingEncoder(module, tmp_path)
    output = cached(windows[:1])
    [entry] = tmp_path.glob("*/*")
    whole = entry.read_bytes()
    for content in (b"", b"not safetensors", whole[:-1]):
        entry.write_bytes(content)
        assert torch.equal(cached(windows[:1]), output)
        assert entry.read_bytes() == whole
    assert cached.computed == 4


def test_a_full_disk_is_said_and_the_work_goes_on(module, windows, tmp_path, monkeypatch):
    cached = Encoder(module, tmp_path)

    def fill(path, data):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.warns(UserWarning, match="gets no new entries: No space left on device"):
        output = cached(windows)
    assert torch.equal(output, Encoder(module)(windows))
    assert list(tmp_path.glob("*/*")) == []
