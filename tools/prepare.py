"""Make manifests of corpora as they are published; docs/data.md has a line of each.

    python -m tools.prepare --corpus librispeech --source LibriSpeech --part train-clean-100 \
        --manifest train.jsonl
    python -m tools.prepare --corpus nemo --source train_manifest.json --manifest train.jsonl \
        --min_duration 0.5 --max_duration 30 --dev_manifest dev.jsonl

A part of a file gets `start` and `end`, in seconds. Paths are absolute. What cannot be used is
counted and named, and the rest is written.
"""

import json
import os
import random
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from tqdm import tqdm
from transformers.hf_argparser import HfArg

from command import InputError, parse_arguments, run_command
from manifest import SHOWN_ERRORS, check_text
from sound import OVERSHOOT, read_duration
from tools.corpora import ROUNDING, Entry, read_corpus

CORPORA = Literal[
    "librispeech",
    "aishell",
    "kaldi",
    "nemo",
    "wenet",
    "lhotse",
    "common_voice",
    "audiofolder",
    "pairs",
]


@dataclass
class Arguments:
    """The flags of tools/prepare.py."""

    corpus: CORPORA = HfArg(help="How the corpus is laid out.")
    source: Path = HfArg(
        aliases=["--folder"], help="Its folder; of nemo, wenet and lhotse the file."
    )
    manifest: Path = HfArg(help="The JSONL to write.")
    part: str | None = HfArg(
        default=None,
        help="Of aishell and common_voice train, dev or test; of others a folder in --source.",
    )
    lower_case: bool = HfArg(
        default=False, help="Make all texts lower case, as LibriSpeech's always are."
    )
    remove_punctuation: bool = HfArg(
        default=False, help="Leave out punctuation, but that in words and numbers."
    )
    min_duration: float = HfArg(default=0.0, help="Seconds of the shortest utterance.")
    max_duration: float | None = HfArg(default=None, help="Seconds of the longest utterance.")
    dev_manifest: Path | None = HfArg(
        default=None, help="A second JSONL, of speakers who are not in the first."
    )
    dev_share: float = HfArg(default=0.05, help="How much of the audio it gets, about.")

    def __post_init__(self):
        if not 0 < self.dev_share < 1:
            raise InputError(f"--dev_share must be between 0 and 1, got {self.dev_share}")
        paths = [self.source.resolve(), self.manifest.resolve()]
        if self.dev_manifest is not None:
            paths.append(self.dev_manifest.resolve())
        if len(set(paths)) < len(paths):
            raise InputError("--source, --manifest and --dev_manifest must be different files")
        if self.max_duration is not None and self.max_duration <= self.min_duration:
            raise InputError(
                f"--max_duration {self.max_duration} leaves nothing above --min_duration "
                f"{self.min_duration}"
            )


def make_row(entry: Entry, args: Arguments) -> dict:
    """The manifest's line; InputError says why an entry cannot be used."""
    if entry.fault:
        raise InputError(entry.fault)
    if entry.path is None or not os.path.isfile(entry.path):
        raise InputError("no such audio file")
    if not entry.text:
        raise InputError("no text")
    if "\ufffd" in entry.text:
        raise InputError("text is not UTF-8")
    text = change_text(entry.text, args)
    check_text(text, need_text=True)
    row = {"wav": str(entry.path.resolve()), "txt": text, "key": entry.key}
    if entry.speaker:
        row["spk"] = entry.speaker
    elif args.dev_manifest:
        raise InputError("no speaker, but --dev_manifest splits by speaker")
    row |= find_times(entry)
    if row["duration"] < args.min_duration:
        raise InputError(f"shorter than --min_duration {args.min_duration}")
    if args.max_duration is not None and row["duration"] > args.max_duration:
        raise InputError(f"longer than --max_duration {args.max_duration}")
    return row


