"""How far are the word times of CTC from the truth? A synthetic voice, with pauses between.

    python -m experiments.word_times --projector_model_path demo/projector.safetensors

Each recording joins utterances of demo/speech.py's voice, less the silence at their ends, with
pauses. So it is known when the first word of each starts and when its last word ends. The text that
was spoken is aligned to the recording. With --utterance word each utterance is one word, so that
all words are known.
"""

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soxr
import torch
from hibari import SAMPLE_RATE as VOICE_RATE
from hibari import Hibari
from transformers.hf_argparser import HfArg
from whisper.audio import SAMPLE_RATE

from command import parse_arguments, run_command
from demo.speech import sentence
from loading import load
from manifest import Utterance
from model import SpeechLLM
from scoring import format_table
from words import time_words

FRAME = SAMPLE_RATE // 100  # samples over which loudness is measured
QUIET = 1e-3  # of the loudest frame's energy: 30 dB below it


@dataclass
class Arguments:
    projector_model_path: str = HfArg(help="The model.safetensors that train.py wrote.")
    recordings: int = HfArg(default=20, help="How many are made.")
    utterances: int = HfArg(default=3, help="How many of them each joins.")
    utterance: Literal["sentence", "word"] = HfArg(default="sentence", help="What is spoken alone.")


def trim(samples: np.ndarray) -> np.ndarray:
    """Audio (S,) from its first frame that is not quiet to its last."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    energy = np.square(frames).sum(axis=1)
    loud = np.flatnonzero(energy > QUIET * energy.max())
    return samples[loud[0] * FRAME : (loud[-1] + 1) * FRAME]


def make_recording(
    voice: Hibari, texts: list[str], rng: random.Random
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Audio (S,), and of each text the seconds at which it starts and ends."""
    parts, times, size = [], [], 0
    for text in texts:
        pause = np.zeros(int(rng.uniform(0.2, 0.8) * SAMPLE_RATE), np.float32)
        spoken = voice(text, seed=rng.randrange(1000))
        speech = trim(soxr.resample(spoken, VOICE_RATE, SAMPLE_RATE))
        start = size + len(pause)
        size = start + len(speech)
        parts += [pause, speech]
        times.append((start / SAMPLE_RATE, size / SAMPLE_RATE))
    return np.concatenate(parts), times


@torch.inference_mode()
def align(model: SpeechLLM, samples: np.ndarray, text: str) -> list[dict]:
    """The words of a text that is spoken in audio (S,)."""
    utterance = Utterance("", len(samples) / SAMPLE_RATE, samples=samples)
    batch = model.collator()([utterance])
    [audio] = model.embed_audio(batch["mel"], batch["lengths"])
    return time_words(model, audio, batch["mel"][0], text)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    rng = random.Random(0)
    voice = Hibari()
    model = load(args.projector_model_path).eval()
    starts, ends = [], []
    for _ in range(args.recordings):
        texts = [sentence(rng) for _ in range(args.utterances)]
        if args.utterance == "word":
            texts = " ".join(texts).split()
        samples, times = make_recording(voice, texts, rng)
        words = iter(align(model, samples, " ".join(texts)))
        for text, (start, end) in zip(texts, times):
            own = [next(words) for _ in text.split()]
            starts.append(own[0]["start"] - start)
            ends.append(own[-1]["end"] - end)
    rows = []
    for name, errors in (("start", starts), ("end", ends)):
        distances = 1000 * np.abs(errors)
        rows.append(
            {
                "boundary": name,
                "number": len(errors),
                "median error, ms": round(np.median(distances)),
                "nine in ten are below, ms": round(np.quantile(distances, 0.9)),
                "median of later - earlier, ms": round(1000 * np.median(errors)),
            }
        )
    print(format_table(rows))


if __name__ == "__main__":
    run_command(main)
