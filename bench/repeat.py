"""How well does an LLM repeat a sentence that it is given as text? With which prompt?

    python bench/repeat.py LLM MANIFEST PROMPT...

decodes each transcript of the manifest in the place where its audio would stand, greedily, and
prints the WER of each prompt. A prompt is that of model.py: lines behind the first (apart by \\n)
are examples. What an LLM does not repeat as text it will not repeat as speech.
"""

import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import read_manifest
from model import build_prompt, choose_bf16, encode
from recognize import score


@torch.inference_mode()
def main(name: str, manifest: str, prompts: list[str]) -> None:
    results = read_manifest([manifest])
    tokenizer = AutoTokenizer.from_pretrained(name)
    dtype = torch.bfloat16 if choose_bf16(True) else torch.float32
    llm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    for prompt in prompts:
        before, after, end_id = build_prompt(tokenizer, prompt.replace("\\n", "\n"))
        texts = [encode(tokenizer, f" {row['txt']}") for row in results]
        rows = [torch.tensor([*before, *text, *after]) for text in texts]
        # greedy, without the penalties of a chat model
        llm.generation_config = GenerationConfig(eos_token_id=end_id, pad_token_id=end_id)
        hypotheses = []
        for start in tqdm(range(0, len(rows), 20), prompt):
            batch = rows[start : start + 20]
            mask = [torch.ones_like(row) for row in batch]
            inputs = {"input_ids": batch, "attention_mask": mask}
            inputs = {key: pad_sequence(x, True, 0, "left") for key, x in inputs.items()}
            ids = llm.generate(**inputs, max_new_tokens=40)
            new = ids[:, inputs["input_ids"].shape[1] :]
            hypotheses += tokenizer.batch_decode(new, skip_special_tokens=True)
        for row, hypothesis in zip(results, hypotheses):
            row["hyp"] = hypothesis
        rate, *_ = score(results).values()
        print(f"{len(before)} + {len(after)} tokens | {prompt} | {rate} %")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python bench/repeat.py LLM MANIFEST PROMPT...")
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
