"""Error rates, normalisers, hallucinations, and the Markdown table.

A result is a dict with `txt`, what is said, `hyp`, what was recognised, and `duration` in seconds.
"""

import re
import unicodedata

import jiwer
import regex
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

# scripts without spaces between words: Thai, Lao, Burmese, Khmer, Chinese, Japanese
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31f0-\u31ff\u3400-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc\u2032\uff07`\u00b4", "'"))
# common words that no other language in Latin script has, and 15 % of what is said in English
ENGLISH = re.compile(
    r"\b(the|and|you|that|with|this|they|what|from|would|there|their|which|your|she|been|were|could"
    r"|should|about|these|two|three|five|seven|eight|nine)\b"
)
DIGIT = "(zero|one|two|three|four|five|six|seven|eight|nine|[0-9])"
# two digits that are read one by one, which whisper's English normaliser joins to a number
DIGITS = re.compile(rf"\b{DIGIT}[\s,-]+((oh|double|triple)[\s,-]+)?{DIGIT}\b")
# what a chat says of audio that it does not hear: it excuses itself, or speaks of audio or itself
REFUSAL = re.compile(
    r"\b(no|any) (speech|audio)\b|\bas an? (ai|language)\b|\b(ai assistant|language model)\b"
    r"|\bi apologi[sz]e,? but\b|\b(i'm|i am) sorry,? but i (cannot|can't)\b"
    r"|\b(cannot|can't|unable to) (listen|transcribe)\b"
)
LOOP = re.compile(r"(.{2,60}?)\1{4}")  # the same 2 to 60 characters five times in a row
FASTEST = 25  # characters a second; a fast speaker of English says 20


class Basic(BasicTextNormalizer):
    """openai-whisper's, but for vowels and tones that are marks of their own, as in Hindi or Thai.

    Those stay. Whisper's own has spaces in their place, which cut words into pieces.
    """

    def __init__(self):
        super().__init__()
        self.clean = remove_symbols


def remove_symbols(text: str) -> str:
    """Spaces in place of symbols, punctuation, and marks that belong to no letter."""
    text = unicodedata.normalize("NFKC", text)
    return regex.sub(r"[\p{S}\p{P}]|(?<![\p{L}\p{M}])\p{M}", " ", text)


NORMALIZERS = {"english": EnglishTextNormalizer(), "basic": Basic(), "none": str}


def normalize(result: dict, normalizer: str) -> tuple[str, str]:
    """What is said and what was recognised, as they are compared."""
    said, recognised = result["txt"], result["hyp"]
    if normalizer == "none":
        return said, recognised
    texts = []
    for text in (said, recognised):
        text = NORMALIZERS[normalizer](text.translate(APOSTROPHES))
        if normalizer == "english" and DIGITS.search(said.lower()):
            text = split_digits(text)
        texts.append(text)
    return tuple(texts)


def split_digits(text: str) -> str:
    """Each digit as a word, also the one that whisper's English normaliser leaves as a word."""
    text = re.sub(r"\bone\b", "1", text)
    return re.sub(r"(\d)(?=\d)", r"\1 ", text)


def split_units(text: str, metric: str) -> list[str]:
    """What is counted: words; characters; or characters of scripts without spaces, else words."""
    if metric == "CER":
        return list("".join(text.split()))
    if metric == "MER":
        return re.findall(f"[{UNSPACED}]|[^\\s{UNSPACED}]+", text)
    return text.split()


def choose_metric(results: list[dict], metric: str, normalizer: str) -> tuple[str, str]:
    """Metric and normaliser, where "auto" is by all references together.

    CER where nearly all is in scripts without spaces between words, MER where a tenth is, otherwise
    WER. The English normaliser where one word of fifty is a common word of English alone, otherwise
    the basic one.
    """
    text = " ".join(result["txt"] for result in results).lower()
    units = split_units(Basic()(text), "MER")
    unspaced = len(re.findall(f"[{UNSPACED}]", "".join(units)))
    if metric == "auto":
        if unspaced > 0.99 * len(units):
            metric = "CER"
        elif unspaced > 0.1 * len(units):
            metric = "MER"
        else:
            metric = "WER"
    if normalizer == "auto":
        english = len(ENGLISH.findall(text)) > 0.02 * len(units)
        normalizer = "english" if metric == "WER" and english else "basic"
    return metric, normalizer


def error_rate(results: list[dict], metric: str, normalizer: str) -> dict:
    """The rate in % and its edits. MER is the rate of texts that mix scripts."""
    references, hypotheses = [], []
    for result in results:
        said, recognised = normalize(result, normalizer)
        references.append(" ".join(split_units(said, metric)))
        hypotheses.append(" ".join(split_units(recognised, metric)))
    out = jiwer.process_words(references, hypotheses)
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
