"""What does the audio say before the LLM reads it? Greedy CTC of a trained projector, scored.

    python -m experiments.ctc_probe --projector_model_path exp/model.safetensors \
        --data_path dev.jsonl

Each position of the projected audio becomes the token with the largest CTC logit; repetitions are
merged and blanks dropped. Where this is wrong the LLM can only guess; where it is right and
recognize.py is not, the LLM does not read what is there.

Training leaves transcripts with more tokens than their audio has positions out of the CTC loss.
They are counted, and many of them call for a smaller --stride. `--result_path` keeps the hypotheses
for tools/score.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from command import parse_arguments, run_command
from loading import load
from machine import get_process
from manifest import read_manifest
from recognize import make_result, write_results
from scoring import choose_metric, format_table, score

SHOWN = 8  # utterances whose hypotheses are printed


@dataclass
class Arguments:
    projector_model_path: str = HfArg(help="The model.safetensors that train.py wrote.")
    data_path: list[str] = HfArg(help="JSONL manifests.")
    batch_size: int = HfArg(default=8, help="How many utterances are encoded at once.")
    bf16: bool = HfArg(default=False, help="Whether to compute in bfloat16.")
    encoder_cache: str | None = HfArg(default=None, help="A folder that keeps encoder outputs.")
    result_path: Path | None = HfArg(default=None, help="JSONL of the hypotheses to write.")


def decode_greedily(positions: Tensor, embeddings: Tensor, blank_id: int) -> Tensor:
    """Token ids (T,) of audio (A, D), by the LLM's embeddings (V, D) of all its tokens."""
    logits = positions.to(embeddings.dtype) @ embeddings.T
    tokens = logits.argmax(-1).unique_consecutive()
    return tokens[tokens != blank_id]


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    utterances = read_manifest(args.data_path)
    device = get_process().device
    model = load(args.projector_model_path, None, None, args.bf16, args.encoder_cache)
    model.to(device).eval()
    vocabulary = range(model.llm.get_input_embeddings().num_embeddings)
    embeddings = model.embed_text(vocabulary)  # (V, D)
    collator = model.collator()

    hypotheses, too_long = [], 0
    for batch in tqdm(DataLoader(utterances, args.batch_size, collate_fn=collator, num_workers=1)):
        batch = send_to_device(batch, device)
        audio = model.embed_audio(batch["mel"], batch["lengths"])
        losses = model.ctc_loss(audio, batch["answers"])
        too_long += int(losses.isinf().sum())
        for positions in audio:
            tokens = decode_greedily(positions, embeddings, model.blank_id)
            hypotheses.append(model.tokenizer.decode(tokens).strip())

    results = []
    for utterance, hypothesis in zip(utterances, hypotheses):
        utterance.hypotheses[1] = hypothesis
        results.append(make_result(utterance, 1))
    for result in results[:SHOWN]:
        print(f"{result['txt']} | {result['hyp']}")
    metric, normalizer = choose_metric(results, "auto", "auto")
    print(format_table([score(results, metric, normalizer)]))
    if args.result_path is not None:
        write_results(args.result_path, results, "w")
    count = f"{too_long} of {len(results)} transcripts"
    print(f"{count} have more tokens than their audio has positions")


if __name__ == "__main__":
    run_command(main)
