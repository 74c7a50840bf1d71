"""Recognise manifests with beam search, and score the hypotheses.

    python recognize.py --projector_model_path exp/model.safetensors --data_path test.jsonl \
        --num_beams 1 3 5 8 10 --result_path result.jsonl

writes a hypothesis a line in the manifest's order, for several beams a file each, and prints a
table with a row for each beam. Each batch is encoded once for all of them.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch.utils.data import DataLoader

import scoring
from arguments import RecognitionArguments, check_result_path, part_path
from command import InputError, parse_arguments, run_command
from ctc import CTC_WEIGHT
from loading import load
from machine import end_processes, get_process, may_fork
from manifest import Utterance, read_manifest
from model import SpeechLLM
from words import time_words


def recognize(
    model: SpeechLLM,
    utterances: list[Utterance],
    num_beams: list[int],
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    ctc_weight: float = CTC_WEIGHT,
    num_workers: int = 2,
    word_times: bool = False,
    progress: bool = True,
) -> Iterator[tuple[list[Utterance], dict[int, float]]]:
    """Add `hypotheses` to utterances, one for each width in `num_beams`; long audio comes first.

    Yields the utterances of each batch when they have theirs, and the seconds that each width took
    with reading and encoding, which all widths share. Several processes share the batches out, and
    each of them gets all hypotheses. The model must be on accelerate's device. `word_times` adds
    `words` beside the hypotheses; `progress` shows a bar.
    """
    ordered = sorted(utterances, key=lambda x: x.duration, reverse=True)
    waiting = iter(ordered)
    accelerator = Accelerator()
    collator = model.collator()
    loader = DataLoader(
        ordered,
        batch_size,
        collate_fn=collator,
        num_workers=num_workers if may_fork() else 0,
        pin_memory=torch.accelerator.is_available(),
    )
    start = time.perf_counter()
    for batch in tqdm(accelerator.prepare(loader), disable=not progress):
        with torch.no_grad():
            audio = model.embed_audio(batch["mel"], batch["lengths"])
        encoded = time.perf_counter()
        texts, seconds = [], {}
        for beams in num_beams:
            begin = time.perf_counter()
            ids = model.generate(audio, beams, max_new_tokens, ctc_weight)
            decoded = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
            words = [[]] * len(decoded)
            if word_times:
                parts = zip(audio, batch["mel"], decoded)
                words = [time_words(model, x, mel, text) for x, mel, text in parts]
            texts.append(list(zip(decoded, words)))
            seconds[beams] = encoded - start + time.perf_counter() - begin
        by_utterance = list(zip(*texts))
        done = []
        # those of several processes come in order, less what fills up the last batch
        for hypotheses in accelerator.gather_for_metrics(by_utterance, use_gather_object=True):
            utterance = next(waiting)
            for beams, (text, words) in zip(num_beams, hypotheses):
                utterance.hypotheses[beams] = " ".join(text.split())
                utterance.words[beams] = words
            done.append(utterance)
        yield done, seconds
        start = time.perf_counter()


def result_paths(path: Path, num_beams: list[int]) -> dict[int, Path]:
    """Where the results of each beam go: result.jsonl, or result.beam1.jsonl and so on."""
    if len(num_beams) == 1:
        return {num_beams[0]: path}
    return {beams: path.with_stem(f"{path.stem}.beam{beams}") for beams in num_beams}


def make_result(utterance: Utterance, beams: int) -> dict:
    """The manifest's line with its duration and hypothesis, and its words where they have times."""
    hypothesis = utterance.hypotheses[beams]
    result = {**utterance.row, "duration": utterance.duration, "hyp": hypothesis}
    words = utterance.words.get(beams)
    if words:
        result["words"] = words
    return result


def write_results(path: Path, results: list[dict], mode: str) -> None:
    """A JSON object a line; InputError where the system does not let it be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8", errors="backslashreplace") as file:
            for result in results:
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"--result_path: cannot write {path}: {error.strerror}") from error


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(RecognitionArguments, argv)
    paths = result_paths(args.result_path, args.num_beams)
    for path in paths.values():
        check_result_path(path, args.data_path)
    utterances = read_manifest(args.data_path, need_text=False)
    state = get_process()
    # hypotheses as they come, which are left where the run is stopped
    parts = {beams: part_path(path) for beams, path in paths.items()}
    if state.is_main_process:
        for part in parts.values():
            write_results(part, [], "w")  # what cannot be written is found before the work
    model = load(
        args.projector_model_path,
        args.llm_model_name_or_path,
        args.whisper_model_name_or_path,
        args.bf16,
        args.encoder_cache,
    )
    model = model.to(state.device).eval()

    total = Counter()
    options = {
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "ctc_weight": args.ctc_weight,
        "num_workers": args.num_workers,
        "word_times": args.word_times,
    }
    for done, seconds in recognize(model, utterances, args.num_beams, **options):
        total.update(seconds)
        if state.is_main_process:
            for beams, part in parts.items():
                write_results(part, [make_result(x, beams) for x in done], "a")

    if state.is_main_process:
        table, dropped = [], []
        for beams, path in paths.items():
            results = [make_result(x, beams) for x in utterances]
            scored = []
            for result in results:
                if result.get("txt") is None:
                    reason = scoring.find_hallucination(result["hyp"], result["duration"])
                    result["hallucination"] = reason
                else:
                    scored.append(result)  # `score` finds theirs
            if scored:
                metric, normalizer = scoring.choose_metric(scored, args.metric, args.normalizer)
                cells = scoring.score(scored, metric, normalizer)
                rtf = total[beams] / sum(x.duration for x in utterances)
                times = {"RTF": f"{rtf:.3f}", "seconds": f"{total[beams]:.1f}"}
                table.append({"beam": beams, **cells, **times})
                dropped += scoring.list_hallucinations(f"beam {beams}", scored)
            write_results(parts[beams], results, "w")
            parts[beams].replace(path)
        if table:
            print(scoring.format_report(table, dropped, metric, normalizer))
    end_processes()


if __name__ == "__main__":
    run_command(main)
