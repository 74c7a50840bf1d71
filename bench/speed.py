"""Time this code against the data flow of the published recipe, on the same models and speech.

    python bench/speed.py --data_path train.jsonl --llm_model_name_or_path LLM \
        --whisper_model_name_or_path WHISPER.pt [--projector_model_path model.safetensors] \
        [--parts padding startup training decoding growth]

The reference is WeST's flow, rewritten here: 30 s of mel for every utterance, the encoder in every
step, 300 slots of audio in front of the chat, all padded to 512 positions, logits for each. It has
the same weights, dtype and optimizer. Both read their data between steps. Each flow lives in a
process of its own; they take turns on batches that are the same in every round, and medians over
the rounds are printed.
"""

import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import soundfile
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser
from whisper.audio import log_mel_spectrogram, pad_or_trim

sys.path.insert(0, str(Path(__file__).parents[1]))

from cached import Cache

from data import collate, load_audio, read_manifest
from model import IGNORE, load, run
from train import by_length

ROOT = Path(__file__).parents[1]
POSITIONS, SLOTS, TOKENS = 512, 300, 50  # of the recipe: in all, of audio, and new ones at most
PARTS = ("padding", "startup", "training", "decoding", "growth")


@dataclass
class Arguments:
    data_path: list[str] = HfArg(help="JSONL manifests.")
    llm_model_name_or_path: str = HfArg(help="A folder.")
    whisper_model_name_or_path: str = HfArg(help="A .pt file.")
    projector_model_path: str | None = HfArg(default=None, help="For decoding that ends.")
    parts: list[str] = HfArg(default_factory=lambda: list(PARTS), help="What to measure.")
    rounds: int = HfArg(default=5, help="Medians are over so many.")
    batch_size: int = HfArg(default=8, help="Utterances in a batch.")
    batches: int = HfArg(default=8, help="Batches of a round; the reference has a quarter.")
    num_beams: int = HfArg(default=4, help="Width of the beam in decoding.")


