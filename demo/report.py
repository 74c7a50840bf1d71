"""Show what the demo's results say. It needs no package.

    python demo/report.py sentences 3 BEFORE.jsonl AFTER.jsonl
    python demo/report.py training demo/exp/trained/trainer_state.json

`sentences` prints so many sentences, each with what was recognised in it by each result;
`training` how loss, listening gap and word error rate moved.
"""

import json
import sys
from pathlib import Path

USAGE = "usage: python demo/report.py sentences COUNT RESULT.jsonl... | training STATE.json"


def format_sentences(results: dict[str, list[dict]], count: int) -> str:
    """`count` sentences, each with the hypothesis of every result, and a blank line after it."""
    width = max(len(name) for name in ["said", *results])
    lines = []
    for rows in list(zip(*results.values()))[:count]:
        lines.append(f"{'said':{width}} | {rows[0]['txt']}")
        for name, row in zip(results, rows):
            lines.append(f"{name:{width}} | {row['hyp']}")
        lines.append("")
    return "\n".join(lines)


def format_training(state: dict) -> str:
    """A Markdown table with a row for each evaluation in a trainer_state.json."""
    lines = [
        "| utterances | loss, nats a token | listening gap, nats a token | WER % |",
        "| --- | --- | --- | --- |",
    ]
    for log in state["log_history"]:
        if "eval_loss" in log:
            cells = [str(state["train_batch_size"] * log["step"])]
            for name in ("eval_loss", "eval_listening_gap", "eval_wer"):
                cells.append(f"{log[name]:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_results(path: str) -> list[dict]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def main(argv: list[str]) -> None:
    match argv:
        case ["sentences", count, *paths] if paths:
            results = {Path(path).stem: read_results(path) for path in paths}
            print(format_sentences(results, int(count)))
        case ["training", path]:
            print(format_training(json.loads(Path(path).read_text(encoding="utf-8"))))
        case _:
            sys.exit(USAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
