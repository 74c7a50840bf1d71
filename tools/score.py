"""Score results again, with another metric or normaliser, or several side by side.

    python -m tools.score --result_path a.jsonl b.jsonl --normalizer basic
    python -m tools.score --result_path a.jsonl --by duration

needs no model. It prints a table with a row for each file, and what it dropped from the filtered
rates. With `--by` there is a row for each value of a key of the manifest, such as `spk`, and for
`duration` one for each range of seconds. Each file is written again, its lines with a transcript
having their own `rate`, and in `hallucination` the reason or null.
"""

from bisect import bisect
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from transformers.hf_argparser import HfArg

import scoring
from arguments import ScoringArguments, part_path
from command import InputError, parse_arguments, run_command
from manifest import check_duration, parse_json_object, read_lines, show
from recognize import write_results

DURATIONS = (2, 4, 6, 8, 12, 17)  # seconds, the ends of ranges


@dataclass(kw_only=True)
class Arguments(ScoringArguments):
    """The flags of tools/score.py."""

    result_path: list[Path] = HfArg(
        help="JSONL as recognize.py or tools/whisper_baseline.py wrote it; it is written again."
    )
    by: str | None = HfArg(
        default=None, help="A key of the lines, such as spk or duration: a row for each value."
    )


def read_results(path: Path) -> list[dict]:
    """The results in a file. InputError names the first line that is none."""
    results = []
    for number, line in read_lines(str(path)):
        try:
            result = parse_json_object(line)
            check_result(result)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        results.append(result)
    if not any(has_transcript(result) for result in results):
        raise InputError(f'{path}: no line has a transcript, "txt", so there is nothing to score')
    return results


def check_result(result: dict) -> None:
    """InputError if it lacks something that scores need."""
    for key in ("wav", "hyp", "txt"):
        missing = key == "txt" and not has_transcript(result)
        if not missing and not isinstance(result.get(key), str):
            raise InputError(
                f'"{key}" must be a text, got {show(result.get(key))}: score what recognize.py '
                "or tools/whisper_baseline.py wrote"
            )
    check_duration(result.get("duration"))


def has_transcript(result: dict) -> bool:
    return result.get("txt") is not None


def choose_for_all(
    scored: dict[Path, list[dict]],
    metric: str,
    normalizer: str,
) -> tuple[str, str]:
    """The metric and the normaliser that all files call for; InputError if they differ."""
    first = None
    for path, results in scored.items():
        choice = scoring.choose_metric(results, metric, normalizer)
        if first is None:
            first, first_path = choice, path
        for flag, here, there in zip(("metric", "normalizer"), choice, first):
            if here != there:
                raise InputError(
                    f"{first_path} calls for {there}, but {path} for {here}: choose one for both "
                    f"with --{flag}, or score them apart"
                )
    return first


def group(results: list[dict], by: str | None) -> dict[str, list[dict]]:
    """Results by what their lines have under the key `by`, or all of them as one group."""
    if by is None:
        return {"all": results}
    if not any(by in result for result in results):
        keys = ", ".join(results[0])
        raise InputError(f"--by {by}: no line has that key; the first line has {keys}")
    if by == "duration":
        results = sorted(results, key=itemgetter("duration"))
    groups = {}
    for result in results:
        value = result.get(by, "none")
        name = name_range(value) if by == "duration" else str(value)
        groups.setdefault(name, []).append(result)
    return groups


def name_range(seconds: float) -> str:
    """The range of DURATIONS that a number of seconds is in."""
    place = bisect(DURATIONS, seconds)
    start = DURATIONS[place - 1] if place > 0 else 0
    if place == len(DURATIONS):
        return f"{start} s and more"
    return f"{start} to {DURATIONS[place]} s"


def report(
    paths: list[Path], metric: str = "auto", normalizer: str = "auto", by: str | None = None
) -> str:
    """The table of results, with what was dropped below it; each file gets its scores.

    InputError for a file of something else, before any is written.
    """
    results_by_path = {path: read_results(path) for path in paths}
    scored = {}
    for path, results in results_by_path.items():
        scored[path] = [result for result in results if has_transcript(result)]
    metric, normalizer = choose_for_all(scored, metric, normalizer)
    groups = {path: group(results, by) for path, results in scored.items()}

    table, dropped = [], []
    for path, results in results_by_path.items():
        for name, members in groups[path].items():
            row = {"result": str(path)}
            if by is not None:
                row[by] = name
            table.append({**row, **scoring.score(members, metric, normalizer)})
        dropped += scoring.list_hallucinations(str(path), scored[path])
        part = part_path(path)
        write_results(part, results, "w")
        part.replace(path)
    return scoring.format_report(table, dropped, metric, normalizer)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    print(report(args.result_path, args.metric, args.normalizer, args.by))


if __name__ == "__main__":
    run_command(main)
