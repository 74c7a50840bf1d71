"""What a beam holds: the LLM's choice, CTC's, that of both with a bonus, and the best.

    python bench/nbest.py PROJECTOR.safetensors MANIFEST.jsonl BEAMS [CACHE]

Of the hypotheses that recognize.py's beam search ends with, the one is taken whose log-probability
for the LLM, plus the weight of CTC times that for CTC, plus a bonus for each token, is greatest:
a row of edits and error rate for each choice of the two, of which recognize.py has 1 and 0. The
last row takes the hypothesis that is nearest to the transcript. CACHE is bench/cached.py's.
"""

import sys
from pathlib import Path

from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from cached import Cache

from data import read_manifest
from model import SpeechLLM, load, run
from recognize import recognize, score

WEIGHTS = (0, 0.5, 1, 2, 3)
BONUSES = (0, 1, 2)  # nats


def hypotheses(model: SpeechLLM, rows: list[dict], beams: int) -> list[tuple[dict, list]]:
    """Each row with its hypotheses: text, log-probability for the LLM and for CTC, tokens."""
    generate, ctc_loss, found, rates = model.llm.generate, model.ctc_loss, [], []

    def kept(**options):
        out = generate(**options)
        scores = out.sequences_scores.view(-1, beams).tolist()
        found.extend(zip(out.sequences.unflatten(0, (-1, beams)), scores))
        return out

    def rated(audio, lengths, labels):
        rates.append(ctc_loss(audio, lengths, labels))
        return rates[-1]

    model.llm.generate, model.ctc_loss = kept, rated
    done = list(recognize(model, rows, 8, beams))
    results = []
    for row, (tokens, llm), ctc in zip(done, found, rates):
        ids = [x[x != model.end_id].tolist() for x in tokens]
        texts = [model.tokenizer.decode(x, skip_special_tokens=True) for x in ids]
        results.append((row, [*zip(texts, llm, (-ctc).tolist(), map(len, ids))]))
    return results


def show(name: str, results: list[tuple[dict, list]], value) -> None:
    """The score of the hypothesis of greatest `value` (row, hypothesis) of each row."""
    taken = [row | {"hyp": max(found, key=lambda x: value(row, x))[0]} for row, found in results]
    print(name, *score(taken).values(), sep=" | ", flush=True)


def main(projector: str, manifest: str, beams: str, cache: str | None = None) -> None:
    model = load(projector, bf16=True).to(PartialState().device).eval()
    if cache:
        model.encoder.forward = Cache(model.encoder, cache)
    rows = read_manifest([manifest])
    results = hypotheses(model, rows, int(beams))
    print("weight of CTC, bonus", *score(rows), sep=" | ")
    print(*["---"] * 5, sep="|")
    for weight in WEIGHTS:
        for bonus in BONUSES:

            def value(row, x, weight=weight, bonus=bonus):
                return x[1] + weight * x[2] + bonus * x[3]

            show(f"{weight}, {bonus}", results, value)

    def nearness(row, x):
        return -float(next(iter(score([row | {"hyp": x[0]}]).values())))

    show("nearest", results, nearness)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or int(sys.argv[3]) < 2:
        sys.exit("usage: python bench/nbest.py PROJECTOR MANIFEST BEAMS(2 or more) [CACHE]")
    run(lambda: main(*sys.argv[1:]))
