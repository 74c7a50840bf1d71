"""Which checkpoint a training goes on from, and what it and DeepSpeed put into one."""

import os
import warnings
from functools import partialmethod
from pathlib import Path

from transformers import TrainerCallback

from arguments import TrainingArguments
from command import InputError
from machine import name_arithmetic

ARITHMETIC = "arithmetic.txt"  # a checkpoint's file with what its last bits depend on


class NoteArithmetic(TrainerCallback):
    """Adds that file to each checkpoint."""

    def on_save(self, args, state, control, **options):
        if args.should_save:
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            (checkpoint / ARITHMETIC).write_text(name_arithmetic(args.bf16))


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one that is asked for, or the newest whole one.

    InputError where its optimizer would be lost.
    """
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None:
        whole = {}
        for state in Path(args.output_dir).glob("checkpoint-*[0-9]/trainer_state.json"):
            if state.read_text().endswith("\n}\n"):  # this file comes last
                whole[int(state.parent.name.removeprefix("checkpoint-"))] = str(state.parent)
        if not whole:
            return None
        checkpoint = whole[max(whole)]

    if not Path(checkpoint, "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint: there is no checkpoint in {checkpoint}")
    processes = len(list(Path(checkpoint).glob("rng_state*")))
    zero = any(Path(checkpoint).glob("global_step*"))
    with_zero = {True: "with ZeRO", False: "without ZeRO"}
    found = f"{processes} processes {with_zero[zero]}"
    here = f"{args.world_size} {with_zero[bool(args.deepspeed)]}"
    if zero != bool(args.deepspeed) or (zero and processes != args.world_size):
        raise InputError(
            f"{checkpoint} is of {found}, and this run is of {here}: start it as before, or "
            f"start anew from its weights with --projector_model_path {checkpoint}/"
            "model.safetensors and another --output_dir; if a kill cut this checkpoint short, "
            "remove its folder"
        )
    if processes != args.world_size:
        warnings.warn(
            f"{checkpoint} is of {found}, and this run is of {here}: it goes on as before "
            "only if processes x --per_device_train_batch_size x "
            "--gradient_accumulation_steps is the same",
            stacklevel=2,
        )
    warn_of_other_arithmetic(Path(checkpoint), args.bf16)
    return checkpoint


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
