"""Draw learning curves, or the error rate over the beam's width, as PNG:

    python bench/plot.py curves.png exp/tiny exp/base:128
    python bench/plot.py beams.png table.md

For folders that train.py wrote, or others with its trainer_state.json, it draws loss and listening
gap over the utterances seen, and the error rate where there was --eval_hypotheses. Behind the colon
are the utterances of a step, where these are more than one process's batch. A file is what
recognize.py, or bench/score.py with it, printed for several beams. Needs bench/requirements.txt.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter

WIDTH, HEIGHT = 10, 3.4  # inches, at 100 dots each: as wide as a README


def table(path: Path) -> list[dict[str, str]]:
    """The rows of the one table in a file, each line of which begins with |, by their heads."""
    lines = [x.strip("| ").split("|") for x in path.read_text().splitlines() if x.startswith("|")]
    heads, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(heads, row)) for row in rows]


def curves(runs: list[str]) -> None:
    """A panel each for loss, listening gap and, if a run has it, the error rate; a line a run."""
    titles = {
        "eval_loss": "loss, nats a token",
        "eval_listening_gap": "listening gap, nats a token",
    }
    titles |= {f"eval_{metric} %": f"greedy {metric}, %" for metric in ("WER", "CER")}
    panels: dict[str, list] = {}
    for i, run in enumerate(runs):
        folder, _, size = run.partition(":")
        state = json.loads(Path(folder, "trainer_state.json").read_text())
        seen = int(size or state["train_batch_size"])  # utterances of a step
        for key, title in titles.items():
            logs = [log for log in state["log_history"] if key in log]
            line = [seen * log["step"] for log in logs], [log[key] for log in logs]
            if logs:
                panels.setdefault(title, []).append((Path(folder).name, f"C{i}", *line))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(WIDTH, HEIGHT), layout="constrained")
    for axis, (title, lines) in zip(axes, panels.items()):
        for name, color, x, y in lines:
            axis.plot(x, y, marker="o", markersize=3, label=name, color=color)
        axis.set(title=title, xlabel="utterances seen")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k"))
        axis.grid(alpha=0.3)
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, fontsize="small", loc="outside lower center", ncols=3)


def beams(path: Path) -> None:
    """The error rate on the left, the real-time factor on the right."""
    rows = table(path)
    metric = next(head for head in rows[0] if head.endswith("%"))
    widths = [row["beam"] for row in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(WIDTH, HEIGHT), layout="constrained")
    for axis, head, name in zip(axes, (metric, "RTF"), (metric, "real-time factor")):
        axis.plot(widths, [float(row[head]) for row in rows], marker="o")
        axis.set(title=name, xlabel="beam width")
        axis.grid(alpha=0.3)


def main(out: str, *sources: str) -> None:
    if Path(sources[0]).is_file():
        beams(Path(sources[0]))
    else:
        curves(list(sources))
    pyplot.savefig(out, dpi=100)
    print(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python bench/plot.py OUT.png FOLDER[:UTTERANCES_A_STEP]...|TABLE.md")
    main(*sys.argv[1:])
