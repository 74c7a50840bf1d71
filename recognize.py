"""Recognise a manifest with beam search and score it.

    python recognize.py --projector_model_path exp/model.safetensors --data_path test.jsonl \
        --result_path result.jsonl

writes one hypothesis a line in the manifest's order, and prints WER, or CER for Chinese and
Japanese, of the utterances that have a transcript.
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jiwer
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

from data import collate, read_manifest
from model import load, run


@dataclass
class Arguments:
    projector_model_path: str = HfArg(help="The model.safetensors that train.py wrote.")
    data_path: list[str] = HfArg(help="JSONL manifests; txt may be missing.")
    result_path: str = HfArg(help="One hypothesis a line: text if it ends in .txt, else JSONL.")
    num_beams: int = HfArg(default=3, help="Width of the beam; 1 is greedy.")
    batch_size: int = HfArg(default=8, help="Utterances decoded at once.")
    bf16: bool = HfArg(default=torch.accelerator.is_available(), help="bfloat16, not float32.")
    llm_model_name_or_path: str | None = HfArg(default=None, help="Where it is now, if it moved.")
    whisper_model_name_or_path: str | None = HfArg(default=None, help="Where it is now, likewise.")


def recognize(model, rows: list[dict], batch_size: int, num_beams: int):
    """Add its hypothesis as `hyp` to each row of a manifest, and yield it, large files first.

    Several processes share the batches out, and each of them yields all rows.
    """
    rows, accelerator = sorted(rows, key=lambda row: -row["_size"]), Accelerator()
    collator, pending = partial(collate, **model.collation), iter(rows)
    loader = torch.utils.data.DataLoader(rows, batch_size, collate_fn=collator, num_workers=2)
    for batch in tqdm(accelerator.prepare(loader)):
        texts = model.tokenizer.batch_decode(model.generate(num_beams, **batch), True)
        for text, row in zip(accelerator.gather_for_metrics(texts, True), pending):
            row["hyp"] = " ".join(text.split())
            yield row


def score(references: list[str], hypotheses: list[str]) -> str:
    """The error rate in words: CER where most of the text is Chinese or Japanese, otherwise WER.

    openai-whisper normalises both sides, the English way where the references are nearly all ASCII.
    """
    text = "".join(references)
    # kana and Chinese characters, which are written without word boundaries
    cer = len(re.findall("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]", text)) > len(text) / 2
    english = sum(character.isascii() for character in text) > 0.99 * len(text)
    normalize = EnglishTextNormalizer() if english else BasicTextNormalizer(split_letters=cer)
    out = jiwer.process_words(*([normalize(x) for x in side] for side in (references, hypotheses)))
    edits = f"{out.substitutions} substituted, {out.deletions} deleted, {out.insertions} inserted"
    rate = f"{'CER' if cer else 'WER'} {100 * out.wer:.2f} % in {len(references)} utterances"
    return f"{rate}: {out.hits} right, {edits}"


def main(argv: list[str] | None = None) -> None:
    [args] = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    rows = read_manifest(args.data_path, default="")
    state = PartialState(cpu=not torch.accelerator.is_available())
    part = Path(f"{args.result_path}.part" if state.is_main_process else "/dev/null")
    part.parent.mkdir(parents=True, exist_ok=True)
    # if it cannot be written, then before models load
    with part.open("w", encoding="utf-8", errors="replace") as file:
        model = load(**vars(args)).to(state.device).eval().requires_grad_(False)
        for row in recognize(model, rows, args.batch_size, args.num_beams):
            print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
    plain = args.result_path.endswith(".txt")
    with part.open("w", encoding="utf-8", errors="replace") as file:
        for row in rows:
            del row["_path"], row["_size"]
            print(row["hyp"] if plain else json.dumps(row, ensure_ascii=False), file=file)
    if state.is_main_process:
        part.replace(args.result_path)
        if scored := [(row["txt"], row["hyp"]) for row in rows if "txt" in row]:
            print(score(*zip(*scored)))


if __name__ == "__main__":
    run(main)
