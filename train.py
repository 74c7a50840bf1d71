"""Train the projector between a frozen Whisper encoder and a frozen LLM.

    torchrun --nproc_per_node=2 train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \
        --whisper_model_name_or_path tiny --data_path train.jsonl --output_dir exp --bf16 True

All arguments of the Hugging Face Trainer are understood. Started again with the same command, it
goes on from the newest checkpoint in `output_dir`.
"""

import random
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path

import torch
import transformers
from accelerate.utils import GatheredParameters
from transformers.hf_argparser import HfArg, HfArgumentParser

from data import collate, read_manifest
from model import choose_bf16, load, run
from recognize import recognize, score


@dataclass(kw_only=True)
class TrainingArguments(transformers.TrainingArguments):
    llm_model_name_or_path: str = HfArg(help="A Qwen, Llama or other LLM.")
    whisper_model_name_or_path: str = HfArg(help="tiny ... turbo, or a .pt file.")
    projector_model_path: str | None = HfArg(default=None, help="A projector to start from.")
    stride: int | None = HfArg(default=None, help="Encoder positions (20 ms) joined: default 5.")
    data_path: list[str] = HfArg(help="JSONL manifests; one named twice counts twice.")
    eval_data_path: list[str] | None = HfArg(default=None, help="JSONL manifests to evaluate on.")
    eval_hypotheses: int = HfArg(default=0, help="How many of them to recognise for a WER or CER.")
    model_max_length: int = HfArg(default=512, help="Most positions of audio and text.")
    ctc_weight: float = HfArg(default=0.3, help="Weight of the CTC loss beside the LLM's.")
    ctc_first: float = HfArg(default=0.5, help="Share of the steps with the CTC loss alone.")
    # flags of the published recipe that transformers 5 renamed
    eval_strategy: str = HfArg(default="no", aliases=["--evaluation_strategy"], help="When.")
    warmup_steps: float = HfArg(default=0, aliases=["--warmup_ratio"], help="Below 1: a ratio.")
    use_cpu: bool = HfArg(default=not torch.accelerator.is_available(), help="No accelerator.")

    def __post_init__(self):
        self.bf16 = choose_bf16(self.bf16)  # before the Trainer's autocast follows from it
        super().__post_init__()


def by_length(rows: list[dict], size: int, seed: int) -> list[dict]:
    """Rows so that each `size` of them are of about one length, in random order of these batches.

    Not from long to short, which does harm. A row that comes twice is moved a little, to another
    batch.
    """
    draw = random.Random(seed)
    rows = sorted(rows, key=lambda row: row["duration"] * draw.uniform(0.95, 1.05))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    # at random, but last the one that may be short
    return [x for b in sorted(batches, key=lambda b: (len(b) < size, draw.random())) for x in b]


class ProjectorTrainer(transformers.Trainer):
    """The Trainer, with the CTC loss, the listening gap, and checkpoints of the projector alone."""

    def compute_loss(self, model, inputs, **kwargs):
        ctc = self.args.ctc_weight if model.training else 0.0
        alone = ctc and self.state.global_step < self.args.ctc_first * self.state.max_steps
        return super().compute_loss(model, inputs | {"ctc": ctc, "ctc_alone": alone}, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with GatheredParameters([*self.model.projector.parameters()]):  # of ZeRO-3's shards
            if self.args.should_save:
                self.model.save_projector(f"{output_dir or self.args.output_dir}/model.safetensors")


def main(argv: list[str] | None = None) -> None:
    [args] = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(argv)
    if args.deepspeed:
        import deepspeed

        engine, options = deepspeed.DeepSpeedEngine, {"exclude_frozen_parameters": True}
        engine.save_checkpoint = partialmethod(engine.save_checkpoint, **options)
        deepspeed.ops.__compatible_ops__ = {}  # gloo, and nothing to compile
        deepspeed.init_distributed("gloo" if args.use_cpu else None, auto_mpi_discovery=False)
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.n_gpu > 1 or step < 1 or not (args.stride is None or args.stride > 0):
        raise ValueError(f"{args.n_gpu=}: start by torchrun; or not >= 1: {step=}, {args.stride=}")
    if args.fp16:
        print("warning: Qwen overflows in --fp16, and does not learn (grad_norm nan): use --bf16")
    train_rows = by_length(read_manifest(args.data_path), step, args.data_seed or args.seed)
    eval_rows = read_manifest(args.eval_data_path) if args.eval_data_path else None

    # the newest checkpoint that was written whole: its trainer_state.json comes last
    states = Path(args.output_dir).glob("checkpoint-*[0-9]/trainer_state.json")
    whole = {int(x.parent.name[11:]): x.parent for x in states if x.read_text().endswith("\n}\n")}
    if resume := args.resume_from_checkpoint or whole.get(max(whole, default=0)):
        args.projector_model_path = f"{resume}/model.safetensors"
        found = [len([*Path(resume).glob(x)]) for x in ("rng_state*", "global_step*")]
        # with another set-up its optimizer's states would be lost
        if found != (here := [args.world_size, bool(args.deepspeed)]):
            raise ValueError(f"{resume}: ranks, ZeRO {found}, not {here}: --projector_model_path?")

    transformers.set_seed(args.seed)  # for the projector's first weights
    # CPUs train 1.3 times as fast so
    model = load(**vars(args), attention="eager" if args.bf16 and args.use_cpu else None)
    # collate needs all columns, rows are in their order, every step uses the whole projector
    args.remove_unused_columns = args.ddp_find_unused_parameters = False
    args.train_sampling_strategy = "sequential"
    collator = partial(collate, **model.collation, max_length=args.model_max_length)

    def gauge(out) -> dict[str, float]:
        rows = eval_rows[: args.eval_hypotheses]
        rates = score([*recognize(model, rows, args.eval_batch_size, 1)]) if rows else {}
        return {"listening_gap": out.predictions.mean(), **{k: float(rates[k]) for k in rates}}

    trainer = ProjectorTrainer(model, args, collator, train_rows, eval_rows, compute_metrics=gauge)
    trainer.train(resume and str(resume))
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    run(main)
