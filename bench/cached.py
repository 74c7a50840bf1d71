"""Run train.py or recognize.py with a cache on disk, so that all audio is encoded only once.

    python bench/cached.py CACHE train.py --llm_model_name_or_path ...
    torchrun --nproc_per_node=2 bench/cached.py CACHE train.py ...
    python bench/cached.py CACHE recognize.py --projector_model_path ... --num_beams 4
    python bench/cached.py CACHE bench/score.py recognize.py --projector_model_path ...

CACHE is a folder, which several processes and runs may share. An entry is the encoder's output for
one window, in the precision that it was computed in; its name is a hash of the window's log-mel, of
the encoder's weights and of that precision, so that none is ever out of date. It is written under
another name first, and computed again where it is damaged. When the disk is full, training goes on
without new entries.
"""

import importlib
import os
import sys
import warnings
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

sys.path.insert(0, str(Path(__file__).parents[1]))

import model

# the commands, and the module that loads the models of each
COMMANDS = {"train.py": "train", "recognize.py": "recognize", "score.py": "recognize"}


class Cache:
    """The encoder's forward, windows (N, M, F) -> (N, E, C), that keeps what it computes."""

    def __init__(self, encoder: torch.nn.Module, folder: str | Path):
        self.forward = encoder.forward
        hashes = [sha256(x.cpu().numpy()).digest() for x in encoder.state_dict().values()]
        self.folder = Path(folder, sha256(b"".join(hashes)).hexdigest()[:16])
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, window: torch.Tensor) -> Path:
        autocast = torch.is_autocast_enabled(window.device.type)
        key = sha256(f"{window.dtype} {autocast} {tuple(window.shape)}".encode())
        key.update(window.detach().cpu().contiguous().view(torch.uint8).numpy())
        return self.folder / f"{key.hexdigest()}.safetensors"

    def read(self, path: Path) -> torch.Tensor | None:
        try:
            return load_file(path)["encoded"]
        except (FileNotFoundError, SafetensorError):
            return None

    def write(self, path: Path, encoded: torch.Tensor) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(save({"encoded": encoded}))
            part.replace(path)
        except OSError as error:
            warnings.warn(f"{self.folder} gets no new entries: {error.strerror}", stacklevel=2)
            part.unlink(missing_ok=True)

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        paths = [self.path(window) for window in windows]
        encoded = [self.read(path) for path in paths]
        new = [i for i, x in enumerate(encoded) if x is None]
        if new:
            for i, x in zip(new, self.forward(windows[new]).detach()):
                encoded[i] = x.clone()
                self.write(paths[i], encoded[i])
        return torch.stack([x.to(windows.device) for x in encoded])


def use(module, folder: str | Path) -> None:
    """Let the models that `module`, train or recognize, loads have a cache."""
    load = module.load

    def cached(**options):
        speech_llm = load(**options)
        speech_llm.encoder.forward = Cache(speech_llm.encoder, folder)
        return speech_llm

    module.load = cached


if __name__ == "__main__":
    name = Path(sys.argv[2]).name if len(sys.argv) > 2 else ""
    if name not in COMMANDS:
        sys.exit(f"usage: python bench/cached.py CACHE {'|'.join(COMMANDS)} ARGUMENTS...")
    use(importlib.import_module(COMMANDS[name]), sys.argv[1])
    command = importlib.import_module(name.removesuffix(".py"))
    model.run(lambda: command.main(sys.argv[3:]))
