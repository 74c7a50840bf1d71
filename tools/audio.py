"""Sound as people have it: files and folders, what libsndfile or ffmpeg reads, audio of any length.

Shapes: S samples, mono at 16 kHz.
"""

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from numpy.lib.stride_tricks import sliding_window_view
from whisper.audio import N_SAMPLES, SAMPLE_RATE

from command import InputError
from manifest import Utterance
from sound import check_samples, load_audio, read_duration, read_header

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf")
# what ffmpeg is asked for; a playlist among them would make it open other files
FFMPEG_SUFFIXES = (".m4a", ".mp4", ".mov", ".3gp", ".aac", ".webm", ".mkv", ".mka", ".wma", ".amr")
FFMPEG_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,aac,matroska,webm,asf,amr,mp3,ogg,flac,wav"
STANDARD_INPUT = "-"
PIECE = 10 * SAMPLE_RATE  # samples, at most, of the pieces of audio over 30 s
QUIET = SAMPLE_RATE // 5  # samples over which loudness is measured


def list_files(paths: list[str]) -> list[str]:
    """The audio files among the paths and, in the order of names, in the folders among them.

    What is hidden in a folder is left out. "-", standard input, stays.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [x for x in sorted(path.rglob("*")) if is_audio(x) and not is_hidden(x, path)]
            if not found:
                suffixes = ", ".join(SUFFIXES + FFMPEG_SUFFIXES)
                raise InputError(f"--wav: no audio in {path}; wanted {suffixes}")
            files.extend(found)
        elif str(path) == STANDARD_INPUT or path.is_file():
            files.append(path)
        else:
            raise InputError(f"--wav: no such file or folder: {path}")
    return [str(file) for file in files]


def is_audio(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES + FFMPEG_SUFFIXES and path.is_file()


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether it is what a system keeps beside the files in a folder: it may look like audio.

    macOS has ._a.wav and __MACOSX, Synology @eaDir, Windows $RECYCLE.BIN.
    """
    parts = file.relative_to(folder).parts
    return any(part.startswith((".", "@", "$", "__MACOSX")) for part in parts)


def read_audio(path: str, max_seconds: float = math.inf) -> np.ndarray:
    """A file's audio (S,), by libsndfile, or by ffmpeg where libsndfile does not know the format.

    InputError for what neither reads, and says so where ffmpeg is not installed; and for audio that
    is longer than `max_seconds`.
    """
    if max_seconds < math.inf:
        check_length(guess_duration(path, read_duration), max_seconds, path)
    try:
        return load_audio(path)
    except InputError as error:
        if is_known(path):
            raise
        return convert(path, error, max_seconds)


def check_length(seconds: float, max_seconds: float, name: str) -> None:
    if seconds > max_seconds:
        wanted = f"at most {max_seconds / 60:.3g} are taken"
        raise InputError(f"{name} has {seconds / 60:.3g} minutes of audio, {wanted}: cut it")


def read_stream(stream: BinaryIO, name: str, max_seconds: float = math.inf) -> np.ndarray:
    """The audio (S,) of a file's content; errors call it by its name."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "audio")
        with path.open("wb") as file:
            shutil.copyfileobj(stream, file)
        try:
            return read_audio(str(path), max_seconds)
        except InputError as error:
            raise InputError(str(error).replace(str(path), name)) from None


def is_known(path: str) -> bool:
    """Whether libsndfile knows the format, or there is no file."""
    try:
        soundfile.info(os.fsencode(path))
    except (RuntimeError, TypeError):  # libsndfile's, and that of .raw
        return not Path(path).is_file()
    return True


def guess_duration(path: str, measure: Callable[[str], float | None] = read_header) -> float:
    """Seconds of audio by the header of a file, or by another measure; 0 where that tells none."""
    try:
        return measure(path) or 0.0
    except InputError:
        return 0.0


def convert(path: str, reason: InputError, max_seconds: float) -> np.ndarray:
    """A file's audio (S,) by ffmpeg, which libsndfile does not read for a `reason`."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise InputError(f"{reason} Install ffmpeg to read m4a, webm, wma and others.")
    command = [program, "-nostdin", "-v", "error", "-format_whitelist", FFMPEG_FORMATS]
    # with file: no name is taken for another protocol
    command += ["-i", f"file:{path}", "-vn"]
    if max_seconds < math.inf:
        command += ["-t", str(max_seconds + 1)]  # seconds, not all of what is too long
    command += ["-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "f32le", "-"]
    done = subprocess.run(command, capture_output=True)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason"]
        raise InputError(f"{path} cannot be decoded as audio, nor by ffmpeg: {lines[-1]}")
    samples = np.frombuffer(done.stdout, np.float32).copy()
    check_length(len(samples) / SAMPLE_RATE, max_seconds, path)
    check_samples(samples, path)
    return samples


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


def make_pieces(samples: np.ndarray, name: str) -> list[Utterance]:
    """The pieces of an audio (S,), in order."""
    pieces = []
    for piece in split(samples):
        pieces.append(Utterance(name, len(piece) / SAMPLE_RATE, samples=piece))
    return pieces


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
