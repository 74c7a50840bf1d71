"""What one GPU does with this code: published sizes with random weights, built on the device.

    bash bench/gpu.sh OUT            # all parts; at most 8 minutes on an H100, without a network
    bash bench/gpu.sh OUT --tiny     # tiny sizes, which a CPU carries, too

    python -m bench.gpu --part models --llm Qwen2-1.5B --output_dir OUT

models     training steps of the Trainer, the parts of a step, the largest batch, the published flow
           (bench/reference.py) and decoding
zero       training steps of the Trainer under ZeRO-3: start it by torchrun
learning   200 steps of train.py with tiny models on tones, whose loss falls

Each part prints its tables and writes them as JSON. Audio is noise of 2 to 16 s, with three tokens
of text a second.
"""

import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback
from transformers.hf_argparser import HfArg
from whisper.audio import SAMPLE_RATE
from whisper.model import AudioEncoder

from arguments import TrainingArguments
from bench.memory import ENCODERS, GIB, LLMS, SIZES
from bench.reference import Reference
from bench.speed import measure_limit
from cache import Encoder
from checkpoints import start_deepspeed
from command import InputError, parse_arguments, run_command
from data import by_length
from loading import set_precision
from machine import get_process
from manifest import Utterance
from model import Config, SpeechLLM
from scoring import format_table
from tests import tiny
from trainer import ProjectorTrainer

WARM_UP = 10  # steps that are not timed
CTC_AND_LLM = {"ctc_weight": 0.3}
CTC_ALONE = {"ctc_weight": 0.3, "ctc_only": True}
TINY_LLM = (128, 128, 2, 4, 2, 300, True)  # as in bench.memory.SIZES
TINY_ENCODER = (80, 1500, 64, 2, 1)


@dataclass
class Arguments:
    part: Literal["models", "zero", "learning"] = HfArg(help="What to measure.")
    output_dir: Path = HfArg(help="A folder for the JSON files.")
    llm: str = HfArg(default="Qwen2-1.5B", help="Whose shape: a row of bench.memory.")
    encoder: str = HfArg(default="large-v3", help="Whose shape: a row of bench.memory.")
    batch_size: int = HfArg(default=8, help="Utterances of a batch.")
    steps: int = HfArg(default=30, help="Training steps of a row, ten of them to warm up.")
    tiny: bool = HfArg(default=False, help="Take tiny sizes in place of --llm and --encoder.")

    def __post_init__(self):
        if self.llm not in LLMS or self.encoder not in ENCODERS:
            known = ", ".join([*LLMS, *ENCODERS])
            raise InputError(f"--llm and --encoder must be among {known}")


def build_random(args: Arguments, device: torch.device, zero: bool = False) -> SpeechLLM:
    """A SpeechLLM in bfloat16 with random weights, on the device or sharded by ZeRO-3."""
    torch.manual_seed(0)
    (config_class, _), sizes = LLMS[args.llm]
    dimensions = ENCODERS[args.encoder]
    if args.tiny:
        sizes, dimensions = TINY_LLM, TINY_ENCODER
    config = config_class(**dict(zip(SIZES, sizes)))
    with device:
        encoder = AudioEncoder(*dimensions)
    set_precision(encoder, torch.bfloat16)
    if zero:
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        with device:
            llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|im_end|>")
    model = SpeechLLM(Encoder(encoder), llm, tokenizer, Config("random", "random"))
    llm.generation_config = GenerationConfig(eos_token_id=[model.end_id])
    return model.to(device)


def make_utterances(count: int, seconds: tuple[int, int] = (2, 16)) -> list[Utterance]:
    """Noise with letters for its text, of lengths from `seconds[0]` to `seconds[1]`."""
    rng = random.Random(0)
    noise = np.random.default_rng(0).normal(0, 0.1, seconds[1] * SAMPLE_RATE).astype(np.float32)
    utterances = []
    for _ in range(count):
        duration = rng.uniform(*seconds)
        samples = noise[: int(duration * SAMPLE_RATE)]
        text = "on " * int(duration)
        utterances.append(Utterance("noise", duration, text, samples=samples))
    return utterances


def wait() -> None:
    """Until the accelerator has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def measure_seconds(call: Callable, *args, **options) -> float:
    wait()
    start = time.perf_counter()
    call(*args, **options)
    wait()
    return time.perf_counter() - start


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def read_peak() -> str:
    """GiB of the most memory that tensors took on the GPU since `reset_peak`."""
    if not torch.cuda.is_available():
        return "no GPU"
    return f"{torch.cuda.max_memory_allocated() / GIB:.1f}"


class StepClock(TrainerCallback):
    """When each step of a training ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **options) -> None:
        wait()
        self.ends.append(time.perf_counter())


