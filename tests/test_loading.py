"""Projector files, models that moved or are others, and what cannot be loaded."""

import json
import os
import random
import shutil
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from arguments import RecognitionArguments
from cache import Encoder
from command import InputError
from loading import build, load, load_whisper, set_precision
from machine import has_fast_bf16
from manifest import read_manifest
from model import Config
from sound import load_audio, read_duration
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


def test_files_and_names_of_transformers_are_no_whisper_and_the_name_is_given(
    config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.encoder.conv1.weight": torch.ones(2)}, "pytorch_model.bin")
    message = "pytorch_model.bin is no openai-whisper file .it has no 'dims', as files of transf"
    with pytest.raises(InputError, match=message):
        build(replace(config, whisper_model_name_or_path="pytorch_model.bin"))
    for name in ("openai/whisper-large-v3", "whisper-large-v3/", "whisper-large-v3/model.bin"):
        with pytest.raises(InputError, match="did you mean large-v3[?].; valid names: tiny.en"):
            build(replace(config, whisper_model_name_or_path=name))
    monkeypatch.setattr("whisper.load_model", Mock(side_effect=URLError("no network")))
    with pytest.raises(InputError, match="URLError: [^;]*no network[^;]*; valid names"):
        build(replace(config, whisper_model_name_or_path="base"))


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


def test_the_encoder_is_kept_in_the_precision_it_computes_in_with_the_same_outputs(paths):
    encoder = load_whisper(paths.whisper).encoder
    windows = torch.randn(2, 80, 100, generator=torch.manual_seed(0)).bfloat16()
    cast_in_each_call = Encoder(encoder).compute(windows)
    set_precision(encoder, torch.bfloat16)
    assert encoder.conv1.weight.dtype == encoder.blocks[0].mlp[0].weight.dtype == torch.bfloat16
    assert encoder.ln_post.weight.dtype == torch.float32
    assert torch.equal(Encoder(encoder)(windows.float()), cast_in_each_call)


def test_an_llm_without_a_chat_template_is_refused_until_it_has_one(paths, tmp_path):
    model = tiny.make_model(paths)
    model.tokenizer.chat_template = None
    config = save_llm(model, tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path} has no chat template: put a chat_template"):
        build(config)
    (tmp_path / "chat_template.jinja").write_text(tiny.CHATML)
    assert build(config).before == model.before


SIZES = {"vocab_size": 263, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def make_folder(folder, llm):
    """A folder of a random LLM and the tiny tokenizer."""
    llm.save_pretrained(folder)
    tiny.make_tokenizer(tiny.CHATML, "<|im_end|>").save_pretrained(folder)
    return str(folder)


def edit(path, **changes):
    """Changes a file of JSON; what becomes None is left out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: x for key, x in content.items() if x is not None}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def rename(weights):
    return {f"base.{name}": x for name, x in weights.items()}


def lose(weights):
    return {name: x for name, x in weights.items() if "layers.1.mlp" not in name}


def spoil(weights):
    weights["model.norm.weight"] *= torch.nan
    return weights


def make_pointer(path):
    """What a clone without git lfs has in place of a file."""
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")


BROKEN = {
    "pointer": "its weights are no whole file .*; fetch them again, from git with git lfs",
    "lost": "its files lack 3 of its weights, model.layers.1.mlp.down_proj.weight among them",
    "renamed": r"its files lack \d+ of its weights, lm_head.weight among them: fetch them again",
    "resized": "its weights have other sizes than its config.json says; fetch both from one place",
    "remote": "it needs code of its own, and none that comes with a model is run; wanted an LLM t",
    "quantised": "cannot be loaded: .*pip install.*; install what it needs, or take another LLM",
    "tokenizer": "it has no tokenizer that can be read; put its tokenizer.json there",
    "tokenizer pointer": r"one of its .json files cannot be read \(.*\); fetch its files again,",
    "tokenizer empty": r"one of its .json files cannot be read .'added_tokens'.; fetch its files",
    "tokenizer other": r"one of its .json files cannot be read \(.*\); fetch its files again,",
    "setting": "Validation error for field 'vocab_size'",
    "empty": "its tokenizer has no token for a space: put its tokenizer.json there",
    "small": "its tokenizer has a token 262, and the LLM embeddings of 200 tokens: put the token",
    "spoilt": "fails in training: ValueError: its loss is nan, and no gradient reaches its inputs",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_llm_whose_files_are_broken_is_refused_in_one_line(paths, config, tmp_path, fault):
    folder = Path(shutil.copytree(paths.llama, tmp_path / "llm"))
    weights, settings = folder / "model.safetensors", folder / "config.json"
    if fault == "pointer":
        make_pointer(weights)
    elif fault == "lost":
        edit_weights(folder, lose)
    elif fault == "renamed":
        edit_weights(folder, rename)
    elif fault == "spoilt":
        edit_weights(folder, spoil)
    elif fault == "resized":
        edit(settings, intermediate_size=64)
    elif fault == "remote":
        edit(settings, model_type="own", auto_map={"AutoConfig": "code.OwnConfig"})
        (folder / "code.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    elif fault == "quantised":
        edit(settings, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    elif fault == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif fault == "tokenizer pointer":
        make_pointer(folder / "tokenizer.json")
    elif fault == "tokenizer empty":
        (folder / "tokenizer.json").write_text("{}")
    elif fault == "tokenizer other":
        (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": 3}')
    elif fault == "setting":
        edit(settings, vocab_size="many")
    elif fault == "empty":  # which transformers makes where a folder of Qwen has none
        folder = Path(shutil.copytree(paths.qwen, tmp_path / "qwen"))
        (folder / "tokenizer.json").unlink()
    elif fault == "small":
        small = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": 200})
        AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    with pytest.raises(
        InputError, match=f"^--llm_model_name_or_path {folder}.*{BROKEN[fault]}"
    ) as e:
        build(replace(config, llm_model_name_or_path=str(folder)))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "was-run").exists()


MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 32, "mamba_d_head": 32}
# of random LLMs: what they are refused with, or None
SERVES = {
    "falcon_h1": ({**MAMBA, "mamba_d_ssm": 128}, "fails in decoding: ValueError: You passed"),
    "bamba": ({**MAMBA, "attn_layer_indices": [1]}, "fails in decoding: ValueError: You passed"),
    "gemma4_text": (
        {"global_head_dim": 16, "vocab_size_per_layer_input": 263},
        "fails in training: RuntimeError: It seems like",
    ),
    "bert": ({}, "fails in training: ValueError: it is no LLM that writes text, as each token"),
    "t5": ({"d_model": 64, "d_ff": 64, "num_heads": 4}, "cannot be loaded: Unrecognized config"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, None),
    "mamba2": ({"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1}, None),
}


@pytest.mark.parametrize("family", SERVES)
def test_an_llm_that_cannot_be_trained_through_or_decoded_with_is_refused(config, tmp_path, family):
    options, refusal = SERVES[family]
    llm_config = AutoConfig.for_model(family, **{**SIZES, **options})
    if family == "t5":
        llm = transformers.T5ForConditionalGeneration(llm_config)
    else:
        llm = AutoModelForCausalLM.from_config(llm_config)
    folder = make_folder(tmp_path, llm)
    config = replace(config, llm_model_name_or_path=folder)
    if refusal is None:
        assert not build(config).llm.training
        return
    with pytest.raises(InputError, match=f"^--llm_model_name_or_path {folder}.*{refusal}") as error:
        build(config)
    assert "\n" not in str(error.value)


def test_a_multimodal_model_gives_its_language_model(config, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    whole = transformers.Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=SIZES, vision_config=sizes, mm_tokens_per_image=4, **tokens)
    ).eval()
    folder = make_folder(tmp_path, whole)
    llm = build(replace(config, llm_model_name_or_path=folder)).llm
    assert type(llm) is transformers.Gemma3ForCausalLM
    assert llm.config.vocab_size == 263
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(llm(ids).logits, whole(ids).logits)
    assert llm.num_parameters() < whole.num_parameters()


def test_a_stop_may_be_the_first_token(paths, tmp_path):
    model = tiny.make_model(paths)
    model.llm.generation_config.eos_token_id = 0
    assert build(save_llm(model, tmp_path)).stop_ids == {model.end_id, 0}


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
