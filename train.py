"""Train the projector between a frozen Whisper encoder and a frozen LLM.

    torchrun --nproc_per_node=8 train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \
        --whisper_model_name_or_path large-v3 --data_path train.jsonl --output_dir exp --bf16 True

All arguments of the Hugging Face Trainer are understood. Started again with the same command, it
goes on from the newest checkpoint in `output_dir`.
"""

import warnings
from pathlib import Path

import numpy as np
import transformers

import scoring
from arguments import TrainingArguments, check_drop_last, check_evaluation
from checkpoints import (
    NoteArithmetic,
    describe_arguments,
    find_checkpoint,
    go_on,
    start_deepspeed,
)
from command import InputError, parse_arguments, run_command
from data import by_length
from loading import build, find_projector, read_config
from machine import end_processes
from manifest import Utterance, read_manifest
from model import Config, SpeechLLM
from recognize import make_result, recognize


def make_config(args: TrainingArguments, checkpoint: str | None = None) -> Config:
    """That of the projector to start from, which the flags must agree with, or a new one."""
    projector = args.projector_model_path
    if checkpoint is not None:
        projector = f"{checkpoint}/model.safetensors"
    given = {
        "llm_model_name_or_path": args.llm_model_name_or_path,
        "whisper_model_name_or_path": args.whisper_model_name_or_path,
        "prompt": args.prompt,
        "stride": args.stride,
    }
    if projector is not None:
        return read_config(projector, **given)
    return Config(**{name: value for name, value in given.items() if value is not None})


def train(args: TrainingArguments, config: Config, checkpoint: str | None) -> None:
    """Read the manifests, load the models, train, and save the last weights."""
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {args.output_dir}: {error.strerror}") from error
    seed = args.seed if args.data_seed is None else args.data_seed
    utterances = read_manifest(args.data_path)
    check_drop_last(args, "data_path", len(utterances), args.train_batch_size)
    arguments = describe_arguments(args)
    if checkpoint is not None and not go_on(args, arguments, checkpoint, len(utterances)):
        return
    train_rows = by_length(utterances, args.global_batch_size, seed)
    eval_rows = None
    if args.eval_data_path:
        eval_rows = read_manifest(args.eval_data_path)
        check_evaluation(args, eval_rows)
    transformers.set_seed(args.seed)  # for the projector's first weights
    model = build(config, args.bf16, args.encoder_cache, training=True)
    if args.projector_model_path is not None and checkpoint is None:
        model.load_projector(find_projector(args.projector_model_path))

    def measure(prediction) -> dict[str, float]:
        metrics = mean_listening_gap(prediction.predictions)
        if args.eval_hypotheses > 0:
            recognised = eval_rows[: args.eval_hypotheses]
            metrics |= recognise_and_score(model, recognised, args)
        return metrics

    from trainer import ProjectorTrainer  # takes a second, for which --help need not wait

    trainer = ProjectorTrainer(
        model=model,
        args=args,
        data_collator=model.collator(args.model_max_length),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        compute_metrics=measure,
        callbacks=[NoteArithmetic()],
    )
    trainer.arguments = arguments
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()


def mean_listening_gap(gaps: np.ndarray) -> dict[str, float]:
    """The mean of the utterances' gaps, which are NaN in batches of one."""
    if np.isnan(gaps).all():
        warnings.warn(
            "no listening gap: --per_device_eval_batch_size must be at least 2", stacklevel=2
        )
        return {}
    return {"listening_gap": float(np.nanmean(gaps))}


def recognise_and_score(
    model: SpeechLLM, utterances: list[Utterance], args: TrainingArguments
) -> dict[str, float]:
    """wer, cer or mer in %, and its edits, of greedy hypotheses."""
    workers = args.dataloader_num_workers
    for _ in recognize(model, utterances, [1], args.eval_batch_size, num_workers=workers):
        pass  # each batch adds its hypotheses
    results = [make_result(x, 1) for x in utterances]
    metric, normalizer = scoring.choose_metric(results, "auto", "auto")
    cells = scoring.error_rate(results, metric, normalizer)
    rate = cells.pop(f"{metric} %")
    return {metric.lower(): rate, **cells}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(TrainingArguments, argv)
    if args.deepspeed:
        start_deepspeed(args.use_cpu)
    args.check_processes()
    checkpoint = find_checkpoint(args)
    train(args, make_config(args, checkpoint), checkpoint)
    end_processes()


if __name__ == "__main__":
    run_command(main)