def train_steps(args: Arguments, name: str, flags: list[str], device: torch.device) -> dict:
    """A row for `args.steps` steps of the Trainer with both losses."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["--llm_model_name_or_path", "random", "--whisper_model_name_or_path", "random"]
        command += ["--data_path", "none", "--output_dir", folder, "--bf16", "True"]
        command += ["--per_device_train_batch_size", str(args.batch_size), "--report_to", "none"]
        command += ["--max_steps", str(args.steps), "--save_strategy", "no", "--ctc_first", "0"]
        command += ["--dataloader_num_workers", "2", "--disable_tqdm", "True", *flags]
        training = parse_arguments(TrainingArguments, command)
        if training.deepspeed:
            start_deepspeed(training.use_cpu)
        model = build_random(args, device, zero=bool(training.deepspeed))
        utterances = make_utterances(args.batch_size * args.steps)
        clock = StepClock()
        trainer = ProjectorTrainer(
            model=model,
            args=training,
            data_collator=model.collator(),
            train_dataset=by_length(utterances, args.batch_size, seed=0),
            callbacks=[clock],
        )
        positions = count_positions(model)
        reset_peak()
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    seconds = clock.ends[-1] - clock.ends[WARM_UP - 1]
    per_second = (args.steps - WARM_UP) / seconds
    return {
        "training": name,
        "utterances/s": round(args.batch_size * per_second, 1),
        "LLM positions/s": round(sum(positions) / len(positions) * per_second),
        "ms a step": round(1000 / per_second),
        "peak, GiB": read_peak(),
        "losses": losses,
    }


def count_positions(model: SpeechLLM) -> list[int]:
    """A list to which each call of the LLM adds its positions."""
    positions = []

    def note(module, args, options):
        positions.append(options["inputs_embeds"].shape[:2].numel())

    model.llm.register_forward_pre_hook(note, with_kwargs=True)
    return positions


def step(model: SpeechLLM | Reference, batch: dict, **options) -> None:
    """Forward and backward."""
    model(**batch, **options)["loss"].backward()
    model.projector.zero_grad()


def measure_parts(args: Arguments, model: SpeechLLM, device: torch.device) -> list[dict]:
    """Milliseconds of each part of a training step: medians of ten."""
    batch = make_batch(model, args.batch_size, device)
    answers, labels = batch["answers"], batch["labels"]
    seconds = defaultdict(list)
    for _ in range(10):
        audio = model.embed_audio(batch["mel"], batch["lengths"])
        seconds["encoder"].append(measure_seconds(model.encode, batch["mel"]))
        start = time.perf_counter()
        ctc = model.ctc_loss(audio, answers, zero_infinity=True).sum()
        wait()
        seconds["CTC"].append(time.perf_counter() - start)
        seconds["CTC backward"].append(measure_seconds(ctc.backward, retain_graph=True))
        start = time.perf_counter()
        loss = model.llm_loss(audio, answers, labels, 1)
        wait()
        seconds["LLM"].append(time.perf_counter() - start)
        seconds["LLM backward"].append(measure_seconds(loss.backward))
        model.projector.zero_grad()
    row = {}
    for name, values in seconds.items():
        row[f"{name}, ms"] = round(1000 * median(values), 1)
    return [row]


def find_largest_batch(args: Arguments, model: SpeechLLM, device: torch.device) -> list[dict]:
    """The largest power of two of utterances of 15 s that a training step has room for."""
    fits, rate = 0, 0.0
    size = 8
    most = 8 if args.tiny else 1024
    while size <= most:
        batch = make_batch(model, size, device, seconds=(15, 15))
        try:
            step(model, batch, **CTC_AND_LLM)
            rate = size / measure_seconds(step, model, batch, **CTC_AND_LLM)
        except torch.OutOfMemoryError:
            break
        fits = size
        size *= 2
    return [{"largest batch of 15 s": fits, "utterances/s there": round(rate, 1)}]


def make_batch(model: SpeechLLM | Reference, size: int, device, seconds=(2, 16)) -> dict:
    collate = model.collate if isinstance(model, Reference) else model.collator()
    return send_to_device(collate(make_utterances(size, seconds)), device)


def compare_flows(args: Arguments, model: SpeechLLM, device: torch.device) -> list[dict]:
    """Steps of this code and of the published flow, whose batches wait on the device."""
    size = 512 if device.type == "cpu" else 8192
    limit = measure_limit(size, model.llm.dtype, device)
    reference = Reference(model)
    flows = {
        "CTC alone": (model, CTC_ALONE),
        "CTC and LLM": (model, CTC_AND_LLM),
        "published flow": (reference, {}),
    }
    table = []
    for name, (flow, options) in flows.items():
        flow.train()
        batch = make_batch(flow, args.batch_size, device)
        with FlopCounterMode(display=False) as counter:
            step(flow, batch, **options)
        reset_peak()
        rounds = [measure_seconds(step, flow, batch, **options) for _ in range(10)]
        seconds = median(rounds)
        row = {
            "flow": name,
            "utterances/s": round(args.batch_size / seconds, 1),
            "of the limit, %": round(100 * counter.get_total_flops() / seconds / limit),
            "peak, GiB": read_peak(),
        }
        table.append(row)
    slowest = table[-1]["utterances/s"]
    for row in table:
        row["ratio"] = round(row["utterances/s"] / slowest, 1)
        row["limit, TFLOP/s"] = round(limit / 1e12, 1)
    return table


@torch.no_grad()
def compare_decoding(args: Arguments, model: SpeechLLM, device: torch.device) -> list[dict]:
    """Real-time factors of both flows, with as many tokens for each."""
    model.eval()
    tokens = 4 if args.tiny else 32
    reference = Reference(model)
    ours = make_batch(model, args.batch_size, device)
    theirs = make_batch(reference, args.batch_size, device)
    audio_seconds = sum(x.duration for x in make_utterances(args.batch_size))

    def decode_ours(beams: int) -> None:
        audio = model.embed_audio(ours["mel"], ours["lengths"])
        model.generate(audio, beams, tokens)

    def decode_theirs(beams: int) -> None:
        reference.generate(theirs["mel"], theirs["ask"], beams, tokens)

    table = []
    for beams in (1, 4):
        row = {"beam": beams}
        for name, decode in {"ours": decode_ours, "published flow": decode_theirs}.items():
            decode(beams)
            row[f"RTF, {name}"] = round(measure_seconds(decode, beams) / audio_seconds, 4)
        row["ratio"] = round(row["RTF, published flow"] / row["RTF, ours"], 1)
        table.append(row)
    return table


def measure_models(args: Arguments, device: torch.device) -> dict[str, list[dict]]:
    """All tables of one LLM's shape without ZeRO."""
    name = f"{args.encoder}, {args.llm}"
    training = []
    for flags in ([], ["--gradient_checkpointing"]):
        title = " ".join([name, *flags])
        training.append(train_steps(args, title, flags, device))
        report({"training": training[-1:]})
    reset_peak()
    model = build_random(args, device).train()
    tables = {"training": training}
    measurements = {
        "parts": measure_parts,
        "largest": find_largest_batch,
        "flows": compare_flows,
        "decoding": compare_decoding,
    }
    for part, measure in measurements.items():
        reset_peak()
        tables[part] = measure(args, model, device)
        report({part: tables[part]})
    return tables


