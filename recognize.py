"""Recognise a manifest with beam search and score it, or recognise audio files.

    python recognize.py --projector_model_path exp/model.safetensors --data_path test.jsonl \
        --num_beams 1 3 5 --result_path result.jsonl
    python recognize.py --projector_model_path exp/model.safetensors --wav a.wav b.flac folder/

The first writes one hypothesis a line in the manifest's order, for several beams a file each, and
prints a table of WER, or CER for Chinese and Japanese, of the utterances that have a transcript.
Without --result_path hypotheses are printed, path<TAB>text.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import accelerate
import jiwer
import torch
from transformers.hf_argparser import HfArg, HfArgumentParser
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

from data import collate, read_manifest
from model import load, run


@dataclass
class Arguments:
    projector_model_path: str = HfArg(help="The model.safetensors that train.py wrote.")
    data_path: list[str] = HfArg(aliases=["--wav"], help="JSONL manifests, audio, folders of it.")
    result_path: Path | None = HfArg(default=None, help="JSONL of results, which are else printed.")
    num_beams: list[int] = HfArg(default_factory=lambda: [3], help="Beam widths; 1 is greedy.")
    batch_size: int = HfArg(default=8, help="Utterances decoded at once.")
    max_new_tokens: int = HfArg(default=0, help="Of a hypothesis; 0: as its audio allows.")
    bf16: bool = HfArg(default=torch.accelerator.is_available(), help="bfloat16, not float32.")
    llm_model_name_or_path: str | None = HfArg(default=None, help="Where it is now, if it moved.")
    whisper_model_name_or_path: str | None = HfArg(default=None, help="Where it is now, likewise.")


def recognize(model, rows: list[dict], batch_size: int, num_beams: int, top: int = 0):
    """Add to each row of `read_manifest` its hypothesis, `hyp`, and yield it, long audio first.

    A hypothesis has at most `top` tokens, or with 0 as many as its audio allows.
    Several processes share the batches out, and each of them yields all rows. The model is to be on
    accelerate's device.
    """
    rows, accelerator = sorted(rows, key=lambda row: -row["duration"]), accelerate.Accelerator()
    collator, pending = partial(collate, **model.collation, max_length=model.room), iter(rows)
    loader = torch.utils.data.DataLoader(rows, batch_size, collate_fn=collator, num_workers=2)
    for batch in accelerate.utils.tqdm(accelerator.prepare(loader)):
        # the end need not be a special token, which decode() would leave out
        ids = [x[x != model.end_id].tolist() for x in model.generate(num_beams, top, **batch)]
        for x, row in zip(accelerator.gather_for_metrics(ids, True), pending):
            row["hyp"] = " ".join(model.tokenizer.decode(x, skip_special_tokens=True).split())
            yield row


def score(rows: list[dict], norm=None) -> dict:
    """The cells of a table, by their heads, for rows with `txt` and `hyp`.

    CER where most of the references' text is Chinese or Japanese, otherwise WER; openai-whisper
    normalises both sides, the English way where the references are nearly all ASCII. Another
    `norm`, text -> text, is to put a space between any two words.
    """
    text = "".join(row["txt"] for row in rows)
    # kana to Chinese characters, which are written without word boundaries
    cer = sum("\u3040" <= x <= "\u9fff" or "\uf900" <= x <= "\ufaff" for x in text) > len(text) / 2
    english = sum(character.isascii() for character in text) > 0.99 * len(text)
    norm = norm or (EnglishTextNormalizer() if english else BasicTextNormalizer(False, cer))
    out = jiwer.process_words(*([norm(row[side]) for row in rows] for side in ("txt", "hyp")))
    edits = {x: getattr(out, x) for x in ("substitutions", "deletions", "insertions")}
    return {f"{'CER' if cer else 'WER'} %": f"{100 * out.wer:.2f}", **edits}


def main(argv: list[str] | None = None, score=score) -> None:
    [args] = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    if min(args.batch_size, *args.num_beams) < 1 or args.result_path and args.result_path.is_dir():
        raise ValueError(f"wanted num_beams, batch_size >= 1, result_path no folder, got {args}")
    rows, path, table = read_manifest(args.data_path, empty=""), args.result_path, []
    state = accelerate.PartialState(cpu=not torch.accelerator.is_available())
    part = Path(f"{path}.part" if path and state.is_main_process else "/dev/null")
    part.parent.mkdir(parents=True, exist_ok=True)
    model = load(**vars(args)).to(state.device).eval()
    for beams in args.num_beams:
        start = time.perf_counter()
        with part.open("w", encoding="utf-8", errors="replace") as file:
            for row in recognize(model, rows, args.batch_size, beams, args.max_new_tokens):
                print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
        seconds = time.perf_counter() - start
        if scored := [row for row in rows if "txt" in row]:
            rtf = f"{seconds / sum(row['duration'] for row in rows):.3f}"
            table += [{"beam": beams, **score(scored), "RTF": rtf, "seconds": f"{seconds:.1f}"}]
        lines = [json.dumps({k: x[k] for k in x if k[0] != "_"}, ensure_ascii=False) for x in rows]
        part.write_text("\n".join([*lines, ""]), encoding="utf-8", errors="replace")
        state.print(*(f"{x['_path']}\t{x['hyp']}\n" for x in rows if not path), sep="", end="")
        if path and state.is_main_process:
            part.replace(path.with_stem(path.stem + f".beam{beams}" * (len(args.num_beams) > 1)))
    for cells in [table[0], ["---"] * len(table[0]), *map(dict.values, table)] if table else []:
        state.print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    run(main)
