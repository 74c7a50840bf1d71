"""From a manifest to padded batches: JSONL lines, audio, log-mel, labels.

A manifest is JSONL, `{"wav": "a.flac", "txt": "what is said"}` a line; other keys are kept.
Shapes: B utterances, S samples, W windows of an utterance, M mel bins, F mel frames of a window
(100 a second), T tokens.
"""

import json
from fileinput import FileInput
from io import BytesIO
from pathlib import Path

import soundfile
import soxr
import torch
from whisper.audio import N_SAMPLES, N_SAMPLES_PER_TOKEN, SAMPLE_RATE, log_mel_spectrogram

from model import IGNORE, encode

AUDIO = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".m4a"}
SILENCE = SAMPLE_RATE // 2  # samples; windows under 30 s are multiples, one at least being silence


def open_manifest(path: str, mode: str):
    """A manifest; or one without transcripts, made up for an audio file, or for a folder of them.

    A folder's files are in the order of their names.
    """
    files = [x for x in (Path(path), *sorted(Path(path or "-").rglob("*"))) if not x.is_dir()]
    lines = [json.dumps({"wav": str(x.absolute())}) for x in files if x.suffix.lower() in AUDIO]
    return BytesIO("\n".join(lines).encode()) if lines else open(path, mode)


def read_manifest(paths: list[str], empty: str | None = None) -> list[dict]:
    """All utterances in order, with `_path` and `duration` (s) of their audio.

    A relative `wav` is relative to its manifest. ValueError that counts the bad lines, and has the
    first ten by file:line; audio whose header cannot be read makes one, but where the line has its
    `duration` it is not opened. `txt` may be missing or empty only where `empty` is "", not None.
    Then paths may be of audio and folders, too.
    """
    rows, bad, file = [], [], FileInput(paths, mode="rb", openhook=open_manifest)  # noqa: SIM115
    for line in filter(None, map(bytes.strip, file)):
        try:
            row = {**json.loads(line)}
            wav, txt = Path(file.filename()).parent / str(row.get("wav")), row.get("txt", empty)
            secs = wav.is_file() and (row.get("duration") or soundfile.info(wav).duration)
            if not (0 < secs < 1e8 and type(txt) is str and (txt.strip().encode() or txt == empty)):
                raise ValueError(f'"wav" must be audio, got {wav}, and "txt" text, got {txt!r}')
            rows.append({**row, "_path": str(wav), "_txt": txt, "duration": round(secs, 2) or 0.01})
        # RuntimeError from libsndfile, TypeError from what is no object and from .raw
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            bad.append(f"{file.filename()}:{file.filelineno()}: {error}, in {line[:80]!r}")
    if bad or not rows:
        raise ValueError("\n".join([f"{paths}: {len(rows)} good lines, {len(bad)} bad", *bad[:10]]))
    return rows


def load_audio(path: str):
    """Any file that libsndfile reads (wav, flac, ogg, opus, mp3) -> (S,) float32, mono, 16 kHz."""
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (S, channels)
    except (RuntimeError, MemoryError, TypeError, ValueError) as error:  # a false size; .raw
        raise ValueError(f"{path}: cannot be decoded as audio: {error}") from error
    audio = soxr.resample(audio.mean(axis=1), rate, SAMPLE_RATE)
    if not (len(audio) and abs(audio).max() < float("inf")):  # NaN is not less
        raise ValueError(f"{path}: holds no audio, or samples that are no numbers")
    return audio


def log_mel(audio, n_mels: int) -> torch.Tensor:
    """Audio (S,) -> log-mel of one window, or of as many of 30 s as it fills: (W, M, F).

    The window is the speech and a little silence, not 30 s. Its size follows from S alone, in steps
    of `SILENCE`, so that windows of one size are many.
    """
    size = min(N_SAMPLES, (len(audio) // SILENCE + 2) * SILENCE)
    mel = log_mel_spectrogram(audio, n_mels, padding=-len(audio) % size)  # (M, WF)
    return mel.unflatten(1, (-(-len(audio) // size), -1)).transpose(0, 1)  # (W, M, F)


def collate(rows, tokenizer, end_id, n_mels, stride, max_length=float("inf")) -> dict:
    """Rows of `read_manifest` -> a batch for SpeechLLM, of which decoding ignores the answers.

    ValueError where audio and answer of a row need more than `max_length` positions, which is
    --model_max_length, or what the LLM was made for.
    """
    audios = [load_audio(row["_path"]) for row in rows]
    lengths = torch.tensor([-(-len(audio) // N_SAMPLES_PER_TOKEN) for audio in audios])
    # the first label is predicted from a position without one
    answers = [torch.tensor([IGNORE, *encode(tokenizer, f"▁{x['_txt']}"), end_id]) for x in rows]
    for row, length, answer in zip(rows, lengths, answers):
        if (size := -(-length // stride) + len(answer) - 1) > max_length:
            raise ValueError(f"{row['_path']}: takes {size} positions, {max_length=} (flag or LLM)")
    # the lengths first, as the Trainer takes B from them
    batch = {"encoder_lengths": lengths, "mel": [log_mel(audio, n_mels) for audio in audios]}
    return batch | {"labels": torch.nn.utils.rnn.pad_sequence(answers, True, IGNORE, "left")}
