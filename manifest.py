"""Manifests: JSONL, `{"wav": "a.flac", "txt": "what is said"}` a line; other keys are kept."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from command import InputError

SHOWN_ERRORS = 10  # bad lines that are named; all are counted
LONGEST = 1e8  # seconds that a manifest is believed


@dataclass
class Utterance:
    """A line of a manifest, or audio from elsewhere, and what is recognised in it."""

    path: str
    duration: float  # seconds
    text: str | None = None  # what is said, where that is known
    row: dict = field(default_factory=dict)  # the manifest's line
    samples: np.ndarray | None = None  # (S,), mono at 16 kHz, in place of the file
    hypotheses: dict[int, str] = field(default_factory=dict)  # by the width of the beam
    words: dict[int, list[dict]] = field(default_factory=dict)  # likewise, with their times
    start: float = 0.0  # seconds into the file
    end: float | None = None  # likewise; None is the file's end


def read_manifest(paths: list[str], need_text: bool = True) -> list[Utterance]:
    """The utterances of all manifests, in order; a relative `wav` is relative to its manifest.

    InputError counts the bad lines, and names the first ten by file and line.
    """
    utterances, errors = [], []
    for path in paths:
        for number, line in read_lines(path):
            try:
                utterances.append(parse_line(line, Path(path).parent, need_text))
            except InputError as error:
                errors.append(f"{path}:{number}: {error}")
    names = ", ".join(paths)
    if errors:
        shown = "\n".join(errors[:SHOWN_ERRORS])
        counts = f"bad lines: {len(errors)}, good lines: {len(utterances)}"
        raise InputError(f"{names}: {counts}\n{shown}")
    if not utterances:
        raise InputError(f"{names}: no utterances; wanted a JSON object a line")
    return utterances


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def parse_line(line: bytes, folder: Path, need_text: bool) -> Utterance:
    """The utterance of a manifest's line; InputError says what is wrong with it."""
    row = parse_json_object(line)
    wav = row.get("wav")
    if not isinstance(wav, str):
        raise InputError(f'"wav" must be the path of an audio file, got {show(wav)}')
    path = folder / wav
    if not os.path.isfile(path):  # unlike Path's, it takes names that are too long
        raise InputError(f'"wav" names no file: {str(path)[:200]}')
    text = row.get("txt")
    if need_text or text is not None:
        check_text(text, need_text)
    start, end = read_part(row)
    duration = row.get("duration")
    if end is not None:
        duration = end - start
    elif duration is None:
        duration = read_duration(path)
    else:
        check_duration(duration)
    seconds = max(round(duration, 2), 0.01)
    return Utterance(str(path), seconds, text, row, start=start, end=end)


def read_part(row: dict) -> tuple[float, float | None]:
    """From where to where a line's part of its file goes, in seconds; (0.0, None) is all of it.

    `start` and `end` are WeNet's and Kaldi's keys, `offset` beside `duration` is NeMo's.
    """
    start, end = row.get("start"), row.get("end")
    wanted = '"start" and "end" must be seconds, and the end after the start'
    if start is None and end is None:
        start = row.get("offset")
        if start is None:
            return 0.0, None
        wanted = '"offset" and "duration" must be seconds'
        end = row.get("duration")
        if is_number(start) and is_number(end):
            end = start + end
    if not is_number(start) or not is_number(end) or not 0 <= start < end < LONGEST:
        raise InputError(f"{wanted}, got {show(start)} and {show(end)}")
    return float(start), float(end)


def is_number(value) -> bool:
    return type(value) in (int, float)


def parse_json_object(line: bytes) -> dict:
    """The object of a line of JSONL."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"not UTF-8: byte {byte:#x} in column {error.start + 1}") from None
    except (ValueError, RecursionError) as error:  # also for a number of 5,000 digits
        start = line.decode("utf-8-sig").strip()[:80]
        raise InputError(f"not JSON: {error}, in: {start}") from None
    if not isinstance(row, dict):
        raise InputError(f"not a JSON object: {show(row)}")
    return row


def show(value) -> str:
    """The start of a value as JSON has it."""
    return json.dumps(value, ensure_ascii=False)[:80]


def check_text(text, need_text: bool) -> None:
    """InputError if `txt` is no text, or empty where it is needed."""
    if not isinstance(text, str):
        raise InputError(f'"txt" must be the text that is said, got {show(text)}')
    if need_text and not text.strip():
        raise InputError('"txt" is empty, but training needs what is said')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = text[error.start].encode("unicode_escape").decode()
        raise InputError(f'"txt" has {code} alone, which is half a character') from None


def check_duration(duration) -> None:
    """InputError if it is no number of seconds that audio may have."""
    if not is_number(duration) or not 0 < duration < LONGEST:
        wanted = '"duration" must be a positive number of seconds'
        raise InputError(f"{wanted}, got {show(duration)}")


def read_duration(path: Path) -> float:
    """Seconds of audio by the header of its file."""
    try:
        duration = soundfile.info(path).duration
    except (RuntimeError, TypeError) as error:  # libsndfile's, and that of .raw
        raise InputError(f"{path} cannot be read as audio: {error}") from error
    if not 0 < duration < LONGEST:
        raise InputError(f"{path} has {duration} s of audio by its header; wanted some")
    return duration
