"""Make manifests of corpora as they are published.

    python -m tools.prepare --corpus librispeech --folder LibriSpeech --part train-clean-100 \
        --manifest train.jsonl
    python -m tools.prepare --corpus aishell --folder data_aishell --part train \
        --manifest train.jsonl
    python -m tools.prepare --corpus kaldi --folder data/train --manifest train.jsonl

LibriSpeech has SPEAKER/CHAPTER/*.flac with a *.trans.txt beside them; AISHELL-1 has
wav/{train,dev,test}/SPEAKER/*.wav and transcript/aishell_transcript_v0.8.txt; a Kaldi folder has
wav.scp and text, of which plain files are read, not commands or segments. Paths in the manifest
are absolute. LibriSpeech's UPPER CASE becomes lower case, as the LLM has many short tokens for
the other. Files without text are counted, and texts alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from command import InputError, parse_arguments, run_command


@dataclass
class Arguments:
    """The flags of tools/prepare.py."""

    corpus: Literal["librispeech", "aishell", "kaldi"] = HfArg(help="How the folder is laid out.")
    folder: Path = HfArg(help="Where the corpus is.")
    manifest: Path = HfArg(help="The JSONL to write.")
    part: str | None = HfArg(
        default=None, help="AISHELL-1's train, dev or test; of others a folder in --folder."
    )
    lower_case: bool = HfArg(
        default=False, help="Make all texts lower case, as LibriSpeech's always are."
    )

    def __post_init__(self):
        if self.corpus == "aishell" and self.part is None:
            raise InputError("--corpus aishell needs --part: train, dev or test")
        if self.corpus != "aishell" and self.part is not None:
            self.folder = self.folder / self.part
        if not self.folder.is_dir():
            raise InputError(f"--folder: no such folder: {self.folder}")


def read_pairs(path: Path) -> dict[str, str]:
    """The lines of a file, `KEY something`, by their keys; lines with a key alone are left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; is --corpus right?") from error
    pairs = {}
    for line in text.split("\n"):
        fields = line.split(maxsplit=1)
        if len(fields) == 2:
            key, value = fields
            pairs[key] = value.strip()
    return pairs


def read_librispeech(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Audio and texts, by utterance."""
    texts = {}
    for path in folder.rglob("*.trans.txt"):
        for key, text in read_pairs(path).items():
            texts[key] = text.lower()
    return {path.stem: path for path in folder.rglob("*.flac")}, texts


def read_aishell(folder: Path, part: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Audio and texts of a part, by utterance; the texts lose the spaces between their words."""
    audio = {path.stem: path for path in (folder / "wav" / part).rglob("*.wav")}
    texts = {}
    for key, text in read_pairs(folder / "transcript" / "aishell_transcript_v0.8.txt").items():
        if key in audio:
            texts[key] = "".join(text.split())
    return audio, texts


def read_kaldi(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Audio and texts, by utterance; a path is relative to where the command runs, as in Kaldi."""
    segments = folder / "segments"
    if segments.exists():
        raise InputError(f"{segments}: parts of files are not read: cut the audio first")
    audio = {}
    for key, path in read_pairs(folder / "wav.scp").items():
        if path.endswith("|"):
            scp = folder / "wav.scp"
            raise InputError(f"{scp}: {key} has a command, not a file: run it first: {path}")
        if Path(path).is_file():
            audio[key] = Path(path)
    return audio, read_pairs(folder / "text")


def write_manifest(audio: dict[str, Path], texts: dict[str, str], path: Path) -> None:
    """The manifest of utterances that have both, in the order of their keys."""
    both = sorted(audio.keys() & texts.keys())
    if not both:
        counts = f"{len(audio)} audio files, {len(texts)} texts"
        raise InputError(
            f"no utterance has audio and text ({counts}): is --corpus right, and is all unpacked?"
        )
    lines = []
    for key in both:
        row = {"wav": str(audio[key].resolve()), "txt": texts[key], "key": key}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--manifest: cannot write {path}: {error.strerror}") from error
    without_text = len(audio) - len(both)
    without_audio = len(texts) - len(both)
    print(
        f"{path}: {len(both)} utterances; {without_text} files without text, "
        f"{without_audio} texts without audio"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    if args.corpus == "librispeech":
        audio, texts = read_librispeech(args.folder)
    elif args.corpus == "aishell":
        audio, texts = read_aishell(args.folder, args.part)
    else:
        audio, texts = read_kaldi(args.folder)
    if args.lower_case:
        texts = {key: text.lower() for key, text in texts.items()}
    write_manifest(audio, texts, args.manifest)


if __name__ == "__main__":
    run_command(main)
