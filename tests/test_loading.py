"""Projector files, models that moved or are others, and what cannot be loaded."""

import os
import random
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from arguments import RecognitionArguments
from command import InputError
from data import load_audio
from loading import build, load
from machine import has_fast_bf16
from manifest import read_duration, read_manifest
from model import Config
from tools import transcribe


@pytest.fixture
def config(paths):
    return Config(paths.qwen, paths.whisper)


@pytest.fixture
def change(projector, tmp_path):
    """Writes the projector with other metadata, of which None is none."""

    def write(**changes):
        with safe_open(projector, "pt") as file:
            metadata = {**file.metadata(), **changes}
        metadata = {name: value for name, value in metadata.items() if value is not None}
        save_file(load_file(projector), tmp_path / "other.safetensors", metadata)
        return str(tmp_path / "other.safetensors")

    return write


def test_a_projector_file_holds_the_projector_alone_and_brings_its_config_back(paths, tmp_path):
    settings = {"prompt": "Repeat it.", "stride": 4, "hidden_dim": 64}
    settings |= {"blank_threshold": 0.55, "ctc_sharpness": 9.5}
    model = tiny.make_model(paths, **settings)
    path = tmp_path / "folder" / "model.safetensors"
    model.save_projector(path)
    assert all(name.startswith("projector.") for name in load_file(path))
    again = load(str(path))
    assert again.speech_config == Config(paths.qwen, paths.whisper, **settings)
    weights = again.projector.state_dict()
    for name, tensor in model.projector.state_dict().items():
        assert torch.equal(tensor, weights[name])
    plain = tmp_path / "plain"  # has the mode that the user's umask asks for
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_models_that_moved_are_taken_from_their_new_places(paths, projector, tmp_path):
    llm = shutil.copytree(paths.qwen, tmp_path / "qwen")
    encoder = shutil.copy(paths.whisper, tmp_path / "tiny.pt")
    model = load(projector, f"{llm}/", str(encoder))
    assert model.speech_config == Config(f"{llm}/", str(encoder))


def test_a_misspelt_argument_is_an_error(paths, projector):
    with pytest.raises(TypeError, match="llm_model_path"):
        load(projector, llm_model_path=paths.qwen)


def test_other_models_than_those_of_training_are_refused(paths, projector, tmp_path):
    with pytest.raises(InputError) as error:
        load(projector, llm_model_name_or_path="other/llm")
    message = f"was trained with --llm_model_name_or_path {paths.qwen!r}, got 'other/llm': give"
    assert str(error.value).startswith(f"{projector} {message}")
    with pytest.raises(InputError, match="with --whisper_model_name_or_path '.*tiny.pt', got"):
        load(projector, whisper_model_name_or_path="base")
    wide = tiny.make_whisper(tmp_path / "tiny.pt", width=48)
    with pytest.raises(InputError, match="does not fit its LLM and encoder: "):
        load(projector, whisper_model_name_or_path=str(wide))


@pytest.mark.parametrize("version", ["4", "6", None])
def test_a_file_of_another_format_is_refused_with_what_to_do(change, version):
    path = change(format=version)
    with pytest.raises(InputError) as error:
        load(path)
    assert str(error.value) == (
        f"{path} is a projector of format {version}, and this code reads 5: "
        "use the code that wrote it, or train a new one"
    )


def test_metadata_that_is_damaged_is_refused_by_the_setting(change):
    with pytest.raises(InputError, match="its metadata has no good stride: "):
        load(change(stride="wide"))
    with pytest.raises(InputError, match="its metadata has no good prompt: "):
        load(change(prompt=None))


