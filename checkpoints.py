"""Which checkpoint a training goes on from, and what it and DeepSpeed put into one."""

import json
import math
import os
import shutil
import warnings
from functools import partialmethod
from hashlib import file_digest, sha256
from pathlib import Path

from transformers import TrainerCallback, TrainerState

from arguments import TrainingArguments
from command import InputError
from machine import name_arithmetic

ARITHMETIC = "arithmetic.txt"  # a checkpoint's file with what its last bits depend on
ARGUMENTS = "arguments.json"  # beside the weights: the flags of their run
# what goes on from the checkpoint whatever the flags say
KEPT = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "logging_steps",
    "eval_steps",
    "save_steps",
)
# what may differ, or is checked elsewhere
FREE = (
    "output_dir",
    "run_name",
    "resume_from_checkpoint",
    "data_path",
    "projector_model_path",
    "llm_model_name_or_path",
    "whisper_model_name_or_path",
    "prompt",
    "stride",
)


class NoteArithmetic(TrainerCallback):
    """Adds `ARITHMETIC` to each checkpoint."""

    def on_save(self, args, state, control, **options):
        if args.should_save:
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            (checkpoint / ARITHMETIC).write_text(name_arithmetic(args.bf16))


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint that is asked for, or the newest whole one, or None if there is none."""
    asked = args.resume_from_checkpoint
    newest = find_newest(args.output_dir)
    if asked is None:
        return newest
    if str(asked).lower() == "true":
        if newest is None:
            raise InputError(
                f"--resume_from_checkpoint {asked}: there is no whole checkpoint in "
                f"{args.output_dir}; leave the flag out to start"
            )
        return newest
    if not is_whole(Path(asked)):
        raise InputError(f"--resume_from_checkpoint: {describe_folder(asked)}")
    return asked


def find_newest(output_dir: str) -> str | None:
    """The whole checkpoint of the most steps in a folder."""
    whole = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        steps = folder.name.removeprefix("checkpoint-")
        if steps.isdecimal() and is_whole(folder):
            whole[int(steps)] = str(folder)
    if not whole:
        return None
    return whole[max(whole)]


def is_whole(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    if any(checkpoint.glob("checkpoint-*")):  # an output folder has a state, too
        return False
    return has_whole_state(checkpoint)  # this file comes last


def has_whole_state(folder: Path) -> bool:
    """Whether the Trainer's state is in a folder, and was written to its end."""
    state = folder / "trainer_state.json"
    return state.is_file() and state.read_text().endswith("\n}\n")


def describe_folder(folder: str) -> str:
    """Why a folder is no checkpoint, and what to give in its place."""
    newest = find_newest(folder)
    if newest is not None:
        return f"{folder} is a folder of checkpoints: give one of them, such as {newest}"
    if not Path(folder).is_dir():
        return f"there is no folder {folder}; wanted a checkpoint-N, or no flag for the newest"
    return f"there is no whole checkpoint in {folder}; wanted a checkpoint-N of train.py"


def go_on(args: TrainingArguments, arguments: dict, checkpoint: str, utterances: int) -> bool:
    """Whether a run has steps left after a checkpoint. One that has none gets its last weights.

    Says what comes, and warns of `arguments` that differ from the checkpoint's; of those that it
    keeps, its own replace them.
    InputError where its optimizer is missing or would be lost.
    """
    steps = count_steps(args, utterances)
    if is_finished(args, checkpoint, steps):
        if args.should_save:
            keep_last_weights(args, checkpoint)
            print(f"{args.output_dir} is finished: all of its {steps} steps are done")
        return False
    check_checkpoint(args, checkpoint)
    before = read_arguments(checkpoint)
    if args.process_index == 0:
        report_resume(arguments, before, checkpoint)
    for name in KEPT:
        arguments[name] = before.get(name, arguments[name])  # so the next one is told the truth
    return True


def count_steps(args: TrainingArguments, utterances: int) -> int:
    """The steps of a whole run, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    whole = math.floor if args.dataloader_drop_last else math.ceil
    batches = whole(utterances / args.train_batch_size)
    batches = whole(batches / args.world_size)  # of each process
    steps_an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * steps_an_epoch)


def read_state(folder: str) -> TrainerState:
    return TrainerState.load_from_json(f"{folder}/trainer_state.json")


def count_saved_steps(args: TrainingArguments, checkpoint: str) -> int:
    """The steps of the weights in output_dir, if they are of this checkpoint's run; otherwise 0."""
    folder = Path(args.output_dir)
    if not has_whole_state(folder) or not Path(folder, "model.safetensors").is_file():
        return 0
    state, logged = read_state(args.output_dir), read_state(checkpoint).log_history
    if state.log_history[: len(logged)] != logged:
        return 0
    return state.global_step


def is_finished(args: TrainingArguments, checkpoint: str, steps: int) -> bool:
    """Whether a run has made all its steps; the last may have no checkpoint."""
    done = read_state(checkpoint).global_step
    if args.resume_from_checkpoint is None:
        done = max(done, count_saved_steps(args, checkpoint))
    return done >= steps


