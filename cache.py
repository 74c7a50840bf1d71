"""The encoder, and its outputs on disk.

Shapes: N windows, M mel bins, F mel frames of a window, E encoder positions (F / 2), C encoder
width.
"""

import os
import warnings
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from command import InputError


class Encoder:
    """A frozen Whisper encoder, which keeps its outputs in a folder if it is given one.

    It is no nn.Module on purpose: as a part of the model ZeRO-3 would shard it, and processes that
    call it a different number of times would wait for one another forever.

    Several processes and runs may share the folder. An entry is named by a hash of the window's
    log-mel, the encoder's weights and the precision, so that none is ever out of date.
    """

    def __init__(self, module: nn.Module, folder: str | Path | None = None):
        self.module = module.requires_grad_(False).eval()
        self.n_mels = module.conv1.in_channels  # 80, or 128 from large-v3 on
        self.width = module.conv1.out_channels
        self.folder = None
        if folder is not None:
            self.folder = make_folder(Path(folder, hash_weights(module)))

    def __call__(self, windows: Tensor) -> Tensor:
        """Log-mel windows (N, M, F) of one size -> encoder outputs (N, E, C)."""
        windows = windows.to(self.module.conv1.weight.dtype)
        if self.folder is None:
            return self.compute(windows)
        autocast = torch.is_autocast_enabled(windows.device.type)
        # all windows and all outputs at once between the devices: each time is a wait
        paths = [self.entry(window, autocast) for window in windows.cpu()]
        outputs = [read_entry(path) for path in paths]
        new = [i for i, output in enumerate(outputs) if output is None]
        if new:
            for i, output in zip(new, self.compute(windows[new]).cpu()):
                outputs[i] = output.clone()
                self.write_entry(paths[i], outputs[i])
        return torch.stack(outputs).to(windows.device)

    def compute(self, windows: Tensor) -> Tensor:
        """Whisper's encoder is made for 30 s, but its positions are sines, and end anywhere."""
        if self.module.conv1.weight.device != windows.device:
            self.module.to(windows.device)
        positions = self.module.positional_embedding[: windows.shape[2] // 2]
        shortened = {"positional_embedding": positions}
        return torch.func.functional_call(self.module, shortened, windows)

    def entry(self, window: Tensor, autocast: bool) -> Path:
        """The file of a window (M, F), which is on the CPU."""
        key = sha256(f"{window.dtype} {autocast} {tuple(window.shape)}".encode())
        key.update(read_bytes(window))
        return self.folder / f"{key.hexdigest()}.safetensors"

    def write_entry(self, path: Path, output: Tensor) -> None:
        """Under another name first, so that no half an entry is found; a full disk only warns."""
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(save({"encoded": output}))
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            warnings.warn(f"{self.folder} gets no new entries: {error.strerror}", stacklevel=2)


def make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--encoder_cache: cannot make {path}: {error.strerror}") from error
    return path


def read_entry(path: Path) -> Tensor | None:
    """What is kept under this name; None if nothing is, or it is damaged."""
    try:
        return load_file(path)["encoded"]
    except (FileNotFoundError, SafetensorError):
        return None


def hash_weights(module: nn.Module) -> str:
    digest = sha256()
    for tensor in module.state_dict().values():
        digest.update(sha256(read_bytes(tensor.cpu())).digest())
    return digest.hexdigest()[:16]


def read_bytes(tensor: Tensor) -> np.ndarray:
    """What a tensor on the CPU holds, for a hash; numpy has no bfloat16."""
    return tensor.detach().contiguous().view(torch.uint8).numpy()
