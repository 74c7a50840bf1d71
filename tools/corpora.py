"""The utterances of corpora, as each community lays them out, for tools/prepare.py.

A reader yields an Entry for all that it finds, also for what cannot be used: that has a `fault`.
"""

import csv
import gzip
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from command import InputError
from manifest import parse_json_object
from tools.audio import SUFFIXES, is_hidden

TEXT_COLUMNS = ("transcription", "transcript", "text", "sentence", "txt")
ROUNDING = 0.05  # seconds by which a rounded time may miss what it stands for
SPEAKER_COLUMNS = ("speaker_id", "speaker", "spk", "client_id")


@dataclass
class Entry:
    """An utterance of a corpus, or what stands in its place."""

    key: str  # its name in the corpus, or else file:line
    path: Path | None = None
    text: str | None = None
    speaker: str | None = None
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None is the end of the file
    fault: str | None = None  # why it cannot be used


def read_corpus(name: str, source: Path, part: str | None) -> list[Entry]:
    """All entries of a corpus; InputError if its folder or its file is not laid out so."""
    if name == "aishell":
        return [*read_aishell(source, part)]
    if name == "common_voice":
        return [*read_common_voice(source, part)]
    if part is not None:
        source = source / part
    if name in LISTS and not source.is_file():
        raise InputError(f"--source: --corpus {name} is one file, and {source} is none")
    if name in TREES and not source.is_dir():
        raise InputError(f"--source: no such folder: {source}")
    if name in LISTS:
        return [*read_list(source, LISTS[name])]
    return [*TREES[name](source)]


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Those that are not hidden, at any depth, in the order of their names."""
    return [path for path in sorted(folder.rglob(pattern)) if not is_hidden(path, folder)]


def read_librispeech(folder: Path) -> Iterator[Entry]:
    """SPEAKER/CHAPTER/*.flac with a *.trans.txt beside them; UPPER CASE becomes lower case.

    An LLM has many more and shorter tokens for upper case.
    """
    texts = {}
    for path in find_files(folder, "*.trans.txt"):
        texts |= read_pairs(path)
    audio = {path.stem: path for path in find_files(folder, "*.flac")}
    for key in sorted(audio.keys() | texts.keys()):
        text = texts.get(key, "").lower()
        yield Entry(key, audio.get(key), text, speaker=key.split("-")[0])


def read_aishell(folder: Path, part: str | None) -> Iterator[Entry]:
    """wav/PART/SPEAKER/*.wav and transcript/*.txt, whose words lose the spaces between them."""
    if part is None:
        raise InputError("--corpus aishell needs --part: train, dev or test")
    texts = read_pairs(folder / "transcript" / "aishell_transcript_v0.8.txt")
    for path in find_files(folder / "wav" / part, "*.wav"):
        text = "".join(texts.get(path.stem, "").split())
        yield Entry(path.stem, path, text, speaker=path.parent.name)


def read_kaldi(folder: Path) -> Iterator[Entry]:
    """wav.scp and text; utt2spk and segments where there are some. Commands are not run."""
    recordings = read_pairs(folder / "wav.scp")
    texts = read_pairs(folder / "text")
    speakers, segments = {}, {}
    if (folder / "utt2spk").exists():
        speakers = read_pairs(folder / "utt2spk")
    if (folder / "segments").exists():
        segments = read_pairs(folder / "segments")
    else:
        segments = {key: f"{key} 0 -1" for key in recordings}
    for key in sorted(segments.keys() | texts.keys()):
        entry = Entry(key, text=texts.get(key), speaker=speakers.get(key))
        if key not in segments:
            entry.fault = "no audio for the text"
        else:
            place_segment(entry, segments[key], recordings)
        yield entry


def place_segment(entry: Entry, segment: str, recordings: dict[str, str]) -> None:
    """Give an entry its audio: `RECORDING START END`, where an end of -1 is that of the file."""
    fields = segment.split()
    if len(fields) == 4:
        entry.fault = "a channel of its own: write it as a file first"
        return
    try:
        recording, start, end = fields
        entry.start, entry.end = float(start), float(end)
    except ValueError:
        entry.fault = "segments has no RECORDING START END"
        return
    if entry.end == -1:
        entry.end = None
    path = recordings.get(recording, "")
    if path.endswith("|"):
        entry.fault = "wav.scp has a command, not a file: run it first"
    elif path:
        entry.path = Path(path)


def read_pairs(path: Path) -> dict[str, str]:
    """The lines of a file, `KEY something`, by their keys."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; is --corpus right?") from error
    pairs = {}
    for line in text.split("\n"):
        key, _, value = line.replace("\t", " ").strip().partition(" ")
        if key:
            pairs[key] = value.strip()
    return pairs


def read_common_voice(folder: Path, part: str | None) -> Iterator[Entry]:
    """PART.tsv and the clips that it names; a client is taken for a speaker."""
    if part is None:
        raise InputError("--corpus common_voice needs --part: train, dev, test or validated")
    # quotation marks are part of a sentence
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    for place, row in read_table(folder / f"{part}.tsv", ["path", "sentence"], **options):
        name = row["path"]
        if not name:
            yield Entry(place, fault="no path")
            continue
        if not name.endswith(".mp3"):  # as the first versions wrote it
            name = f"{name}.mp3"
        text, speaker = row["sentence"], row.get("client_id")
        yield Entry(Path(name).stem, folder / "clips" / name, text, speaker)


def read_audiofolder(folder: Path) -> Iterator[Entry]:
    """Hugging Face's: metadata.csv or metadata.jsonl, whose `file_name` is relative to it."""
    found = False
    for path in find_files(folder, "metadata.csv"):
        found = True
        for place, row in read_table(path, ["file_name"]):
            yield from refuse_faults(parse_audiofolder, row, place, path.parent)
    for path in find_files(folder, "metadata.jsonl"):
        found = True
        yield from read_list(path, parse_audiofolder)
    if not found:
        raise InputError(f"no metadata.csv and no metadata.jsonl in {folder}")


def parse_audiofolder(row: dict, place: str, folder: Path) -> Iterator[Entry]:
    name = get_text(row, "file_name")
    if not name:
        raise InputError("no file_name")
    columns = [column for column in TEXT_COLUMNS if column in row]
    if not columns:
        raise InputError(f"no column of text: wanted is one of {', '.join(TEXT_COLUMNS)}")
    entry = Entry(name, folder / name, get_text(row, columns[0]))
    for column in SPEAKER_COLUMNS:
        entry.speaker = entry.speaker or get_name(row, column)
    yield entry


def read_plain_pairs(folder: Path) -> Iterator[Entry]:
    """a.wav beside a.txt, at any depth; a folder in the folder is taken for a speaker."""
    texts = {path.with_suffix("") for path in find_files(folder, "*.txt")}
    for path in find_files(folder, "*"):
        if path.suffix.lower() not in SUFFIXES:
            continue
        name = path.with_suffix("")
        entry = Entry(str(name.relative_to(folder)), path)
        if name in texts:
            texts.remove(name)
            file = name.with_name(f"{name.name}.txt")
            try:
                entry.text = file.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                entry.fault = f"its text cannot be read ({error.strerror})"
        if path.parent != folder:
            entry.speaker = str(path.parent.relative_to(folder))
        yield entry
    for name in sorted(texts):
        yield Entry(str(name.relative_to(folder)), fault="no audio for the text")


def parse_nemo(row: dict, place: str, folder: Path) -> Iterator[Entry]:
    """NeMo's line: audio_filepath, text, and an offset with a duration for a part of a file."""
    name = get_text(row, "audio_filepath")
    if name is None:
        raise InputError("no audio_filepath")
    start = get_seconds(row, "offset") or 0.0
    end = get_seconds(row, "duration")
    if end is not None:
        end += start
    speaker = get_name(row, "speaker")
    yield Entry(place, find_audio(name, folder), get_text(row, "text"), speaker, start, end)


def parse_wenet(row: dict, place: str, folder: Path) -> Iterator[Entry]:
    """WeNet's and WeST's line: key, wav, txt, and start with end for a part of a file."""
    name = get_text(row, "wav")
    if name is None:
        raise InputError("no wav")
    start, end = get_seconds(row, "start") or 0.0, get_seconds(row, "end")
    entry = Entry(get_text(row, "key") or place, find_audio(name, folder), get_text(row, "txt"))
    entry.speaker = get_name(row, "spk")
    entry.start, entry.end = start, end
    yield entry


def parse_lhotse(row: dict, place: str, folder: Path) -> Iterator[Entry]:
    """The supervisions of lhotse's cut, whose times are relative to it."""
    recording = row.get("recording")
    if not isinstance(recording, dict):
        raise InputError("no cut of one recording (a mix, padding, or features alone)")
    transforms = {transform["name"] for transform in recording.get("transforms") or []}
    if transforms - {"Resample"}:
        raise InputError("a recording with transforms, which lhotse alone computes: save its audio")
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1:
        raise InputError("a recording of several files")
    source = sources[0]
    if source.get("type") != "file":
        raise InputError(f"a recording that is a {source.get('type')}, not a file")
    if len(source.get("channels", [0])) != 1:
        raise InputError("a recording of several channels: write each as a file first")
    if not row.get("supervisions"):
        raise InputError("a cut without supervision")
    path = find_audio(get_text(source, "source"), folder)
    start = get_seconds(row, "start") or 0.0
    end = start + get_seconds(row, "duration")
    for supervision in row["supervisions"]:
        first = start + get_seconds(supervision, "start")
        last = first + get_seconds(supervision, "duration")
        entry = Entry(str(supervision["id"]), path, get_text(supervision, "text"))
        entry.speaker = get_name(supervision, "speaker")
        entry.start, entry.end = max(start, first), min(end, last)
        if first < start - ROUNDING or last > end + ROUNDING:
            entry.fault = "its cut holds a part of the supervision, but all of its text"
        yield entry


def read_list(path: Path, parse: Callable) -> Iterator[Entry]:
    """The entries of JSONL, which may be gzipped, by `parse(row, place, folder)`."""
    for place, line in read_numbered(path):
        try:
            row = parse_json_object(line)
        except InputError as error:
            fault = str(error).split(":")[0]
            if line.strip().endswith(b".tar"):
                fault = "a tar of a shard: unpack it, and read it by --corpus pairs"
            yield Entry(place, fault=fault)
            continue
        yield from refuse_faults(parse, row, place, path.parent)


def read_numbered(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, each behind its file:line."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path.name}:{number}", line
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def read_table(path: Path, needed: list[str], **options) -> Iterator[tuple[str, dict]]:
    """The rows of a file with a line of columns, each behind its file:line."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.DictReader(file, **options)
            missing = set(needed) - set(reader.fieldnames or [])
            if missing:
                raise InputError(f"{path} has no column {', '.join(sorted(missing))}")
            for row in reader:
                yield f"{path.name}:{reader.line_num}", row
    except (OSError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def refuse_faults(parse: Callable, row: dict, place: str, folder: Path) -> Iterator[Entry]:
    """The entries of a row, or one with the fault that keeps it from having any."""
    try:
        yield from parse(row, place, folder)
    except InputError as error:
        yield Entry(place, fault=str(error))
    except (AttributeError, KeyError, TypeError):  # a list for an object, a key that is missing
        yield Entry(place, fault="a line that is not laid out as its format wants")


def find_audio(name: str, folder: Path) -> Path:
    """The file where the command runs, as in Kaldi, WeNet and lhotse, or else beside its list."""
    name = os.path.expanduser(name)
    return Path(name) if os.path.isfile(name) else folder / name


def get_text(row: dict, name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} is no text")
    return value


def get_name(row: dict, name: str) -> str | None:
    """A speaker, whom a number may stand for."""
    value = row.get(name)
    return None if value is None else str(value)


def get_seconds(row: dict, name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(f"{name} is no number of seconds")
    return value


TREES = {
    "librispeech": read_librispeech,
    "kaldi": read_kaldi,
    "audiofolder": read_audiofolder,
    "pairs": read_plain_pairs,
}
LISTS = {"nemo": parse_nemo, "wenet": parse_wenet, "lhotse": parse_lhotse}
