"""What does the audio say before the LLM reads it? Greedy CTC of a trained projector, scored:

    python bench/ctc.py PROJECTOR.safetensors MANIFEST.jsonl

Each position of the projected audio becomes the token whose embedding is nearest; repetitions are
merged and blanks dropped. Where this is wrong the LLM can only guess; where it is right and
recognize.py is not, the LLM does not read what is there. The CTC loss skips transcripts with more
tokens than their audio has positions: many of them call for a smaller --stride.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import model
from data import collate, read_manifest
from recognize import score


@torch.inference_mode()
def main(projector: str, manifest: str) -> None:
    rows = read_manifest([manifest])
    speech_llm = model.load(projector).eval()
    collator = partial(collate, **speech_llm.collation)
    ids = torch.arange(speech_llm.llm.config.vocab_size)
    embeddings = speech_llm.llm.get_input_embeddings()(ids)  # (V, D)
    hypotheses, skipped = [], 0
    for batch in tqdm(DataLoader(rows, 8, collate_fn=collator, num_workers=1)):
        audio, lengths = speech_llm.project(**batch)
        skipped += int(speech_llm.ctc_loss(audio, lengths, batch["labels"]).isinf().sum())
        for positions, length in zip(audio, lengths):
            tokens = (positions[:length] @ embeddings.T).argmax(-1).unique_consecutive()
            hypotheses.append(
                speech_llm.tokenizer.decode(tokens[tokens != speech_llm.blank]).strip()
            )
    for row, hypothesis in zip(rows, hypotheses):
        row["hyp"] = hypothesis
    for row in rows[:8]:
        print(f"{row['txt']} | {row['hyp']}")
    print(", ".join(f"{head}: {cell}" for head, cell in score(rows).items()))
    print(f"{skipped} of {len(rows)} transcripts have more tokens than their audio has positions")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python bench/ctc.py PROJECTOR.safetensors MANIFEST.jsonl")
    model.run(lambda: main(*sys.argv[1:]))
