"""Begin a projector for another LLM with what one for the same encoder has learnt to hear.

    python -m experiments.graft --projector_model_path exp/model.safetensors \
        --llm_model_name_or_path Qwen2.5-Coder-0.5B-Instruct --output_path start.safetensors

The convolution and the hidden layer are those of the given projector. The last layer, which leads
into the embeddings of the LLM, is random. train.py goes on from it with `--projector_model_path`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.hf_argparser import HfArg

from command import parse_arguments, run_command
from loading import build, find_projector, read_config

SEED = 0


@dataclass
class Arguments:
    projector_model_path: str = HfArg(help="The model.safetensors of the other LLM.")
    llm_model_name_or_path: str = HfArg(help="The LLM to begin with: a name or a folder.")
    output_path: Path = HfArg(help="The projector file to write.")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    path = find_projector(args.projector_model_path)
    config = read_config(path)
    torch.manual_seed(SEED)
    model = build(replace(config, llm_model_name_or_path=args.llm_model_name_or_path))
    kept = {}
    for name, tensor in load_file(path).items():
        name = name.removeprefix("projector.")
        if not name.startswith("output."):
            kept[name] = tensor
    model.projector.load_state_dict(kept, strict=False)
    model.save_projector(args.output_path)
    print(args.output_path)


if __name__ == "__main__":
    run_command(main)
