"""Long audio: as a whole, or in pieces that are cut at silences? The error rates of both.

    python -m experiments.long_audio --projector_model_path exp/model.safetensors \
        --data_path dev.jsonl --seconds 300

joins the utterances, with half a second of silence behind each, to recordings of about so many
seconds. As a whole means as recognize.py does it: windows of 30 s are joined before the projector.
The pieces are those of tools/transcribe.py. With --whisper_model_name_or_path Whisper's own decoder
has a row, too.
"""

from dataclasses import dataclass

import numpy as np
from transformers.hf_argparser import HfArg
from whisper.audio import SAMPLE_RATE

from command import parse_arguments, run_command
from loading import load, load_whisper
from machine import get_process
from manifest import Utterance, read_manifest
from recognize import make_result, recognize
from scoring import choose_metric, format_table, score
from tools import whisper_baseline
from tools.transcribe import transcribe

PAUSE = np.zeros(SAMPLE_RATE // 2, np.float32)


@dataclass
class Arguments:
    projector_model_path: str = HfArg(help="The model.safetensors that train.py wrote.")
    data_path: list[str] = HfArg(help="JSONL manifests.")
    seconds: float = HfArg(default=300.0, help="How long a recording is at least, but the last.")
    num_beams: int = HfArg(default=3, help="Width of the beam.")
    whisper_model_name_or_path: str | None = HfArg(
        default=None, help="A Whisper to compare with, tiny ... turbo, or its .pt file."
    )


def join(utterances: list[Utterance], seconds: float) -> list[Utterance]:
    """Recordings of at least so many seconds, but for the last; none is in a file."""
    recordings, audio, texts, size = [], [], [], 0
    for utterance in utterances:
        samples = utterance.load()
        audio += [samples, PAUSE]
        texts.append(utterance.text)
        size += len(samples) + len(PAUSE)
        if size >= seconds * SAMPLE_RATE or utterance is utterances[-1]:
            name, text = f"recording {len(recordings)}", " ".join(texts)
            row = {"wav": name, "txt": text}
            joined = np.concatenate(audio)
            recordings.append(Utterance(name, size / SAMPLE_RATE, text, row, joined))
            audio, texts, size = [], [], 0
    return recordings


def with_hypotheses(results: list[dict], texts: list[str]) -> list[dict]:
    return [{**result, "hyp": text} for result, text in zip(results, texts)]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    recordings = join(read_manifest(args.data_path), args.seconds)
    device = get_process().device
    model = load(args.projector_model_path).to(device).eval()

    for _ in recognize(model, recordings, [args.num_beams], batch_size=1, num_workers=0):
        pass  # each batch adds its hypotheses
    whole = [make_result(recording, args.num_beams) for recording in recordings]
    waveforms = [recording.samples for recording in recordings]
    texts = transcribe(model, waveforms, num_beams=args.num_beams)
    pieces = with_hypotheses(whole, texts)

    minutes = sum(recording.duration for recording in recordings) / 60
    print(f"{len(recordings)} recordings, {minutes:.1f} minutes, beam {args.num_beams}")
    ways = {"as a whole": whole, "in pieces": pieces}
    if args.whisper_model_name_or_path is not None:
        own = load_whisper(args.whisper_model_name_or_path)
        texts = [whisper_baseline.decode(own, waveform, "en", 5)[0] for waveform in waveforms]
        ways["Whisper's own decoder"] = with_hypotheses(whole, texts)
    table = []
    for name, results in ways.items():
        metric, normalizer = choose_metric(results, "auto", "auto")
        table.append({"way": name, **score(results, metric, normalizer)})
    print(format_table(table))


if __name__ == "__main__":
    run_command(main)