def keep_last_weights(args: TrainingArguments, checkpoint: str) -> None:
    """Give output_dir a finished run's weights, if a stop after its last checkpoint took them."""
    state = read_state(checkpoint)
    if count_saved_steps(args, checkpoint) >= state.global_step:
        return
    source = checkpoint
    best = state.best_model_checkpoint
    if args.load_best_model_at_end and best is not None and Path(best).is_dir():
        source = best
    # the state comes last, as it says of which step the weights are
    shutil.copyfile(Path(source, "model.safetensors"), Path(args.output_dir, "model.safetensors"))
    shutil.copyfile(
        Path(checkpoint, "trainer_state.json"), Path(args.output_dir, "trainer_state.json")
    )


def check_checkpoint(args: TrainingArguments, checkpoint: str) -> None:
    """InputError for a checkpoint whose optimizer is missing, or would be lost by going on."""
    anew = (
        f"start anew from its weights with --projector_model_path {checkpoint}/"
        "model.safetensors and another --output_dir"
    )
    processes = len(list(Path(checkpoint).glob("rng_state*")))
    zero = any(Path(checkpoint).glob("global_step*"))
    if not zero and not Path(checkpoint, "optimizer.pt").is_file():
        raise InputError(f"{checkpoint} holds no optimizer, as with --save_only_model: {anew}")
    optim = read_arguments(checkpoint).get("optim", args.optim)
    if optim != args.optim:
        raise InputError(
            f"--optim {args.optim}: {checkpoint} holds the state of {optim}; give that, or {anew}"
        )
    with_zero = {True: "with ZeRO", False: "without ZeRO"}
    found = f"{processes} processes {with_zero[zero]}"
    here = f"{args.world_size} {with_zero[bool(args.deepspeed)]}"
    if zero != bool(args.deepspeed) or (zero and processes != args.world_size):
        raise InputError(
            f"{checkpoint} is of {found}, and this run is of {here}: start it as before, or "
            f"{anew}; if a kill cut this checkpoint short, remove its folder"
        )
    if processes != args.world_size:
        warnings.warn(
            f"{checkpoint} is of {found}, and this run is of {here}: it goes on as before "
            "only if processes x --per_device_train_batch_size x "
            "--gradient_accumulation_steps is the same",
            stacklevel=2,
        )
    warn_of_other_arithmetic(Path(checkpoint), args.bf16)


def describe_arguments(args: TrainingArguments) -> dict:
    """The flags of a run, and a hash of what its manifests hold, as JSON has them."""
    digest = sha256()
    for path in args.data_path:
        with open(path, "rb") as file:
            digest.update(file_digest(file, "sha256").digest())
    return {**json.loads(args.to_json_string()), "manifests": digest.hexdigest()}


def write_arguments(arguments: dict, folder: Path) -> None:
    (folder / ARGUMENTS).write_text(json.dumps(arguments, indent=2))


def read_arguments(checkpoint: str) -> dict:
    """What `write_arguments` wrote; nothing for checkpoints of older code."""
    path = Path(checkpoint, ARGUMENTS)
    if not path.is_file():
        return {}
    return json.loads(path.read_text())


def report_resume(arguments: dict, before: dict, checkpoint: str) -> None:
    """Say what a run goes on from, and warn of each flag that differs there."""
    print(f"resuming from {checkpoint} at step {read_state(checkpoint).global_step}", flush=True)
    for name, value in arguments.items():
        if name in FREE or before.get(name, value) == value:
            continue
        if name == "manifests":
            message = f"--data_path: {checkpoint} had other lines; these hold from here on"
        elif name in KEPT:
            message = f"--{name} {value} has no effect: {checkpoint} goes on with {before[name]}"
        else:
            message = f"--{name} {value} holds from here on: {checkpoint} had {before[name]}"
        warnings.warn(message, stacklevel=2)


def warn_of_other_arithmetic(checkpoint: Path, bf16: bool) -> None:
    """A warning where the checkpoint is of another kind of processor, or of another precision."""
    here = name_arithmetic(bf16)
    try:
        found = (checkpoint / ARITHMETIC).read_text()
    except FileNotFoundError:  # a stop came before it
        return
    if found != here:
        warnings.warn(
            f"{checkpoint} was computed by {found}, and this run is by {here}: it goes on, but no "
            "longer bit for bit",
            stacklevel=2,
        )


def start_deepspeed(use_cpu: bool) -> None:
    """DeepSpeed as this project needs it, before models load. It has no options for this."""
    import deepspeed

    if "RANK" not in os.environ:
        raise InputError("--deepspeed needs torchrun: torchrun --nproc_per_node=1 train.py ...")
    # frozen weights are in no checkpoint
    save = deepspeed.DeepSpeedEngine.save_checkpoint
    without_frozen = partialmethod(save, exclude_frozen_parameters=True)
    deepspeed.DeepSpeedEngine.save_checkpoint = without_frozen
    # no ops, as on CPUs each would be compiled for a minute: gloo serves
    deepspeed.ops.__compatible_ops__ = {}
    # its calls of functions that torch has renamed, hundreds of lines in each process
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend = "gloo" if use_cpu else None
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)
