"""Tiny random models, tokenizers and sounds, built locally for the tests."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from whisper.model import ModelDimensions, Whisper

from loading import build
from model import Config, SpeechLLM

SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """\
{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}\
{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n' }}\
{{ date_string + '<|eot_id|>' }}\
{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'\
 + message['content'] | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """\
<|begin_of_text|>{% for m in messages %}\
{% set role = 'model' if m.role == 'assistant' else m.role %}\
{{ '<|im_start|>' + role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"""
TEXTS = ["go", "no", "up", "left", "on", "ten", "in", "red"]


def make_tokenizer(
    template: str | None, end: str, specials: list[str] = SPECIALS, start: str | None = None
) -> PreTrainedTokenizerFast:
    """One token a byte, and `specials`; pad is `end`, as in the published recipe."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        chat_template=template,
    )


def make_llm(folder: Path, family: str) -> Path:
    """A random "qwen" (2), "llama" or "gemma" (3) with its tokenizer and a template like theirs."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 256 + len(SPECIALS),
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
    }
    if family == "qwen":
        tokenizer = make_tokenizer(CHATML, "<|im_end|>")
        llm = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    elif family == "llama":
        tokenizer = make_tokenizer(LLAMA3, "<|eot_id|>")
        llm = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        tokenizer = make_tokenizer(GEMMA, "<|im_end|>")
        # tied, it would say its last token again and again
        options = {"head_dim": 32, "sliding_window": 512, "tie_word_embeddings": False}
        llm = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **options))
    llm.generation_config.eos_token_id = tokenizer.eos_token_id
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_whisper(path: Path, n_mels: int = 80, width: int = 32) -> Path:
    """A random Whisper in openai-whisper's file format."""
    torch.manual_seed(0)
    dims = ModelDimensions(n_mels, 1500, width, 1, 1, 100, 8, width, 1, 1)
    model = Whisper(dims)
    # Whisper leaves this one to whatever was in memory, and NaN equals nothing
    torch.nn.init.normal_(model.decoder.positional_embedding)
    torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, path)
    return path


def make_model(paths, llm: str = "qwen", whisper: str = "whisper", **settings) -> SpeechLLM:
    """A model of two of the fixture's `paths`; `settings` are of its Config."""
    torch.manual_seed(0)
    return build(Config(getattr(paths, llm), getattr(paths, whisper), **settings))


def make_sound(path: Path, seconds: float, pitch: float, rate: int = 16_000) -> Path:
    """A sine of `pitch` Hz that fades out."""
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * pitch * time)
    soundfile.write(path, wave * np.exp(-time), rate)
    return path


def make_manifest(folder: Path, texts: list[str] = TEXTS, longer: float = 0.13) -> Path:
    """A manifest of sounds of different pitches, each `longer` by so many seconds than the last."""
    with open(folder / "manifest.jsonl", "w") as manifest:
        for i, text in enumerate(texts):
            make_sound(folder / f"{i}.wav", 0.5 + longer * i, 200 * 1.5 ** (i % 8))
            print(json.dumps({"wav": f"{i}.wav", "txt": text}), file=manifest)
    return folder / "manifest.jsonl"
