"""Print what is said in audio files of any length, or use `transcribe` from Python.

    python demo/transcribe.py --projector_model_path exp/model.safetensors --wav a.wav b.flac \
        folder/

prints `path<TAB>text` for each file, and for each audio file in a folder. Audio over 30 s is cut
where it is quietest, in pieces of at most 10 s, and each of them is recognised alone.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import soundfile
import torch
from accelerate import PartialState
from transformers.hf_argparser import HfArg, HfArgumentParser
from whisper.audio import N_SAMPLES, SAMPLE_RATE

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import load_audio, read_manifest
from model import SpeechLLM, load, run
from recognize import recognize

PIECE = 10 * SAMPLE_RATE  # samples, at most, of the pieces of audio over 30 s
QUIET = SAMPLE_RATE // 5  # samples, over which the loudness is measured
GROUP = 100  # files whose texts are printed at once


@dataclass
class Arguments:
    projector_model_path: str = HfArg(help="The model.safetensors that train.py wrote.")
    wav: list[str] = HfArg(help="Audio files, and folders of them.")
    num_beams: int = HfArg(default=3, help="Beam width; 1 is greedy.")
    batch_size: int = HfArg(default=8, help="Pieces decoded at once.")
    bf16: bool = HfArg(default=torch.accelerator.is_available(), help="bfloat16, not float32.")
    llm_model_name_or_path: str | None = HfArg(default=None, help="Where it is now, if it moved.")
    whisper_model_name_or_path: str | None = HfArg(default=None, help="Where it is now, likewise.")


def split(audio: torch.Tensor) -> Iterator[torch.Tensor]:
    """Audio over 30 s (S,) in pieces of at most PIECE, cut in the quietest 0.2 s of second halves.

    Nothing is lost: the pieces, joined, are the audio.
    """
    longest, half = N_SAMPLES, PIECE // 2
    while len(audio) > longest:
        longest = PIECE
        windows = audio[half:PIECE].square().unfold(0, QUIET, QUIET // 2)
        end = half + QUIET // 2 * (int(windows.sum(1).argmin()) + 1)
        yield audio[:end]
        audio = audio[end:]
    yield audio


def transcribe(
    model: SpeechLLM, audios: list, num_beams: int = 3, batch_size: int = 8
) -> list[str]:
    """The text of each audio, a path or a waveform (S,), mono at 16 kHz, by model.load's model.

    The model is moved to accelerate's device. Several processes share the pieces out. ValueError
    for what is no audio.
    """
    model.to(PartialState().device).eval()
    rows: list[list[dict]] = []  # of each audio's pieces, as of a manifest
    for i, audio in enumerate(audios):
        samples = load_audio(str(audio)) if isinstance(audio, str | Path) else audio
        samples = torch.as_tensor(samples, dtype=torch.float32, device="cpu").detach()
        if not (len(samples) and samples.abs().max() < float("inf")):
            raise ValueError(f"audio {i} holds no samples, or such that are no numbers")
        rows.append([])
        for piece in split(samples):
            file = BytesIO()
            soundfile.write(file, piece.numpy(), SAMPLE_RATE, format="WAV", subtype="FLOAT")
            file.seek(0)
            rows[-1].append({"_path": file, "_txt": "", "duration": len(piece) / SAMPLE_RATE})
    list(recognize(model, [row for pieces in rows for row in pieces], batch_size, num_beams))
    return [" ".join(row["hyp"] for row in pieces if row["hyp"]) for pieces in rows]


def main(argv: list[str] | None = None) -> None:
    [args] = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    if min(args.num_beams, args.batch_size) < 1:
        raise ValueError(f"wanted 1 or more, got {args.num_beams=}, {args.batch_size=}")
    files = [row["_path"] for row in read_manifest(args.wav, empty="")]
    model = load(**vars(args))
    for start in range(0, len(files), GROUP):
        group = files[start : start + GROUP]
        for file, text in zip(group, transcribe(model, group, args.num_beams, args.batch_size)):
            PartialState().print(f"{file}\t{text}", flush=True)


if __name__ == "__main__":
    run(main)
