"""What happens before the first step, and how much padding the order of utterances leaves.

    python -m bench.startup --projector_model_path exp/model.safetensors --data_path train.jsonl

prints the padding at random order and by length, the time and memory that manifests of up to a
million lines take, and the time of train.py with one step.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers.hf_argparser import HfArg
from whisper.audio import SAMPLE_RATE

from bench.speed import GIB, read_peak
from command import parse_arguments, run_command
from data import by_length
from loading import read_config
from manifest import read_manifest
from scoring import format_table

SECONDS = 4  # of audio in a line
KINDS = {
    "wav, with its duration": {"wav": "a.wav", "duration": SECONDS},
    "wav": {"wav": "a.wav"},
    "opus": {"wav": "a.ogg"},
}


@dataclass
class Arguments:
    projector_model_path: str = HfArg(help="A model.safetensors, for the names of its models.")
    data_path: list[str] = HfArg(help="JSONL manifests.")
    batch_size: int = HfArg(default=8, help="How many utterances are in a batch.")
    lines: list[int] = HfArg(
        default_factory=lambda: [1_000, 100_000, 1_000_000],
        help="Sizes of the manifests whose reading is timed.",
    )


def measure_padding(args: Arguments) -> str:
    """A table: how much of the audio in a batch is padding, at random and by length."""
    utterances, size = read_manifest(args.data_path), args.batch_size
    shuffled = random.Random(0).sample(utterances, len(utterances))
    orders = {"at random": shuffled, "by length": by_length(utterances, size, seed=42)}
    table = []
    for name, ordered in orders.items():
        durations = torch.tensor([x.duration for x in ordered])
        filled = sum(len(batch) * batch.max() for batch in durations.split(size))
        padding = 100 * (1 - durations.sum() / filled)
        table.append({f"order, batches of {size}": name, "padding": f"{padding:.1f} %"})
    return format_table(table)


def measure_reading(args: Arguments) -> str:
    """A table: what reading manifests takes, each in a process of its own."""
    noise = np.random.default_rng(0).normal(0, 0.1, SECONDS * SAMPLE_RATE)
    table = []
    pool = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as folder, pool:
        soundfile.write(f"{folder}/a.wav", noise, SAMPLE_RATE)
        soundfile.write(f"{folder}/a.ogg", noise, SAMPLE_RATE, subtype="OPUS")
        manifest = Path(folder, "manifest.jsonl")
        for name, keys in KINDS.items():
            line = json.dumps({**keys, "txt": "some words " * 5})
            for count in args.lines:
                manifest.write_text(f"{line}\n" * count)
                seconds, peak = pool.submit(read, str(manifest)).result()
                row = {"audio": name, "lines": count}
                row["seconds to read"] = f"{seconds:.2f}"
                row["memory"] = f"{peak / GIB:.2f} GiB"
                table.append(row)
    return format_table(table)


def read(manifest: str) -> tuple[float, int]:
    """Seconds that a manifest takes, and the memory of the process in bytes."""
    start = time.perf_counter()
    read_manifest([manifest])
    return time.perf_counter() - start, read_peak()


def measure_first_step(args: Arguments) -> str:
    """Seconds of train.py with one step and its checkpoint."""
    config = read_config(args.projector_model_path)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--output_dir", folder, "--max_steps", "1"]
        command += ["--llm_model_name_or_path", config.llm_model_name_or_path]
        command += ["--whisper_model_name_or_path", config.whisper_model_name_or_path]
        command += ["--data_path", *args.data_path, "--bf16", "True", "--report_to", "none"]
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        seconds = time.perf_counter() - start
    return f"train.py with one step, saved: {seconds:.1f} s"


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    for measure in (measure_padding, measure_reading, measure_first_step):
        print(measure(args), end="\n\n", flush=True)


if __name__ == "__main__":
    run_command(main)
