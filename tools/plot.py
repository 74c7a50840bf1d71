"""Draw trainings, or the error rate over the beam's width, as PNG.

    python -m tools.plot --output curves.png --runs exp/tiny exp/base:128
    python -m tools.plot --output curves.png --runs exp/first:32+exp/second:32+exp/third:64
    python -m tools.plot --output beams.png --table table.md

A run is a folder with the trainer_state.json of train.py: loss and listening gap are drawn over
the utterances seen, and the error rate where there was --eval_hypotheses. Behind the colon are the
utterances of a step, where these are more than one process's batch. Folders joined by + are the
phases of one training, and become one line. The table is what recognize.py printed for several
beams. Needs tools/requirements.txt.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from transformers.hf_argparser import HfArg

from command import InputError, parse_arguments, run_command

WIDTH, HEIGHT = 8, 3  # inches; 8 fill the width of a README
DOTS = 200  # an inch
TITLES = {
    "eval_loss": "loss, nats a token",
    "eval_listening_gap": "listening gap, nats a token",
    "eval_wer": "greedy WER, %",
    "eval_cer": "greedy CER, %",
    "eval_mer": "greedy MER, %",
}


@dataclass
class Arguments:
    """The flags of tools/plot.py."""

    output: Path = HfArg(help="The PNG to write.")
    runs: list[str] | None = HfArg(
        default=None,
        help="Folders that train.py wrote, DIR or DIR:UTTERANCES_A_STEP; phases of one training "
        "are joined by +.",
    )
    table: Path | None = HfArg(
        default=None, help="A file with the Markdown table that recognize.py printed."
    )

    def __post_init__(self):
        if (self.runs is None) == (self.table is None):
            raise InputError("give --runs for curves of trainings, or --table for beams")


@dataclass
class Run:
    """What a training logged in its evaluations, over the utterances it had seen by then."""

    name: str
    joints: list[int] = field(default_factory=list)  # utterances seen when a phase ended
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # by key of the log


def read_run(text: str) -> Run:
    """The run of `DIR:SIZE+DIR:SIZE`; its phases stand one after the other."""
    phases = []
    for phase in text.split("+"):
        folder, colon, size = phase.rpartition(":")
        if not colon or not size.isdigit():
            folder, size = phase, None
        phases.append((Path(folder), size))

    run = Run(" + ".join(folder.name for folder, _ in phases))
    before = 0  # utterances seen in earlier phases
    for folder, size in phases:
        state = read_state(folder / "trainer_state.json")
        step_size = state["train_batch_size"] if size is None else int(size)
        for log in state["log_history"]:
            for key in TITLES.keys() & log.keys():
                seen = before + step_size * log["step"]
                run.curves.setdefault(key, []).append((seen, log[key]))
        before += step_size * state["global_step"]
        run.joints.append(before)
    run.joints.pop()  # the end is no joint
    if not run.curves:
        raise InputError(f"--runs {text}: nothing was evaluated; train with --eval_strategy")
    return run


def read_state(path: Path) -> dict:
    """What the Trainer writes; InputError for something else."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--runs: cannot read {path}: {error.strerror}; wanted a folder of train.py's, or a "
            "checkpoint in it where the training was stopped"
        ) from error
    except ValueError as error:
        raise InputError(f"--runs: {path} is not JSON: {error}") from error
    for key in ("log_history", "global_step", "train_batch_size"):
        if not isinstance(state, dict) or key not in state:
            raise InputError(f"--runs: {path} is no state of a Trainer: it has no {key}")
    return state


def draw_runs(runs: list[Run]) -> Figure:
    """A panel each for loss, listening gap and error rate, if a run has it; a line a run."""
    keys = [key for key in TITLES if any(key in run.curves for run in runs)]
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    [axes] = figure.subplots(1, len(keys), squeeze=False)
    lines = {}  # for the legend, a line of each run
    for axis, key in zip(axes, keys):
        for number, run in enumerate(runs):
            if key not in run.curves:
                continue
            color = f"C{number}"
            seen, values = zip(*run.curves[key])
            [line] = axis.plot(seen, values, marker="o", markersize=3, color=color)
            lines[number] = line
            for joint in run.joints:
                axis.axvline(joint, color=color, linestyle=":", linewidth=1)
        axis.set_title(TITLES[key], fontsize="medium")
        axis.set_xlabel("utterances seen")
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    names = [runs[number].name for number in lines]
    columns = 3 if max(map(len, names)) < 30 else 1
    figure.legend(lines.values(), names, loc="outside lower center", ncols=columns)
    return figure


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of the Markdown table in a file by their heads, whatever stands around it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--table: cannot read {path}: {error}") from error
    rows = []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = line.strip().strip("|").split("|")
            rows.append([cell.strip() for cell in cells])
    if len(rows) < 3:
        raise InputError(f"--table: no table in {path}; wanted what recognize.py prints")
    heads = rows[0]
    return [dict(zip(heads, row)) for row in rows[2:]]  # the line between is dashes


def draw_table(path: Path) -> Figure:
    """The error rate on the left and the real-time factor on the right, over the beam's width."""
    rows = read_table(path)
    metric = "WER %"
    for other in ("CER %", "MER %"):
        if other in rows[0]:
            metric = other
    columns = {}
    for head in ("beam", metric, "RTF"):
        try:
            columns[head] = [float(row[head]) for row in rows]
        except (KeyError, ValueError) as error:
            raise InputError(
                f"--table: {path} has no numbers in a column {head!r}; wanted the table that "
                "recognize.py prints for several --num_beams"
            ) from error
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, head, title in zip(axes, (metric, "RTF"), (metric, "real-time factor")):
        axis.plot(columns["beam"], columns[head], marker="o")
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("beam width")
        axis.set_xticks(columns["beam"])
        axis.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    if args.table is not None:
        figure = draw_table(args.table)
    else:
        figure = draw_runs([read_run(text) for text in args.runs])
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=DOTS, format="png")
    except OSError as error:
        raise InputError(f"--output: cannot write {args.output}: {error.strerror}") from error
    print(args.output)


if __name__ == "__main__":
    run_command(main)
