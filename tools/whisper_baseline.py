"""Recognise manifests with Whisper's own decoder, to stand beside recognize.py's results.

    python -m tools.whisper_baseline --whisper_model_name_or_path large-v3 \
        --data_path test.jsonl --result_path whisper.jsonl --beside result.jsonl

writes a hypothesis a line in the manifest's order, as recognize.py does, and prints the table of
tools/score.py for this result and those beside it. Audio goes through Whisper's `decode`, and
over 30 s through its `transcribe`, window by window.

    python -m tools.whisper_baseline --whisper_model_name_or_path large-v3 \
        --data_path untranscribed.jsonl --result_path whisper.jsonl --as_manifest pseudo.jsonl

also writes a manifest for train.py: the same lines, with what Whisper hears as `txt`. It leaves
out hallucinations, what Whisper takes for no speech, and audio that cannot be read.
`--spell_numbers True` writes "twenty", not "20".
"""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import whisper
from accelerate.utils import tqdm
from transformers.hf_argparser import HfArg
from whisper.audio import N_SAMPLES
from whisper.tokenizer import LANGUAGES, get_tokenizer

from arguments import ScoringArguments, check_positive, check_result_path, is_among, part_path
from command import InputError, parse_arguments, run_command
from loading import load_whisper
from manifest import Utterance, read_manifest
from recognize import make_result, write_results
from scoring import find_hallucination
from tools.prepare import describe_rejected, write_manifest
from tools.score import has_transcript, read_results, report

NO_SPEECH = 0.6  # probability of silence from which Whisper itself doubts its text


@dataclass(kw_only=True)
class Arguments(ScoringArguments):
    """The flags of tools/whisper_baseline.py."""

    whisper_model_name_or_path: str = HfArg(help="A Whisper, tiny ... turbo, or its .pt file.")
    data_path: list[str] = HfArg(help="JSONL manifests; lines without txt are not scored.")
    result_path: Path = HfArg(help="JSONL of the results.")
    as_manifest: Path | None = HfArg(
        default=None, help="JSONL to write for train.py, with Whisper's text as txt."
    )
    beside: list[Path] = HfArg(
        default_factory=list, help="Results to show in the same table; they are scored again."
    )
    language: str = HfArg(default="en", help="What is spoken, as Whisper's code: en, zh, de ...")
    num_beams: int = HfArg(default=5, help="Beam width; 1 is greedy.")
    spell_numbers: bool = HfArg(
        default=False, help="Write numbers in words: Whisper never takes a token with a digit."
    )

    def __post_init__(self):
        check_positive("num_beams", self.num_beams)
        check_result_path(self.result_path, [*self.data_path, *self.beside])
        if self.language not in LANGUAGES:
            codes = ", ".join(LANGUAGES)
            raise InputError(f"--language must be one of {codes}, got {self.language}")


def check_manifest(path: Path, others: list[str | Path]) -> None:
    """InputError if it cannot be written, or is one of the other files of the command."""
    if is_among(path, others):
        raise InputError(f"--as_manifest: {path} is also another flag's file: give another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise InputError(f"--as_manifest: cannot write {path}: {error.strerror}") from error


def list_digits(model: whisper.Whisper) -> list[int]:
    """The tokens of a Whisper that have a digit."""
    tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages)
    digits = []
    for token in range(tokenizer.eot):  # those that are text
        text = tokenizer.decode([token])
        if any(character.isdigit() for character in text):
            digits.append(token)
    return digits


def decode(
    model: whisper.Whisper,
    audio,
    language: str,
    num_beams: int,
    suppressed: Iterable[int] = (),
) -> tuple[str, float]:
    """Whisper's text of audio (S,), mono at 16 kHz, and its probability that nothing is said.

    No token of `suppressed` is in it.
    """
    beam_size = num_beams if num_beams > 1 else None  # Whisper's word for greedy
    options = {
        "language": language,
        "beam_size": beam_size,
        "fp16": model.device.type == "cuda",
        "suppress_tokens": [-1, *suppressed],  # -1: and what Whisper itself never takes
    }
    if len(audio) > N_SAMPLES:
        result = model.transcribe(audio, **options)
        text = result["text"]
        silences = [segment["no_speech_prob"] for segment in result["segments"]]
        no_speech = min(silences, default=1.0)
    else:
        window = whisper.pad_or_trim(audio)
        mel = whisper.log_mel_spectrogram(window, model.dims.n_mels)
        decoding = whisper.DecodingOptions(**options, without_timestamps=True)
        result = model.decode(mel.to(model.device), decoding)
        text, no_speech = result.text, result.no_speech_prob
    return " ".join(text.split()), no_speech


def find_fault(text: str, no_speech: float, duration: float) -> str | None:
    """Why Whisper's text of so many seconds is not to be learnt from, or None."""
    if no_speech > NO_SPEECH or not any(character.isalnum() for character in text):
        return "no speech"
    return find_hallucination(text, duration)


def make_row(utterance: Utterance, text: str) -> dict:
    """The manifest's line with another text, and a path that holds from any folder."""
    path = str(Path(utterance.path).resolve())
    return {**utterance.row, "wav": path, "txt": text, "duration": utterance.duration}


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    utterances = read_manifest(args.data_path, need_text=False)
    if args.as_manifest is not None:
        check_manifest(args.as_manifest, [*args.data_path, args.result_path, *args.beside])
    for path in args.beside:
        read_results(path)  # what is no result is found before the work
    part = part_path(args.result_path)
    write_results(part, [], "w")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_whisper(args.whisper_model_name_or_path).to(device)
    suppressed = list_digits(model) if args.spell_numbers else []

    results, rows, rejected = [], [], defaultdict(list)
    start = time.perf_counter()
    for utterance in tqdm(utterances):  # one by one, as Whisper's beam search takes no batches
        try:
            audio = utterance.load()
        except InputError:
            if args.as_manifest is None:  # a test set is scored whole, or not at all
                raise
            rejected["cannot be read"].append(utterance.name)
            continue
        text, no_speech = decode(model, audio, args.language, args.num_beams, suppressed)
        utterance.hypotheses[args.num_beams] = text
        result = make_result(utterance, args.num_beams)
        write_results(part, [result], "a")  # which is left where the run is stopped
        results.append(result)
        fault = find_fault(text, no_speech, utterance.duration)
        if fault is None:
            rows.append(make_row(utterance, text))
        else:
            rejected[fault].append(utterance.name)
    seconds = time.perf_counter() - start
    part.replace(args.result_path)

    if args.as_manifest is not None:
        write_manifest(rows, args.as_manifest)
        for line in describe_rejected(rejected):
            print(line)
    duration = sum(utterance.duration for utterance in utterances)
    print(f"{len(results)} utterances, {seconds:.1f} s, RTF {seconds / duration:.3f}")
    if any(has_transcript(result) for result in results):
        print(report([args.result_path, *args.beside], args.metric, args.normalizer))


if __name__ == "__main__":
    run_command(main)
