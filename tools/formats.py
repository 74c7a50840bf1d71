"""Transcripts, and how they are written: txt, jsonl, srt, vtt."""

import html
import json
import re
from dataclasses import asdict, dataclass

from whisper.utils import format_timestamp

from words import SCRIPT

FORMATS = ("txt", "jsonl", "srt", "vtt")
CUE_LENGTH = 84  # characters of a subtitle at most, two lines of 42; only words with times are cut
PAUSE = 1.0  # seconds without a word after which a subtitle ends
# a space that Chinese and Japanese do not have, also behind their full stop and comma
NO_GAP = re.compile(rf"(?<=[{SCRIPT}\u3000-\u303f\uff00-\uff60]) (?=[{SCRIPT}])")


@dataclass
class Segment:
    """A piece of audio with what is said in it; `words` are words.py's, or none."""

    start: float  # seconds from the start of the audio
    end: float
    text: str
    words: list[dict]


@dataclass
class Transcript:
    """What is said in an audio."""

    name: str
    segments: list[Segment]

    @property
    def duration(self) -> float:
        return self.segments[-1].end

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.text)

    @property
    def words(self) -> list[dict]:
        words = []
        for segment in self.segments:
            words.extend(segment.words)
        return words


def format_transcript(transcript: Transcript, kind: str) -> str:
    """A transcript in one of the `FORMATS`, with its last line break."""
    if kind == "txt":
        return f"{transcript.text}\n"
    if kind == "jsonl":
        row = {"wav": transcript.name, "duration": transcript.duration, "hyp": transcript.text}
        row["segments"] = [describe_segment(segment) for segment in transcript.segments]
        return json.dumps(row, ensure_ascii=False) + "\n"
    blocks = []
    for number, (start, end, text) in enumerate(list_cues(transcript), start=1):
        text = text.replace("-->", "->")  # which a player would read as times
        point = "." if kind == "vtt" else ","
        first, last = (format_timestamp(x, True, point) for x in (start, end))
        times = f"{first} --> {last}"
        if kind == "vtt":
            text = html.escape(text, quote=False)
            blocks.append(f"{times}\n{text}\n")
        else:
            blocks.append(f"{number}\n{times}\n{text}\n")
    if kind == "vtt":
        blocks.insert(0, "WEBVTT\n")
    return "\n".join(blocks)


def describe_segment(segment: Segment) -> dict:
    """A segment as JSON has it: without `words` where none have times."""
    row = asdict(segment)
    if not segment.words:
        del row["words"]
    return row


def list_cues(transcript: Transcript) -> list[tuple[float, float, str]]:
    """The subtitles, each with its start and end: segments, or parts of them that words allow."""
    cues = []
    for segment in transcript.segments:
        words = segment.words
        if words and words[0].get("aligned", True):
            cues.extend(join_words(words))
        elif segment.text:
            cues.append((segment.start, segment.end, segment.text))
    return cues


def join_words(words: list[dict]) -> list[tuple[float, float, str]]:
    """Words that have times as subtitles of at most `CUE_LENGTH`, with no `PAUSE` within one."""
    cues = []
    for word in words:
        if cues:
            start, end, text = cues[-1]
            joined = NO_GAP.sub("", f"{text} {word['word']}")
            if len(joined) <= CUE_LENGTH and word["start"] - end < PAUSE:
                cues[-1] = (start, word["end"], joined)
                continue
        cues.append((word["start"], word["end"], word["word"]))
    return cues
