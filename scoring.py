"""Error rates, normalisers, hallucinations, and the Markdown table.

A result is a dict with `txt`, what is said, `hyp`, what was recognised, and `duration` in seconds.
"""

import re

import jiwer
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

NORMALIZERS = {"english": EnglishTextNormalizer(), "basic": BasicTextNormalizer(), "none": str}
# what a chat says of audio that it does not hear: it excuses itself, or speaks of audio or itself
REFUSAL = re.compile(
    r"\b(no|any) (speech|audio)\b|\bas an? (ai|language)\b|\b(ai assistant|language model)\b"
    r"|\bi apologi[sz]e,? but\b|\b(i'm|i am) sorry,? but i (cannot|can't)\b"
    r"|\b(cannot|can't|unable to) (listen|transcribe)\b"
)
LOOP = re.compile(r"(.{2,60}?)\1{4}")  # the same 2 to 60 characters five times in a row
FASTEST = 25  # characters a second; a fast speaker of English says 20


def is_chinese_or_japanese(text: str) -> bool:
    """Whether most characters are kana or Chinese, which are written without word boundaries."""
    found = re.findall("[\u3040-\u9fff\uf900-\ufaff]", text)
    return len(found) > len(text) / 2


def choose_metric(results: list[dict], metric: str, normalizer: str) -> tuple[str, str]:
    """Metric and normaliser, where "auto" is by the script of the references.

    CER for Chinese and Japanese, otherwise WER; the English normaliser where nearly all is ASCII,
    otherwise the basic one.
    """
    text = "".join(result["txt"] for result in results)
    if metric == "auto":
        metric = "CER" if is_chinese_or_japanese(text) else "WER"
    if normalizer == "auto":
        ascii_characters = sum(character.isascii() for character in text)
        english = metric == "WER" and ascii_characters > 0.99 * len(text)
        normalizer = "english" if english else "basic"
    return metric, normalizer


def error_rate(results: list[dict], metric: str, normalizer: str) -> dict:
    """The rate in % and its edits. A CER's words are all characters but spaces."""
    normalize = NORMALIZERS[normalizer]
    sides = {}
    for side in ("txt", "hyp"):
        sides[side] = [normalize(result[side]) for result in results]
        if metric == "CER":
            sides[side] = [" ".join("".join(text.split())) for text in sides[side]]
    out = jiwer.process_words(sides["txt"], sides["hyp"])
    return {
        f"{metric} %": round(100 * out.wer, 2),
        "substitutions": out.substitutions,
        "deletions": out.deletions,
        "insertions": out.insertions,
    }


def find_hallucination(hypothesis: str, duration: float) -> str | None:
    """Why a hypothesis is no transcript of so many seconds, whatever was said, or None."""
    hypothesis = hypothesis.lower()
    if len(hypothesis) > FASTEST * (duration + 1):  # a second more, as short words are short
        return "more than can be said"
    if LOOP.search(f"{hypothesis} "):
        return "loop"
    if REFUSAL.search(hypothesis):
        return "refusal"
    return None


def score(results: list[dict], metric: str, normalizer: str) -> dict:
    """The cells of a row of the table; each result gets its own `rate`, and `hallucination`.

    "filtered" is the rate without hallucinations, of which "dropped" is the number.
    """
    head = f"{metric} %"
    for result in results:
        result["rate"] = error_rate([result], metric, normalizer)[head]
        result["hallucination"] = find_hallucination(result["hyp"], result["duration"])
    kept = [result for result in results if result["hallucination"] is None]
    filtered = error_rate(kept, metric, normalizer)[head] if kept else None
    return {
        **error_rate(results, metric, normalizer),
        f"{head} filtered": filtered,
        "dropped": len(results) - len(kept),
        "utterances": len(results),
    }


def format_report(table: list[dict], dropped: list[str], metric: str, normalizer: str) -> str:
    """The table, how it was scored, and what was dropped from the filtered rates."""
    lines = [format_table(table), f"metric: {metric}; normaliser: {normalizer}"]
    if dropped:
        lines.append("dropped as hallucinations:")
    return "\n".join(lines + dropped)


def format_table(rows: list[dict]) -> str:
    """A Markdown table of rows with the same keys, which are its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([format_cell(head, value) for head, value in row.items()])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_cell(head: str, value) -> str:
    if value is None:
        return "-"
    if "%" in head:
        return f"{value:.2f}"
    return str(value)


def list_hallucinations(name: str, results: list[dict]) -> list[str]:
    """A line for each: whose results, the audio, the reason, what is said, what was recognised."""
    lines = []
    for result in results:
        reason = result["hallucination"]
        if reason is not None:
            texts = f"{result['txt']} | {result['hyp']}"
            lines.append(f"{name}: {result['wav']}: {reason}: {texts}")
    return lines
