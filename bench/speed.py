"""Time this code against the data flow of the published recipe, on the same models and speech.

    python -m bench.speed --projector_model_path exp/model.safetensors --data_path train.jsonl \
        [--parts training decoding growth decoding_growth]

Both flows (bench/reference.py has the published one) have the same weights, precision and
optimizer, and read their audio between steps. Each lives in a process of its own, so that its
memory can be told. They take turns on batches that are the same in every round, and medians over
the rounds are printed.
"""

import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.hf_argparser import HfArg
from whisper.audio import SAMPLE_RATE

from bench.memory import GIB
from bench.reference import Reference
from cache import Encoder
from command import InputError, parse_arguments, run_command
from data import by_length
from loading import load, read_config
from manifest import Utterance, read_manifest
from scoring import format_table

# what a step of ours may do: a row's name, and the options of Flow.train
STEPS = {
    "ours, CTC alone": {"ctc_weight": 0.3, "ctc_only": True},
    "ours, CTC and LLM": {"ctc_weight": 0.3},
    "ours, LLM alone": {},
    "ours, CTC alone, cached": {"cached": True, "ctc_weight": 0.3, "ctc_only": True},
    "ours, CTC and LLM, cached": {"cached": True, "ctc_weight": 0.3},
}


@dataclass
class Arguments:
    projector_model_path: str = HfArg(help="The model.safetensors that train.py wrote.")
    data_path: list[str] = HfArg(help="JSONL manifests.")
    parts: list[str] = HfArg(default_factory=lambda: list(PARTS), help="What to measure.")
    rounds: int = HfArg(default=5, help="How many rounds the medians are over.")
    batch_size: int = HfArg(default=8, help="How many utterances are in a batch.")
    batches: int = HfArg(default=8, help="Batches of a round; the reference has a quarter.")
    num_beams: int = HfArg(default=4, help="Width of the beam in decoding.")

    def __post_init__(self):
        for part in self.parts:
            if part not in PARTS:
                raise InputError(f"--parts must be among {', '.join(PARTS)}, got {part}")


