"""Recognise a manifest with Whisper's own decoder, to stand beside recognize.py's result:

    python bench/native.py --whisper_model_name_or_path WHISPER.pt --data_path dev.jsonl \
        --result_path native.jsonl [--language en] [--beside ours.jsonl ...]

writes a hypothesis a line, as recognize.py does, and prints bench/score.py's table of this result
and of those beside it, which get the keys that it adds. Audio goes through Whisper's `decode`, and
over 30 s through its `transcribe`, window by window.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import whisper
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser
from whisper.audio import N_SAMPLES, SAMPLE_RATE

sys.path.insert(0, str(Path(__file__).parents[1]))

from score import show, write

from data import load_audio, read_manifest
from model import run


@dataclass
class Arguments:
    whisper_model_name_or_path: str = HfArg(help="A name of openai-whisper's or a .pt file.")
    data_path: list[str] = HfArg(help="JSONL manifests.")
    result_path: str = HfArg(help="JSONL, the manifest's keys and hyp.")
    beside: list[str] = HfArg(default_factory=list, help="Results to show in the same table.")
    language: str = HfArg(default="en", help="Of a multilingual Whisper.")
    num_beams: int = HfArg(default=5, help="Whisper's beam; 1 is greedy.")


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    [args] = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    rows = read_manifest(args.data_path, empty="")
    part = Path(f"{args.result_path}.part")  # if it cannot be written, then before the work
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = whisper.load_model(args.whisper_model_name_or_path, device)
    beams = args.num_beams if args.num_beams > 1 else None
    options = {"language": args.language, "beam_size": beams, "fp16": device == "cuda"}
    start = time.perf_counter()
    for row in tqdm(rows):  # one by one, as Whisper's beam search takes no batches
        audio = load_audio(row["_path"])
        row["duration"] = len(audio) / SAMPLE_RATE
        if len(audio) > N_SAMPLES:
            row["hyp"] = model.transcribe(audio, **options)["text"].strip()
            continue
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(audio), model.dims.n_mels)
        decoding = whisper.DecodingOptions(**options, without_timestamps=True)
        row["hyp"] = model.decode(mel.to(device), decoding).text.strip()
    seconds, duration = time.perf_counter() - start, sum(row["duration"] for row in rows)
    write(rows, args.result_path)
    print(f"{len(rows)} utterances, {seconds:.1f} s, RTF {seconds / duration:.3f}")
    if any("txt" in row for row in rows):
        show([args.result_path, *args.beside])


if __name__ == "__main__":
    run(main)
