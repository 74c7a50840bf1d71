"""Fixtures that all tests share."""

from types import SimpleNamespace

import pytest
import tiny
import transformers

from loading import build
from manifest import read_manifest
from model import Config

transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """Where the tiny models and a manifest of eight sounds are."""
    folder = tmp_path_factory.mktemp("tiny")
    return SimpleNamespace(
        qwen=str(tiny.make_llm(folder / "qwen", "qwen")),
        llama=str(tiny.make_llm(folder / "llama", "llama")),
        gemma=str(tiny.make_llm(folder / "gemma", "gemma")),
        whisper=str(tiny.make_whisper(folder / "tiny.pt")),
        whisper128=str(tiny.make_whisper(folder / "large.pt", n_mels=128, width=48)),
        manifest=str(tiny.make_manifest(folder)),
    )


@pytest.fixture(scope="session")
def projector(paths, tmp_path_factory):
    """A projector file between the tiny Qwen and the tiny Whisper, as it is before training."""
    path = tmp_path_factory.mktemp("projector") / "model.safetensors"
    build(Config(paths.qwen, paths.whisper)).save_projector(path)
    return str(path)


@pytest.fixture
def model(paths):
    """The tiny Qwen and the tiny Whisper with a random projector between them."""
    return tiny.make_model(paths)


@pytest.fixture
def utterances(paths):
    """Those of the manifest of eight sounds."""
    return read_manifest([paths.manifest])
