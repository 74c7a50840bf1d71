"""Score results with their hallucinations told apart, after recognition or in the same command:

    python bench/score.py --result_path RESULT.jsonl ... \
        [--metric WER|CER] [--normalizer english|basic|none]
    python bench/score.py recognize.py --projector_model_path ... --num_beams 1 3 5 \
        --result_path RESULT.jsonl [--metric WER|CER] [--normalizer english|basic|none]

The first needs no model; RESULT is what recognize.py or bench/native.py wrote. The second is
recognize.py, whose table then has what the first one's has. Each result has a row in a table: its
error rate over all utterances, "filtered" without those whose hypothesis is a hallucination, and
how many were so dropped; below are these themselves. All lines of RESULT with a transcript
get their own `rate`, and in `hallucination` the reason or null. Without the flags, metric and
normaliser are recognize.py's.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from transformers.hf_argparser import HfArg, HfArgumentParser
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

sys.path.insert(0, str(Path(__file__).parents[1]))

import recognize
from model import run

NORMALIZERS = {"english": EnglishTextNormalizer(), "basic": BasicTextNormalizer(), "none": str}
# what a chat says of audio that it does not hear: it excuses itself, or speaks of audio or itself
REFUSAL = re.compile(
    r"\b(no|any) (speech|audio)\b|\bas an? (ai|language)\b|\b(ai assistant|language model)\b"
    r"|\bi apologi[sz]e,? but\b|\b(i'm|i am) sorry,? but i (cannot|can't)\b"
    r"|\b(cannot|can't|unable to) (listen|transcribe)\b"
)
LOOP = re.compile(r"(.{2,60}?)\1{4}")  # the same 2 to 60 characters five times in a row
FASTEST = 25  # characters a second, of which a fast speaker of English says 20


@dataclass
class Choices:
    metric: Literal["WER", "CER"] | None = HfArg(default=None, help="Default: by the script.")
    normalizer: Literal["english", "basic", "none"] | None = HfArg(default=None, help="Likewise.")


@dataclass(kw_only=True)
class Arguments(Choices):
    result_path: list[str] = HfArg(help="JSONL files with txt and hyp.")


def hallucination(row: dict) -> str | None:
    """Why a row's hypothesis is no transcript of its audio, whatever was said in it."""
    hypothesis = row["hyp"].lower()
    # a second more, as short words are short
    if len(hypothesis) > FASTEST * (row.get("duration", float("inf")) + 1):
        return "more than can be said"
    if LOOP.search(f"{hypothesis} "):
        return "loop"
    return "refusal" if REFUSAL.search(hypothesis) else None


def read(path: str) -> list[dict]:
    """The rows of a result."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        for row in rows:
            if not all(isinstance(x, str) for x in (row["hyp"], row["wav"], row.get("txt", ""))):
                raise ValueError("hyp, wav and txt must be strings")
            if not isinstance(row.get("duration", 0), int | float):
                raise ValueError("duration must be a number")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: wanted JSONL with hyp, as recognize.py writes: {error!r}"
        ) from error
    return rows


def write(rows: list[dict], path: str) -> None:
    """A line for each row, less its keys that begin with _, as recognize.py does."""
    public = [{key: row[key] for key in row if key[0] != "_"} for row in rows]
    lines = [json.dumps(row, ensure_ascii=False) for row in public]
    part = Path(f"{path}.part")
    part.write_text("\n".join([*lines, ""]), encoding="utf-8", errors="replace")
    part.replace(path)


def normalizer(texts: list[str], metric: str | None, name: str | None):
    """The metric, and what makes words of a text: as in recognize.score, or what is asked for."""
    metric = metric or next(iter(recognize.score([{"txt": x, "hyp": ""} for x in texts])))[:3]
    english = metric == "WER" and sum(map(str.isascii, "".join(texts))) > 0.99 * len("".join(texts))
    clean = NORMALIZERS[name or ("english" if english else "basic")]
    # the words of a CER are all characters but spaces
    return metric, clean if metric == "WER" else lambda x: " ".join("".join(clean(x).split()))


def score(rows: list[dict], metric: str | None = None, name: str | None = None) -> dict:
    """The cells by their heads for rows with `txt` and `hyp`, which get `rate`, `hallucination`."""
    metric, norm = normalizer([row["txt"] for row in rows], metric, name)

    def rate(rows: list[dict]) -> str:
        return next(iter(recognize.score(rows, norm).values()))

    for row in rows:
        row |= {"rate": float(rate([row])), "hallucination": hallucination(row)}
    kept = [row for row in rows if not row["hallucination"]]
    (_, total), *edits = recognize.score(rows, norm).items()
    cells = {f"{metric} %": total, **dict(edits)}
    cells[f"{metric} % filtered"] = rate(kept) if kept else "-"
    return cells | {"dropped": len(rows) - len(kept), "utterances": len(rows)}


def dropped(rows: list[dict]) -> list[str]:
    """A line for each hallucination."""
    found = [row for row in rows if row["hallucination"]]
    return [f"{x['wav']}: {x['hallucination']}: {x['txt']} | {x['hyp']}" for x in found]


def show(paths: list[str], metric: str | None = None, name: str | None = None) -> None:
    """Print the table of results, and what was dropped from them."""
    table, below = [], []
    for path in paths:
        rows = read(path)
        scored = [row for row in rows if "txt" in row]
        if not scored:
            raise ValueError(f"{path}: no line has a transcript, txt")
        table.append({"result": path, **score(scored, metric, name)})
        write(rows, path)
        below += [f"{path}: {line}" for line in dropped(scored)]
    first = table[0]
    if any(cells.keys() != first.keys() for cells in table):
        raise ValueError("some results call for WER and some for CER: choose by --metric")
    for cells in [first, ["---"] * len(first), *(cells.values() for cells in table)]:
        print("|", " | ".join(map(str, cells)), "|")
    print(*(f"{line}\n" for line in below), sep="", end="")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or Path(argv[0]).name != "recognize.py":
        [args] = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
        return show(args.result_path, args.metric, args.normalizer)
    [args, others] = HfArgumentParser(Choices).parse_args_into_dataclasses(argv[1:], True)
    below: list[list[str]] = []

    def scored(rows: list[dict]) -> dict:
        cells = score(rows, args.metric, args.normalizer)
        below.append(dropped(rows))
        return cells

    recognize.main(others, scored)
    for i, lines in enumerate(below, 1):
        PartialState().print(*(f"row {i}: {line}\n" for line in lines), sep="", end="")


if __name__ == "__main__":
    run(main)
