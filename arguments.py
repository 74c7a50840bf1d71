"""The flags of train.py and recognize.py, and what is refused before models load."""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from accelerate.utils import is_deepspeed_available
from transformers.hf_argparser import HfArg

from command import InputError
from ctc import CTC_WEIGHT
from machine import choose_bf16, choose_workers, has_fast_bf16, may_fork
from manifest import Utterance
from scoring import choose_metric

# flags of the Trainer that break here or mean nothing, and what is said of them
REFUSED = {
    "auto_find_batch_size": "batches are put together by length before; lower the batch size",
    "average_tokens_across_devices": "the loss is a mean over the tokens of all processes",
    "batch_eval_metrics": "evaluation measures all batches together",
    "dataloader_in_order": "a run could not be repeated, nor resumed exactly",
    "eval_do_concat_batches": "evaluation measures all batches together",
    "fsdp": "take --deepspeed ds_config_zero3.json to share an LLM out",
    "include_for_metrics": "evaluation measures what it does, and needs no more",
    "include_num_input_tokens_seen": "the model reads audio; the length of a manifest is known",
    "label_names": "evaluation would have no loss",
    "label_smoothing_factor": "the losses are the model's own",
    "neftune_noise_alpha": "it is for embeddings that learn, and the LLM's are frozen",
    "optim_target_modules": "it is for the weights of an LLM, which are frozen",
    "push_to_hub": "upload model.safetensors when training is done",
    "use_liger_kernel": "it changes models of transformers alone, and this one holds its LLM",
}
# what --accelerator_config must leave alone
PLAIN_BATCHES = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "gradient_accumulation_kwargs": None,
}
NEED_WORKERS = (
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
)
MAY_BE_EMPTY = ("prompt", "debug")
# what evaluation logs beside the loss
GAP = "listening_gap"
ERROR_RATES = ("wer", "cer", "mer")
EDITS = ("substitutions", "deletions", "insertions")


