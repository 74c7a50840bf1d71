"""Draw the error rates that hours.sh measured over the hours of speech that were trained on.

    python -m experiments.hours --folder OUT --output docs/hours.png

OUT is the folder of hours.sh, of which it takes what is there. It prints the same as a table,
and beside each rate those of the shorter and of the longer half of the utterances. Needs
tools/requirements.txt.
"""

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from matplotlib.figure import Figure
from transformers.hf_argparser import HfArg

from command import parse_arguments, run_command
from manifest import read_manifest
from scoring import error_rate, format_table
from tools.plot import DOTS, HEIGHT, WIDTH
from tools.score import read_results

SETS = {"speechocean762": "learners", "cv": "Common Voice", "librispeech": "LibriSpeech"}


@dataclass
class Arguments:
    folder: Path = HfArg(help="OUT of hours.sh.")
    output: Path = HfArg(help="The PNG to write.")


def measure(folder: Path, part: str) -> dict:
    """A row: the hours of a part of the training set, and the WER of each dev set after it."""
    utterances = read_manifest([f"{folder}/{part}.jsonl"])
    hours = sum(utterance.duration for utterance in utterances) / 3600
    row = {"hours": round(hours, 1)}
    for name, title in SETS.items():
        results = read_results(folder / part / f"{name}.jsonl")
        results.sort(key=itemgetter("duration"))
        middle = len(results) // 2
        row[f"{title}, WER %"] = measure_rate(results)
        row[f"{title}, shorter half, WER %"] = measure_rate(results[:middle])
        row[f"{title}, longer half, WER %"] = measure_rate(results[middle:])
    return row


def measure_rate(results: list[dict]) -> float:
    return error_rate(results, "WER", "english")["WER %"]


def draw(rows: list[dict]) -> Figure:
    """A line for each dev set over the hours, which double from mark to mark."""
    figure = Figure(figsize=(WIDTH / 2, HEIGHT), layout="constrained")
    axis = figure.subplots()
    hours = [row["hours"] for row in rows]
    for title in SETS.values():
        rates = [row[f"{title}, WER %"] for row in rows]
        axis.plot(hours, rates, marker="o", label=title)
    axis.set_xscale("log", base=2)
    axis.set_xticks(hours, [str(x) for x in hours])
    axis.set_xlabel("hours of speech")
    axis.set_ylabel("WER of greedy CTC, %")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    parts = [path.parent.name for path in args.folder.glob("hours-*/librispeech.jsonl")]
    rows = [measure(args.folder, part) for part in parts]
    rows.sort(key=lambda row: row["hours"])
    print(format_table(rows))
    draw(rows).savefig(args.output, dpi=DOTS)


if __name__ == "__main__":
    run_command(main)
