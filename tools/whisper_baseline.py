"""Recognise manifests with Whisper's own decoder, to stand beside recognize.py's results.

    python -m tools.whisper_baseline --whisper_model_name_or_path large-v3 \
        --data_path test.jsonl --result_path whisper.jsonl --beside result.jsonl

writes a hypothesis a line in the manifest's order, as recognize.py does, and prints the table of
tools/score.py for this result and those beside it. Audio goes through Whisper's `decode`, and
over 30 s through its `transcribe`, window by window.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import whisper
from accelerate.utils import tqdm
from transformers.hf_argparser import HfArg
from whisper.audio import N_SAMPLES
from whisper.tokenizer import LANGUAGES

from arguments import ScoringArguments, check_positive, check_result_path
from command import InputError, parse_arguments, run_command
from loading import load_whisper
from manifest import read_manifest
from recognize import make_result, write_results
from tools.score import has_transcript, read_results, report


@dataclass(kw_only=True)
class Arguments(ScoringArguments):
    """The flags of tools/whisper_baseline.py."""

    whisper_model_name_or_path: str = HfArg(help="A Whisper, tiny ... turbo, or its .pt file.")
    data_path: list[str] = HfArg(help="JSONL manifests; lines without txt are not scored.")
    result_path: Path = HfArg(help="JSONL of the results.")
    beside: list[Path] = HfArg(
        default_factory=list, help="Results to show in the same table; they are scored again."
    )
    language: str = HfArg(default="en", help="What is spoken, as Whisper's code: en, zh, de ...")
    num_beams: int = HfArg(default=5, help="Beam width; 1 is greedy.")

    def __post_init__(self):
        check_positive("num_beams", self.num_beams)
        check_result_path(self.result_path)
        if self.language not in LANGUAGES:
            codes = ", ".join(LANGUAGES)
            raise InputError(f"--language must be one of {codes}, got {self.language}")


def decode(model: whisper.Whisper, audio, language: str, num_beams: int) -> str:
    """Whisper's text of audio (S,), mono at 16 kHz."""
    beam_size = num_beams if num_beams > 1 else None  # Whisper's word for greedy
    fp16 = model.device.type == "cuda"
    options = {"language": language, "beam_size": beam_size, "fp16": fp16}
    if len(audio) > N_SAMPLES:
        text = model.transcribe(audio, **options)["text"]
    else:
        window = whisper.pad_or_trim(audio)
        mel = whisper.log_mel_spectrogram(window, model.dims.n_mels)
        decoding = whisper.DecodingOptions(**options, without_timestamps=True)
        text = model.decode(mel.to(model.device), decoding).text
    return " ".join(text.split())


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    utterances = read_manifest(args.data_path, need_text=False)
    for path in args.beside:
        read_results(path)  # what is no result is found before the work
    part = args.result_path.with_name(f"{args.result_path.name}.part")
    write_results(part, [], "w")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_whisper(args.whisper_model_name_or_path).to(device)

    results = []
    start = time.perf_counter()
    for utterance in tqdm(utterances):  # one by one, as Whisper's beam search takes no batches
        audio = utterance.load()
        text = decode(model, audio, args.language, args.num_beams)
        utterance.hypotheses[args.num_beams] = text
        result = make_result(utterance, args.num_beams)
        write_results(part, [result], "a")  # which is left where the run is stopped
        results.append(result)
    seconds = time.perf_counter() - start
    part.replace(args.result_path)

    duration = sum(utterance.duration for utterance in utterances)
    print(f"{len(results)} utterances, {seconds:.1f} s, RTF {seconds / duration:.3f}")
    if any(has_transcript(result) for result in results):
        print(report([args.result_path, *args.beside], args.metric, args.normalizer))


if __name__ == "__main__":
    run_command(main)
