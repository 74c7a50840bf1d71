"""Print what is said in audio files of any length, or use `transcribe` from Python.

    python -m tools.transcribe --projector_model_path exp/model.safetensors \
        --wav a.wav b.m4a folder/

prints `path<TAB>text` for each file, and for each audio file in a folder and the folders in it. "-"
is standard input. `--output srt --word_times True --output_dir out` writes subtitles. Audio over
30 s is cut where it is quietest, in pieces of at most 10 s, and each of them is recognised alone.
In Python:

    from loading import load
    from tools.transcribe import transcribe

    model = load("exp/model.safetensors")
    print(transcribe(model, ["a.wav", waveform]))

Shapes: S samples, mono at 16 kHz.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from arguments import check_no_empty, check_positive
from command import InputError, parse_arguments, run_command
from loading import load
from machine import end_processes, get_process, has_fast_bf16
from manifest import Utterance
from model import SpeechLLM
from recognize import recognize
from tools.audio import (
    STANDARD_INPUT,
    check_waveform,
    guess_duration,
    list_files,
    make_pieces,
    read_audio,
    read_stream,
)
from tools.formats import Segment, Transcript, format_transcript

GROUP = 60  # seconds of audio, or one file, that are recognised before their texts are printed


@dataclass(kw_only=True)
class ModelArguments:
    """The flags of every command that recognises audio which is in no manifest."""

    projector_model_path: str = HfArg(
        help="The model.safetensors that train.py wrote, or user/name on the Hub."
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
        check_no_empty(self)
        check_positive("num_beams", self.num_beams)
        check_positive("batch_size", self.batch_size)

    def load_model(self) -> SpeechLLM:
        return load(
            self.projector_model_path,
            self.llm_model_name_or_path,
            self.whisper_model_name_or_path,
            self.bf16,
        )


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    """The flags of tools/transcribe.py."""

    wav: list[str] = HfArg(help="Audio files, folders of them, or - for standard input.")
    output: Literal["txt", "jsonl", "srt", "vtt"] = HfArg(
        default="txt",
        aliases=["--output_format"],
        help="What is printed for each file: its text, a JSON object, or subtitles.",
    )
    output_dir: Path | None = HfArg(
        default=None, help="A folder that gets a file for each audio, in place of printing."
    )
    word_times: bool = HfArg(
        default=False,
        aliases=["--word_timestamps"],
        help="Whether jsonl has the start and end of each word, and subtitles keep to them.",
    )


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
    pieces_by_audio = []
    for index, audio in enumerate(audios):
        if isinstance(audio, str | Path):
            pieces = make_pieces(read_audio(str(audio)), str(audio))
        else:
            name = f"audio {index}"
            pieces = make_pieces(check_waveform(audio, name), name)
        pieces_by_audio.append(pieces)
    for _ in recognize_pieces(model, pieces_by_audio, num_beams, batch_size):
        pass  # each batch adds its hypotheses
    return [make_transcript(pieces, num_beams).text for pieces in pieces_by_audio]


def recognize_pieces(
    model: SpeechLLM,
    pieces_by_audio: list[list[Utterance]],
    num_beams: int,
    batch_size: int,
    word_times: bool = False,
) -> Iterator[list[Utterance]]:
    """Add `hypotheses` to all pieces; yields those of each batch when they have theirs."""
    model.to(get_process().device).eval()
    utterances = []
    for pieces in pieces_by_audio:
        utterances.extend(pieces)
    if not utterances:
        return
    # no data workers, as the samples are in memory already
    options = {"num_workers": 0, "word_times": word_times, "progress": False}
    for done, _ in recognize(model, utterances, [num_beams], batch_size, **options):
        yield done


def make_transcript(pieces: list[Utterance], num_beams: int) -> Transcript:
    """What was recognised in the pieces of an audio."""
    segments, start = [], 0.0
    for piece in pieces:
        words = []
        for word in piece.words[num_beams]:
            times = {name: round(start + word[name], 2) for name in ("start", "end")}
            words.append({**word, **times})
        end = start + piece.duration
        text = piece.hypotheses[num_beams]
        segments.append(Segment(round(start, 2), round(end, 2), text, words))
        start = end
    return Transcript(pieces[0].path, segments)


def read_groups(files: list[str]) -> Iterator[tuple[list[list[Utterance]], list[InputError]]]:
    """The pieces of each file, of so many files as have `GROUP` seconds, and what was no audio."""
    group, errors, seconds = [], [], 0.0
    for file in files:
        try:
            if file == STANDARD_INPUT:
                samples = read_stream(sys.stdin.buffer, "standard input")
            else:
                samples = read_audio(file)
        except InputError as error:
            errors.append(error)
            continue
        pieces = make_pieces(samples, file)
        group.append(pieces)
        seconds += sum(piece.duration for piece in pieces)
        if seconds >= GROUP:
            yield group, errors
            group, errors, seconds = [], [], 0.0
    if group or errors:
        yield group, errors


def choose_paths(files: list[str], kind: str, folder: Path | None) -> dict[str, Path]:
    """Where the transcript of each file goes; nowhere if they are printed.

    InputError if that is one place for two of them.
    """
    if folder is None:
        if kind in ("srt", "vtt") and len(files) > 1:
            raise InputError(
                f"--output {kind} of {len(files)} files would be printed one after the other: "
                "give --output_dir"
            )
        return {}
    paths, taken = {}, {}
    for file in files:
        stem = "stdin" if file == STANDARD_INPUT else Path(file).stem
        path = folder / f"{stem}.{kind}"
        if path in taken:
            raise InputError(
                f"--output_dir: {taken[path]} and {file} would both be written to {path}: give "
                "them to two commands"
            )
        taken[path] = file
        paths[file] = path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir: cannot make {folder}: {error.strerror}") from error
    return paths


def write(transcript: Transcript, kind: str, path: Path | None) -> None:
    """Print a transcript, or write it to a path; InputError where that cannot be written."""
    text = format_transcript(transcript, kind)
    if path is not None:
        try:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise InputError(f"--output_dir: cannot write {path}: {error.strerror}") from error
        return
    if kind == "txt":
        text = f"{transcript.name}\t{text}"
    tqdm.write(text, end="")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    files = list_files(args.wav)
    paths = choose_paths(files, args.output, args.output_dir)
    model = args.load_model()
    state = get_process()
    failed = 0
    seconds = sum(guess_duration(file) for file in files if file != STANDARD_INPUT)
    bar = tqdm(total=round(seconds), unit=" s of audio", disable=not state.is_main_process)
    for group, errors in read_groups(files):
        failed += len(errors)
        if state.is_main_process:
            for error in errors:
                tqdm.write(f"error: {error}", file=sys.stderr)
        options = (args.num_beams, args.batch_size, args.word_times)
        for done in recognize_pieces(model, group, *options):
            bar.update(round(sum(piece.duration for piece in done)))
        if state.is_main_process:
            for pieces in group:
                transcript = make_transcript(pieces, args.num_beams)
                write(transcript, args.output, paths.get(transcript.name))
    bar.close()
    end_processes()
    if failed:
        raise InputError(f"{failed} of {len(files)} files have no transcript; they are named above")


if __name__ == "__main__":
    run_command(main)
