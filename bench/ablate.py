"""Train with constants changed, and draw up the learning curve: what is each choice worth?

    python bench/ablate.py CACHE BLANK_COSINE=2 ... -- --output_dir exp/kept \
        --eval_data_path dev.jsonl --eval_strategy steps --eval_steps 100 --eval_hypotheses 100 ...

CACHE is a folder for the encoder's outputs, which runs share (bench/cached.py). Then come constants
of model.py and data.py with new values, `prompt=...` for the default prompt (its lines apart by
\\n), `blank=...` for the text whose token is the blank, or `rms_norm=off` for audio of any length;
behind `--` the arguments of train.py. In the end OUTPUT_DIR/curve.md has a row for each evaluation.
"""

import json
import sys
from functools import partial
from pathlib import Path

from transformers.hf_argparser import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1]))

from cached import use

import data
import model
import train

HEAD = "utterances | loss | listening gap | greedy WER or CER\n---|---|---|---\n"


def change(name: str, value: str) -> None:
    """Give a number of model.py or data.py or the prompt another value, or leave rms_norm out."""
    if name == "prompt":
        model.DEFAULTS["prompt"] = value.replace("\\n", "\n")
    elif (name, value) == ("rms_norm", "off"):
        model.nn.functional.rms_norm = lambda x, shape: x
    else:
        modules = [x for x in (model, data) if isinstance(getattr(x, name, None), int | float)]
        if not modules:
            sys.exit(f"{sys.argv[0]}: no number {name} in model.py or data.py: try BLANK_COSINE")
        setattr(modules[0], name, type(getattr(modules[0], name))(value))


def load(original, blank: str | None, **options):
    """What `original` loads, with `blank` if given."""
    speech_llm = original(**options)
    if blank is not None:
        speech_llm.blank = model.encode(speech_llm.tokenizer, blank)[-1]
    return speech_llm


def curve(args: train.TrainingArguments) -> str:
    """A table with a row for each evaluation."""
    table = HEAD
    for log in json.loads(Path(args.output_dir, "trainer_state.json").read_text())["log_history"]:
        if "eval_loss" in log:
            seen = log["step"] * args.train_batch_size * args.gradient_accumulation_steps
            cells = [seen, f"{log['eval_loss']:.2f}", f"{log['eval_listening_gap']:.2f}"]
            rates = [f"{log[key]} %" for key in ("eval_WER %", "eval_CER %") if key in log]
            table += " | ".join(map(str, [*cells, *(rates or ["-"])])) + "\n"
    return table


def main() -> None:
    split = sys.argv.index("--")
    cache, settings, arguments = sys.argv[1], sys.argv[2:split], sys.argv[split + 1 :]
    given = dict(setting.split("=", 1) for setting in settings)
    blank = given.pop("blank", None)
    for name, value in given.items():
        change(name, value)
    use(train, cache)
    train.load = partial(load, train.load, blank)
    train.main(arguments)
    [args] = HfArgumentParser(train.TrainingArguments).parse_args_into_dataclasses(arguments)
    table = curve(args)
    Path(args.output_dir, "curve.md").write_text(table)
    print(table)


if __name__ == "__main__":
    if "--" not in sys.argv[2:]:
        sys.exit("usage: python bench/ablate.py CACHE [NAME=VALUE ...] -- ARGUMENTS OF train.py")
    model.run(main)
