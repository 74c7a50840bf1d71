"""From a manifest to padded batches: JSONL lines, audio, log-mel, prompt and labels.

A manifest is JSONL, `{"wav": "a.flac", "txt": "what is said"}` a line; other keys are kept.
Shapes: B utterances, S samples, W windows of an utterance, M mel bins, F mel frames of a window
(100 a second), T tokens.
"""

import json
import math
from functools import partial
from pathlib import Path

import soundfile
import soxr
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from whisper import log_mel_spectrogram, pad_or_trim
from whisper.audio import HOP_LENGTH, N_SAMPLES, SAMPLE_RATE

from model import IGNORE, InputError

WINDOW_STEP = 2 * SAMPLE_RATE  # samples; windows of few sizes are encoded in few batches
SILENCE = SAMPLE_RATE // 2  # samples, at least, behind speech of less than 30 s
SAMPLES_PER_POSITION = 2 * HOP_LENGTH  # the second convolution of Whisper's encoder has stride 2
PLACEHOLDER = "<|speech-goes-here|>"  # is rendered by the chat template, never tokenised


def read_manifest(paths: list[str], need_text: bool = True) -> list[dict]:
    """All utterances of the manifests in order, each with where its audio is as `_path`.

    A relative `wav` is relative to its manifest. InputError with file:line for a bad line.
    """
    rows = []
    for manifest in map(Path, paths):
        try:
            lines = manifest.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{manifest}: cannot be read as a JSONL manifest: {error}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(parse_line(line, f"{manifest}:{number}", manifest.parent, need_text))
    if not rows:
        raise InputError(f"{', '.join(paths)}: no utterance in it; wanted JSONL lines")
    return rows


def parse_line(line: str, where: str, folder: Path, need_text: bool) -> dict:
    """One utterance of a manifest; `where` (file:line) is for its InputError."""
    try:
        row = dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: not a JSON object: {line[:80]}") from error
    for key in ("wav", "txt") if need_text or "txt" in row else ("wav",):
        if not isinstance(row.get(key), str):
            raise InputError(f'{where}: "{key}" must be a string, got {row.get(key)!r}')
    path = folder / row["wav"]
    if not path.is_file():
        raise InputError(f'{where}: "wav" names {path}, which is no file')
    return {**row, "_path": str(path)}


def load_audio(path: str):
    """Any file that libsndfile reads (wav, flac, ogg, opus, mp3) -> (S,) float32, mono, 16 kHz."""
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (S, channels)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path}: cannot be decoded as audio: {error}") from error
    audio = soxr.resample(audio.mean(axis=1), rate, SAMPLE_RATE)
    if len(audio) == 0:
        raise InputError(f"{path}: holds no audio")
    return audio


def log_mel(audio, n_mels: int) -> Tensor:
    """Audio (S,) -> log-mel of one window, or of as many of 30 s as it fills: (W, M, F).

    The window is the speech and a little silence, not 30 s: its size follows from S alone.
    """
    size = min(N_SAMPLES, math.ceil((len(audio) + SILENCE) / WINDOW_STEP) * WINDOW_STEP)
    windows = math.ceil(len(audio) / size)
    mel = log_mel_spectrogram(pad_or_trim(audio, windows * size), n_mels)  # (M, W * F)
    return mel.unflatten(1, (windows, size // HOP_LENGTH)).transpose(0, 1)  # (W, M, F)


def build_prompt(tokenizer, prompt: str) -> tuple[list[int], list[int], int]:
    """Token ids before the audio and after it, and the token that ends the answer.

    `prompt`, then the audio, are the user's turn in the tokenizer's chat template. A tokenizer
    without one gets its own start of text, prompt, newline, audio, newline, and answers end in EOS.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def render(*messages: dict, **options) -> str:
        # Qwen3 must not think aloud, and Llama 3's system turn must not change from day to day
        fixed = {"tokenize": False, "enable_thinking": False, "date_string": "26 Jul 2024"}
        return tokenizer.apply_chat_template(list(messages), **fixed, **options)

    if not tokenizer.chat_template:
        return tokenizer.encode(f"{prompt}\n"), encode("\n"), tokenizer.eos_token_id
    user = {"role": "user", "content": f"{prompt}\n{PLACEHOLDER}"}
    before, after = render(user, add_generation_prompt=True).split(PLACEHOLDER)
    dialogue = render(user, {"role": "assistant", "content": PLACEHOLDER})
    tail = dialogue.rsplit(PLACEHOLDER, 1)[1].strip()
    end_id = encode(tail)[0] if tail else tokenizer.eos_token_id
    return encode(before), encode(after), end_id


class Collator:
    """Rows of `read_manifest` -> a batch for SpeechLLM.

    With `answers` off, for decoding, it ends with the prompt; there is nothing to be learnt.
    """

    def __init__(self, tokenizer, settings, n_mels: int, max_length=math.inf, answers=True):
        self.encode = partial(tokenizer.encode, add_special_tokens=False)
        self.before, self.after, self.end_id = build_prompt(tokenizer, settings["prompt"])
        self.stride = int(settings["stride"])
        self.n_mels = n_mels
        self.max_length = max_length
        self.answers = answers

    def __call__(self, rows: list[dict]) -> dict[str, Tensor | list[Tensor]]:
        audios = [load_audio(row["_path"]) for row in rows]
        lengths = [math.ceil(len(audio) / SAMPLES_PER_POSITION) for audio in audios]
        # the transcript and the end of its turn: all that has a loss
        answers = [[*self.encode(row["txt"]), self.end_id] if self.answers else [] for row in rows]
        for row, length, answer in zip(rows, lengths, answers):
            size = len(self.before + self.after + answer) + math.ceil(length / self.stride)
            if size > self.max_length:
                got = f"{row['_path']} needs {size} positions with its prompt and transcript, but"
                raise InputError(f"{got} --model_max_length is {self.max_length}: raise it")
        batch = {
            "encoder_lengths": torch.tensor(lengths),  # first, as the Trainer takes B from it
            "mel": [log_mel(audio, self.n_mels) for audio in audios],
            "before": torch.tensor(self.before),
            "after": [torch.tensor(self.after + answer) for answer in answers],
        }
        if self.answers:  # the position before an answer predicts its first token
            labels = [torch.tensor([IGNORE, *answer]) for answer in answers]
            batch["labels"] = pad_sequence(labels, True, IGNORE, "left")
            # a word piece has its space in front, as within a sentence
            batch["transcripts"] = [torch.tensor(self.encode(f" {row['txt']}")) for row in rows]
        return batch
