"""Train the projector between a frozen Whisper encoder and a frozen LLM.

    torchrun --nproc_per_node=2 train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \
        --whisper_model_name_or_path tiny --data_path train.jsonl --output_dir exp --bf16 True

All arguments of the Hugging Face Trainer are understood. Started again with the same command, it
goes on from the newest checkpoint in `output_dir`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from data import collate, read_manifest
from model import InputError, load, run


@dataclass(kw_only=True)
class TrainingArguments(transformers.TrainingArguments):
    llm_model_name_or_path: str = HfArg(help="A Qwen, Llama or other LLM.")
    whisper_model_name_or_path: str = HfArg(help="tiny ... turbo, or a .pt file.")
    projector_model_path: str | None = HfArg(default=None, help="A projector to start from.")
    stride: int | None = HfArg(default=None, help="Encoder positions (20 ms) joined: default 5.")
    data_path: list[str] = HfArg(help="JSONL manifests; one named twice counts twice.")
    eval_data_path: list[str] | None = HfArg(default=None, help="JSONL manifests to evaluate on.")
    model_max_length: int = HfArg(default=512, help="Most positions of audio and text.")
    ctc_weight: float = HfArg(default=0.3, help="Weight of the CTC loss beside the LLM's.")
    ctc_first: float = HfArg(default=0.5, help="Share of the steps with the CTC loss alone.")
    # flags of the published recipe that transformers 5 renamed
    eval_strategy: str = HfArg(default="no", aliases=["--evaluation_strategy"], help="When.")
    warmup_steps: float = HfArg(default=0, aliases=["--warmup_ratio"], help="Below 1: a ratio.")
    # collate needs all columns, batches are by length, every step uses the whole projector
    remove_unused_columns: bool = field(default=False, init=False)
    train_sampling_strategy: str = field(default="random", init=False)
    ddp_find_unused_parameters: bool | None = field(default=False, init=False)
    use_cpu: bool = HfArg(default=not torch.accelerator.is_available(), help="No accelerator.")


class ByLength(LengthGroupedSampler):
    """The Trainer's sampler, but with batches in random order: from long to short does harm.

    Its `generator` is the Trainer: what is drawn follows from the seed and from the epoch's number,
    in a run that goes on, too.
    """

    def __iter__(self):
        args, epoch = self.generator.args, int(self.generator.state.epoch)
        random = torch.Generator().manual_seed((args.data_seed or args.seed) + epoch)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=random)
        steps = torch.tensor(order).split(self.batch_size)
        places = torch.randperm(len(steps) - 1, generator=random).tolist()
        return iter(torch.cat([steps[i] for i in [*places, -1]]).tolist())  # the last may be short


class ProjectorTrainer(transformers.Trainer):
    """The Trainer, with the CTC loss, the listening gap, and checkpoints of the projector alone."""

    def _get_train_sampler(self, train_dataset=None) -> ByLength:
        step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        # bytes tell lengths apart nearly as well as seconds, and without reading the audio
        return ByLength(step, lengths=[x["_size"] for x in self.train_dataset], generator=self)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training and self.args.ctc_weight:
            alone = self.state.global_step < self.args.ctc_first * self.state.max_steps
            inputs = {**inputs, "ctc_weight": self.args.ctc_weight, "ctc_alone": alone}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args) -> None:
        """Add this process's CTC loss an utterance, and how many had too much text for theirs."""
        if "loss" in logs and self.model.ctc_losses:
            losses, self.model.ctc_losses = torch.cat(self.model.ctc_losses), []
            logs |= {"ctc_loss": losses.mean().item(), "ctc_skipped": int((losses == 0).sum())}
        super().log(logs, *args)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Log the loss, the loss with each utterance's audio taken from the next, and their gap."""
        rows, name, metrics = eval_dataset or self.eval_dataset, metric_key_prefix, {}
        swapped = [row | {"_path": other["_path"]} for row, other in zip(rows, rows[1:] + rows[:1])]
        for part, prefix in ((rows, name), (swapped, f"{name}_swapped")):
            self._eval_dataloaders = {}  # persistent workers would go on with the other part
            metrics |= super().evaluate(part, ignore_keys, prefix)
        gap = {f"{name}_listening_gap": metrics[f"{name}_swapped_loss"] - metrics[f"{name}_loss"]}
        self.log(gap)
        return metrics | gap

    def _issue_warnings_after_load(self, load_result) -> None:
        """None: a checkpoint is the projector, and the rest is not missing."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            self.model.save_projector(f"{output_dir or self.args.output_dir}/model.safetensors")


def main(argv: list[str] | None = None) -> None:
    [args] = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(argv)
    if args.n_gpu > 1:
        raise InputError(f"{args.n_gpu} GPUs: start it with torchrun --nproc_per_node={args.n_gpu}")
    train_rows = read_manifest(args.data_path)
    eval_rows = read_manifest(args.eval_data_path) if args.eval_data_path else None

    # the newest checkpoint that was written whole: its trainer_state.json comes last
    whole = [x.parent for x in Path(args.output_dir).glob("checkpoint-[0-9]*/trainer_state.json")]
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    if resume := args.resume_from_checkpoint or newest:
        args.projector_model_path = f"{resume}/model.safetensors"

    transformers.set_seed(args.seed)  # for the projector's first weights
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    with args.main_process_first():  # one process downloads
        model = load(dtype=dtype, **vars(args))
    if dtype == torch.bfloat16 and args.use_cpu:  # trains 1.3 times as fast so
        model.llm.set_attn_implementation("eager")
    collator = partial(collate, **model.collation, max_length=args.model_max_length)
    trainer = ProjectorTrainer(model, args, collator, train_rows, eval_rows)
    trainer.train(resume and str(resume))
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    run(main)
