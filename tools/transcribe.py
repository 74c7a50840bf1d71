"""Print what is said in audio files of any length, or use `transcribe` from Python.

    python -m tools.transcribe --projector_model_path exp/model.safetensors \
        --wav a.wav b.flac folder/

prints `path<TAB>text` for each file, and for each audio file in a folder and the folders in it.
Audio over 30 s is cut where it is quietest, in pieces of at most 10 s, and each of them is
recognised alone. In Python:

    from loading import load
    from tools.transcribe import transcribe

    model = load("exp/model.safetensors")
    print(transcribe(model, ["a.wav", waveform]))

Shapes: S samples, mono at 16 kHz.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from numpy.lib.stride_tricks import sliding_window_view
from transformers.hf_argparser import HfArg
from whisper.audio import N_SAMPLES, SAMPLE_RATE

from arguments import check_positive
from command import InputError, parse_arguments, run_command
from data import check_samples, load_audio
from loading import load
from machine import get_process, has_fast_bf16
from manifest import Utterance, read_duration
from model import SpeechLLM
from recognize import recognize

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf")
PIECE = 10 * SAMPLE_RATE  # samples, at most, of the pieces of audio over 30 s
QUIET = SAMPLE_RATE // 5  # samples over which loudness is measured
GROUP = 1800  # seconds of audio that are in memory at once, if no file is longer


@dataclass
class Arguments:
    """The flags of tools/transcribe.py."""

    projector_model_path: str = HfArg(help="The model.safetensors that train.py wrote.")
    wav: list[str] = HfArg(
        help="Audio files, and folders of them. Audio is decoded one group at a time: files "
        "of half an hour together, whose texts are printed before the next group is read."
    )
    num_beams: int = HfArg(default=3, help="Beam width; 1 is greedy.")
    batch_size: int = HfArg(default=8, help="How many pieces of audio are recognised at once.")
    bf16: bool = HfArg(
        default=has_fast_bf16(),
        help="Whether to compute in bfloat16; by default where that is faster than float32.",
    )
    llm_model_name_or_path: str | None = HfArg(
        default=None, help="Where the LLM is now, if it is not where training found it."
    )
    whisper_model_name_or_path: str | None = HfArg(
        default=None, help="Where the encoder is now, likewise."
    )

    def __post_init__(self):
        check_positive("num_beams", self.num_beams)
        check_positive("batch_size", self.batch_size)


def transcribe(
    model: SpeechLLM,
    audios: list[str | Path | np.ndarray],
    num_beams: int = 3,
    batch_size: int = 8,
) -> list[str]:
    """The text of each audio: a path, or a waveform (S,) of floats, mono at 16 kHz.

    The model is moved to accelerate's device. Several processes share the pieces out, and each
    gets all texts. InputError for what is no audio.
    """
    if isinstance(audios, str | Path):
        raise InputError(f"audios must be a list, got {audios!r}: give [{audios!r}]")
    state = get_process()
    model.to(state.device).eval()
    pieces_by_audio = []
    for index, audio in enumerate(audios):
        name = f"audio {index}"
        if isinstance(audio, str | Path):
            name = str(audio)
            samples = load_audio(name)
        else:
            samples = check_waveform(audio, name)
        pieces = []
        for piece in split(samples):
            pieces.append(Utterance(name, len(piece) / SAMPLE_RATE, samples=piece))
        pieces_by_audio.append(pieces)

    utterances = []
    for pieces in pieces_by_audio:
        utterances.extend(pieces)
    # no data workers, as the samples are in memory already
    for _ in recognize(model, utterances, [num_beams], batch_size, num_workers=0):
        pass  # each batch adds its hypotheses
    texts = []
    for pieces in pieces_by_audio:
        hypotheses = [piece.hypotheses[num_beams] for piece in pieces]
        texts.append(" ".join(text for text in hypotheses if text))
    return texts


def check_waveform(audio, name: str) -> np.ndarray:
    """A waveform (S,) as contiguous float32; InputError if it is no mono audio of floats."""
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu().numpy()
    samples = np.asarray(audio)
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise InputError(
            f"{name} must be a path or one row of floats, mono at 16 kHz, got {samples.dtype} of "
            f"shape {samples.shape}: take the mean of channels, divide 16-bit integers by 32768"
        )
    samples = np.ascontiguousarray(samples, np.float32)
    check_samples(samples, name)
    return samples


def split(samples: np.ndarray) -> Iterator[np.ndarray]:
    """Audio (S,) as it is up to 30 s, and otherwise in pieces of at most `PIECE`.

    Each cut is in the quietest 0.2 s of the piece's second half. Nothing is lost: the pieces,
    joined, are the audio.
    """
    longest = N_SAMPLES
    half, step = PIECE // 2, QUIET // 2
    while len(samples) > longest:
        longest = PIECE
        windows = sliding_window_view(samples[half:PIECE] ** 2, QUIET)[::step]
        quietest = int(windows.sum(axis=1).argmin())
        end = half + quietest * step + step  # the middle of the quietest window
        yield samples[:end]
        samples = samples[end:]
    yield samples


def list_files(paths: list[str]) -> list[str]:
    """The audio files among the paths and, in the order of names, in the folders among them."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if is_audio(file)]
            if not found:
                raise InputError(f"--wav: no audio in {path}; wanted {', '.join(SUFFIXES)}")
            files.extend(found)
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"--wav: no such file or folder: {path}")
    return [str(file) for file in files]


def is_audio(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def make_groups(files: list[str]) -> list[list[str]]:
    """Files in order, in groups of at most `GROUP` seconds or of one file."""
    groups, room = [], 0.0
    for file in files:
        duration = read_duration(Path(file))
        if duration > room:
            groups.append([])
            room = GROUP
        groups[-1].append(file)
        room -= duration
    return groups


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    groups = make_groups(list_files(args.wav))
    model = load(
        args.projector_model_path,
        args.llm_model_name_or_path,
        args.whisper_model_name_or_path,
        args.bf16,
    )
    state = PartialState()
    for group in groups:
        texts = transcribe(model, group, args.num_beams, args.batch_size)
        for file, text in zip(group, texts):
            state.print(f"{file}\t{text}", flush=True)
    state.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
