"""Train the projector between a frozen Whisper encoder and a frozen LLM.

    torchrun --nproc_per_node=2 train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \
        --whisper_model_name_or_path tiny --data_path train.jsonl --output_dir exp --bf16 True

All arguments of the Hugging Face Trainer are understood. Started again with the same command, it
goes on from the newest checkpoint in `output_dir`.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import set_seed
from transformers.hf_argparser import HfArg, HfArgumentParser

from data import Collator, read_manifest
from model import InputError, load, run


@dataclass
class ModelArguments:
    llm_model_name_or_path: str | None = HfArg(default=None, help="A Qwen, Llama or other LLM.")
    whisper_model_name_or_path: str | None = HfArg(default=None, help="tiny ... turbo, or a .pt.")
    projector_model_path: str | None = HfArg(default=None, help="A projector to start from.")
    stride: int | None = HfArg(default=None, help="Encoder positions (20 ms) joined: default 5.")
    prompt: str | None = HfArg(default=None, help="What stands after the audio; see model.py.")


@dataclass
class DataArguments:
    data_path: list[str] = HfArg(help="JSONL manifests; one named twice counts twice.")
    eval_data_path: list[str] | None = HfArg(default=None, help="JSONL manifests for eval_loss.")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    model_max_length: int = HfArg(default=512, help="Most positions of prompt, audio and text.")
    ctc_weight: float = HfArg(default=0.3, help="Weight of the CTC loss beside the LLM's.")
    ctc_first: float = HfArg(default=0.5, help="Share of the steps with the CTC loss alone.")
    # flags of the published recipe that transformers 5 renamed
    eval_strategy: str = HfArg(default="no", aliases=["--evaluation_strategy"], help="When.")
    warmup_steps: float = HfArg(default=0, aliases=["--warmup_ratio"], help="Below 1: a ratio.")

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.remove_unused_columns = False  # the collator needs them
        self.ddp_find_unused_parameters = False  # every step uses the whole projector
        super().__post_init__()


class ProjectorTrainer(transformers.Trainer):
    """The Trainer, with the CTC loss, the listening gap, and checkpoints of the projector alone."""

    def __init__(self, *args):
        super().__init__(*args)
        self.parts = defaultdict(list)  # of the loss, of each batch since they were logged

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            alone = self.state.global_step < self.args.ctc_first * self.state.max_steps
            weight = self.args.ctc_weight
            inputs = {**inputs, "ctc_weight": weight, "ctc_alone": alone and weight > 0}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for key in outputs.keys() - {"loss"} if model.training else ():
            self.parts[key].append(outputs[key].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args) -> None:
        """Add the parts of a training loss: their means over steps, and the utterances skipped."""
        for key in sorted(self.parts) if "loss" in logs else ():
            values = self.parts.pop(key)
            total = self.accelerator.reduce(torch.stack(values).sum(), "sum").item()
            steps = len(values) / self.args.gradient_accumulation_steps
            logs[key] = total if key == "ctc_skipped" else total / steps
        super().log(logs, *args)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Log the loss, the loss with each utterance's audio taken from the next, and their gap."""
        rows = eval_dataset or self.eval_dataset
        swapped = [row | {"_path": other["_path"]} for row, other in zip(rows, rows[1:] + rows[:1])]
        metrics = super().evaluate(rows, ignore_keys, metric_key_prefix)
        metrics |= super().evaluate(swapped, ignore_keys, f"{metric_key_prefix}_swapped")
        own, other = (metrics[f"{metric_key_prefix}{x}_loss"] for x in ("", "_swapped"))
        self.log({f"{metric_key_prefix}_listening_gap": other - own})
        return metrics | {f"{metric_key_prefix}_listening_gap": other - own}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        output_dir = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            output_dir.mkdir(parents=True, exist_ok=True)
            self.model.save_projector(output_dir / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.model.load_projector(Path(resume_from_checkpoint) / "model.safetensors")

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def newest_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint that was written whole: its trainer_state.json comes last."""
    whole = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return max(map(str, whole), key=lambda path: int(path.rsplit("-", 1)[1]), default=None)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    if args.n_gpu > 1:
        raise InputError(f"{args.n_gpu} GPUs: start it with torchrun --nproc_per_node={args.n_gpu}")
    train_rows = read_manifest(data_args.data_path)
    eval_rows = read_manifest(data_args.eval_data_path) if data_args.eval_data_path else None

    set_seed(args.seed)  # for the projector's first weights
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    with args.main_process_first():  # one process downloads
        model, tokenizer = load(dtype=dtype, **vars(model_args))
    collator = Collator(tokenizer, model.settings, model.n_mels, args.model_max_length)
    trainer = ProjectorTrainer(model, args, collator, train_rows, eval_rows)
    checkpoint = args.resume_from_checkpoint or newest_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if eval_rows:
        trainer.evaluate()
    trainer.save_state()


if __name__ == "__main__":
    run(main)
