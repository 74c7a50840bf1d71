"""Synthesise a small corpus of spoken commands with an offline voice.

    python demo/speech.py demo/speech

writes demo/speech/{train,dev,test}.jsonl with their audio. Sentences are drawn with a fixed seed,
and no sentence is in two sets. What is there already is kept, so that a stopped run goes on.
"""

import json
import os
import random
import re
import sys
from pathlib import Path

import soundfile
from tqdm import tqdm

SIZES = {"train": 1000, "dev": 40, "test": 100}  # utterances; the grammar has 1,432 sentences
SEED = 0
SPEEDS = (0.9, 1.0, 1.1, 1.2)
GRAMMAR = {
    "command": [
        "turn {state} the {device} in the {room}",
        "turn {state} the {room} {device}",
        "set the {room} heater to {tens} degrees",
        "set a timer for {tens} minutes",
        "wake me up at {hour} {minute} on {day}",
        "call {person} at {hour} {minute}",
        "send a message to {person} and {person}",
        "play some {music} in the {room}",
        "what is the weather in {city} on {day}",
        "how far is it from {city} to {city}",
        "add {food} and {food} to the shopping list",
        "remind me to buy {food} on {day}",
        "remind me to {chore} on {day}",
        "book a table in {city} for {person}",
    ],
    "state": ["on", "off"],
    "device": ["light", "lamp", "fan", "radio", "heater", "television", "speaker"],
    "room": ["kitchen", "bedroom", "bathroom", "garage", "garden", "office", "hall", "cellar"],
    "tens": ["ten", "fifteen", "twenty", "thirty", "forty", "fifty", "sixty"],
    "hour": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    "minute": ["fifteen", "twenty", "thirty", "forty five", "fifty"],
    "day": ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"],
    "person": ["anna", "peter", "maria", "george", "doctor brown", "my brother", "my mother"],
    "music": ["jazz", "rock", "piano music", "folk songs", "opera", "dance music"],
    "city": ["london", "paris", "berlin", "madrid", "rome", "boston", "chicago", "dublin"],
    "food": ["milk", "bread", "butter", "apples", "cheese", "coffee", "rice", "onions", "eggs"],
    "chore": ["water the plants", "feed the cat", "wash the car", "clean the windows"],
}


def sentence(rng: random.Random, template: str = "{command}") -> str:
    """Fill each {name} of `template` with a random choice, until none is left."""
    while "{" in template:
        template = re.sub(r"{(\w+)}", lambda name: rng.choice(GRAMMAR[name[1]]), template)
    return template


def sentences(seed: int) -> dict[str, list[str]]:
    """The sentences of each set of SIZES, all different."""
    rng = random.Random(seed)
    drawn: dict[str, None] = {}  # a set that keeps its order
    while len(drawn) < sum(SIZES.values()):
        drawn[sentence(rng)] = None
    pool = iter(rng.sample(list(drawn), len(drawn)))  # as late draws are of the longer templates
    return {name: [next(pool) for _ in range(size)] for name, size in SIZES.items()}


def synthesise(folder: Path) -> None:
    """Write each set's audio, and then its manifest: so a manifest is there only when all is."""
    from hibari import SAMPLE_RATE, Hibari  # not needed for speech that is there

    rng = random.Random(SEED)
    voice = Hibari()
    for name, texts in sentences(SEED).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = []
        for number, text in enumerate(tqdm(texts, f"{folder / name}: speaking", unit="utt")):
            wav = f"{name}/{number:04d}.flac"
            speed = rng.choice(SPEEDS)
            if not (folder / wav).exists():
                audio = voice(text, speed=speed, seed=number)
                part = folder / f"{wav}.part"
                soundfile.write(part, audio, SAMPLE_RATE, format="FLAC")
                os.replace(part, folder / wav)
            rows.append(json.dumps({"wav": wav, "txt": text}))
        part = folder / f"{name}.jsonl.part"
        part.write_text("\n".join(rows) + "\n")
        os.replace(part, folder / f"{name}.jsonl")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python demo/speech.py FOLDER")
    target = Path(sys.argv[1])
    if all((target / f"{name}.jsonl").exists() for name in SIZES):
        print(f"{target}: there already")
    else:
        synthesise(target)