class Reference(nn.Module):
    """The recipe's flow, with the modules of a SpeechLLM."""

    def __init__(self, speech_llm):
        super().__init__()
        self.encoder = speech_llm.encoder.to(speech_llm.llm.device)
        self.projector = speech_llm.projector
        self.llm, self.tokenizer = speech_llm.llm, speech_llm.tokenizer
        self.llm.set_attn_implementation("sdpa")  # the default of transformers

    def collate(self, rows: list[dict]) -> dict:
        audios = [load_audio(row["_path"]) for row in rows]
        mel = [log_mel_spectrogram(pad_or_trim(x), self.encoder.conv1.in_channels) for x in audios]
        chats = [
            [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "Transcribe the speech"},
                {"role": "assistant", "content": row["txt"]},
            ]
            for row in rows
        ]
        render = partial(self.tokenizer.apply_chat_template, return_dict=False)
        size = {"padding": "max_length", "truncation": True, "max_length": POSITIONS - SLOTS}
        ids = torch.tensor(render(chats, **size))
        ask = torch.tensor(render([chat[:2] for chat in chats], add_generation_prompt=True))
        return {"mel": torch.stack(mel), "ids": ids, "ask": ask}

    def embed(self, mel: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            encoded = self.encoder(mel.to(self.llm.dtype))
        audio = self.projector(encoded.to(self.projector.conv.bias))
        return torch.cat([audio.to(self.llm.dtype), self.llm.get_input_embeddings()(ids)], 1)

    def forward(self, mel, ids, ask):
        speaks = torch.ones(len(ids), SLOTS, dtype=torch.long, device=ids.device)
        mask = torch.cat([speaks, ids.ne(self.tokenizer.pad_token_id)], 1)
        labels = torch.cat([speaks * 0, ids], 1).masked_fill(mask == 0, IGNORE)
        labels[:, :SLOTS] = IGNORE
        return self.llm(inputs_embeds=self.embed(mel, ids), attention_mask=mask, labels=labels)

    def generate(self, num_beams: int, tokens: int, mel, ids, ask):
        options = {"num_beams": num_beams, "max_new_tokens": tokens, "do_sample": False}
        return self.llm.generate(inputs_embeds=self.embed(mel, ask), **options)


class Flow:
    """One way to train and decode, in a process of its own."""

    def __init__(self, args: Arguments, name: str):
        torch.manual_seed(42)
        self.device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.ours = load(bf16=True, **vars(args)).to(self.device)
        self.model = self.ours if name == "ours" else Reference(self.ours)
        self.args, self.rows = args, read_manifest(args.data_path)
        # an encoder that computes all anew, and one that keeps what it has computed
        self.encode, self.folder = self.ours.encoder.forward, tempfile.TemporaryDirectory()
        self.cache = Cache(self.ours.encoder, self.folder.name)
        # the same projector in all rounds
        self.optimizer = torch.optim.AdamW(self.ours.projector.parameters(), lr=0.0)

    def loader(self, rows: list[dict], size: int) -> DataLoader:
        ours = self.model is self.ours
        function = partial(collate, **self.ours.collation) if ours else self.model.collate
        # without workers: a fork makes memory slow at first, and a round is but a few batches
        return DataLoader(rows, size, collate_fn=function)

    def attend(self, implementation: str) -> None:
        """As train.py and recognize.py have it on a CPU; the reference always has the default.

        And nothing comes from the cache, unless `train` says so.
        """
        self.ours.encoder.forward = self.encode
        if self.ours.llm.dtype == torch.float32:
            implementation = "sdpa"
        if self.model is self.ours and self.device == "cpu":
            self.ours.llm.set_attn_implementation(implementation)

    def train(self, cached: bool = False, **options) -> dict:
        """Some batches of an epoch in its order, from the files to the optimizer's step."""
        self.attend("eager")
        if cached:
            self.ours.encoder.forward = self.cache
        size = self.args.batch_size
        if self.model is self.ours:
            rows, count = by_length(self.rows, size, seed=42), self.args.batches
        else:
            rows = random.Random(0).sample(self.rows, len(self.rows))
            count = max(self.args.batches // 4, 1)
        # short batches and long ones: the middle of each of `count` shares of equal size
        batches = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        batches.sort(key=lambda batch: batch[0]["duration"])
        chosen = [batches[int((k + 0.5) * len(batches) / count)] for k in range(count)]
        return self.steps(sum(chosen, []), size, **options)

    def steps(self, rows: list[dict], size: int, **options) -> dict:
        start = time.perf_counter()
        for batch in self.loader(rows, size):
            loss = self.model(**send_to_device(batch, self.device), **options)["loss"]
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        loss.item()
        return {"seconds": time.perf_counter() - start, "utterances": len(rows)}

    def grow(self, seconds: int, size: int, folder: str) -> dict:
        """Three steps with noise of so many seconds, three words to each of them."""
        self.attend("eager")
        path = Path(folder, f"{seconds}.wav")
        if not path.exists():
            soundfile.write(path, torch.randn(seconds * 16_000).numpy() / 10, 16_000)
        text = "and then some " * seconds
        row = {"_path": str(path), "txt": text, "_txt": text}
        self.steps([row] * size, size, ctc=0.3)
        return self.steps([row] * 3 * size, size, ctc=0.3)

    @torch.inference_mode()
    def decode(self, tokens: list[int] | None = None) -> dict:
        """The first batches of the manifest; the reference's with at most these tokens."""
        self.attend("sdpa")
        rows = self.rows[: self.args.batch_size * max(self.args.batches // 4, 1)]
        rows, sizes = sorted(rows, key=lambda row: -row["duration"]), []
        start = time.perf_counter()
        for i, batch in enumerate(self.loader(rows, self.args.batch_size)):
            batch = send_to_device(batch, self.device)
            if self.model is self.ours:
                ids = self.ours.generate(self.args.num_beams, **batch)
            else:
                most = tokens[i] if tokens else TOKENS
                ids = self.model.generate(self.args.num_beams, most, **batch)
            sizes.append(ids.shape[1])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "utterances": len(rows), "tokens": sizes}

    def count(self, **options) -> dict:
        """What `train` computes: floating-point operations, and positions that the LLM reads."""
        positions = []

        def hook(module, args, kwargs):
            positions.append(kwargs["inputs_embeds"].shape[:2].numel())

        handle = self.ours.llm.register_forward_pre_hook(hook, with_kwargs=True)
        with FlopCounterMode(display=False) as counter:
            self.train(**options)
        handle.remove()
        return {"operations": counter.get_total_flops(), "positions": sum(positions)}

    def limit(self) -> dict:
        """Operations a second of a large matrix product in the flows' precision, for a second."""
        a = torch.randn(2048, 2048, dtype=self.ours.llm.dtype, device=self.device)
        (a @ a).sum().item()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 1:
            (a @ a).sum().item()
            count += 1
        return {"limit": count * 2 * 2048**3 / (time.perf_counter() - start)}


def serve(args: Arguments, name: str, connection) -> None:
    """In a process of its own: answer calls of a Flow's methods, with the peak of its memory."""
    flow = Flow(args, name)
    connection.send(memory())
    for method, options in iter(connection.recv, None):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        connection.send({**getattr(flow, method)(**options), "peak": memory("VmHWM")})


def memory(key: str = "VmRSS") -> int:
    """Bytes of this process."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)]
    return int(line.split()[1]) * 1024


class Process:
    """A Flow elsewhere."""

    def __init__(self, args: Arguments, name: str):
        self.connection, end = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(args, name, end), daemon=True
        )
        self.process.start()
        end.close()  # so that a flow that fails ends the other, too
        self.idle = self.connection.recv()

    def __call__(self, method: str, **options) -> dict:
        self.connection.send((method, options))
        return self.connection.recv()

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


# what ours does: a row's name, and the options of `forward`
OURS = {
    "ours, CTC alone": {"ctc": 0.3, "ctc_alone": True},
    "ours, CTC and LLM": {"ctc": 0.3},
    "ours, LLM alone": {"ctc": 0.0},
    "ours, CTC alone, encoder's outputs in a cache": {
        "ctc": 0.3,
        "ctc_alone": True,
        "cached": True,
    },
    "ours, CTC and LLM, encoder's outputs in a cache": {"ctc": 0.3, "cached": True},
}


def training(args: Arguments, reference: Process, ours: Process) -> str:
    """A table: both flows in turn, medians over the rounds."""
    results = {name: [] for name in ["reference", *OURS]}
    limits = []
    for options in OURS.values():  # memory warms up, and the cache is filled
        ours("train", **options)
    for _ in tqdm(range(args.rounds), "training"):
        limits.append(ours("limit")["limit"])
        results["reference"].append(reference("train"))
        for name, options in OURS.items():
            results[name].append(ours("train", **options))
    limit, base = statistics.median(limits), None
    table = "flow | utterances/s | ratio | LLM positions/s | of the limit | peak memory\n"
    table += "---|---|---|---|---|---\n"
    for name, rounds in results.items():
        if name == "reference":
            counted, idle = reference("count"), reference.idle
        else:
            counted, idle = ours("count", **OURS[name]), ours.idle
        seconds = statistics.median(x["seconds"] for x in rounds)
        rate = rounds[0]["utterances"] / seconds
        base = base or rate
        peak = max(x["peak"] for x in rounds)
        share = counted["operations"] / seconds / limit
        table += f"{name} | {rate:.2f} | {rate / base:.1f} | {counted['positions'] / seconds:.0f} "
        table += f"| {100 * share:.0f} % | {peak / 2**30:.2f} GiB ({idle / 2**30:.2f} idle)\n"
    return table + f"\nlimit: {limit / 1e9:.0f} GFLOP/s, a product of two 2048 x 2048 matrices\n"


def decoding(args: Arguments, reference: Process, ours: Process) -> str:
    """A table: ours, and the reference with as many tokens as ours takes, and with its own."""
    mine, limited, free = [], [], []
    for _ in tqdm(range(args.rounds), "decoding"):
        mine.append(ours("decode"))
        limited.append(reference("decode", tokens=mine[-1]["tokens"]))
        free.append(reference("decode"))
    results = {"ours": mine, "reference, no more tokens than ours": limited, "reference": free}
    table = f"flow, beam {args.num_beams} | utterances/s | ratio of ours | tokens | peak memory\n"
    table += "---|---|---|---|---\n"
    base = statistics.median(x["seconds"] for x in mine)
    for name, rounds in results.items():
        seconds = statistics.median(x["seconds"] for x in rounds)
        table += f"{name} | {rounds[0]['utterances'] / seconds:.2f} | {seconds / base:.1f} | "
        tokens = ", ".join(map(str, rounds[0]["tokens"]))
        table += f"{tokens} | {max(x['peak'] for x in rounds) / 2**30:.2f} GiB\n"
    return table


def growth(args: Arguments, reference: Process, ours: Process) -> str:
    """A table of ours, CTC and LLM, over the length of utterances and the size of batches."""
    sizes = (1, 8, 32)
    table = "seconds of audio | " + " | ".join(f"batch {size}" for size in sizes)
    table += " (utterances/s, peak memory)\n" + "---|" * len(sizes) + "---\n"
    with tempfile.TemporaryDirectory() as folder:
        for seconds in tqdm((2, 5, 10, 20), "growth"):
            cells = [str(seconds)]
            for size in sizes:
                one = ours("grow", seconds=seconds, size=size, folder=folder)
                rate = one["utterances"] / one["seconds"]
                cells.append(f"{rate:.2f}, {one['peak'] / 2**30:.1f} GiB")
            table += " | ".join(cells) + "\n"
    return table


def padding(args: Arguments) -> str:
    """How much of the audio in a batch is padding, at random and by length."""
    rows, size = read_manifest(args.data_path), args.batch_size
    table = f"order, batches of {size} | padding\n---|---\n"
    shuffled = random.Random(0).sample(rows, len(rows))
    for name, order in (("at random", shuffled), ("by length", by_length(rows, size, seed=42))):
        durations = torch.tensor([row["duration"] for row in order])
        filled = sum(len(batch) * batch.max() for batch in durations.split(size))
        table += f"{name} | {100 * (1 - durations.sum() / filled):.1f} %\n"
    return table


def startup(args: Arguments) -> str:
    """Seconds until a manifest is read, and for train.py with one step."""
    table = "audio | lines of the manifest | seconds to read it | memory of the process\n"
    table += "---|---|---|---\n"
    code = "import data, sys, time; start = time.time(); data.read_manifest(sys.argv[1:]);"
    code += (
        "print(time.time() - start, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    noise = torch.randn(4 * 16_000).numpy() / 10
    with tempfile.TemporaryDirectory() as folder:
        for i in range(1000):
            soundfile.write(Path(folder, f"{i}.wav"), noise, 16_000)
            soundfile.write(Path(folder, f"{i}.ogg"), noise, 16_000, subtype="OPUS")
        kinds = {"any, with its duration": ("wav", {"duration": 4.0})}
        kinds |= {"wav": ("wav", {}), "opus": ("ogg", {})}
        for name, (suffix, keys) in kinds.items():
            for lines in (1_000, 100_000, 1_000_000):
                path = Path(folder, "manifest.jsonl")
                with path.open("w") as file:
                    for i in range(lines):
                        row = {"wav": f"{i % 1000}.{suffix}", "txt": "some words " * 5, **keys}
                        print(json.dumps(row), file=file)
                command = [sys.executable, "-c", code, str(path)]
                out = subprocess.run(
                    command, cwd=ROOT, capture_output=True, text=True, check=True
                ).stdout
                seconds, peak = out.split()
                table += f"{name} | {lines} | {float(seconds):.2f} | {int(peak) / 2**20:.2f} GiB\n"
        command = [sys.executable, "train.py", "--output_dir", folder, "--max_steps", "1"]
        command += ["--data_path", *args.data_path, "--bf16", "True", "--report_to", "none"]
        command += ["--llm_model_name_or_path", args.llm_model_name_or_path]
        command += ["--whisper_model_name_or_path", args.whisper_model_name_or_path]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        seconds = time.perf_counter() - start
    return f"{table}\ntrain.py with one step, saved: {seconds:.1f} s\n"


def main() -> None:
    [args] = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    for part in (padding, startup):
        if part.__name__ in args.parts:
            print(part(args), flush=True)
    if set(args.parts) & {"training", "decoding", "growth"}:
        flows = [Process(args, name) for name in ("reference", "ours")]
        for part in (training, decoding, growth):
            if part.__name__ in args.parts:
                print(part(args, *flows), flush=True)
        for flow in flows:
            flow.close()


if __name__ == "__main__":
    run(main)
