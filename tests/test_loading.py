"""Projector files, models that moved or are others, and what cannot be loaded."""

import json
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from command import InputError
from data import load_audio
from loading import build, load
from machine import choose_bf16
from manifest import read_manifest
from model import Config


def read_metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def config(paths):
    return Config(paths.qwen, paths.whisper)


def test_a_projector_file_holds_the_projector_alone_and_brings_its_config_back(paths, tmp_path):
    settings = {"prompt": "Repeat it.", "stride": 4, "hidden_dim": 64}
    settings |= {"blank_threshold": 0.55, "ctc_sharpness": 9.5}
    model = tiny.make_model(paths, **settings)
    path = tmp_path / "folder" / "model.safetensors"
    model.save_projector(path)
    assert all(name.startswith("projector.") for name in load_file(path))
    again = load(str(path))
    assert again.speech_config == Config(paths.qwen, paths.whisper, **settings)
    assert again.projector.hidden.out_features == 64
    for name, tensor in model.projector.state_dict().items():
        assert torch.equal(tensor, again.projector.state_dict()[name])
    plain = tmp_path / "plain"  # has the mode that the user's umask asks for
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_the_blank_threshold_of_the_file_is_used(paths, tmp_path):
    path = str(tmp_path / "model.safetensors")
    tiny.make_model(paths, blank_threshold=-2.0).save_projector(path)
    model = load(path)
    batch = model.collator()(read_manifest([paths.manifest])[:1])
    [audio] = model.embed_audio(batch["mel"], batch["lengths"])
    assert len(audio) > 0 and len(model.drop_blanks([audio])[0]) == 0


def test_models_that_moved_are_taken_from_their_new_places(paths, projector, tmp_path):
    llm = str(shutil.copytree(paths.qwen, tmp_path / "qwen"))
    encoder = str(shutil.copy(paths.whisper, tmp_path / "tiny.pt"))
    model = load(projector, llm, encoder)
    assert model.speech_config == Config(llm, encoder)
    assert load(projector, f"{llm}/").speech_config.llm_model_name_or_path == f"{llm}/"


def test_a_misspelt_argument_is_an_error(projector, paths):
    with pytest.raises(TypeError, match="llm_model_path"):
        load(projector, llm_model_path=paths.qwen)


def test_other_models_than_those_of_training_are_refused(paths, projector):
    with pytest.raises(InputError) as error:
        load(projector, llm_model_name_or_path="other/llm")
    ours = f"was trained with --llm_model_name_or_path {paths.qwen!r}, got 'other/llm'"
    assert str(error.value).startswith(f"{projector} {ours}: ")
    with pytest.raises(InputError, match="with --whisper_model_name_or_path '.*tiny.pt', got 'b"):
        load(projector, whisper_model_name_or_path="base")


def test_models_of_other_sizes_under_the_same_names_are_refused(projector, tmp_path):
    wide = str(tiny.make_whisper(tmp_path / "tiny.pt", width=48))
    with pytest.raises(InputError, match="does not fit its LLM and encoder: "):
        load(projector, whisper_model_name_or_path=wide)


@pytest.mark.parametrize("version", ["4", "6", None])
def test_a_file_of_another_format_is_refused_with_what_to_do(projector, tmp_path, version):
    path = str(tmp_path / "other.safetensors")
    metadata = read_metadata(projector)
    if version is None:
        metadata = None
    else:
        metadata["format"] = version
    save_file(load_file(projector), path, metadata)
    with pytest.raises(InputError) as error:
        load(path)
    assert str(error.value) == (
        f"{path} is a projector of format {version}, and this code reads 5: "
        "use the code that wrote it, or train a new one"
    )


@pytest.mark.parametrize("name, value", [("stride", "wide"), ("stride", None), ("prompt", None)])
def test_metadata_that_is_damaged_is_refused_by_the_setting(projector, tmp_path, name, value):
    path = str(tmp_path / "other.safetensors")
    metadata = read_metadata(projector)
    del metadata[name]
    if value is not None:
        metadata[name] = value
    save_file(load_file(projector), path, metadata)
    with pytest.raises(InputError, match=f"other.safetensors: its metadata has no good {name}: "):
        load(path)


def test_files_that_are_no_projector_are_refused_by_name(projector, tmp_path):
    whole = Path(projector).read_bytes()
    for name, content in {"text": b"hello", "empty": b"", "cut": whole[:5000]}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in ("text", "empty", "cut", "folder", "missing"):
        with pytest.raises(InputError, match=f"/{name} cannot be read as a projector file: "):
            load(str(tmp_path / name))
    path = str(tmp_path / "part")
    bias = load_file(projector)["projector.conv.bias"]
    save_file({"projector.conv.bias": bias}, path, read_metadata(projector))
    with pytest.raises(InputError, match="/part does not fit its LLM and encoder: "):
        load(path)


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
    with open("code.pt", "wb") as file:
        pickle.dump(Code(), file)
    torch.save({"x": Code()}, "code-zip.pt")
    torch.save({"x": 1}, "other.pt")
    for name in ("text.pt", "code.pt", "code-zip.pt", "other.pt", "folder.pt", "missing", "huge"):
        message = f"^--whisper_model_name_or_path: {name} is no openai-whisper file .*valid names: tiny.en, "
        with pytest.raises(InputError, match=f"(?s){message}"):
            build(replace(config, whisper_model_name_or_path=name))
    assert not Path("was-run").exists()