@dataclass(kw_only=True)
class TrainingArguments(transformers.TrainingArguments):
    """The flags of train.py: ours, and all of the Hugging Face Trainer's."""

    llm_model_name_or_path: str = HfArg(
        help="A Qwen, a Llama or another LLM: its name on the hub, or a folder."
    )
    whisper_model_name_or_path: str = HfArg(
        help="A Whisper: its name (tiny ... turbo), or a .pt file."
    )
    projector_model_path: str | None = HfArg(
        default=None,
        help="A projector to start from, also user/name on the Hub.",
    )
    prompt: str | None = HfArg(
        default=None,
        help="What the LLM is told to do with the audio; by default, to repeat it.",
    )
    stride: int | None = HfArg(
        default=None,
        help="How many encoder positions (20 ms) one audio position joins; default 5.",
    )
    data_path: list[str] = HfArg(
        help="JSONL manifests to train on, all behind one flag; one named twice counts twice.",
    )
    eval_data_path: list[str] | None = HfArg(
        default=None,
        help="JSONL manifests to evaluate on, as often as --eval_strategy says.",
    )
    eval_hypotheses: int = HfArg(
        default=0,
        help="How many of their utterances evaluation recognises for a WER or CER.",
    )
    encoder_cache: str | None = HfArg(
        default=None,
        help="A folder that keeps encoder outputs for later epochs and runs.",
    )
    model_max_length: int = HfArg(
        default=512,
        help="Most positions of audio and transcript; longer utterances are refused.",
    )
    ctc_weight: float = HfArg(
        default=0.3,
        help="Weight of the CTC loss beside the LLM's; 0 leaves it out.",
    )
    ctc_first: float = HfArg(
        default=0.5,
        help="Share of the steps, at the start, with the CTC loss alone.",
    )
    # flags of the published recipe that transformers 5 renamed
    eval_strategy: str = HfArg(
        default="no",
        aliases=["--evaluation_strategy"],
        help="When to evaluate: no, steps or epoch.",
    )
    warmup_steps: float = HfArg(
        default=0,
        aliases=["--warmup_ratio"],
        help="Steps of warm-up; below 1, their share of all steps.",
    )
    use_cpu: bool = HfArg(
        default=not torch.accelerator.is_available(),
        help="Whether to leave accelerators alone.",
    )
    dataloader_num_workers: int = HfArg(
        default_factory=choose_workers,
        help="Processes that read audio, for each GPU; by default up to 4, without a GPU none.",
    )

    def __post_init__(self):
        check_no_empty(self)
        check_refused(self)
        for flag in ("save_steps", "eval_steps", "logging_steps", "model_max_length"):
            check_above_zero(flag, getattr(self, flag))
        if self.max_steps == 0:
            raise InputError("--max_steps must be at least 1, or -1 for --num_train_epochs, got 0")
        if self.save_total_limit is not None:
            check_positive("save_total_limit", self.save_total_limit)
        check_not_negative("num_train_epochs", self.num_train_epochs)
        check_not_negative("weight_decay", self.weight_decay)
        check_positive("per_device_train_batch_size", self.per_device_train_batch_size)
        check_positive("per_device_eval_batch_size", self.per_device_eval_batch_size)
        check_positive("gradient_accumulation_steps", self.gradient_accumulation_steps)
        if self.stride is not None:
            check_positive("stride", self.stride)
        if not 0 <= self.ctc_first <= 1:
            raise InputError(f"--ctc_first must be a share from 0 to 1, got {self.ctc_first}")
        check_not_negative("ctc_weight", self.ctc_weight)
        check_not_negative("learning_rate", self.learning_rate)
        check_not_negative("eval_hypotheses", self.eval_hypotheses)
        check_needs(self)
        if self.metric_for_best_model is not None:
            self.metric_for_best_model = plain_name(self.metric_for_best_model)
            if self.greater_is_better is None:
                self.greater_is_better = self.metric_for_best_model == GAP
        if self.fp16:
            warnings.warn("--fp16: Qwen overflows in it (grad_norm nan); use --bf16", stacklevel=2)
        self.bf16 = choose_bf16(self.bf16)  # before autocast and ZeRO's settings follow from it
        if self.dataloader_num_workers > 0 and not may_fork():
            warnings.warn(
                "--dataloader_num_workers: several processes on CPUs have none, as forks hang "
                "beside gloo's threads; each process reads its audio itself",
                stacklevel=2,
            )
            self.dataloader_num_workers = 0
            for flag in NEED_WORKERS:
                setattr(self, flag, None)
        for flag in self._VALID_DICT_FIELDS:
            check_json(flag, getattr(self, flag))
        try:
            super().__post_init__()
        except TypeError as error:
            raise InputError(f"--accelerator_config: {error}") from error
        check_optimizer(self)
        check_schedule(self)
        check_loggers(self)
        check_batches(self)
        # or each tensor of a batch waits for the GPU
        self.accelerator_config.non_blocking = torch.accelerator.is_available()
        self.remove_unused_columns = False  # rows are Utterances
        self.train_sampling_strategy = "sequential"  # rows are in their order
        self.ddp_find_unused_parameters = False  # every step uses the whole projector

    @property
    def global_batch_size(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def check_processes(self) -> None:
        """InputError for several GPUs in one process. Call it when DeepSpeed has started."""
        if self.n_gpu > 1:
            raise InputError(
                f"{self.n_gpu} GPUs are visible and one process was started: torchrun "
                f"--nproc_per_node={self.n_gpu} train.py ..., or CUDA_VISIBLE_DEVICES=0"
            )


@dataclass(kw_only=True)
class ScoringArguments:
    """The flags of every command that scores."""

    metric: Literal["auto", "WER", "CER", "MER"] = HfArg(
        default="auto",
        help="Words (WER), characters (CER), or characters of Chinese and words of the rest (MER).",
    )
    normalizer: Literal["auto", "english", "basic", "none"] = HfArg(
        default="auto",
        help="For both sides; auto: english where references are English, otherwise basic.",
    )


@dataclass(kw_only=True)
class RecognitionArguments(ScoringArguments):
    """The flags of recognize.py."""

    projector_model_path: str = HfArg(
        help="The model.safetensors that train.py wrote, or user/name on the Hub.",
    )
    data_path: list[str] = HfArg(
        help="JSONL manifests, behind one flag; lines without txt are recognised and not scored.",
    )
    result_path: Path = HfArg(
        help="JSONL of the results; several beams have a file each.",
    )
    num_beams: list[int] = HfArg(
        default_factory=lambda: [3],
        help="Widths of the beam; 1 is greedy.",
    )
    batch_size: int = HfArg(
        default=8,
        help="How many utterances are decoded at once.",
    )
    word_times: bool = HfArg(
        default=False,
        aliases=["--word_timestamps"],
        help="Whether results have the start and end of each word, in seconds, by CTC.",
    )
    ctc_weight: float = HfArg(
        default=CTC_WEIGHT,
        help="How much CTC's log-probability counts beside the LLM's; 0 leaves it out.",
    )
    max_new_tokens: int | None = HfArg(
        default=None,
        help="Most tokens of a hypothesis and its end; by default as many as its audio allows.",
    )
    bf16: bool = HfArg(
        default=has_fast_bf16(),
        help="Whether to compute in bfloat16; by default where that is faster than float32.",
    )
    encoder_cache: str | None = HfArg(
        default=None,
        help="A folder that keeps encoder outputs for later runs.",
    )
    num_workers: int = HfArg(
        default=2,
        help="Processes that read audio; 0 reads it in this one.",
    )
    llm_model_name_or_path: str | None = HfArg(
        default=None,
        help="Where the LLM is now, if it moved since training.",
    )
    whisper_model_name_or_path: str | None = HfArg(
        default=None,
        help="Where the encoder is now, if it moved since training.",
    )

    def __post_init__(self):
        check_no_empty(self)
        for beams in self.num_beams:
            check_positive("num_beams", beams)
        self.num_beams = [*dict.fromkeys(self.num_beams)]  # each once
        check_positive("batch_size", self.batch_size)
        check_not_negative("ctc_weight", self.ctc_weight)
        check_not_negative("num_workers", self.num_workers)
        if self.max_new_tokens is not None:
            check_positive("max_new_tokens", self.max_new_tokens)
        check_result_path(self.result_path, self.data_path)


def plain_name(metric: str) -> str:
    """A metric as evaluation names it, of a spelling like "WER %" or eval_WER."""
    return metric.lower().removeprefix("eval_").removesuffix("%").strip()


def check_refused(args: TrainingArguments) -> None:
    """InputError for flags of the Trainer that this training does not have."""
    for flag, reason in REFUSED.items():
        value = getattr(args, flag)
        default = getattr(transformers.TrainingArguments, flag, [])
        is_off = value is False and default is not True  # the default may be None, or "no"
        if value != default and not is_off:
            raise InputError(f"--{flag} {value} is refused: {reason}")


def check_needs(args: TrainingArguments) -> None:
    """InputError for a flag without another that it needs."""
    evaluates = args.eval_strategy != "no"
    if not args.eval_data_path:
        if evaluates:
            raise InputError(f"--eval_strategy {args.eval_strategy} needs --eval_data_path")
        if args.eval_hypotheses > 0:
            raise InputError("--eval_hypotheses needs --eval_data_path")
        if args.eval_on_start:
            raise InputError("--eval_on_start needs --eval_data_path")
    if args.load_best_model_at_end and not evaluates:
        raise InputError("--load_best_model_at_end needs --eval_strategy")
    if args.save_strategy == "best":
        if not evaluates:
            raise InputError("--save_strategy best needs --eval_strategy")
        if args.metric_for_best_model is None:
            raise InputError("--save_strategy best needs --metric_for_best_model, such as loss")
    for flag in NEED_WORKERS:
        if getattr(args, flag) and args.dataloader_num_workers == 0:
            raise InputError(f"--{flag} needs --dataloader_num_workers of 1 or more")
    if args.ddp_backend is not None and "RANK" not in os.environ:
        raise InputError("--ddp_backend needs torchrun")
    if args.deepspeed and not is_deepspeed_available():
        raise InputError("--deepspeed needs a package that is not there: pip install deepspeed")


def check_json(flag: str, value: str | dict | None) -> None:
    """InputError if a flag that takes JSON has something else, or names no file of it."""
    if not isinstance(value, str):
        return
    if not flag.endswith("_kwargs") and os.path.isfile(value):
        return
    try:
        json.loads(value)
    except ValueError as error:
        raise InputError(f"--{flag} {value} is neither JSON nor a file: {error}") from None


def check_optimizer(args: TrainingArguments) -> None:
    """InputError if the optimizer cannot be made, for want of a package or of `optim_args`."""
    try:
        transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        name = args.optim.value
        raise InputError(f"--optim {name}, --optim_args {args.optim_args}: {error}") from error


def check_schedule(args: TrainingArguments) -> None:
    """InputError if the schedule cannot be made of its `lr_scheduler_kwargs`."""
    name, options = args.lr_scheduler_type.value, args.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.zeros(1)])  # stands in for the model's
    try:
        transformers.get_scheduler(name, optimizer, 0, 1, options)
    except (TypeError, ValueError) as error:
        raise InputError(f"--lr_scheduler_type {name}, its options {options}: {error}") from error