def test_files_that_are_no_projector_are_refused_by_name(projector, tmp_path):
    (tmp_path / "text").write_bytes(b"hello")
    (tmp_path / "empty").touch()
    (tmp_path / "cut").write_bytes(Path(projector).read_bytes()[:5000])
    (tmp_path / "folder").mkdir()
    for name in ("text", "empty", "cut", "folder", "missing"):
        with pytest.raises(InputError, match=f"/{name} cannot be read as a projector file: "):
            load(str(tmp_path / name))


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_what_is_no_whisper_is_refused_with_the_names_and_none_of_its_code_is_run(
    config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("text.pt").write_text("hello")
    Path("folder.pt").mkdir()
    torch.save({"x": Code()}, "code.pt")
    torch.save({"x": Code()}, "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"x": 1}, "other.pt")
    for name in ("text.pt", "folder.pt", "code.pt", "old.pt", "other.pt", "missing.pt", "huge"):
        message = f"^--whisper_model_name_or_path: {name} is no openai-whisper file"
        with pytest.raises(InputError, match=f"(?s){message}.*; valid names: tiny.en, tiny, "):
            build(replace(config, whisper_model_name_or_path=name))
    assert not Path("was-run").exists()


def test_what_is_no_llm_and_no_folder_for_the_cache_is_refused_by_name(paths, config):
    other = replace(config, llm_model_name_or_path="no/such/model")
    with pytest.raises(InputError, match="--llm_model_name_or_path no/such/model cannot be load"):
        build(other)
    with pytest.raises(InputError, match=f"--encoder_cache.*{paths.manifest}"):
        build(config, encoder_cache=paths.manifest)


def save_llm(model, folder):
    model.llm.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return replace(model.speech_config, llm_model_name_or_path=str(folder))


def test_an_llm_without_a_chat_template_is_refused_until_it_has_one(paths, tmp_path):
    model = tiny.make_model(paths)
    model.tokenizer.chat_template = None
    config = save_llm(model, tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path} has no chat template: put a chat_template"):
        build(config)
    (tmp_path / "chat_template.jinja").write_text(tiny.CHATML)
    assert build(config).before == model.before


def test_sampling_and_penalties_of_a_chat_are_dropped_but_its_stops_are_kept(paths, tmp_path):
    model = tiny.make_model(paths)
    chat = {"eos_token_id": [3, 4], "do_sample": True, "repetition_penalty": 9.0}
    model.llm.generation_config.update(**chat)
    generation = build(save_llm(model, tmp_path)).llm.generation_config
    assert generation.eos_token_id == [model.end_id, 3, 4]
    assert (generation.do_sample, generation.repetition_penalty) == (None, None)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_used_where_the_processor_has_it_and_else_warns(config, monkeypatch, native):
    def has_bf16():
        return native

    def has_accelerator():
        return False

    monkeypatch.setattr(torch.accelerator, "is_available", has_accelerator)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", has_bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", has_bf16)
    if native:
        model = build(config, bf16=True)
        assert model.llm.dtype == torch.bfloat16
        assert model.projector.conv.bias.dtype == torch.float32
    else:
        with pytest.warns(UserWarning, match="emulates bfloat16.*computing in float32"):
            model = build(config, bf16=True)
        assert model.llm.dtype == torch.float32


@pytest.mark.parametrize("flags", [RecognitionArguments, transcribe.Arguments])
def test_recognition_takes_bfloat16_by_itself_where_it_is_fast(flags):
    default = {field.name: field.default for field in fields(flags)}["bf16"]
    assert default == has_fast_bf16()


def mutate(content, rng):
    """One to six random changes, most of them near the beginning, where headers are."""
    for _ in range(rng.randint(1, 6)):
        reach = min(len(content), rng.choice([60, len(content)]))
        start = rng.randrange(max(1, reach))
        end = start + rng.choice([0, 1, rng.randint(1, 30), len(content)])
        content = content[:start] + rng.randbytes(rng.randint(0, 8)) + content[end:]
    return content


def read(path):
    """Read a manifest, a projector, or audio by its header and then whole."""
    if path.endswith("jsonl"):
        read_manifest([path])
    elif path.endswith("safetensors"):
        load(path)
    else:
        read_duration(path)
        load_audio(path)


@pytest.mark.parametrize("suffix", ["jsonl", "safetensors", "wav", "flac", "mp3", "ogg"])
def test_damaged_files_are_read_or_refused(projector, tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    tiny.make_sound(Path("a.wav"), 0.4, 300)
    content = b'{"wav": "a.wav", "txt": "go"}\n' * 3
    if suffix == "safetensors":
        content = Path(projector).read_bytes()
    elif suffix != "jsonl":
        content = tiny.make_sound(Path(f"whole.{suffix}"), 1, 300).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(100):
        Path(f"damaged.{suffix}").write_bytes(mutate(content, rng))
        try:
            read(f"damaged.{suffix}")
        except InputError:
            refused += 1
    assert 25 < refused < 100
