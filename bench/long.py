"""Long audio: one context for the whole file, or pieces cut at silences? WER of both:

    python bench/long.py PROJECTOR.safetensors MANIFEST.jsonl SECONDS

joins the manifest's utterances, half a second of silence between them, to files of about SECONDS.
recognize.py reads each as a whole, its windows of 30 s joined before the projector, and
demo/transcribe.py in pieces.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import SAMPLE_RATE, load_audio, read_manifest
from demo.transcribe import transcribe
from model import load, run
from recognize import recognize, score

BEAMS = 3
GAP = SAMPLE_RATE // 2  # samples


def join(manifest: str, seconds: float, folder: str) -> list[dict]:
    """Rows of files of at least so many seconds, but for the last, which are made in `folder`."""
    rows, lines, audio, texts = read_manifest([manifest]), [], [], []
    for row in rows:
        audio += [load_audio(row["_path"]), np.zeros(GAP, np.float32)]
        texts.append(row["txt"])
        if sum(map(len, audio)) >= seconds * SAMPLE_RATE or row is rows[-1]:
            name = f"{len(lines)}.flac"
            soundfile.write(Path(folder, name), np.concatenate(audio), SAMPLE_RATE)
            lines.append(json.dumps({"wav": name, "txt": " ".join(texts)}))
            audio, texts = [], []
    path = Path(folder, "long.jsonl")
    path.write_text("\n".join(lines))
    return read_manifest([str(path)])


def main(projector: str, manifest: str, seconds: str) -> None:
    model = load(projector).to(PartialState().device).eval()
    with tempfile.TemporaryDirectory() as folder:
        rows = join(manifest, float(seconds), folder)
        cells = score(list(recognize(model, rows, 1, BEAMS)))
        minutes = sum(row["duration"] for row in rows) / 60
        print(f"{len(rows)} files, {minutes:.1f} minutes, beam {BEAMS}")
        print(f"whole: {cells}")
        for row, text in zip(rows, transcribe(model, [row["_path"] for row in rows], BEAMS)):
            row["hyp"] = text
        print(f"in pieces: {score(rows)}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python bench/long.py PROJECTOR.safetensors MANIFEST.jsonl SECONDS")
    run(lambda: main(*sys.argv[1:]))