def check_loggers(args: TrainingArguments) -> None:
    """InputError for a logger that transformers does not know, or whose package is missing."""
    from transformers.integrations import get_available_reporting_integrations  # takes a second

    installed = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in installed:
            raise InputError(f"--report_to {name}: not installed; loggers that are: {installed}")


def check_batches(args: TrainingArguments) -> None:
    """InputError where accelerate would change the batches, which are by length already."""
    for flag, value in PLAIN_BATCHES.items():
        given = getattr(args.accelerator_config, flag)
        if given != value:
            raise InputError(
                f"--accelerator_config: {flag} {given} is refused: batches are by length already"
            )


def check_evaluation(args: TrainingArguments, utterances: list[Utterance]) -> None:
    """InputError if evaluation of these will have nothing, or not the metric for the best model."""
    if args.eval_strategy == "no" and not args.eval_on_start:
        return
    check_drop_last(args, "eval_data_path", len(utterances), args.eval_batch_size)
    names = ["loss"]
    if not args.prediction_loss_only:
        if min(len(utterances), args.eval_batch_size) > 1:
            names.append(GAP)
        if args.eval_hypotheses > 0:
            texts = [{"txt": x.text} for x in utterances[: args.eval_hypotheses]]
            metric, _ = choose_metric(texts, "auto", "auto")
            names += [metric.lower(), *EDITS]
    if args.metric_for_best_model not in [None, *names]:
        raise InputError(
            f"--metric_for_best_model {args.metric_for_best_model}: evaluation will have "
            f"{', '.join(names)}; error rates need --eval_hypotheses, the gap batches of 2"
        )


