"""From names and files to a SpeechLLM."""

import os
import re
from dataclasses import fields, replace
from pathlib import Path

import torch
import whisper
from accelerate import PartialState
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cache import Encoder
from command import InputError
from machine import choose_attention, choose_bf16
from model import FORMAT, Config, SpeechLLM

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+(?<!\.safetensors))(?:/(.+\.safetensors))?")


def build(
    config: Config,
    bf16: bool = False,
    encoder_cache: str | None = None,
    training: bool = False,
) -> SpeechLLM:
    """A SpeechLLM with a new projector, on the CPU, or under ZeRO-3 with its LLM sharded.

    `training` only makes it faster in training. InputError for models that cannot be loaded.
    """
    bf16 = choose_bf16(bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    attention = choose_attention(bf16, training)
    with PartialState().local_main_process_first():  # one process downloads
        encoder = load_whisper(config.whisper_model_name_or_path).encoder
    set_precision(encoder, dtype)
    name = config.llm_model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        llm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--llm_model_name_or_path {name} cannot be loaded: {reason}; wanted a folder, or a "
            "name on the hub with its owner (Qwen/Qwen2-1.5B-Instruct)"
        ) from error
    model = SpeechLLM(Encoder(encoder, encoder_cache), llm, tokenizer, config)
    # the sampling and the penalties of a chat go, its stops stay
    stops = llm.generation_config.eos_token_id or []
    stops = [stops] if isinstance(stops, int) else stops
    model.stop_ids.update(stops)
    llm.generation_config = GenerationConfig(eos_token_id=list(model.stop_ids))
    return model


def load(
    path: str,
    llm_model_name_or_path: str | None = None,
    whisper_model_name_or_path: str | None = None,
    bf16: bool = False,
    encoder_cache: str | None = None,
) -> SpeechLLM:
    """The SpeechLLM of a projector, a file or a name on the Hub.

    Its models may have moved, and are then given.

    InputError for a file that is no projector, and for models that it was not trained with.
    """
    path = find_projector(path)
    config = read_config(
        path,
        llm_model_name_or_path=llm_model_name_or_path,
        whisper_model_name_or_path=whisper_model_name_or_path,
    )
    model = build(config, bf16, encoder_cache)
    model.load_projector(path)
    return model


def find_projector(path: str) -> str:
    """The path, or where nothing is there the file of `user/name[/file.safetensors]` on the Hub."""
    name = HUB_NAME.fullmatch(path)
    if os.path.exists(path) or name is None:
        return path
    repository, file = name.group(1), name.group(2) or "model.safetensors"
    try:
        return hf_hub_download(repository, file)
    except LocalEntryNotFoundError:
        reason = "it cannot be reached, and its cache has no such file"
    except (EntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise InputError(
        f"--projector_model_path: no such file: {path}; nor is {file} of {repository} from the "
        f"Hub: {reason}"
    )


def load_whisper(name: str) -> nn.Module:
    """A Whisper by its name, or from openai-whisper's file."""
    try:
        return whisper.load_model(name, "cpu")
    except Exception as error:  # torch.load has many for a file that is something else
        names = ", ".join(whisper.available_models())
        reason = str(error).split(";")[0]
        raise InputError(
            f"--whisper_model_name_or_path: {name} is no openai-whisper file "
            f"({type(error).__name__}: {reason}); valid names: {names}"
        ) from error


def set_precision(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Keep Whisper's encoder in the precision that it computes in, where it has products.

    Otherwise it would cast its weights in each call. Norms and positions stay in float32, as
    Whisper computes with them so.
    """
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv1d | nn.Linear):
            layer.to(dtype)


def read_config(path: str, **given) -> Config:
    """The config in a projector file, with what is `given` and not None in place of what is there.

    InputError where that differs; but a model may have moved: the last part of its path counts.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as a projector file: {error}") from error
    if "stride" not in metadata:
        wanted = "wanted the model.safetensors that train.py wrote"
        raise InputError(f"{path} is no projector file of this project; {wanted}")
    if metadata.get("format") != str(FORMAT):
        raise InputError(
            f"{path} is a projector of format {metadata.get('format')}, and this code reads "
            f"{FORMAT}: use the code that wrote it, or train a new one"
        )
    values = {}
    for field in fields(Config):
        try:
            values[field.name] = field.type(metadata[field.name])
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: its metadata has no good {field.name}: {error!r}") from error
    config = Config(**values)
    for name, value in given.items():
        if value is None:
            continue
        saved = getattr(config, name)
        if last_part(name, value) != last_part(name, saved):
            raise InputError(
                f"{path} was trained with --{name} {saved!r}, got {value!r}: give the same, or "
                "train a new projector"
            )
        config = replace(config, **{name: value})
    return config


def last_part(name: str, value):
    """Of a path its last part without .pt, which names a model; of others the value itself."""
    if name.endswith("_path"):
        return Path(value).name.removesuffix(".pt")
    return value
