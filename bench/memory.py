"""What fits where? The memory of a process, computed for well-known models or measured in training.

    python -m bench.memory table
    python -m bench.memory measure --data_path dev.jsonl --llm_model_name_or_path LLM \
        --whisper_model_name_or_path WHISPER.pt [MORE ARGUMENTS OF train.py]

`table` counts parameters from the models' shapes, without weights: the LLM in bfloat16 in equal
shares, its largest module whole, the encoder in bfloat16, and the projector with gradients and
Adam's states. Activations come on top.

`measure` trains eight steps with one process, with two, and with two under ZeRO-3, and prints what
each process holds: anonymous pages, and so without libraries and weight files that are mapped.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from whisper.model import AudioEncoder

import train
from command import InputError, run_command
from model import Config, Projector
from scoring import format_table

GIB = 2**30
GPUS = (1, 2, 4, 8)
QWEN = (Qwen2Config, Qwen2ForCausalLM)
LLAMA = (LlamaConfig, LlamaForCausalLM)
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
LLMS = {
    "Qwen2-0.5B": (QWEN, (896, 4864, 24, 14, 2, 151_936, True)),
    "Qwen2-1.5B": (QWEN, (1536, 8960, 28, 12, 2, 151_936, True)),
    "Qwen2-7B": (QWEN, (3584, 18_944, 28, 28, 4, 152_064, False)),
    "LLaMA3-8B": (LLAMA, (4096, 14_336, 32, 32, 8, 128_256, False)),
}
# mel bins, positions, width, heads, layers
ENCODERS = {
    "tiny": (80, 1500, 384, 6, 4),
    "small": (80, 1500, 768, 12, 12),
    "large-v3": (128, 1500, 1280, 20, 32),
}
SETUPS = {
    "1": (1, []),
    "2, DDP": (2, []),
    "2, ZeRO-3": (2, ["--deepspeed", "ds_config_zero3.json"]),
}
STEPS = ["--max_steps", "8", "--save_steps", "8", "--per_device_train_batch_size", "1"]


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make_table() -> str:
    """GiB of a process without activations, by models and number of GPUs."""
    table = []
    for llm_name, ((config_class, llm_class), sizes) in LLMS.items():
        config = config_class(**dict(zip(SIZES, sizes)))
        with torch.device("meta"):
            llm = llm_class(config)
        leaves = [count(module) for module in llm.modules() if not list(module.children())]
        for encoder_name, dimensions in ENCODERS.items():
            with torch.device("meta"):
                encoder = AudioEncoder(*dimensions)
                width = encoder.conv1.out_channels
                hidden_dim, stride = Config.hidden_dim, Config.stride
                projector = count(Projector(width, config.hidden_size, hidden_dim, stride))
            row = {"LLM": llm_name, "encoder": encoder_name}
            row["projector"] = f"{projector / 2**20:.2f} M"
            for gpus in GPUS:
                shared = (2 * count(llm) + 16 * projector) / gpus
                gathered = 2 * max(leaves) if gpus > 1 else 0
                total = shared + gathered + 2 * count(encoder)
                row[f"{gpus} GPU, GiB each"] = f"{total / GIB:.1f}"
            table.append(row)
    return format_table(table)


class Watch:
    """The peaks of this process's anonymous memory, in bytes, by phase."""

    def __init__(self):
        self.phase = "loading"
        self.peaks = {"loading": 0, "loaded": 0, "training": 0}
        threading.Thread(target=self.sample, daemon=True).start()

    def sample(self) -> None:
        while True:
            self.peaks[self.phase] = max(self.peaks[self.phase], read_memory())
            time.sleep(0.02)

    def build(self, *args, **options):
        """loading.build, behind which training begins."""
        model = self.original_build(*args, **options)
        self.peaks["loaded"] = read_memory()
        self.phase = "training"
        return model

    def train(self, arguments: list[str]) -> None:
        # train.py shows nobody when its models are there
        self.original_build, train.build = train.build, self.build
        train.main(arguments)


def read_memory() -> int:
    """Bytes of anonymous pages of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def watch(folder: str, arguments: list[str]) -> None:
    """Run train.py here, in one of several processes, and write its peaks into the folder."""
    watching = Watch()
    watching.train([*arguments, "--output_dir", folder])
    Path(folder, f"peaks-{os.environ['RANK']}.json").write_text(json.dumps(watching.peaks))


def measure(arguments: list[str]) -> str:
    """A row for each of SETUPS, with the peaks of all its processes."""
    # what is freed goes back to the system at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    table = []
    for name, (processes, flags) in tqdm(SETUPS.items(), "measuring"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={processes}", "-m", "bench.memory", "watch", folder]
            command += [*STEPS, "--bf16", "True", "--report_to", "none", *flags, *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise InputError(f"{name}: training failed: {done.stderr}")
            files = sorted(Path(folder).glob("peaks-*.json"))
            peaks = [json.loads(file.read_text()) for file in files]
        row = {"processes": name}
        for phase, head in (
            ("loading", "peak while loading, GiB"),
            ("loaded", "loaded"),
            ("training", "peak in training and saving"),
        ):
            row[head] = ", ".join(f"{ranks[phase] / GIB:.2f}" for ranks in peaks)
        table.append(row)
    return format_table(table)


def main(argv: list[str] | None = None) -> None:
    match sys.argv[1:] if argv is None else argv:
        case ["table"]:
            print(make_table())
        case ["measure", *arguments]:
            print(measure(arguments))
        case ["watch", folder, *arguments]:
            watch(folder, arguments)
        case _:
            raise InputError("wanted table, or measure and arguments of train.py")


if __name__ == "__main__":
    run_command(main)
