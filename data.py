"""From a manifest to padded batches: JSONL lines, audio, log-mel, prompt and labels.

A manifest is JSONL, `{"wav": "a.flac", "txt": "what is said"}` a line; other keys are kept.
Shapes: B utterances, S samples, W windows of 30 s, M mel bins, F = 3000 frames a window, E encoder
positions (50 a second), A audio positions (E / stride), T tokens.
"""

import json
import math
from pathlib import Path

import soundfile
import soxr
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from whisper import log_mel_spectrogram, pad_or_trim
from whisper.audio import HOP_LENGTH, N_FRAMES, N_SAMPLES, SAMPLE_RATE

from model import IGNORE, InputError

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
    """Audio (S,) -> log-mel of as many 30 s windows as it fills, the last padded: (W, M, F)."""
    windows = math.ceil(len(audio) / N_SAMPLES)
    mel = log_mel_spectrogram(pad_or_trim(audio, windows * N_SAMPLES), n_mels)  # (M, W * F)
    return mel.unflatten(1, (windows, N_FRAMES)).transpose(0, 1)  # (W, M, F)


def build_prompt(tokenizer, prompt: str) -> tuple[list[int], list[int], int]:
    """Token ids before the audio and after it, and the token that ends the answer.

    The audio, then `prompt`, are the user's turn in the tokenizer's chat template. A tokenizer
    without one gets its own start of text, audio, newline, prompt, newline, and answers end in EOS.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def render(*messages: dict, **options) -> str:
        # Qwen3 must not think aloud, and Llama 3's system turn must not change from day to day
        fixed = {"tokenize": False, "enable_thinking": False, "date_string": "26 Jul 2024"}
        return tokenizer.apply_chat_template(list(messages), **fixed, **options)

    if not tokenizer.chat_template:
        return tokenizer.encode(""), encode(f"\n{prompt}\n"), tokenizer.eos_token_id
    user = {"role": "user", "content": f"{PLACEHOLDER}\n{prompt}"}
    before, after = render(user, add_generation_prompt=True).split(PLACEHOLDER)
    dialogue = render(user, {"role": "assistant", "content": PLACEHOLDER})
    tail = dialogue.rsplit(PLACEHOLDER, 1)[1].strip()
    end_id = encode(tail)[0] if tail else tokenizer.eos_token_id
    return encode(before), encode(after), end_id


class Collator:
    """Rows of `read_manifest` -> a batch for SpeechLLM, padded on the left.

    With `answers` off, for decoding, a sequence ends with the prompt and there are no labels.
    """

    def __init__(self, tokenizer, settings, n_mels: int, max_length=math.inf, answers=True):
        self.tokenizer = tokenizer
        self.before, self.after, self.end_id = build_prompt(tokenizer, settings["prompt"])
        self.stride = int(settings["stride"])
        self.n_mels = n_mels
        self.max_length = max_length
        self.answers = answers

    def sequence(self, row: dict, encoder_length: int) -> dict[str, Tensor]:
        """Ids, masks and labels (T,) of one utterance; all but the ids follow from lengths."""
        n_audio = math.ceil(encoder_length / self.stride)
        answer = []
        if self.answers:  # the transcript and the end of its turn: all that has a loss
            answer = [*self.tokenizer.encode(row["txt"], add_special_tokens=False), self.end_id]
        ids = [*self.before, *[self.end_id] * n_audio, *self.after, *answer]  # audio has any id
        if len(ids) > self.max_length:
            got = f"{row['_path']} needs {len(ids)} positions with its prompt and transcript, but"
            raise InputError(f"{got} --model_max_length is {self.max_length}: raise it")
        places = torch.arange(len(ids))
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.long),
            "audio_mask": (places >= len(self.before)) & (places < len(self.before) + n_audio),
            "labels": torch.tensor([IGNORE] * (len(ids) - len(answer)) + answer),
        }

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        audios = [load_audio(row["_path"]) for row in rows]
        lengths = [math.ceil(len(audio) / SAMPLES_PER_POSITION) for audio in audios]
        sequences = [self.sequence(row, length) for row, length in zip(rows, lengths)]
        padding = {"input_ids": self.end_id, "attention_mask": 0, "audio_mask": False}
        if self.answers:
            padding["labels"] = IGNORE
        batch = {}
        for key, value in padding.items():  # each (B, T)
            batch[key] = pad_sequence([x[key] for x in sequences], True, value, "left")
        batch["mel"] = torch.cat([log_mel(audio, self.n_mels) for audio in audios])  # (W, M, F)
        batch["encoder_lengths"] = torch.tensor(lengths)  # (B,)
        return batch