def check_drop_last(args: TrainingArguments, flag: str, utterances: int, batch_size: int) -> None:
    """InputError if --dataloader_drop_last leaves nothing of a set."""
    size = batch_size * args.world_size
    if args.dataloader_drop_last and utterances < size:
        raise InputError(
            f"--dataloader_drop_last leaves nothing of the {utterances} utterances in --{flag}, as "
            f"all processes together take {size}: leave it out, or lower the batch size"
        )


def check_result_path(path: Path, inputs: list[str | Path]) -> None:
    """InputError if it is a folder, or if it or its part is a file that the command reads."""
    if path.is_dir():
        raise InputError(f"--result_path must be a file, got the folder {path}")
    for written in (path, part_path(path)):
        if is_among(written, inputs):
            raise InputError(
                f"--result_path would replace {written}, which is read: give another file"
            )


def part_path(path: Path) -> Path:
    """Where results are until all are there: a stop leaves the file at `path` whole."""
    return path.with_name(f"{path.name}.part")


def is_among(path: Path, others: list[str | Path]) -> bool:
    """Whether a path is the file of one of the others, however they are written."""
    return path.resolve() in [Path(other).resolve() for other in others]


def check_not_negative(flag: str, value: float) -> None:
    if value < 0:
        raise InputError(f"--{flag} must not be negative, got {value}")


def check_above_zero(flag: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise InputError(f"--{flag} must be above 0, got {value}")


def check_no_empty(args) -> None:
    """InputError for a flag whose value is "", where that means nothing."""
    for flag, value in vars(args).items():
        if value == "" and flag not in MAY_BE_EMPTY:
            raise InputError(f"--{flag} is empty: give a value, or leave it out")


def check_positive(flag: str, value: int) -> None:
    if value < 1:
        raise InputError(f"--{flag} must be at least 1, got {value}")
