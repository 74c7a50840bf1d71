"""Which words are lost? The errors in results by how often training has heard the word.

    python -m experiments.rare_words --result_path result.beam5.jsonl --data_path train.jsonl

prints a row for each range of counts: its share of the words that are said, how many of them are
wrong, and how many points of the WER that is. Inserted words are not counted.
"""

from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jiwer
from transformers.hf_argparser import HfArg

from command import parse_arguments, run_command
from manifest import read_manifest
from scoring import format_table, normalize
from tools.score import has_transcript, read_results

RANGES = ("0", "1 to 2", "3 to 9", "10 to 29", "30 to 99", "100 and more")
STARTS = (1, 3, 10, 30, 100)  # the least count of each range but the first


@dataclass
class Arguments:
    result_path: list[Path] = HfArg(help="JSONL as recognize.py or experiments.ctc_probe wrote it.")
    data_path: list[str] = HfArg(help="JSONL manifests that were trained on.")


def count_words(manifests: list[str]) -> Counter:
    counts = Counter()
    for utterance in read_manifest(manifests):
        said, _ = normalize({"txt": utterance.text, "hyp": ""}, "english")
        counts.update(said.split())
    return counts


def sort_errors(results: list[dict], counts: Counter) -> tuple[Counter, Counter]:
    """How many words of each range are said, and how many of these are wrong."""
    said, recognised = zip(*(normalize(result, "english") for result in results))
    output = jiwer.process_words(list(said), list(recognised))
    words, errors = Counter(), Counter()
    for reference, chunks in zip(output.references, output.alignments):
        for chunk in chunks:
            for word in reference[chunk.ref_start_idx : chunk.ref_end_idx]:
                place = RANGES[bisect(STARTS, counts[word])]
                words[place] += 1
                errors[place] += chunk.type != "equal"
    return words, errors


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    counts = count_words(args.data_path)
    results = []
    for path in args.result_path:
        results += [result for result in read_results(path) if has_transcript(result)]
    words, errors = sort_errors(results, counts)
    table = []
    for place in RANGES:
        if words[place]:
            row = {
                "times in training": place,
                "% of the words": 100 * words[place] / words.total(),
                "% of these wrong": 100 * errors[place] / words[place],
                "% of all": 100 * errors[place] / words.total(),
            }
            table.append(row)
    print(format_table(table))


if __name__ == "__main__":
    run_command(main)
