"""Make manifests of corpora as they are published:

    python demo/prepare.py librispeech LibriSpeech/train-clean-100 train.jsonl
    python demo/prepare.py aishell data_aishell train train.jsonl
    python demo/prepare.py kaldi data/train train.jsonl [lower]

LibriSpeech has SPEAKER/CHAPTER/*.flac with a *.trans.txt beside them; AISHELL-1 has
wav/{train,dev,test}/SPEAKER/*.wav and transcript/aishell_transcript_v0.8.txt; a Kaldi folder has
wav.scp and text, of which only plain files are read, not commands or segments. Paths in the
manifest are absolute. LibriSpeech's UPPER CASE becomes lower case, as the LLM has many short tokens
for the other; `lower` does so for a Kaldi folder. Files without text are counted, and texts alone.
"""

import json
import sys
from pathlib import Path

USAGE = "usage: python demo/prepare.py librispeech|aishell|kaldi FOLDER [PART] OUT.jsonl [lower]"


def pairs(path: Path) -> dict[str, str]:
    """The lines of a file, `KEY something`, by their keys."""
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").split("\n")]
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}


def librispeech(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Audio and texts, by utterance."""
    texts = {}
    for path in sorted(folder.rglob("*.trans.txt")):
        texts |= {key: text.lower() for key, text in pairs(path).items()}
    return {path.stem: path for path in sorted(folder.rglob("*.flac"))}, texts


def aishell(folder: Path, part: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Audio and texts, by utterance; the texts lose the spaces between their words."""
    found = {path.stem: path for path in sorted((folder / "wav" / part).rglob("*.wav"))}
    texts = pairs(folder / "transcript" / "aishell_transcript_v0.8.txt")
    return found, {key: "".join(texts[key].split()) for key in texts if key in found}


def kaldi(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Audio and texts, by utterance; a path is relative to where the command runs."""
    if (folder / "segments").exists():
        sys.exit(f"{folder / 'segments'}: parts of files are not read; cut the audio first")
    found = pairs(folder / "wav.scp")
    for key, path in found.items():
        if path.endswith("|"):
            sys.exit(f"{folder / 'wav.scp'}: {key}: a command, not a file: {path}")
    return {key: Path(path) for key, path in found.items()}, pairs(folder / "text")


def write(found: dict[str, Path], texts: dict[str, str], out: Path) -> None:
    """The manifest of what has both, in the order of the keys."""
    found = {key: path for key, path in found.items() if path.is_file()}
    keys = sorted(found.keys() & texts.keys())
    rows = [{"wav": str(found[key].resolve()), "txt": texts[key], "key": key} for key in keys]
    if not rows:
        sys.exit(f"no utterance with audio and text: {len(found)} files, {len(texts)} texts")
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    out.write_text("\n".join([*lines, ""]), encoding="utf-8")
    alone = f"{len(found.keys() - texts.keys())} files without text"
    print(f"{out}: {len(rows)} utterances; {alone}, {len(texts.keys() - found.keys())} texts alone")


def main(kind: str, folder: str, *rest: str) -> None:
    source = Path(folder)
    if not source.is_dir():
        sys.exit(f"{folder}: no such folder")
    try:
        if kind == "librispeech":
            [out] = rest
            found, texts = librispeech(source)
        elif kind == "aishell":
            part, out = rest
            found, texts = aishell(source, part)
        elif kind == "kaldi":
            out, *lower = rest
            found, texts = kaldi(source)
            if lower == ["lower"]:
                texts = {key: text.lower() for key, text in texts.items()}
            elif lower:
                raise ValueError
        else:
            raise ValueError
    except UnicodeDecodeError as error:
        sys.exit(f"{folder}: a text in it is not UTF-8: {error}")
    except ValueError:
        sys.exit(USAGE)
    except OSError as error:
        sys.exit(f"{error}")
    write(found, texts, Path(out))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(USAGE)
    main(*sys.argv[1:])
