"""Train with a constant of model.py changed, to measure what it is worth.

    python bench/ablate.py BLANK_COSINE=2 -- --output_dir exp/kept --max_steps 400 ...

Before `--` stand constants of model.py with their new values, `prompt=...` for the default prompt,
or `blank=...` for the text whose token is the blank; behind it the arguments of train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import model
import train


def change(name: str, value: str) -> None:
    """Give a constant of model.py, the prompt or the blank another value."""
    if name == "prompt":
        model.DEFAULTS["prompt"] = value
    elif name == "blank":
        load = train.load

        def load_with_blank(**options):
            speech_llm = load(**options)
            speech_llm.blank = model.encode(speech_llm.tokenizer, value)[-1]
            return speech_llm

        train.load = load_with_blank
    elif isinstance(getattr(model, name, None), int | float):
        setattr(model, name, type(getattr(model, name))(value))
    else:
        sys.exit(f"{sys.argv[0]}: model.py has no number {name}; there are BLANK_COSINE, CTC_...")


if __name__ == "__main__":
    if "--" not in sys.argv:
        sys.exit("usage: python bench/ablate.py [NAME=VALUE ...] -- ARGUMENTS OF train.py")
    split = sys.argv.index("--")
    for setting in sys.argv[1:split]:
        change(*setting.split("=", 1))
    model.run(lambda: train.main(sys.argv[split + 1 :]))
