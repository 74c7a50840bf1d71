"""Manifests: JSONL, `{"wav": "a.flac", "txt": "what is said"}` a line; other keys are kept."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from command import InputError
from sound import LONGEST, OVERSHOOT, check_part, load_audio, name_part, read_duration, read_header

SHOWN_ERRORS = 10  # bad lines that are named; all are counted
CHECKED = 1000  # files of a manifest that are opened to check its durations


@dataclass
class Utterance:
    """A line of a manifest, or audio from elsewhere, and what is recognised in it."""

    path: str
    duration: float  # seconds
    text: str | None = None  # what is said, where that is known
    row: dict = field(default_factory=dict)  # the manifest's line
    samples: np.ndarray | None = None  # (S,), mono at 16 kHz, in place of the file
    hypotheses: dict[int, str] = field(default_factory=dict)  # by the width of the beam
    start: float = 0.0  # seconds of the file before it
    end: float | None = None  # second of the file at which it ends; None is the file's end
    words: dict[int, list[dict]] = field(default_factory=dict)  # likewise, with their times

    @property
    def name(self) -> str:
        """The file, and which part of it, for messages."""
        return name_part(self.path, self.start, self.end)

    @property
    def claimed(self) -> float | None:
        """Seconds of audio that the file must have by the manifest's line."""
        if self.end is not None:
            return self.end
        if self.start == 0:
            return self.row.get("duration")
        return None

    def load(self) -> np.ndarray:
        """The audio (S,), mono at 16 kHz."""
        if self.samples is not None:
            return self.samples
        return load_audio(self.path, self.start, self.end)


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
    if errors:
        raise_errors(paths, errors, len(utterances))
    if not utterances:
        names = ", ".join(paths)
        raise InputError(f"{names}: no utterances; wanted a JSON object a line")
    check_durations(paths, utterances)
    return utterances


def raise_errors(paths: list[str], errors: list[str], good: int) -> NoReturn:
    """InputError with the number of bad lines, and the first of them."""
    shown = "\n".join(errors[:SHOWN_ERRORS])
    counts = f"bad lines: {len(errors)}, good lines: {good}"
    raise InputError(f"{', '.join(paths)}: {counts}\n{shown}")


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
    start, end = parse_part(row)
    duration = row.get("duration")
    if end is not None:
        duration = end - start
    elif duration is None:
        duration = read_duration(path) - start
        if duration <= 0:
            raise InputError(f"{path} ends before this part, at {start} s, starts")
    utterance = Utterance(str(path), max(round(duration, 2), 0.01), text, row)
    utterance.start, utterance.end = start, end
    return utterance


def parse_part(row: dict) -> tuple[float, float | None]:
    """Where an utterance starts and ends in its file, in seconds; None is the file's end.

    A line has `start` and `end`, as in WeNet, or `offset` and `duration`, as in NeMo, or none.
    InputError if they are no times, or no time is between them.
    """
    duration, end = row.get("duration"), row.get("end")
    if duration is not None:
        check_duration(duration)
    key = "offset" if row.get("start") is None else "start"
    start = row.get(key)
    for name, value in ((key, start), ("end", end)):
        if value is not None:
            check_time(name, value)
    if end is None and start is not None and duration is not None:
        end = start + duration
    if start is None:
        start = 0.0
    if end is not None and end <= start:
        raise InputError(f'"end" must be after "{key}", {show(start)}, got {show(end)}')
    return start, end


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


def check_time(name: str, value) -> None:
    """InputError if it is no place in audio."""
    if type(value) not in (int, float) or not 0 <= value < LONGEST:
        raise InputError(f'"{name}" must be a number of seconds, 0 or more, got {show(value)}')


def check_duration(duration) -> None:
    """InputError if it is no number of seconds that audio may have."""
    if type(duration) not in (int, float) or not 0 < duration < LONGEST:
        wanted = '"duration" must be a positive number of seconds'
        raise InputError(f"{wanted}, got {show(duration)}")


def check_durations(paths: list[str], utterances: list[Utterance]) -> None:
    """InputError names lines whose seconds cannot be those of their files.

    To open all files of a large manifest takes minutes, so at most `CHECKED` are opened: those with
    the fewest and the most bytes for each second that the manifest claims.
    """
    claims = []
    for index, utterance in enumerate(utterances):
        if utterance.claimed is not None:
            bytes_a_second = os.path.getsize(utterance.path) / utterance.claimed
            claims.append((bytes_a_second, index))
    claims.sort()
    if len(claims) > CHECKED:
        claims = claims[: CHECKED // 2] + claims[-CHECKED // 2 :]
    errors = {}
    for _, index in claims:
        try:
            check_claim(utterances[index])
        except InputError as error:
            errors[index] = error
    if errors:
        places = [f"{path}:{number}" for path in paths for number, _ in read_lines(path)]
        named = [f"{places[index]}: {errors[index]}" for index in sorted(errors)]
        raise_errors(paths, named, len(utterances) - len(named))


def check_claim(utterance: Utterance) -> None:
    """InputError if the seconds in a manifest's line cannot be those of the file."""
    header = read_header(utterance.path)
    if header is None:
        return
    if utterance.end is not None:
        check_part(utterance.path, utterance.start, utterance.end, header)
    elif abs(utterance.claimed - header) > OVERSHOOT + 0.1 * header:
        raise InputError(
            f'"duration" is {utterance.claimed} s, but {utterance.path} has {header:.2f} s: give '
            "that, or none"
        )
