"""Are words made up where nobody speaks? 60 synthetic sounds without speech.

    python -m experiments.silence --projector_model_path demo/projector.safetensors

Ten each of silence, noise, clicks, tones, breath and chords of plucked strings, of 1 to 15 s. It
prints how many of each kind got words, and what they are.
"""

from dataclasses import dataclass

import numpy as np
from transformers.hf_argparser import HfArg
from whisper.audio import SAMPLE_RATE

from command import parse_arguments, run_command
from loading import load
from scoring import format_table
from tools.transcribe import transcribe

SEED = 0
CLIPS = 10  # of each kind
NOTES = 220 * 2 ** (np.arange(0, 24) / 12)  # Hz, two octaves of semitones


@dataclass
class Arguments:
    projector_model_path: str = HfArg(help="The model.safetensors that train.py wrote.")
    num_beams: int = HfArg(default=5, help="Width of the beam.")


def make_silence(rng, samples: int) -> np.ndarray:
    """Digital silence, or dither as of a sound card."""
    level = rng.choice([0, 1e-5, 1e-4])
    return rng.normal(0, level, samples)


def make_noise(rng, samples: int) -> np.ndarray:
    """Noise with a slope of 0 to 12 dB an octave: a hiss, rain, a fan."""
    spectrum = np.fft.rfft(rng.normal(0, 1, samples))
    frequencies = np.maximum(np.arange(len(spectrum)), 1)
    noise = np.fft.irfft(spectrum / frequencies ** rng.uniform(0, 2), samples)
    return scale(noise, rng.uniform(0.01, 0.3))


def make_clicks(rng, samples: int) -> np.ndarray:
    """Keys or a clock: bursts of 2 to 10 ms, up to 8 a second."""
    clicks = rng.normal(0, 1e-4, samples)
    for start in rng.integers(0, samples, int(samples / SAMPLE_RATE * rng.uniform(1, 8))):
        length = min(rng.integers(SAMPLE_RATE // 500, SAMPLE_RATE // 100), samples - start)
        fade = np.linspace(1, 0, length)
        clicks[start : start + length] += fade * rng.normal(0, 0.2, length)
    return clicks


def make_tones(rng, samples: int) -> np.ndarray:
    """Beeps of one pitch: a telephone, a machine."""
    time = np.arange(samples) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * rng.uniform(100, 3000) * time)
    is_on = np.sin(2 * np.pi * rng.uniform(0.2, 2) * time) > rng.uniform(-1, 0.5)
    return scale(tone * is_on, rng.uniform(0.02, 0.4))


def make_breath(rng, samples: int) -> np.ndarray:
    """Noise of 300 to 3,000 Hz that swells and falls 12 to 20 times a minute."""
    spectrum = np.fft.rfft(rng.normal(0, 1, samples))
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum[(frequencies < 300) | (frequencies > 3000)] = 0
    time = np.arange(samples) / SAMPLE_RATE
    swell = np.sin(np.pi * rng.uniform(12, 20) / 60 * time) ** 2
    return scale(np.fft.irfft(spectrum, samples) * swell, rng.uniform(0.005, 0.1))


def make_music(rng, samples: int) -> np.ndarray:
    """Chords of three plucked notes with overtones, two a second."""
    music = np.zeros(samples)
    for start in range(0, samples, SAMPLE_RATE // 2):
        time = np.arange(samples - start) / SAMPLE_RATE
        for note in rng.choice(NOTES, 3):
            for overtone in range(1, 6):
                fade = np.exp(-3 * overtone * time) / overtone
                music[start:] += fade * np.sin(2 * np.pi * note * overtone * time)
    return scale(music, rng.uniform(0.05, 0.4))


def scale(sound: np.ndarray, peak: float) -> np.ndarray:
    return sound * peak / max(np.abs(sound).max(), 1e-9)


KINDS = {
    "silence": make_silence,
    "noise": make_noise,
    "clicks": make_clicks,
    "tones": make_tones,
    "breath": make_breath,
    "music": make_music,
}


def make_sounds() -> dict[str, list[np.ndarray]]:
    """Sounds (S,) of each kind, the same in every run."""
    rng = np.random.default_rng(SEED)
    sounds = {}
    for kind, make in KINDS.items():
        sounds[kind] = []
        for _ in range(CLIPS):
            samples = int(rng.uniform(1, 15) * SAMPLE_RATE)
            sounds[kind].append(make(rng, samples).astype(np.float32))
    return sounds


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    model = load(args.projector_model_path)
    table = []
    for kind, sounds in make_sounds().items():
        texts = transcribe(model, sounds, args.num_beams)
        words = [text for text in texts if text]
        row = {"sound": kind, "clips": len(texts), "with words": len(words)}
        table.append({**row, "which": "; ".join(words) or "-"})
    print(format_table(table))


if __name__ == "__main__":
    run_command(main)
