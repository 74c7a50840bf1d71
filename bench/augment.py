"""More speech from little: what bench/results.sh trains on beside the corpus itself.

    python bench/augment.py lower IN.jsonl OUT.jsonl
    python bench/augment.py speed IN.jsonl FOLDER 0.88 1.12
    python bench/augment.py write LLM COUNT OUT.txt
    python bench/augment.py speak TEXT.txt FOLDER

`lower` makes transcripts lower-case without punctuation. `speed` copies utterances faster or
slower, and so higher or lower. `write` lets the LLM write short sentences around words of its own
vocabulary, and `speak` lets the demo's offline voice say them, and some numbers, at different
speeds and pitches with a little noise. `speed` and `speak` end in FOLDER/manifest.jsonl.
"""

import random
import re
import sys
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

import score

from data import SAMPLE_RATE, load_audio, read_manifest
from model import choose_bf16

SEED = 0
TASKS = [
    "Write a very short story for children with the words",
    "Write a conversation between two friends, in short sentences, with the words",
    "Write ten short and simple sentences with the words",
]
WORDS = 12_000  # of the vocabulary's first ones, which are the most common
MOST_WORDS = 12  # in a sentence
STORIES = 128  # written at once
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NUMBERS = 400  # sequences of digits beside the sentences
PITCHES = [0.85, 0.93, 1.0, 1.1, 1.2, 1.3]


def plain(text: str) -> str:
    """Lower case, letters and apostrophes alone."""
    return " ".join(re.sub("[^a-z' ]", " ", text.lower()).split())


def manifest(path: Path, rows: list[dict]) -> None:
    score.write(rows, str(path))
    print(f"{path}: {len(rows)} utterances")


def lower(source: str, out: str) -> None:
    rows = read_manifest([source])
    rows = [{"wav": str(Path(x["_path"]).resolve()), "txt": plain(x["txt"])} for x in rows]
    manifest(Path(out), [row for row in rows if row["txt"]])  # less those of digits alone, say


def save(path: Path, audio: np.ndarray) -> None:
    soundfile.write(path, audio.clip(-1, 1), SAMPLE_RATE)


def speed(source: str, out: str, *factors: str) -> None:
    folder, rows = Path(out), []
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(tqdm(read_manifest([source]), f"{out}: speed")):
        audio = load_audio(row["_path"])
        for factor in factors:
            name = f"{i:05}-{factor}.flac"
            save(folder / name, soxr.resample(audio, SAMPLE_RATE * float(factor), SAMPLE_RATE))
            rows.append({"wav": name, "txt": row["txt"]})
    manifest(folder / "manifest.jsonl", rows)


@torch.inference_mode()
def write(name: str, count: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    dtype = torch.bfloat16 if choose_bf16(True) else torch.float32
    llm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    ids = tokenizer.get_vocab()
    words = sorted((word for word in ids if re.fullmatch("Ġ[a-z]{3,}", word)), key=ids.get)[:WORDS]
    rng, found = random.Random(SEED), {}  # a set that keeps its order
    torch.manual_seed(SEED)
    bar = tqdm(total=int(count), desc=f"{out}: writing")
    while len(found) < int(count):
        prompts = []
        for _ in range(STORIES):
            first, second = (word[1:] for word in rng.sample(words, 2))
            task = f'{rng.choice(TASKS)} "{first}" and "{second}".'
            turns = [{"role": "user", "content": task}]
            prompts.append(
                tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            )
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        options = {"do_sample": True, "temperature": 0.9, "top_k": 200, "top_p": 1.0}
        options |= {"max_new_tokens": 96, "pad_token_id": tokenizer.eos_token_id}
        new = llm.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        for story in tokenizer.batch_decode(new, skip_special_tokens=True):
            for sentence in re.findall(r"[^.!?\n:\"]+[.!?]", story):
                words_in_it = len(plain(sentence).split())
                if re.fullmatch(r"[A-Za-z' ,.!?;-]+", sentence) and 2 <= words_in_it <= MOST_WORDS:
                    found[plain(sentence)] = None
        bar.update(len(found) - bar.n)
    Path(out).write_text("\n".join([*list(found)[: int(count)], ""]))


def speak(source: str, out: str) -> None:
    from hibari import SAMPLE_RATE as VOICE_RATE
    from hibari import Hibari

    folder, rng, rows = Path(out), random.Random(SEED), []
    folder.mkdir(parents=True, exist_ok=True)
    texts = Path(source).read_text().splitlines()
    texts += [" ".join(rng.choices(DIGITS, k=rng.randint(3, 8))) for _ in range(NUMBERS)]
    voice = Hibari()
    for i, text in enumerate(tqdm(texts, f"{out}: speaking")):
        audio = np.asarray(voice(text, speed=rng.uniform(0.75, 1.25), seed=i), np.float32)
        audio = soxr.resample(audio, VOICE_RATE * rng.choice(PITCHES), SAMPLE_RATE)
        noise = np.random.default_rng(i).normal(0, 10 ** rng.uniform(-4.5, -2.3), len(audio))
        save(folder / f"{i:05}.flac", rng.uniform(0.3, 1) * audio + noise.astype(np.float32))
        rows.append({"wav": f"{i:05}.flac", "txt": text})
    manifest(folder / "manifest.jsonl", rows)


COMMANDS = {"lower": lower, "speed": speed, "write": write, "speak": speak}

if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python bench/augment.py {'|'.join(COMMANDS)} ..., as its docstring says")
    COMMANDS[sys.argv[1]](*sys.argv[2:])
