"""More speech from little: what the scripts here train on beside the corpus itself.

    python -m experiments.augment select --data_path in.jsonl --output_path out.jsonl
    python -m experiments.augment speed --data_path in.jsonl --output_dir copies --factors 0.88 1.12
    python -m experiments.augment disturb --data_path in.jsonl --output_dir noisy
    python -m experiments.augment join --data_path in.jsonl --output_dir joined --seconds 20 28
    python -m experiments.augment draw --llm_model_name_or_path LLM --output_path words.txt
    python -m experiments.augment write --llm_model_name_or_path LLM --output_path text.txt
    python -m experiments.augment speak --text_path words.txt text.txt --output_dir spoken

`select` makes transcripts lower-case without punctuation, and leaves utterances out, among them
those with digits; for readable text `--lower False --cased True` keeps those that have case, as
they are. `speed` copies utterances faster or slower, and so higher or lower. `disturb` copies them
with noise or other speakers behind, half of them in a room that echoes. `join` makes long
utterances of neighbours in the manifest that have the same `spk`. `draw` draws rows of words from
the LLM's vocabulary, each word equally often. `write` lets the LLM write short sentences around
such words. `speak` lets the demo's offline voice say them, and some numbers, at different speeds
and pitches with a little noise. `speed`, `disturb`, `join` and `speak` end in
OUTPUT_DIR/manifest.jsonl.
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.hf_argparser import HfArg
from whisper.audio import SAMPLE_RATE

from arguments import check_positive, is_among, part_path
from command import InputError, parse_arguments, run_command
from experiments.silence import make_noise
from machine import choose_bf16
from manifest import Utterance, read_manifest
from scoring import APOSTROPHES

SEED = 0
TASKS = [
    "Write a very short story for children with the words",
    "Write a conversation between two friends, in short sentences, with the words",
    "Write ten short and simple sentences with the words",
]
ROW = (3, 12)  # words, at least and at most
COMMON_WORDS = 12_000  # that stories are about
MOST_WORDS = 12  # in a sentence
STORIES = 128  # written at once
LOWER_WORD = re.compile("Ġ[a-z]{3,}")  # tokens that are words
WORD = re.compile("Ġ([a-z]{2,}|[A-Z][a-z]{2,})")  # and names
SENTENCE = re.compile(r"[^.!?\n:\"]+[.!?]")
LOST = re.compile(r"[^\W_a-z]")  # digits, and letters with accents: make_plain drops them
PLAIN_ENGLISH = re.compile(r"[A-Za-z' ,.!?;-]+")
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PAUSE = np.zeros(SAMPLE_RATE * 3 // 10, np.float32)  # between joined utterances
RATIOS = (5, 20)  # dB of speech above what is behind it
ECHO = (0.2, 0.8)  # seconds in which an echo falls by 60 dB
ECHO_RATIOS = (0, 10)  # dB of speech above its echo
SPEAKERS_BEHIND = 3
PITCHES = [0.85, 0.93, 1.0, 1.1, 1.2, 1.3]


@dataclass
class SelectArguments:
    data_path: list[str] = HfArg(help="JSONL manifests.")
    output_path: Path = HfArg(help="The manifest to write.")
    lower: bool = HfArg(default=True, help="Make transcripts lower-case without punctuation.")
    longest: float = HfArg(default=float("inf"), help="Leave out what is longer, in seconds.")
    text_key: str = HfArg(default="txt", help="The key of the transcript, where a line has it.")
    cased: bool = HfArg(
        default=False, help="Leave out transcripts in capitals or small letters alone."
    )
    every: int = HfArg(default=1, help="Of the rest keep the first of each so many utterances.")

    def __post_init__(self):
        check_positive("every", self.every)


@dataclass
class SpeedArguments:
    data_path: list[str] = HfArg(help="JSONL manifests.")
    output_dir: Path = HfArg(help="Where the copies and their manifest go.")
    factors: list[float] = HfArg(help="Speeds; each makes a copy of every utterance.")


@dataclass
class DisturbArguments:
    data_path: list[str] = HfArg(help="JSONL manifests.")
    output_dir: Path = HfArg(help="Where the copies and their manifest go.")


@dataclass
class JoinArguments:
    data_path: list[str] = HfArg(help="JSONL manifests.")
    output_dir: Path = HfArg(help="Where the long utterances and their manifest go.")
    seconds: list[float] = HfArg(help="How long they are at least, and at most.")
    count: int = HfArg(default=500, help="How many of them, drawn at random.")

    def __post_init__(self):
        if len(self.seconds) != 2 or self.seconds[0] > self.seconds[1]:
            raise InputError(f"--seconds must be least and most, such as 20 28, got {self.seconds}")


@dataclass
class WriteArguments:
    llm_model_name_or_path: str = HfArg(help="A chat model: a name or a folder.")
    output_path: Path = HfArg(help="The text to write, a sentence a line.")
    count: int = HfArg(default=12_000, help="How many sentences.")


@dataclass
class DrawArguments:
    llm_model_name_or_path: str = HfArg(help="Whose vocabulary: a name or a folder.")
    output_path: Path = HfArg(help="The text to write, a row of words a line.")
    words: int = HfArg(default=8000, help="How many words, the most common first.")
    times: int = HfArg(default=12, help="How often each of them is drawn.")


@dataclass
class SpeakArguments:
    text_path: list[Path] = HfArg(help="Text files, a sentence a line.")
    output_dir: Path = HfArg(help="Where the audio and its manifest go.")
    numbers: int = HfArg(default=400, help="Rows of digits that are spoken beside the sentences.")


def select(args: SelectArguments) -> None:
    """Write a manifest of what `args` keep.

    Transcripts without any letter are left out, too, and with `lower` those with digits or
    accents.
    """
    prepare_output(args.output_path, args.data_path)
    rows = []
    for utterance in read_manifest(args.data_path):
        text = utterance.row.get(args.text_key) or utterance.text
        plain = make_plain(text)
        if args.cased and (text.islower() or text.isupper()):
            continue
        if args.lower and LOST.search(text.lower()):
            continue
        if plain and utterance.duration <= args.longest:
            text = plain if args.lower else text
            rows.append({**utterance.row, "wav": str(Path(utterance.path).resolve()), "txt": text})
    write_manifest(args.output_path, rows[:: args.every])


def prepare_output(path: Path, inputs: list[str]) -> None:
    """Make the folder of a file to be written; InputError if it is one of those that are read."""
    if is_among(path, inputs):
        raise InputError(f"{path} is in --data_path, too: write to another place")
    path.parent.mkdir(parents=True, exist_ok=True)


def make_plain(text: str) -> str:
    """Lower case, letters and apostrophes alone."""
    text = text.lower().translate(APOSTROPHES)
    return " ".join(re.sub("[^a-z' ]", " ", text).split())


def write_manifest(path: Path, rows: list[dict]) -> None:
    """Under another name first, so that a manifest that is there is whole."""
    part = part_path(path)
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    part.replace(path)
    print(f"{path}: {len(rows)} utterances")


def speed(args: SpeedArguments) -> None:
    """Write copies of each utterance at other speeds, and their manifest."""
    manifest = args.output_dir / "manifest.jsonl"
    prepare_output(manifest, args.data_path)
    rows = []
    for i, utterance in enumerate(tqdm(read_manifest(args.data_path), str(args.output_dir))):
        audio = utterance.load()
        for factor in args.factors:
            name = f"{i:05}-{factor}.flac"
            copy = soxr.resample(audio, SAMPLE_RATE * factor, SAMPLE_RATE)
            save_audio(args.output_dir / name, copy)
            rows.append({"wav": name, "txt": utterance.text})
    write_manifest(manifest, rows)


def disturb(args: DisturbArguments) -> None:
    """Write a copy of each utterance in a place that is not quiet, and their manifest."""
    manifest = args.output_dir / "manifest.jsonl"
    prepare_output(manifest, args.data_path)
    utterances = read_manifest(args.data_path)
    rng = np.random.default_rng(SEED)
    rows = []
    for i, utterance in enumerate(tqdm(utterances, str(args.output_dir))):
        audio = utterance.load()
        if rng.random() < 0.5:
            audio = add_echo(audio, rng)
        if rng.random() < 0.5:
            behind = make_noise(rng, len(audio))
        else:
            others = rng.integers(len(utterances), size=SPEAKERS_BEHIND)
            behind = sum(np.resize(utterances[k].load(), len(audio)) for k in others)
        audio = audio + behind * find_gain(audio, behind, rng.uniform(*RATIOS))
        save_audio(args.output_dir / f"{i:05}.flac", audio / max(1, np.abs(audio).max()))
        rows.append({"wav": f"{i:05}.flac", "txt": utterance.text})
    write_manifest(manifest, rows)


def add_echo(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Audio (S,) and noise that its room makes of it, which falls by the exponential function."""
    seconds = rng.uniform(*ECHO)
    time = np.arange(1, int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    room = rng.normal(0, 1, len(time)) * 10 ** (-3 * time / seconds)
    samples = len(audio) + len(room)  # of their convolution, which the product of spectra is
    spectrum = np.fft.rfft(audio, samples) * np.fft.rfft(room, samples)
    echo = np.fft.irfft(spectrum, samples)[: len(audio)]
    return audio + echo * find_gain(audio, echo, rng.uniform(*ECHO_RATIOS))


def find_gain(audio: np.ndarray, behind: np.ndarray, ratio: float) -> float:
    """What makes `behind` weaker than the audio by so many dB; 0 where one of them is silent."""
    power = np.square(behind).mean()
    return np.sqrt(np.square(audio).mean() / power / 10 ** (ratio / 10)) if power else 0.0


def join(args: JoinArguments) -> None:
    """Write neighbours of a speaker as one utterance each, and their manifest."""
    manifest = args.output_dir / "manifest.jsonl"
    prepare_output(manifest, args.data_path)
    groups = group_neighbours(read_manifest(args.data_path), *args.seconds)
    random.Random(SEED).shuffle(groups)
    rows = []
    for i, group in enumerate(tqdm(groups[: args.count], str(args.output_dir))):
        audio, texts = [], []
        for utterance in group:
            audio += [utterance.load(), PAUSE]
            texts.append(utterance.text)
        save_audio(args.output_dir / f"{i:05}.flac", np.concatenate(audio[:-1]))
        rows.append({"wav": f"{i:05}.flac", "txt": " ".join(texts)})
    write_manifest(manifest, rows)


def group_neighbours(
    utterances: list[Utterance], least: float, most: float
) -> list[list[Utterance]]:
    """Neighbours that one `spk` has spoken, of `least` to `most` seconds together."""
    groups, group, seconds = [], [], 0.0
    for utterance in utterances:
        speaker = utterance.row.get("spk")
        if group and (speaker != group[-1].row["spk"] or seconds + utterance.duration > most):
            group, seconds = [], 0.0
        if speaker is None:
            continue
        group.append(utterance)
        seconds += utterance.duration + len(PAUSE) / SAMPLE_RATE
        if seconds >= least:
            groups.append(group)
            group, seconds = [], 0.0
    return groups


def save_audio(path: Path, audio: np.ndarray) -> None:
    soundfile.write(path, audio.clip(-1, 1), SAMPLE_RATE)


def write(args: WriteArguments) -> None:
    """Let the LLM write sentences until there are enough different ones."""
    prepare_output(args.output_path, [])
    name = args.llm_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    dtype = torch.bfloat16 if choose_bf16(True) else torch.float32
    llm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    words = list_words(tokenizer, LOWER_WORD)[:COMMON_WORDS]
    rng = random.Random(SEED)
    torch.manual_seed(SEED)

    found: dict[str, None] = {}  # a set that keeps its order
    bar = tqdm(total=args.count, desc=str(args.output_path))
    while len(found) < args.count:
        tasks = []
        for _ in range(STORIES):
            first, second = rng.sample(words, 2)
            tasks.append(f'{rng.choice(TASKS)} "{first}" and "{second}".')
        for story in answer(llm, tokenizer, tasks):
            found.update(dict.fromkeys(find_sentences(story)))
        bar.update(len(found) - bar.n)
    sentences = list(found)[: args.count]
    args.output_path.write_text("\n".join(sentences) + "\n")


def draw(args: DrawArguments) -> None:
    """Write the vocabulary's words and names, mixed anew each of `times` times, in short rows."""
    prepare_output(args.output_path, [])
    tokenizer = AutoTokenizer.from_pretrained(args.llm_model_name_or_path)
    words = list_words(tokenizer, WORD)[: args.words]
    rng = random.Random(SEED)
    rows = []
    for _ in range(args.times):
        rng.shuffle(words)
        start = 0
        while start < len(words):
            size = rng.randint(*ROW)
            rows.append(" ".join(words[start : start + size]))
            start += size
    args.output_path.write_text("\n".join(rows) + "\n")
    print(f"{args.output_path}: {len(rows)} rows of {len(words)} words")


def list_words(tokenizer, kind: re.Pattern) -> list[str]:
    """Words in lower case that are one token each of this kind, the most common first."""
    ids = tokenizer.get_vocab()
    tokens = [token for token in ids if kind.fullmatch(token)]
    tokens.sort(key=ids.get)
    words = [token.removeprefix("Ġ").lower() for token in tokens]
    return list(dict.fromkeys(words))


@torch.inference_mode()
def answer(llm, tokenizer, tasks: list[str]) -> list[str]:
    """What the LLM writes, drawn at random, when a user says each task."""
    prompts = []
    for task in tasks:
        turns = [{"role": "user", "content": task}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompts.append(prompt)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = llm.generate(
        **inputs,
        do_sample=True,
        temperature=0.9,
        top_k=200,
        top_p=1.0,
        max_new_tokens=96,
        pad_token_id=tokenizer.eos_token_id,
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def find_sentences(story: str) -> list[str]:
    """The plain English sentences of two words to MOST_WORDS, as a transcript has them."""
    sentences = []
    for sentence in SENTENCE.findall(story):
        plain = make_plain(sentence)
        if PLAIN_ENGLISH.fullmatch(sentence) and 2 <= len(plain.split()) <= MOST_WORDS:
            sentences.append(plain)
    return sentences


def speak(args: SpeakArguments) -> None:
    """Let the voice say each line of the text, and rows of digits, and write their manifest."""
    import hibari

    manifest = args.output_dir / "manifest.jsonl"
    prepare_output(manifest, [])
    rng = random.Random(SEED)
    texts = []
    for path in args.text_path:
        texts += path.read_text().splitlines()
    for _ in range(args.numbers):
        digits = rng.choices(DIGITS, k=rng.randint(3, 8))
        texts.append(" ".join(digits))

    voice = hibari.Hibari()
    rows = []
    for i, text in enumerate(tqdm(texts, str(args.output_dir))):
        speech = voice(text, speed=rng.uniform(0.75, 1.25), seed=i)
        rate = hibari.SAMPLE_RATE * rng.choice(PITCHES)
        audio = soxr.resample(np.asarray(speech, np.float32), rate, SAMPLE_RATE)
        noise_level = 10 ** rng.uniform(-4.5, -2.3)
        noise = np.random.default_rng(i).normal(0, noise_level, len(audio))
        audio = rng.uniform(0.3, 1) * audio + noise.astype(np.float32)
        save_audio(args.output_dir / f"{i:05}.flac", audio)
        rows.append({"wav": f"{i:05}.flac", "txt": text})
    write_manifest(manifest, rows)


COMMANDS = {
    "select": (SelectArguments, select),
    "speed": (SpeedArguments, speed),
    "disturb": (DisturbArguments, disturb),
    "join": (JoinArguments, join),
    "draw": (DrawArguments, draw),
    "write": (WriteArguments, write),
    "speak": (SpeakArguments, speak),
}


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    names = ", ".join(COMMANDS)
    if not given:
        raise InputError(f"wanted one of {names}: python -m experiments.augment NAME --help")
    name, *arguments = given
    if name not in COMMANDS:
        raise InputError(f"wanted one of {names}, got {name!r}")
    arguments_class, command = COMMANDS[name]
    command(parse_arguments(arguments_class, arguments))


if __name__ == "__main__":
    run_command(main)
