"""When each word of a hypothesis is said, by aligning it to the audio with CTC.

Shapes: A audio positions, D width of the LLM, W windows, M mel bins, F mel frames of a window.
"""

import re

import torch
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_SAMPLES_PER_TOKEN, SAMPLE_RATE

from ctc import align
from model import SpeechLLM

SCRIPT = "\u3040-\u9fff\uf900-\ufaff"  # of Chinese and Japanese, which have no spaces
FRAMES_PER_TOKEN = N_SAMPLES_PER_TOKEN // HOP_LENGTH  # mel frames in an encoder position
LONGEST_REST = 5  # positions that a word may last behind its last token
LOUD = 0.3  # of the way from the audio's quiet positions to its loud ones
WORD_START = re.compile(rf"(?<!\S)\S|[{SCRIPT}]|(?<=[{SCRIPT}])\S")


def time_words(model: SpeechLLM, audio: Tensor, mel: Tensor, text: str) -> list[dict]:
    """Each word of a text with its start and end in seconds: `word`, `start`, `end`.

    Audio is `embed_audio`'s, (A, D), of the log-mel (W, M, F). Where CTC cannot align the text, all
    words have the times of the whole audio, and `aligned` is false.
    """
    stride = model.projector.stride
    ids = model.tokenizer.encode(f" {text}", add_special_tokens=False)
    words = split_words(model.tokenizer, ids)
    target = [i for i in ids if i != model.blank_id]
    embeddings = model.llm.get_input_embeddings()
    spans = align(audio, target, embeddings, model.blank_id)
    if spans is None:
        end = to_seconds(len(audio), stride)
        times = {"start": 0.0, "end": end, "aligned": False}
        return [{"word": word, **times} for word, _ in words]
    starts, ends = [], []
    waiting = iter(spans)
    for _, word_ids in words:
        own = [next(waiting) for i in word_ids if i != model.blank_id]
        starts.append(own[0][0])
        ends.append(own[-1][1])
    is_loud = find_loud(mel, len(audio), stride)
    timed = []
    limits = [*starts[1:], len(audio)]
    for (word, _), start, end, limit in zip(words, starts, ends, limits):
        # CTC sees a word piece where it begins, and blanks in the rest of it
        limit = min(limit, end + LONGEST_REST)
        while end < limit and is_loud[end]:
            end += 1
        times = {"start": to_seconds(start, stride), "end": to_seconds(end, stride)}
        timed.append({"word": word, **times})
    return timed


def to_seconds(position: int, stride: int) -> float:
    """When an audio position starts."""
    return round(position * stride * N_SAMPLES_PER_TOKEN / SAMPLE_RATE, 2)


def find_loud(mel: Tensor, count: int, stride: int) -> list[bool]:
    """Whether each of the first `count` positions of a log-mel (W, M, F) is loud, within it."""
    frames = mel.mean(dim=1).flatten()  # (W * F,)
    parts = frames.split(stride * FRAMES_PER_TOKEN)[:count]
    levels = torch.stack([part.mean() for part in parts]).cpu()
    quiet, loud = levels.quantile(torch.tensor([0.05, 0.9]))
    return (levels >= quiet + LOUD * (loud - quiet)).tolist()


def split_words(tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The words that token ids spell, each with its ids.

    A word ends at a space; in Chinese and Japanese each token, or so many as spell a character, is
    a word.
    """
    words = []
    said, waiting = "", []
    for end, token in enumerate(ids, start=1):
        waiting.append(token)
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):
            continue  # a part of a character
        piece = text[len(said) :]
        word, word_ids = "", []
        if words:
            begins = WORD_START.match(text, len(text) - len(piece.lstrip()))
            if not begins or not words[-1][0]:
                word, word_ids = words.pop()
        words.append((f"{word}{piece}".strip(), word_ids + waiting))
        said, waiting = text, []
    return [(word, word_ids) for word, word_ids in words if word]
