"""A running tools/serve.py under load: what is lost, does memory grow, what does batching give?

    python -m tools.serve --projector_model_path demo/projector.safetensors --port 8000 &
    python -m bench.serve --url http://127.0.0.1:8000 --pid $! --wav demo/speech/test

sends the same requests for each number of clients, and prints a row for each. Every tenth upload is
no audio, which must be answered with 400; all others must get the text that they got first.
"""

import itertools
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
from transformers.hf_argparser import HfArg

from command import parse_arguments, run_command
from scoring import format_table
from sound import read_duration
from tools.audio import list_files

PATH = "/v1/audio/transcriptions"
BROKEN = 10  # every so manyth upload is no audio


@dataclass
class Arguments:
    wav: list[str] = HfArg(help="Audio files or folders of them, which are sent in turn.")
    url: str = HfArg(default="http://127.0.0.1:8000", help="Where the service is.")
    pid: int | None = HfArg(default=None, help="Its process, whose memory is measured.")
    requests: int = HfArg(default=200, help="How many requests each number of clients sends.")
    clients: list[int] = HfArg(
        default_factory=lambda: [1, 16], help="Numbers of clients that send at the same time."
    )


@dataclass
class Answer:
    file: str | None  # None is no audio
    status: int | str  # of HTTP, or the error's name
    text: str
    seconds: float


def send(client: httpx2.Client, file: str | None) -> Answer:
    """The answer to an upload of a file, or of what is no audio."""
    content = b"no audio"
    if file is not None:
        content = Path(file).read_bytes()
    start = time.perf_counter()
    try:
        response = client.post(PATH, files={"file": ("upload.wav", content)})
    except httpx2.HTTPError as error:
        return Answer(file, type(error).__name__, "", time.perf_counter() - start)
    text = response.json().get("text", "")
    return Answer(file, response.status_code, text, time.perf_counter() - start)


def list_uploads(files: list[str], count: int) -> list[str | None]:
    """The files in turn, and every tenth time none."""
    uploads = []
    for number, file in zip(range(1, count + 1), itertools.cycle(files)):
        uploads.append(None if number % BROKEN == 0 else file)
    return uploads


def read_memory(pid: int | None) -> str:
    """MiB that a process holds in memory."""
    if pid is None:
        return "-"
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return f"{int(line.split()[1]) / 1024:.0f}"


def measure(answers: list[Answer], first_texts: dict[str, str], seconds: float) -> dict:
    """What came back, and how fast."""
    counts = Counter()
    audio = 0.0
    for answer in answers:
        if answer.file is None:
            counts["broken, 400"] += answer.status == 400
        elif answer.status == 200:
            counts["text, 200"] += 1
            counts["other text"] += answer.text != first_texts.setdefault(answer.file, answer.text)
            audio += read_duration(Path(answer.file))
    answered = counts["broken, 400"] + counts["text, 200"]
    waits = [answer.seconds for answer in answers]
    return {
        "text, 200": counts["text, 200"],
        "broken, 400": counts["broken, 400"],
        "lost": len(answers) - answered,
        "other text": counts["other text"],
        "seconds": f"{seconds:.1f}",
        "audio s a second": f"{audio / seconds:.1f}",
        "median wait, s": f"{np.median(waits):.2f}",
        "longest wait, s": f"{max(waits):.2f}",
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    uploads = list_uploads(list_files(args.wav), args.requests)
    rows, first_texts = [], {}
    with httpx2.Client(base_url=args.url, timeout=600) as client:
        send(client, uploads[0])  # the first is slow
        for clients in args.clients:
            before = read_memory(args.pid)
            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                answers = list(pool.map(send, itertools.repeat(client), uploads))
            row = measure(answers, first_texts, time.perf_counter() - start)
            memory = f"{before} -> {read_memory(args.pid)}"
            rows.append({"clients": clients, **row, "memory, MiB": memory})
    print(format_table(rows))


if __name__ == "__main__":
    run_command(main)
