"""What fits where? The memory of a process, computed for well-known models or measured in training.

    python bench/memory.py table
    python bench/memory.py measure MANIFEST WHISPER.pt LLM [MORE ARGUMENTS OF train.py]

`table` counts parameters from the models' shapes, without weights: the LLM in bfloat16 in equal
shares, its largest module whole, the encoder in float32 and the projector with gradients and Adam's
states. Activations come on top. `measure` trains eight steps with one process, with two, and with
two under ZeRO-3, and prints what each process holds: anonymous pages, and so without libraries and
weight files that are mapped.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

GIB = 2**30
GPUS = (1, 2, 4, 8)
# hidden size, intermediate size, layers, heads, heads of keys and values, vocabulary, tied
QWEN = {
    "Qwen2-0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "Qwen2-1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "Qwen2-7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}
LLAMA = {"LLaMA3-8B": (4096, 14_336, 32, 32, 8, 128_256, False)}
ENCODERS = {"tiny": (80, 384, 6, 4), "small": (80, 768, 12, 12), "large-v3": (128, 1280, 20, 32)}


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def table() -> str:
    """GiB of a process without activations, by models and number of GPUs."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from whisper.model import AudioEncoder

    from model import Projector

    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names = [*names.split(), "num_key_value_heads", "vocab_size", "tie_word_embeddings"]
    out = "LLM | encoder | projector | " + " | ".join(f"{n} GPU" for n in GPUS) + " (GiB each)\n"
    out += "---|" * (2 + len(GPUS)) + "---\n"
    for sizes, config, family in (
        (QWEN, Qwen2Config, Qwen2ForCausalLM),
        (LLAMA, LlamaConfig, LlamaForCausalLM),
    ):
        for llm_name, values in sizes.items():
            with torch.device("meta"):
                llm = family(config(**dict(zip(names, values))))
            leaves = [count(x) for x in llm.modules() if not list(x.children())]
            for name, (mels, width, heads, layers) in ENCODERS.items():
                with torch.device("meta"):
                    encoder = AudioEncoder(mels, 1500, width, heads, layers)
                    projector = count(Projector(width, values[0], 2048, 5))
                cells = [llm_name, name, f"{projector / 2**20:.2f} M"]
                for n in GPUS:
                    shared = (2 * count(llm) + 16 * projector) / n
                    gathered = 2 * max(leaves) if n > 1 else 0
                    cells.append(f"{(shared + gathered + 4 * count(encoder)) / GIB:.1f}")
                out += " | ".join(cells) + "\n"
    return out


def watch(arguments: list[str]) -> None:
    """Run train.py here, and print the peaks of this process's anonymous memory, by phase."""
    import model
    import train

    peaks, phase, load = {"loading": 0, "loaded": 0, "training": 0}, "loading", train.load

    def own() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    def sample() -> None:
        while True:
            peaks[phase] = max(peaks[phase], own())
            time.sleep(0.02)

    def watched(**options):
        nonlocal phase
        speech_llm = load(**options)
        phase, peaks["loaded"] = "training", own()
        return speech_llm

    train.load = watched
    threading.Thread(target=sample, daemon=True).start()
    model.run(lambda: train.main(arguments))
    print("\nPEAK", *peaks.values(), flush=True)


def measure(manifest: str, whisper: str, llm: str, *more: str) -> str:
    arguments = ["--data_path", manifest, "--whisper_model_name_or_path", whisper]
    arguments += ["--llm_model_name_or_path", llm, "--max_steps", "8", "--save_steps", "8"]
    arguments += ["--per_device_train_batch_size", "1", "--bf16", "True", "--report_to", "none"]
    zero = ["--deepspeed", str(ROOT / "ds_config_zero3.json")]
    out = "processes | peak while loading | loaded | peak in training and saving (GiB of each)\n"
    out += "---|---|---|---\n"
    for name, processes, flags in tqdm(
        [("1", 1, []), ("2, DDP", 2, []), ("2, ZeRO-3", 2, zero)], "measuring"
    ):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={processes}", __file__, "watch", *arguments, *flags]
            command += ["--output_dir", folder, *more]
            # what is freed goes back to the system at once
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        ranks = [x.split()[1:] for x in done.stdout.splitlines() if x.startswith("PEAK")]
        cells = [", ".join(f"{int(x) / GIB:.2f}" for x in values) for values in zip(*ranks)]
        out += " | ".join([name, *cells]) + "\n"
    return out


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["table"]:
            print(table())
        case ["measure", manifest, whisper, llm, *more]:
            print(measure(manifest, whisper, llm, *more))
        case ["watch", *arguments]:
            watch(arguments)
        case _:
            sys.exit(__doc__)