def measure_zero(args: Arguments, device: torch.device) -> dict[str, list[dict]]:
    """The training steps under ZeRO-3."""
    table = []
    for flags in ([], ["--gradient_checkpointing"]):
        title = " ".join([f"{args.encoder}, {args.llm}, ZeRO-3", *flags])
        flags = ["--deepspeed", "ds_config_zero3.json", *flags]
        table.append(train_steps(args, title, flags, device))
        report({"zero": table[-1:]})
        reset_peak()
    return {"zero": table}


def learn(args: Arguments) -> dict[str, list[dict]]:
    """200 steps of train.py on eight tones, in a process as a user starts it."""
    steps = 20 if args.tiny else 200
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "train.py", "--output_dir", str(folder / "out")]
        command += ["--llm_model_name_or_path", str(tiny.make_llm(folder / "qwen", "qwen"))]
        command += ["--whisper_model_name_or_path", str(tiny.make_whisper(folder / "tiny.pt"))]
        command += ["--data_path", str(tiny.make_manifest(folder)), "--bf16", "True"]
        command += ["--max_steps", str(steps), "--learning_rate", "1e-3", "--report_to", "none"]
        command += ["--logging_steps", "1", "--disable_tqdm", "True", "--ctc_first", "0.3"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        state = json.loads((folder / "out" / "trainer_state.json").read_text())
    row = {"steps": steps}
    for name in ("ctc_loss", "llm_loss"):
        losses = [entry[name] for entry in state["log_history"] if name in entry]
        row[f"{name}, first"] = round(losses[0], 2)
        row[f"{name}, last ten"] = round(sum(losses[-10:]) / 10, 2)
    return {"learning": [row]}


def report(tables: dict[str, list[dict]]) -> None:
    for name, table in tables.items():
        shown = [{key: x for key, x in row.items() if key != "losses"} for row in table]
        print(f"\n{name}\n\n{format_table(shown)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    name = args.part
    if args.part == "learning":
        tables = learn(args)
        report(tables)
    else:
        device = get_process().device
        measure = measure_zero if args.part == "zero" else measure_models
        tables = measure(args, device)
        name = f"{args.part}-{args.llm}"
    tables["machine"] = [describe_machine()]
    report({"machine": tables["machine"]})
    (args.output_dir / f"{name}.json").write_text(json.dumps(tables, indent=2))


def describe_machine() -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"GPU": gpu, "torch": torch.__version__}


if __name__ == "__main__":
    run_command(main)
