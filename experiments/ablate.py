"""Train with constants of the model changed, and draw up the learning curve.

    python -m experiments.ablate blank_threshold=2 hidden_dim=1024 -- --output_dir exp/kept \
        --eval_data_path dev.jsonl --eval_strategy steps --eval_steps 100 --eval_hypotheses 100 ...

Before `--` stand fields of model.Config with their values, and behind it the arguments of train.py.
OUTPUT_DIR/curve.md gets a row for each evaluation.
"""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

from arguments import ERROR_RATES, TrainingArguments
from checkpoints import find_checkpoint
from command import InputError, parse_arguments, run_command
from model import Config
from scoring import format_table
from train import make_config, train

USAGE = "python -m experiments.ablate FIELD=VALUE ... -- ARGUMENTS OF train.py"


def change_config(config: Config, settings: list[str]) -> Config:
    """The config with each FIELD=VALUE in it; InputError for what it does not have."""
    types = {field.name: field.type for field in fields(Config)}
    changes = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in types:
            names = ", ".join(types)
            raise InputError(f"wanted FIELD=VALUE, got {setting!r}; the fields are {names}")
        try:
            changes[name] = types[name](value)
        except ValueError:
            wanted = types[name].__name__
            raise InputError(f"{name} must be of type {wanted}, got {value!r}") from None
    return replace(config, **changes)


def read_curve(args: TrainingArguments) -> list[dict]:
    """A row of the table for each evaluation in the Trainer's log."""
    state = json.loads(Path(args.output_dir, "trainer_state.json").read_text())
    rows = []
    for log in state["log_history"]:
        if "eval_loss" not in log:
            continue
        row = {
            "utterances": log["step"] * args.global_batch_size,
            "loss": format_nats(log["eval_loss"]),
            "listening gap": format_nats(log.get("eval_listening_gap")),
        }
        for metric in ERROR_RATES:
            if f"eval_{metric}" in log:
                row[f"{metric.upper()} %"] = log[f"eval_{metric}"]
        rows.append(row)
    return rows


def format_nats(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    if "--" not in given:
        raise InputError(f"wanted a -- before the arguments of train.py: {USAGE}")
    place = given.index("--")
    settings, arguments = given[:place], given[place + 1 :]
    args = parse_arguments(TrainingArguments, arguments)
    args.check_processes()
    if args.deepspeed:
        raise InputError("--deepspeed: ablations run without it")
    if args.eval_strategy == "no":
        raise InputError("a learning curve needs --eval_strategy steps or epoch")
    config = change_config(make_config(args), settings)
    train(args, config, find_checkpoint(args))
    if args.should_save:
        table = format_table(read_curve(args))
        Path(args.output_dir, "curve.md").write_text(f"{table}\n")
        print(table)


if __name__ == "__main__":
    run_command(main)