class Flow:
    """One way to train and decode, in a process of its own."""

    def __init__(self, args: Arguments, name: str):
        torch.manual_seed(42)
        self.args = args
        self.utterances = read_manifest(args.data_path)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        self.device = accelerator or torch.device("cpu")
        model = load(args.projector_model_path, bf16=True)
        self.is_ours = name == "ours"
        if self.is_ours:
            self.collate = model.collator()
            self.folder = tempfile.TemporaryDirectory()
            module = model.encoder.module
            self.encoders = {False: Encoder(module), True: Encoder(module, self.folder.name)}
        else:
            model = Reference(model)
            self.collate = model.collate
        self.model = model.to(self.device)
        self.llm_calls: list[int] = []  # positions that the LLM reads in each call
        model.llm.register_forward_pre_hook(self.note_call, with_kwargs=True)
        # the same projector in all rounds
        self.optimizer = torch.optim.AdamW(model.projector.parameters(), lr=0.0)

    def note_call(self, module, args: tuple, options: dict) -> None:
        inputs = options.get("inputs_embeds")
        if inputs is None:
            inputs = options["input_ids"]
        self.llm_calls.append(inputs.shape[:2].numel())

    def train(self, cached: bool = False, **options) -> dict:
        """Some batches of an epoch in its order, from the files to the optimizer's step."""
        size, count = self.args.batch_size, self.args.batches
        if self.is_ours:
            self.model.encoder = self.encoders[cached]
            ordered = by_length(self.utterances, size, seed=42)
        else:
            count = max(count // 4, 1)
            ordered = random.Random(0).sample(self.utterances, len(self.utterances))
        batches = cut(ordered, size)
        batches.sort(key=lambda batch: batch[0].duration)
        step = max(len(batches) // count, 1)
        return self.step(batches[step // 2 :: step][:count], **options)  # short ones and long ones

    def step(self, batches: list[list[Utterance]], **options) -> dict:
        self.model.train()
        self.llm_calls.clear()
        start = time.perf_counter()
        for batch in batches:
            inputs = send_to_device(self.collate(batch), self.device)
            loss = self.model(**inputs, **options)["loss"]
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start
        count = sum(len(batch) for batch in batches)
        return {"seconds": seconds, "utterances": count, "positions": sum(self.llm_calls)}

    def count(self, **options) -> dict:
        """The floating-point operations of `train`."""
        with FlopCounterMode(display=False) as counter:
            self.train(**options)
        return {"operations": counter.get_total_flops()}

    @torch.inference_mode()
    def decode(self, limits: list[int] | None = None) -> dict:
        """The first batches of the manifest; the reference takes `limits` tokens for each."""
        self.model.eval()
        size, beams = self.args.batch_size, self.args.num_beams
        utterances = self.utterances[: size * max(self.args.batches // 4, 1)]
        batches = cut(sorted(utterances, key=lambda x: x.duration, reverse=True), size)
        tokens = []
        start = time.perf_counter()
        for i, batch in enumerate(batches):
            self.llm_calls.clear()
            inputs = send_to_device(self.collate(batch), self.device)
            if self.is_ours:
                audio = self.model.embed_audio(inputs["mel"], inputs["lengths"])
                self.model.generate(audio, beams)
            else:
                self.model.generate(inputs["mel"], inputs["ask"], beams, limits[i])
            tokens.append(len(self.llm_calls))  # a call for each
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "utterances": len(utterances), "tokens": tokens}

    def grow(self, seconds: int, size: int) -> dict:
        """Three steps with noise of so many seconds, three words to each of them."""
        text = "and then some " * seconds
        noise = np.random.default_rng(0).normal(0, 0.1, seconds * SAMPLE_RATE)
        utterance = Utterance("noise", seconds, text, samples=noise.astype(np.float32))
        batch = [utterance] * size
        self.step([batch], ctc_weight=0.3)  # memory warms up
        return self.step([batch] * 3, ctc_weight=0.3)

    @torch.inference_mode()
    def grow_decoding(self, seconds: int, num_beams: int) -> dict:
        """A batch of the manifest's speech, joined and cut to so many seconds."""
        self.model.eval()
        wanted = seconds * SAMPLE_RATE
        speech = []
        while sum(map(len, speech)) < wanted:
            speech.append(self.utterances[len(speech) % len(self.utterances)].load())
        samples = np.concatenate(speech)[:wanted]
        batch = [Utterance("joined", seconds, "", samples=samples)] * self.args.batch_size
        inputs = send_to_device(self.collate(batch), self.device)
        start = time.perf_counter()
        audio = self.model.embed_audio(inputs["mel"], inputs["lengths"])
        self.llm_calls.clear()
        self.model.generate(audio, num_beams)
        seconds_taken = time.perf_counter() - start
        return {"seconds": seconds_taken, "utterances": len(batch), "tokens": len(self.llm_calls)}

    def limit(self) -> dict:
        """The limit in the flows' precision."""
        size = 2048 if self.device.type == "cpu" else 8192
        return {"limit": measure_limit(size, self.model.llm.dtype, self.device)}


def measure_limit(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of products of two square matrices, over a second."""
    a = torch.randn(size, size, dtype=dtype, device=device)
    (a @ a).sum().item()  # which waits for the device
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 1:
        (a @ a).sum().item()
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - start)


class FlowProcess:
    """A Flow in another process: a call is of one of its methods."""

    def __init__(self, args: Arguments, name: str):
        spawn = get_context("spawn")
        self.pool = ProcessPoolExecutor(1, spawn, initializer=make_flow, initargs=(args, name))

    def __call__(self, method: str, **options) -> dict:
        return self.pool.submit(call_flow, method, options).result()


def make_flow(args: Arguments, name: str) -> None:
    global flow  # of this process
    flow = Flow(args, name)


def call_flow(method: str, options: dict) -> dict:
    """What a method of the flow returns, and `peak`, the bytes of this process while it ran."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    result = getattr(flow, method)(**options)
    return {**result, "peak": read_peak()}


def read_peak() -> int:
    """Bytes of the most memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def cut(utterances: list[Utterance], size: int) -> list[list[Utterance]]:
    return [utterances[start : start + size] for start in range(0, len(utterances), size)]


def summarise(rounds: list[dict]) -> tuple[float, float, str]:
    """The median of seconds, utterances a second, and the peak of memory."""
    seconds = median(x["seconds"] for x in rounds)
    peak = max(x["peak"] for x in rounds)
    return seconds, rounds[0]["utterances"] / seconds, f"{peak / GIB:.2f} GiB"


def measure_training(args: Arguments, reference: FlowProcess, ours: FlowProcess) -> str:
    """A table: both flows in turn."""
    ways = {"reference": (reference, {})}
    for name, options in STEPS.items():
        ways[name] = (ours, options)
        ours("train", **options)  # memory warms up, and the cache is filled
    limits, results = [], {name: [] for name in ways}
    for _ in tqdm(range(args.rounds), "training"):
        limits.append(ours("limit")["limit"])
        for name, (process, options) in ways.items():
            results[name].append(process("train", **options))

    limit, table = median(limits), []
    _, slowest, _ = summarise(results["reference"])
    for name, (process, options) in ways.items():
        seconds, rate, peak = summarise(results[name])
        operations = process("count", **options)["operations"]
        row = {"flow": name, "utterances/s": f"{rate:.2f}", "ratio": f"{rate / slowest:.1f}"}
        row["LLM positions/s"] = round(results[name][0]["positions"] / seconds)
        row["of the limit"] = f"{100 * operations / seconds / limit:.0f} %"
        row["peak memory"] = peak
        table.append(row)
    return f"{format_table(table)}\n\nlimit: {limit / 1e9:.0f} GFLOP/s, a product of matrices"


def measure_decoding(args: Arguments, reference: FlowProcess, ours: FlowProcess) -> str:
    """A table: both flows in turn, with as many tokens."""
    results = {"reference": [], "ours": []}
    for _ in tqdm(range(args.rounds), "decoding"):
        results["ours"].append(ours("decode"))
        tokens = results["ours"][-1]["tokens"]
        results["reference"].append(reference("decode", limits=tokens))
    table = []
    _, slowest, _ = summarise(results["reference"])
    for name, rounds in results.items():
        _, rate, peak = summarise(rounds)
        row = {f"flow, beam {args.num_beams}": name, "utterances/s": f"{rate:.2f}"}
        row["ratio"] = f"{rate / slowest:.1f}"
        row["tokens"] = ", ".join(map(str, rounds[0]["tokens"]))
        row["peak memory"] = peak
        table.append(row)
    return format_table(table)


def measure_growth(args: Arguments, reference: FlowProcess, ours: FlowProcess) -> str:
    """A table of ours over the length of utterances and the size of batches."""
    table = []
    for seconds in tqdm((2, 5, 10, 20), "growth"):
        row = {"seconds of audio": seconds}
        for size in (1, 8, 32):
            _, rate, peak = summarise([ours("grow", seconds=seconds, size=size)])
            row[f"batch {size}"] = f"{rate:.2f}/s, {peak}"
        table.append(row)
    return format_table(table)


def measure_decoding_growth(args: Arguments, reference: FlowProcess, ours: FlowProcess) -> str:
    """A table of ours over the length of utterances and the width of the beam."""
    table = []
    for seconds in tqdm((2, 5, 10, 20, 30), "decoding growth"):
        row = {"seconds of audio": seconds}
        for beams in (1, 4, 10):
            result = ours("grow_decoding", seconds=seconds, num_beams=beams)
            taken, _, peak = summarise([result])
            factor = taken / seconds / result["utterances"]
            row["tokens"] = result["tokens"]
            row[f"RTF, memory at beam {beams}"] = f"{factor:.3f}, {peak}"
        table.append(row)
    return format_table(table)


PARTS = {
    "training": measure_training,
    "decoding": measure_decoding,
    "growth": measure_growth,
    "decoding_growth": measure_decoding_growth,
}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    # what is wrong with them is said here, and not by two processes
    read_config(args.projector_model_path)
    read_manifest(args.data_path)
    flows = [FlowProcess(args, name) for name in ("reference", "ours")]
    for part in args.parts:
        print(PARTS[part](args, *flows), end="\n\n", flush=True)
    for process in flows:
        process.pool.shutdown()


if __name__ == "__main__":
    run_command(main)
