"""Train with constants of model.py changed, and draw up the learning curve: what is each worth?

    python bench/ablate.py ENCODED.pt BLANK_COSINE=2 ... -- --output_dir exp/kept \
        --eval_data_path dev.jsonl --eval_strategy steps --eval_steps 100 --save_steps 100 ...

ENCODED.pt keeps the encoder's outputs, which runs on the same audio share: no utterance is encoded
twice. Then come constants of model.py with new values, `prompt=...` for the default prompt (its
lines apart by \\n), `blank=...` for the text whose token is the blank, or `rms_norm=off` for audio
of any length; behind `--` the arguments of train.py. In the end each checkpoint decodes the
evaluation's manifests greedily, and OUTPUT_DIR/curve.md has a row for each.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from transformers.hf_argparser import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1]))

import model
import recognize
import train
from data import read_manifest

HEAD = "utterances | loss | listening gap | greedy WER\n---|---|---|---\n"


def change(name: str, value: str) -> None:
    """Give a number of model.py, the prompt or the blank another value."""
    if name == "prompt":
        model.DEFAULTS["prompt"] = value.replace("\\n", "\n")
    elif name == "blank":
        load = train.load

        def load_with_blank(**options):
            speech_llm = load(**options)
            speech_llm.blank = model.encode(speech_llm.tokenizer, value)[-1]
            return speech_llm

        train.load = load_with_blank
    elif (name, value) == ("rms_norm", "off"):
        model.F.rms_norm = lambda x, shape: x
    elif isinstance(getattr(model, name, None), int | float):
        setattr(model, name, type(getattr(model, name))(value))
    else:
        sys.exit(f"{sys.argv[0]}: model.py has no number {name}; there are BLANK_COSINE, CTC_...")


def encode_once(known: dict[str, torch.Tensor]) -> None:
    """Let no encoder compute what is known; what it computes is added."""
    load = train.load

    def load_and_remember(**options):
        speech_llm = load(**options)
        compute, name = (
            speech_llm.encoder.forward,
            speech_llm.settings["whisper_model_name_or_path"],
        )

        def forward(mel):
            key = f"{name} {hashlib.sha256(mel.float().cpu().numpy().tobytes()).hexdigest()}"
            if key not in known:
                known[key] = compute(mel).detach().clone()
            return known[key]

        speech_llm.encoder.forward = forward
        return speech_llm

    train.load = load_and_remember


@torch.no_grad()
def curve(args: train.TrainingArguments) -> str:
    """A table with a row for each checkpoint."""
    logs: dict[int, dict] = {}  # of each evaluation, by its step
    for log in json.loads(Path(args.output_dir, "trainer_state.json").read_text())["log_history"]:
        if any(key.startswith("eval_") for key in log):
            logs.setdefault(log["step"], {}).update(log)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    rows, table = read_manifest(args.eval_data_path), HEAD
    for step, log in logs.items():
        cells = [step * args.train_batch_size * args.gradient_accumulation_steps]
        cells += [f"{log['eval_loss']:.2f}", f"{log['eval_listening_gap']:.2f}"]
        path = Path(args.output_dir, f"checkpoint-{step}", "model.safetensors")
        speech_llm = train.load(projector_model_path=path, dtype=dtype).eval()
        hypotheses = list(recognize.recognize(speech_llm, rows, 10, num_beams=1))
        score = recognize.score([row["txt"] for row in rows], hypotheses)
        cells.append(score.removeprefix("WER ").split(" of ")[0])
        table += " | ".join(map(str, cells)) + "\n"
    return table


def main() -> None:
    split = sys.argv.index("--")
    encoded, *settings = sys.argv[1:split]
    known = torch.load(encoded) if Path(encoded).exists() else {}
    size = len(known)
    for setting in settings:
        change(*setting.split("=", 1))
    encode_once(known)
    train.main(sys.argv[split + 1 :])
    parser = HfArgumentParser(train.TrainingArguments)
    [args] = parser.parse_args_into_dataclasses(sys.argv[split + 1 :])
    table = curve(args)
    if len(known) > size:
        torch.save(known, encoded)
    Path(args.output_dir, "curve.md").write_text(table)
    print(table)


if __name__ == "__main__":
    if "--" not in sys.argv[2:]:
        sys.exit(
            "usage: python bench/ablate.py ENCODED.pt [NAME=VALUE ...] -- ARGUMENTS OF train.py"
        )
    model.run(main)
