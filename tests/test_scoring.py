"""Error rates and hallucinations, counted by hand, and the table."""

from pathlib import Path

import pytest

import scoring

REFUSED = "I apologize, but it appears that there is no speech to transcribe"  # 12 words


def make_result(txt, hyp, duration=9.0):
    return {"wav": "a.wav", "txt": txt, "hyp": hyp, "duration": duration}


def rate(txt, hyp, metric="WER", normalizer="none"):
    return scoring.error_rate([make_result(txt, hyp)], metric, normalizer)


@pytest.mark.parametrize(
    "txt, hyp, metric, cells",
    [
        ("go up now", "go up now", "WER", [0, 0, 0, 0]),
        ("go up now", "go down", "WER", [66.67, 1, 1, 0]),
        ("go up", "", "WER", [100, 0, 2, 0]),
        ("go", "oh go go", "WER", [200, 0, 0, 2]),
        ("今天 天气", "今天天汽好", "CER", [50, 1, 0, 1]),
        ("go up", "goup", "CER", [0, 0, 0, 0]),
    ],
)
def test_rates_and_edits_are_those_counted_by_hand(txt, hyp, metric, cells):
    out = rate(txt, hyp, metric)
    assert list(out) == [f"{metric} %", "substitutions", "deletions", "insertions"]
    assert list(out.values()) == cells


def test_the_rate_of_many_is_over_all_their_words_and_not_a_mean_of_rates():
    results = [make_result("a", "b"), make_result("a b c", "a b c")]
    assert scoring.error_rate(results, "WER", "none")["WER %"] == 25


@pytest.mark.parametrize(
    "txt, hyp, rates",
    [
        ("Go up!", "go up", {"none": 100, "basic": 0, "english": 0}),
        ("It's two o'clock", "it is 2 o'clock", {"none": 100, "basic": 40, "english": 0}),
        ("Où est-il?", "où est il", {"none": 150, "basic": 0}),
    ],
)
def test_normalisers_forgive_what_they_say(txt, hyp, rates):
    found = {name: rate(txt, hyp, "WER", name)["WER %"] for name in rates}
    assert found == rates


def read_cases():
    """The rows of the table in docs/scoring.md that were counted by hand."""
    page = Path(__file__).parents[1] / "docs" / "scoring.md"
    table = page.read_text(encoding="utf-8").split("## Counted by hand")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if " | " in line]
    return rows[1:]  # without the head


@pytest.mark.parametrize("case, txt, hyp, metric, normalizer, expected", read_cases(), ids=str)
def test_the_table_in_docs_is_what_is_counted(case, txt, hyp, metric, normalizer, expected):
    assert rate(txt, hyp, metric, normalizer)[f"{metric} %"] == float(expected)


GERMAN = "er geht um acht los und darum geht es um alles was man in der Not hat"
PORTUGUESE = "ele tem um carro novo e um gato no teto da casa dele"


@pytest.mark.parametrize(
    "texts, chosen",
    [
        (["go up", "it's two o'clock"], ("WER", "english")),
        (["WE CALL IT BEAR", "WHAT DID THEY SAY"], ("WER", "english")),
        (["where is the café"], ("WER", "english")),
        (["one two three four five"], ("WER", "english")),
        (["où est l'été", "là"], ("WER", "basic")),
        ([GERMAN], ("WER", "basic")),
        ([PORTUGUESE], ("WER", "basic")),
        ([GERMAN] * 9 + ["The Beatles"], ("WER", "basic")),
        (["今天天气。", "今天"], ("CER", "basic")),
        (["ひらがな カタカナ"], ("CER", "basic")),
        (["สวัสดี"], ("CER", "basic")),
        (["안녕하세요 여러분"], ("WER", "basic")),  # Korean has spaces
        (["今天天气 very good"], ("MER", "basic")),
        (["今天天气"] * 100 + ["ok"], ("CER", "basic")),
        (["what is the meaning of all of this three times over, of 三"], ("WER", "english")),
    ],
    ids=str,
)
def test_metric_and_normaliser_follow_all_references_together(texts, chosen):
    results = [make_result(text, "三三三三三三三三三三") for text in texts]
    assert scoring.choose_metric(results, "auto", "auto") == chosen


def test_metric_and_normaliser_can_be_given():
    chinese, english = [make_result("今天", "今天")], [make_result("go", "go")]
    assert scoring.choose_metric(chinese, "WER", "none") == ("WER", "none")
    assert scoring.choose_metric(english, "CER", "auto") == ("CER", "basic")


@pytest.mark.parametrize(
    "hypothesis, reason",
    [
        (REFUSED, "refusal"),
        ("I'm an AI language model", "refusal"),
        ("As an AI, I cannot hear audio.", "refusal"),
        ("I am sorry, but I cannot make that out", "refusal"),
        ("i am sorry but i have to go", None),
        ("there is an apology in the speech", None),
        ("no no no no", None),
        ("no no no no no", "loop"),
        ("on the on the on the on the on the hill", "loop"),
        ("对对对对对对对对对对", "loop"),
        ("one zero one zero one zero one", None),
        ("", None),
    ],
)
def test_what_counts_as_a_hallucination(hypothesis, reason):
    assert scoring.find_hallucination(hypothesis, len(hypothesis) / 25) == reason


def test_text_that_nobody_can_say_so_fast_is_a_hallucination():
    text = "the quick brown fox jumps over the lazy dog and away"  # 52 characters, of 25 a second
    assert scoring.find_hallucination(text, 1.1) is None
    assert scoring.find_hallucination(text, 1.0) == "more than can be said"


def test_the_filtered_rate_leaves_hallucinations_out_and_counts_them():
    results = [make_result("go on", "go on"), make_result("go on", REFUSED)]
    # 12 words for 2 are 2 substituted and 10 inserted, of 4 words in all
    assert scoring.score(results, "WER", "none") == {
        "WER %": 300,
        "substitutions": 2,
        "deletions": 0,
        "insertions": 10,
        "WER % filtered": 0,
        "dropped": 1,
        "utterances": 2,
    }
    assert [x["rate"] for x in results] == [0, 600]
    assert [x["hallucination"] for x in results] == [None, "refusal"]
    [line] = scoring.list_hallucinations("beam 1", results)
    assert line == f"beam 1: a.wav: refusal: go on | {REFUSED}"
    alone = scoring.score(results[1:], "CER", "none")
    assert alone["CER % filtered"] is None


def test_the_report_is_a_markdown_table_how_it_was_scored_and_what_was_dropped():
    table = [
        {"beam": 1, "WER %": 5.0, "WER % filtered": 4.256, "dropped": 1},
        {"beam": 3, "WER %": 100.0, "WER % filtered": None, "dropped": 2},
    ]
    head = (
        "| beam | WER % | WER % filtered | dropped |\n"
        "| --- | --- | --- | --- |\n"
        "| 1 | 5.00 | 4.26 | 1 |\n"
        "| 3 | 100.00 | - | 2 |\n"
        "metric: WER; normaliser: basic"
    )
    assert scoring.format_report(table, [], "WER", "basic") == head
    report = scoring.format_report(table, ["beam 1: a.wav"], "WER", "basic")
    assert report == f"{head}\ndropped as hallucinations:\nbeam 1: a.wav"