def find_times(entry: Entry) -> dict[str, float]:
    """Seconds: the duration, and of a part of a file `start` and `end`."""
    length = measure(entry.path)
    end = length if entry.end is None else entry.end
    if end > length + OVERSHOOT:
        raise InputError(f"ends over {OVERSHOOT} s after the end of its file")
    end = min(end, length)
    if not 0 <= entry.start < end:
        raise InputError("start and end have nothing between them in the file")
    times = {"duration": round(end - entry.start, 4)}
    if entry.start > 0 or end < length - ROUNDING:
        times |= {"start": round(entry.start, 4), "end": round(end, 4)}
    return times


@lru_cache(maxsize=10_000)  # segments follow each other in their recording
def measure(path: Path) -> float:
    try:
        return read_duration(path)
    except InputError as error:
        raise InputError("the file cannot be read as audio, or holds none") from error


def change_text(text: str, args: Arguments) -> str:
    """The text on one line, as the flags want it."""
    if args.lower_case:
        text = text.lower()
    if args.remove_punctuation:
        text = remove_punctuation(text)
    return " ".join(text.split())


def remove_punctuation(text: str) -> str:
    """The text with spaces for its punctuation, but that in don't, 3.5 and 10:30."""
    kept = []
    for before, character, after in zip(f" {text}", text, f"{text[1:]} "):
        is_mark = unicodedata.category(character).startswith("P")
        in_word = character in "'’" and before.isalpha() and after.isalpha()
        in_number = before.isdigit() and after.isdigit()
        if is_mark and not in_word and not in_number:
            character = " "
        kept.append(character)
    return "".join(kept)


def split_speakers(rows: list[dict], share: float) -> tuple[list[dict], list[dict]]:
    """Rows of two sets without a speaker in both; the second has about `share` of the audio."""
    seconds = defaultdict(float)
    for row in rows:
        seconds[row["spk"]] += row["duration"]
    if len(seconds) < 2:
        raise InputError("--dev_manifest needs two speakers or more, and there is one")
    speakers = sorted(seconds)
    random.Random(0).shuffle(speakers)
    wanted = share * sum(seconds.values())
    chosen, total = set(), 0.0
    for speaker in speakers[:-1]:
        if total < wanted:
            chosen.add(speaker)
            total += seconds[speaker]
    train = [row for row in rows if row["spk"] not in chosen]
    dev = [row for row in rows if row["spk"] in chosen]
    return train, dev


def write_manifest(rows: list[dict], path: Path) -> None:
    """Write the rows, and print how many, how long, and of how many speakers."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # of a name that is not UTF-8 a byte becomes JSON's \udc.., which read_manifest takes back
        path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"cannot write the manifest {path}: {error.strerror}") from error
    hours = sum(row["duration"] for row in rows) / 3600
    speakers = {row["spk"] for row in rows if "spk" in row}
    count = len(speakers) if speakers else "unknown"
    print(f"{path}: utterances: {len(rows)}, hours: {hours:.2f}, speakers: {count}")


def describe_rejected(rejected: dict[str, list[str]]) -> list[str]:
    """A line for each reason, with the first keys that it has."""
    lines = []
    for reason, keys in sorted(rejected.items()):
        names = ", ".join(keys[:SHOWN_ERRORS])
        if len(keys) > SHOWN_ERRORS:
            names += ", ..."
        lines.append(f"{len(keys)} rejected: {reason} ({names})")
    return lines


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    rows, rejected = [], defaultdict(list)
    for entry in tqdm(read_corpus(args.corpus, args.source, args.part), unit=" utterances"):
        try:
            rows.append(make_row(entry, args))
        except InputError as error:
            rejected[str(error)].append(entry.key)
    reasons = describe_rejected(rejected)
    if not rows:
        found = "; ".join(reasons) or "there is nothing"
        raise InputError(
            f"no utterance of {args.source} has audio and text: {found}; is --corpus right, and "
            "is all unpacked?"
        )
    if args.dev_manifest:
        rows, dev = split_speakers(rows, args.dev_share)
        write_manifest(dev, args.dev_manifest)
    write_manifest(rows, args.manifest)
    for line in reasons:
        print(line)


if __name__ == "__main__":
    run_command(main)
