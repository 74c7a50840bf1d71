"""From names and files to a SpeechLLM."""

import os
import re
from dataclasses import fields, replace
from json import JSONDecodeError
from pathlib import Path

import torch
import whisper
from accelerate import PartialState
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
)

from cache import Encoder
from command import InputError
from data import IGNORE
from machine import choose_attention, choose_bf16
from model import FORMAT, Config, SpeechLLM

# user/name, or user/name/file.safetensors
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+(?<!\.safetensors))(?:/(.+\.safetensors))?")


def build(
    config: Config,
    bf16: bool = False,
    encoder_cache: str | None = None,
    training: bool = False,
) -> SpeechLLM:
    """A SpeechLLM with a new projector, on accelerate's device, or under ZeRO-3 with a sharded LLM.

    `training` only makes it faster in training. InputError for models that cannot be loaded, and
    for LLMs that cannot be trained through or decoded with.
    """
    bf16 = choose_bf16(bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    attention = choose_attention(bf16, training)
    with PartialState().local_main_process_first():  # one process downloads
        encoder = load_whisper(config.whisper_model_name_or_path).encoder
    set_precision(encoder, dtype)
    llm, tokenizer = load_llm(config.llm_model_name_or_path, dtype, attention)
    model = SpeechLLM(Encoder(encoder, encoder_cache), llm, tokenizer, config)
    # the sampling and the penalties of a chat go, its stops stay
    stops = llm.generation_config.eos_token_id
    if stops is None:
        stops = []
    stops = [stops] if isinstance(stops, int) else stops
    model.stop_ids.update(stops)
    llm.generation_config = GenerationConfig(eos_token_id=list(model.stop_ids))
    check_llm(model)
    return model


def load_llm(name: str, dtype: torch.dtype, attention: str | None):
    """The LLM and the tokenizer of a folder, or of a name on the hub.

    Of a multimodal model it is the language model. InputError for what cannot be loaded: no code
    that comes with a model is run.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        loader = AutoModelForCausalLM
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            loader = AutoModelForMultimodalLM
        llm, found = loader.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds
        reason, wanted = explain(error)
        raise InputError(
            f"--llm_model_name_or_path {name} cannot be loaded: {reason}; {wanted}"
        ) from error
    if not tokenizer.encode(" ", add_special_tokens=False):
        raise InputError(
            f"--llm_model_name_or_path {name}: its tokenizer has no token for a space: put its "
            "tokenizer.json there, or take another LLM"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(
            f"--llm_model_name_or_path {name}: its files lack {len(missing)} of its weights, "
            f"{missing[0]} among them: fetch them again, or take another LLM"
        )
    return take_language_model(llm), tokenizer


def explain(error: Exception) -> tuple[str, str]:
    """Why a model cannot be loaded, and what is wanted in its place."""
    if "trust_remote_code" in str(error):
        reason = "it needs code of its own, and none that comes with a model is run"
        return reason, "wanted an LLM that transformers knows"
    if "backend tokenizer" in str(error):
        return "it has no tokenizer that can be read", "put its tokenizer.json there"
    if "ignore_mismatched_sizes" in str(error):
        reason = "its weights have other sizes than its config.json says"
        return reason, "fetch both from one place"
    reason = str(error).strip().split("\n")[0].removesuffix(".")
    if isinstance(error, SafetensorError):
        return (
            f"its weights are no whole file ({reason})",
            "fetch them again, from git with git lfs",
        )
    # tokenizers raises Exception itself
    if isinstance(error, (JSONDecodeError, KeyError)) or type(error) is Exception:
        return (
            f"one of its .json files cannot be read ({reason})",
            "fetch its files again, from git with git lfs",
        )
    if isinstance(error, ImportError):
        return reason, "install what it needs, or take another LLM"
    wanted = "wanted a folder, or a name on the hub with its owner (Qwen/Qwen2-1.5B-Instruct)"
    return reason, wanted


def first_sentence(error: Exception) -> str:
    """What an error says, less its advice to developers."""
    first_line = str(error).strip().split("\n")[0]
    return first_line.split(". ")[0].removesuffix(".")


def take_language_model(llm: nn.Module) -> nn.Module:
    """Of a multimodal model the part that reads and writes text, if it is an LLM by itself."""
    config = llm.config.get_text_config()
    if config is llm.config or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return llm
    with torch.device("meta"):  # a frame without weights, which gets those that are loaded
        language_model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    setattr(language_model, language_model.base_model_prefix, llm.get_decoder())
    language_model.set_output_embeddings(llm.get_output_embeddings())
    language_model.generation_config = llm.generation_config
    return language_model.eval()


def check_llm(model: SpeechLLM) -> None:
    """Try what training and decoding will do, so that an LLM that cannot is refused at once.

    All processes take part. The model goes to accelerate's device. Under ZeRO-3 each process
    needs the whole LLM for it; where that has no room only what needs no weights is checked.
    """
    name = model.speech_config.llm_model_name_or_path
    embeddings = model.llm.get_input_embeddings().num_embeddings
    ids = [*model.before, *model.after, model.end_id, model.blank_id]
    largest = max(*ids, model.tokenizer.vocab_size - 1)
    if largest >= embeddings:
        raise InputError(
            f"--llm_model_name_or_path {name}: its tokenizer has a token {largest}, and the LLM "
            f"embeddings of {embeddings} tokens: put the tokenizer beside it that it was made with"
        )
    weights = list(model.llm.parameters())
    if not hasattr(weights[0], "ds_id"):  # with which ZeRO-3 marks what it has sharded
        model.to(PartialState().device)
        try_llm(model)
    elif have_room_for(weights):
        import deepspeed

        with deepspeed.zero.GatheredParameters(weights):
            try_llm(model)


def have_room_for(weights: list[nn.Parameter]) -> bool:
    """Whether each process can hold two copies of weights that ZeRO-3 has sharded."""
    if not torch.accelerator.is_available():
        return True
    device = PartialState().device
    needed = sum(2 * x.ds_numel * x.element_size() for x in weights)
    free, _ = torch.accelerator.get_memory_info(device)
    has_room = torch.tensor(int(needed < free), device=device)
    # the smallest counts for all, as they gather together
    torch.distributed.all_reduce(has_room, torch.distributed.ReduceOp.MIN)
    return bool(has_room)


@torch.enable_grad()  # also where a caller only decodes
def try_llm(model: SpeechLLM) -> None:
    """A loss with a gradient to the inputs, and two tokens of a beam of two; on three positions."""
    llm = model.llm
    # no token's embedding, as audio is none
    inputs = -model.embed_text([model.blank_id] * 3)[None].detach()
    inputs = inputs.requires_grad_().clone()
    positions = torch.arange(3, device=inputs.device)[None]
    mask = torch.ones_like(positions)
    labels = torch.tensor([[IGNORE, model.end_id]], device=inputs.device)
    options = {"inputs_embeds": inputs, "attention_mask": mask}
    try:
        task = "training"
        llm.train()
        loss = llm(
            **options,
            position_ids=positions,
            labels=labels,
            logits_to_keep=torch.arange(-2, 0, device=inputs.device),
            num_items_in_batch=1,
        ).loss
        [gradient] = torch.autograd.grad(loss, inputs)
        if not gradient.any() or not gradient.isfinite().all():
            raise ValueError(f"its loss is {loss.item():.3g}, and no gradient reaches its inputs")
        if gradient[0, -1].any():
            raise ValueError("it is no LLM that writes text, as each token reads those behind it")
        llm.eval()
        task = "decoding"
        llm.generate(**options, num_beams=2, max_new_tokens=2, pad_token_id=model.end_id)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an LLM's own code raises
        raise InputError(
            f"--llm_model_name_or_path {llm.name_or_path}: this LLM ({type(llm).__name__}) fails "
            f"in {task}: {type(error).__name__}: {first_sentence(error)}; take another LLM"
        ) from error
    finally:
        llm.eval()


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
    from_cache = not answers(repository, file)
    try:
        return hf_hub_download(repository, file, local_files_only=from_cache)
    except LocalEntryNotFoundError:
        reason = "it cannot be reached, and its cache has no such file"
    except (OSError, ValueError) as error:  # the Hub's answer, or what is no name there
        reason = " ".join(str(error).split())
    raise InputError(
        f"--projector_model_path: no such file: {path}; nor is {file} of {repository} from the "
        f"Hub: {reason}"
    )


def answers(repository: str, file: str) -> bool:
    """Whether the Hub says anything about a file; the download would try for half a minute."""
    try:
        get_hf_file_metadata(hf_hub_url(repository, file))
    except HfHubHTTPError:  # no, or not to you
        return True
    except Exception:  # those of the Hub's HTTP library, which changes
        return False
    return True


def load_whisper(name: str) -> nn.Module:
    """A Whisper by its name, or from openai-whisper's file."""
    try:
        return whisper.load_model(name, "cpu")
    except Exception as error:  # torch.load has many for a file that is something else
        names = whisper.available_models()
        reason = f"{type(error).__name__}: {first_sentence(error).split(';')[0]}"
        # those of transformers are called whisper-tiny, and lie in folders of that name
        parts = [part.removeprefix("whisper-") for part in Path(name).parts]
        meant = [part for part in parts if part in names]
        if meant and name not in names:  # a right name fails where it cannot be fetched
            reason += f"; transformers' files are others: did you mean {meant[-1]}?"
        elif isinstance(error, KeyError):
            reason = f"it has no {error}, as files of transformers have none"
        raise InputError(
            f"--whisper_model_name_or_path: {name} is no openai-whisper file "
            f"({reason}); valid names: {', '.join(names)}"
        ) from error


def set_precision(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Keep Whisper's encoder in the precision that it computes in, where it has products.

    Otherwise it would cast its weights in each call. Norms and positions stay in float32, as
    Whisper computes with them so.
    """
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv1d | nn.Linear):
            layer.to(dtype)


def read_config(path: str | Path, **given) -> Config:
    """The config in a projector file, with what is `given` and not None in place of what is there.

    The file may be a name on the Hub. InputError where what is given differs; but a model may have
    moved: the last part of its path counts.
    """
    path = find_projector(str(path))
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
