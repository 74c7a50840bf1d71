"""Sound files: their samples, of the whole file or of a part, and their durations.

Shapes: S samples.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from whisper.audio import SAMPLE_RATE

from command import InputError

UNKNOWN = 2**63 - 1  # libsndfile's number of frames where the header of a FLAC has none
LONGEST = 1e8  # seconds that a header or a manifest is believed
BLOCK = 2**20  # frames that are read at once where their number is unknown
OVERSHOOT = 0.5  # seconds that a part may end after its file, as in Kaldi's extract-segments


class Stream(soundfile.SoundFile):
    """A file that is read from its start on: without its length, seeking fails in libsndfile."""

    def seekable(self) -> bool:
        return False


def load_audio(path: str, start: float = 0.0, end: float | None = None) -> np.ndarray:
    """Any file that libsndfile reads (wav, flac, ogg, opus, mp3) -> (S,) float32, mono, 16 kHz.

    Of a part, from `start` to `end` in seconds, no more is decoded than needed. InputError for what
    is no audio, and for a part that is not in its file.
    """
    if not os.path.isfile(path):
        raise InputError(f"no such audio file: {path}")
    try:
        frames, rate = read_frames(path, start, end)
    except (RuntimeError, MemoryError, TypeError, ValueError) as error:  # a false size; .raw
        raise InputError(f"{path} cannot be decoded as audio: {error}") from error
    if end is not None:
        check_part(path, start, end, start + len(frames) / rate)
    audio = soxr.resample(frames.mean(axis=1), rate, SAMPLE_RATE)
    check_samples(audio, name_part(path, start, end))
    return audio


def read_frames(path: str, start: float, end: float | None) -> tuple[np.ndarray, int]:
    """Frames (S, channels) as they are in the file, and how many there are in a second."""
    with soundfile.SoundFile(os.fsencode(path)) as file:
        rate = file.samplerate
        first = round(start * rate)
        count = -1  # all
        if end is not None:
            count = round(end * rate) - first
        if file.frames != UNKNOWN:
            file.seek(min(first, file.frames))
            return file.read(count, dtype="float32", always_2d=True), rate
    frames = np.concatenate(list(read_blocks(path)))[first:]
    if count >= 0:
        frames = frames[:count]
    return frames, rate


def read_blocks(path: str) -> Iterator[np.ndarray]:
    """Frames (at most `BLOCK`, channels), to the end of a file whose length is unknown."""
    with Stream(os.fsencode(path)) as file:
        block = file.read(BLOCK, dtype="float32", always_2d=True)
        yield block
        while len(block) == BLOCK:
            block = file.read(BLOCK, dtype="float32", always_2d=True)
            yield block


def name_part(path: str, start: float, end: float | None) -> str:
    """The file, and which part of it, for messages."""
    if end is None and start == 0:
        return path
    return f"{path} from {start:.2f} s"


def check_part(path: str, start: float, end: float, file_end: float) -> None:
    """InputError if a part starts or ends after its file."""
    if start >= file_end:
        raise InputError(f"{path} ends before this part, at {start:.2f} s, starts")
    if end > file_end + OVERSHOOT:
        raise InputError(f"{path} ends before {end:.2f} s: its part from {start:.2f} s is too long")


def check_samples(audio: np.ndarray, name: str) -> None:
    """InputError if there are none, or some are NaN or infinite."""
    if len(audio) == 0:
        raise InputError(f"{name} holds no samples")
    if not np.isfinite(audio).all():
        raise InputError(f"{name} holds samples that are no numbers (NaN or infinite)")


def read_header(path: str | Path) -> float | None:
    """Seconds of audio by the header of a file; None if that does not tell."""
    try:
        header = soundfile.info(os.fsencode(path))
    except (RuntimeError, TypeError) as error:  # libsndfile's, and that of .raw
        raise InputError(f"{path} cannot be read as audio: {error}") from error
    if header.frames == UNKNOWN:
        return None
    if not 0 < header.duration < LONGEST:
        raise InputError(f"{path} has {header.duration} s of audio by its header; wanted some")
    return header.duration


def read_duration(path: str | Path) -> float:
    """Seconds of audio; the file is decoded only if its header does not tell."""
    duration = read_header(path)
    if duration is not None:
        return duration
    try:
        frames = sum(len(block) for block in read_blocks(str(path)))
    except RuntimeError as error:
        raise InputError(f"{path} cannot be decoded as audio: {error}") from error
    if frames == 0:
        raise InputError(f"{path} holds no samples")
    return frames / soundfile.info(os.fsencode(path)).samplerate