def test_what_is_no_llm_is_refused_by_name(config, tmp_path):
    for name in ("no/such/model", str(tmp_path)):
        message = f"^--llm_model_name_or_path {name} cannot be loaded: "
        with pytest.raises(InputError, match=message):
            build(replace(config, llm_model_name_or_path=name))


def test_an_encoder_cache_that_is_no_folder_is_refused_by_name(config):
    with pytest.raises(InputError, match=f"--encoder_cache.*{config.whisper_model_name_or_path}"):
        build(config, encoder_cache=config.whisper_model_name_or_path)


def save_llm(model, folder, **settings):
    model.llm.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return Config(str(folder), model.speech_config.whisper_model_name_or_path)


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
    assert not generation.do_sample and generation.repetition_penalty is None


def test_an_llm_may_have_no_pad_no_eos_and_more_tokens_than_its_tokenizer(paths, tmp_path):
    model = tiny.make_model(paths)
    size = model.llm.config.vocab_size
    model.llm.resize_token_embeddings(size + 64, mean_resizing=False)
    model.llm.config.tie_word_embeddings = False
    model.llm.generation_config.eos_token_id = None
    model.tokenizer.pad_token = model.tokenizer.eos_token = None
    model = build(save_llm(model, tmp_path))
    batch = model.collator()(read_manifest([paths.manifest])[:3])
    assert model(**batch, ctc_weight=0.3)["loss"].isfinite()
    # the tokens that no tokenizer knows are what it likes best
    torch.nn.init.zeros_(model.llm.lm_head.weight[:size])
    ids = model.generate(model.embed_audio(batch["mel"], batch["lengths"]), num_beams=3)
    assert max(max(row) for row in ids) >= size
    assert all(isinstance(text, str) for text in model.tokenizer.batch_decode(ids))


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_used_where_the_processor_has_it_and_else_warns(config, monkeypatch, native):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    if not native:
        with pytest.warns(UserWarning, match="emulates bfloat16.*computing in float32"):
            model = build(config, bf16=True)
        assert model.llm.dtype == torch.float32
        assert model.llm.config._attn_implementation == "sdpa"
        return
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    model = build(config, bf16=True)
    assert model.llm.dtype == torch.bfloat16
    assert model.projector.conv.bias.dtype == torch.float32
    assert choose_bf16(False) is False


def mutate(content, rng):
    """One to six random changes, most of them near the beginning, where headers are."""
    for _ in range(rng.randint(1, 6)):
        reach = min(len(content), rng.choice([60, len(content)]))
        start = rng.randrange(max(1, reach))
        end = start + rng.choice([0, 1, rng.randint(1, 30), len(content)])
        content = content[:start] + rng.randbytes(rng.randint(0, 8)) + content[end:]
    return content


def read_audio(path):
    """Read the header of audio, as for a manifest, and then the whole."""
    Path("audio.jsonl").write_text(json.dumps({"wav": path, "txt": "x"}))
    try:
        read_manifest(["audio.jsonl"])
    finally:
        load_audio(path)


@pytest.mark.parametrize("kind, count", [("jsonl", 200), ("safetensors", 60), ("audio", 300)])
def test_damaged_files_are_read_or_refused(projector, tmp_path, monkeypatch, kind, count):
    monkeypatch.chdir(tmp_path)
    tiny.make_sound(tmp_path / "a.wav", 0.4, 300)
    Path("whole.jsonl").write_text('{"wav": "a.wav", "txt": "go"}\n' * 3)
    shutil.copy(projector, "whole.safetensors")
    tone = 0.3 * np.sin(np.arange(16_000) / 20)
    for suffix, subtype in {"wav": None, "flac": None, "mp3": None, "ogg": "OPUS"}.items():
        soundfile.write(f"whole.{suffix}", tone, 16_000, subtype=subtype)
    readers = {"jsonl": lambda path: read_manifest([path]), "safetensors": load}
    read = readers.get(kind, read_audio)
    rng = random.Random(0)
    refused = 0
    for _ in range(count):
        suffix = kind
        if kind == "audio":
            suffix = rng.choice(["wav", "flac", "mp3", "ogg"])
        content = Path(f"whole.{suffix}").read_bytes()
        Path(f"damaged.{suffix}").write_bytes(mutate(content, rng))
        try:
            read(f"damaged.{suffix}")
        except InputError:
            refused += 1
    assert count / 4 < refused < count
