"""Average the projectors of several checkpoints of one training into one.

    python -m tools.average --projector_model_paths exp/checkpoint-{800,900,1000} \
        --output_path exp/average.safetensors --half True

Each is a projector file, or the folder of a checkpoint. The average is a projector file like them.
`--half` stores it in float16: half the size.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.hf_argparser import HfArg

from arguments import is_among
from command import InputError, parse_arguments, run_command
from loading import last_part, read_config


@dataclass
class Arguments:
    """The flags of tools/average.py."""

    projector_model_paths: list[Path] = HfArg(
        help="Projector files, or folders of checkpoints; all of one training."
    )
    output_path: Path = HfArg(help="The projector file to write.")
    half: bool = HfArg(default=False, help="Whether to store it in float16.")

    def __post_init__(self):
        count = len(self.projector_model_paths)
        if count < 2:
            raise InputError(f"--projector_model_paths must be two or more, got {count}")
        if self.output_path.is_dir():
            raise InputError(f"--output_path must be a file, got the folder {self.output_path}")
        given = [find_file(path) for path in self.projector_model_paths]
        if is_among(self.output_path, given):
            raise InputError(f"--output_path would replace {self.output_path}, which is averaged")


def find_file(path: Path) -> Path:
    """The projector file that a path names, or that is in the folder."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"--projector_model_paths: no such file: {file}")
    return file


def check_alike(first: Path, other: Path) -> None:
    """InputError if two projectors do not belong to one training."""
    wanted = asdict(read_config(str(first)))
    found = asdict(read_config(str(other)))
    for name, value in found.items():
        if last_part(name, value) != last_part(name, wanted[name]):
            refuse(first, wanted[name], other, value, name)


def refuse(first: Path, wanted, other: Path, found, name: str) -> None:
    raise InputError(
        f"{other} has {name} {found!r}, but {first} {wanted!r}: average checkpoints of one training"
    )


def average(paths: list[Path]) -> dict[str, Tensor]:
    """The mean of each tensor of the projector files, in float32; InputError if shapes differ."""
    first = paths[0]
    read_config(str(first))  # what is no projector is refused here
    means = {name: tensor.float() for name, tensor in load_file(first).items()}
    for path in paths[1:]:
        check_alike(first, path)
        for name, tensor in load_file(path).items():
            wanted, found = list(means[name].shape), list(tensor.shape)
            if found != wanted:
                refuse(first, wanted, path, found, name)
            means[name] += tensor
    for tensor in means.values():
        tensor /= len(paths)
    return means


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def write_projector(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    content = save(weights, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"--output_path: cannot write {path}: {error.strerror}") from error


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    paths = [find_file(path) for path in args.projector_model_paths]
    weights = average(paths)
    if args.half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
    write_projector(args.output_path, weights, read_metadata(paths[0]))
    print(f"{args.output_path}: the average of {len(paths)} projectors")


if __name__ == "__main__":
    run_command(main)
