"""This process, and what its machine computes fast."""

import os
import time
import warnings

import torch
from accelerate import PartialState

LET_GO = 0.2  # seconds that threads of other libraries get for it


def get_process() -> PartialState:
    """This process among those of the run, with its device; the CPU if there is no accelerator."""
    return PartialState(cpu=not torch.accelerator.is_available())


def end_processes() -> None:
    """Leave the run's group of processes, at the end of a command.

    gloo's threads let go of the last tensors a moment after these have arrived, and need the
    interpreter for it. A thread that still wants it when it ends would abort the process.
    """
    state = PartialState()
    if state.num_processes > 1:
        time.sleep(LET_GO)
    state.destroy_process_group()


def choose_workers() -> int:
    """How many data workers each process of a training has by default.

    An accelerator must not wait for audio; a CPU trains slower than it reads.
    """
    if not torch.accelerator.is_available():
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
    return min(4, (os.cpu_count() or 1) // processes)


def may_fork() -> bool:
    """Whether data workers may be forked: not from one of several processes on CPUs.

    These share their results by threads of gloo. A worker that is forked while one of them holds a
    lock of the interpreter would wait for it forever.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    return processes == 1 or torch.accelerator.is_available()


def has_fast_bf16() -> bool:
    """Whether bfloat16 is faster here than float32: on accelerators and CPUs made for it.

    A CPU without AVX512-BF16 or AMX emulates it. oneDNN knows what DNNL_MAX_CPU_ISA leaves of them.
    """
    if torch.accelerator.is_available():
        return True
    return torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_bf16(wanted: bool) -> bool:
    """Whether to compute in bfloat16: if wanted, and this machine does not have to emulate it."""
    if wanted and not has_fast_bf16():
        warnings.warn(
            "this processor emulates bfloat16, which is about 100 times slower: "
            "computing in float32",
            stacklevel=2,
        )
        return False
    return wanted


def choose_attention(bf16: bool, training: bool) -> str | None:
    """The LLM's implementation of attention for transformers; None is its default, sdpa."""
    if training and bf16 and not torch.accelerator.is_available():
        return "eager"  # sdpa's backward in bfloat16 is slow on CPUs, its forward is fast
    return None


def name_arithmetic(bf16: bool) -> str:
    """What the last bits of a computation depend on, such as "AVX2 in float32"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    processor = torch.backends.cpu.get_cpu_capability()
    if accelerator is not None:
        processor = accelerator.type
    precision = "bfloat16" if bf16 else "float32"
    return f"{processor} in {precision}"
