"""From utterances to padded batches: log-mel, labels, rows by length.

Shapes: B utterances, S samples, W windows of an utterance, M mel bins, F mel frames of a window
(100 a second), T tokens.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from whisper.audio import N_SAMPLES, N_SAMPLES_PER_TOKEN, SAMPLE_RATE, log_mel_spectrogram

from command import InputError
from manifest import Utterance

IGNORE = -100  # the label of a position without loss, as in transformers and torch
SILENCE = SAMPLE_RATE // 2  # samples; windows under 30 s are multiples of it


def log_mel(audio: np.ndarray, n_mels: int) -> Tensor:
    """Audio (S,) -> log-mel of one window, or of as many of 30 s as it fills: (W, M, F).

    The window is the speech and half a second to a second of silence, not 30 s. Its size follows
    from S alone, in steps of `SILENCE`, so that many windows have the same.
    """
    size = min(N_SAMPLES, (len(audio) // SILENCE + 2) * SILENCE)
    count = -(-len(audio) // size)
    mel = log_mel_spectrogram(audio, n_mels, padding=count * size - len(audio))  # (M, W * F)
    return mel.unflatten(1, (count, -1)).transpose(0, 1)


def by_length(utterances: list[Utterance], size: int, seed: int) -> list[Utterance]:
    """Utterances so that each `size` of them are about as long, in random order of these batches.

    One that comes twice is moved a little, to another batch.
    """
    rng = random.Random(seed)
    ordered = sorted(utterances, key=lambda x: x.duration * rng.uniform(0.95, 1.05))
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    last = [batches.pop()] if len(batches[-1]) < size else []  # a short one stays at the end
    batches.sort(key=lambda _: rng.random())
    mixed = []
    for batch in batches + last:
        mixed.extend(batch)
    return mixed


@dataclass
class Collator:
    """Utterances -> a batch for SpeechLLM; a class, as data workers need to pickle it.

    answers  token ids of each transcript and its end: lists, as to read them from a GPU is a wait
    labels   (B, 1 + T), the answers padded on the left; the first label is IGNORE, as each is
             predicted from the position before
    mel      a log-mel (W, M, F) for each utterance
    lengths  of the audio, in encoder positions (50 a second)
    """

    tokenizer: object
    end_id: int
    n_mels: int
    stride: int
    max_length: float  # most positions of audio and answer
    limit: str  # whose limit that is, and what to do about it

    def __call__(self, utterances: list[Utterance]) -> dict:
        answers, mels, lengths = [], [], []
        for utterance in utterances:
            audio = utterance.load()
            length = -(-len(audio) // N_SAMPLES_PER_TOKEN)
            answer = self.encode_answer(utterance.text or "")
            self.check_length(utterance, length, answer)
            answers.append(answer)
            mels.append(log_mel(audio, self.n_mels))
            lengths.append(length)
        labels = [torch.tensor([IGNORE, *answer]) for answer in answers]
        # the labels first, as the Trainer takes B from the first tensor
        return {
            "labels": pad_sequence(labels, True, IGNORE, padding_side="left"),
            "answers": answers,
            "mel": mels,
            "lengths": lengths,
        }

    def encode_answer(self, text: str) -> list[int]:
        """Token ids and the end. The space makes a word the same tokens wherever it stands."""
        ids = self.tokenizer.encode(f" {text}", add_special_tokens=False)
        return [*ids, self.end_id]

    def check_length(self, utterance: Utterance, length: int, answer: list[int]) -> None:
        positions = -(-length // self.stride) + len(answer)
        if positions > self.max_length:
            raise InputError(
                f"{utterance.name}: audio and transcript take {positions} positions, but at most "
                f"{self.max_length} are allowed by {self.limit}, or cut the audio"
            )
