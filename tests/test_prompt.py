"""The prompt and the labels, written out by hand for the genuine templates of published models."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import tiny
from tokenizers.processors import TemplateProcessing
from transformers.utils import chat_template_utils

from command import InputError
from data import IGNORE, Collator
from manifest import Utterance
from prompt import build_prompt

FOLDER = Path(__file__).parent / "chat_templates"
SPECIAL_TOKENS = json.loads((FOLDER / "special_tokens.json").read_text(encoding="utf-8"))
PAGE = Path(__file__).parents[1] / "docs" / "templates.md"
# what stands before the audio and after it, and what ends the answer
TEMPLATES = {
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nSay it:\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen3": (  # it would think aloud if it were let
        "<|im_start|>user\nSay it:\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "llama3.2": (  # it would show today's date
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSay it:\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma2": (
        "<bos><start_of_turn>user\nSay it:\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "mistral": (
        "<s>[INST]Say it:\n",
        "[/INST]",
        "</s>",
    ),
}


def make_tokenizer(name):
    bos, eos, others = SPECIAL_TOKENS[name].values()
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    specials = [token for token in dict.fromkeys([bos, *others, eos]) if token]
    return tiny.make_tokenizer(template, eos, specials, start=bos)


def spell(tokenizer, text):
    """Token ids of a text, letter by letter, without the tokenizer's own splitting."""
    specials = list(tokenizer.get_added_vocab())
    ids = []
    while text:
        found = [x for x in specials if text.startswith(x)]
        piece = found[0] if found else text[0]
        text = text.removeprefix(piece)
        name = {" ": "Ġ", "\n": "Ċ"}.get(piece, piece)
        ids.append(tokenizer.convert_tokens_to_ids(name))
    assert None not in ids
    return ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_a_genuine_template_is_the_one_written_by_hand(name):
    before, after, end = TEMPLATES[name]
    tokenizer = make_tokenizer(name)
    before_ids, after_ids, end_id = build_prompt(tokenizer, "Say it:")
    assert tokenizer.decode(before_ids) == before
    assert tokenizer.decode(after_ids) == after
    assert tokenizer.decode([end_id]) == end
    assert before_ids == spell(tokenizer, before)
    assert after_ids == spell(tokenizer, after)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_labels_of_a_genuine_template_are_those_written_by_hand(name, tmp_path):
    tokenizer = make_tokenizer(name)
    # which is also what pads for most, and yet a label
    [end_id] = spell(tokenizer, TEMPLATES[name][2])
    first = tiny.make_sound(tmp_path / "a.wav", 0.3, 300)
    second = tiny.make_sound(tmp_path / "b.wav", 0.2201, 300)
    collator = Collator(tokenizer, end_id, n_mels=80, stride=5, max_length=99, limit="")
    batch = collator([Utterance(first, 0.3, "hi"), Utterance(second, 0.22, "a")])
    assert batch["labels"].tolist() == [
        [IGNORE, *spell(tokenizer, " hi"), end_id],
        [IGNORE, IGNORE, *spell(tokenizer, " a"), end_id],
    ]
    assert batch["lengths"] == [15, 12]  # of 20 ms, rounded up


def show(tokenizer, ids):
    """Token ids as a cell of a table of Markdown shows them."""
    text = tokenizer.decode(ids).replace("\n", r"\n").replace("|", r"\|")
    return f"`{text}`"


def describe(name):
    """The cells of a template's row: its first token, the last ones before the audio, and so on."""
    tokenizer = make_tokenizer(name)
    before, after, end_id = build_prompt(tokenizer, "Say it:")
    own = tokenizer.added_tokens_decoder
    last = max(i for i, token in enumerate(before) if token in own)
    parts = [before[:1], before[last:], after, [end_id]]
    return [name, *(show(tokenizer, ids) for ids in parts)]


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_the_prompt_of_a_genuine_template_is_the_one_in_docs(name):
    row = "| " + " | ".join(describe(name)) + " |"
    assert row in PAGE.read_text(encoding="utf-8").splitlines()
    before, after, _ = build_prompt(make_tokenizer(name), "Say it:")
    text = make_tokenizer(name).decode(before + after)
    assert "goes-here" not in text
    # what the template spells as a token is one
    bos = SPECIAL_TOKENS[name]["bos_token"]
    assert text.count(bos or "<s>") == [*before, *after].count(make_tokenizer(name).bos_token_id)


CLOCKS = ["llama3.2", "mistral-small3.2", "granite3.3", "gpt-oss"]  # genuine ones that show a date


@pytest.mark.parametrize("name", CLOCKS)
def test_a_template_shows_the_same_date_on_all_days(name, monkeypatch):
    class Later(datetime):
        @classmethod
        def now(cls):
            return cls(2031, 5, 4)

    tokenizer = make_tokenizer(name)
    today = build_prompt(tokenizer, "Say it:")
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    messages = [{"role": "user", "content": "Say it:"}]
    assert "2031" in tokenizer.apply_chat_template(messages, tokenize=False)
    assert build_prompt(tokenizer, "Say it:") == today
    assert "2024" in tokenizer.decode(today[0])


def test_all_that_a_template_may_ask_the_clock_for_is_fixed():
    format = "%Y-%m-%d, %d %b %Y, %B %-d, %A, %H:%M:%S, %j, %y%m%d, %F %T, %I %p"
    # also where the clock is asked within a macro, and only if there is one
    macro = "{% macro day(format) %}{% if strftime_now is defined %}{{ strftime_now(format) }}"
    macro += "{% endif %}{% endmacro %}{{ day('" + format + "') }};"
    template = macro + "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tiny.make_tokenizer(template, "<|eot_id|>")
    before, _, _ = build_prompt(tokenizer, "Say it:")
    wanted = datetime(2024, 7, 26).strftime(format)
    assert tokenizer.decode(before) == f"{wanted};Say it:\n"


@pytest.mark.parametrize("written", ["", "{{ bos_token }}"])
def test_a_text_starts_with_one_bos_whether_the_template_or_the_tokenizer_puts_it_there(written):
    template = written + "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tiny.make_tokenizer(template, "<|eot_id|>", start="<|begin_of_text|>")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    names = [(tokenizer.bos_token, bos), (tokenizer.eos_token, eos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A {tokenizer.eos_token}", special_tokens=names
    )
    assert tokenizer.encode("a") == [bos, *spell(tokenizer, "a"), eos]
    before, after, _ = build_prompt(tokenizer, "Say it:")
    assert before == [bos, *spell(tokenizer, "Say it:\n")]
    assert after == []


def test_where_a_template_does_not_end_an_answer_the_tokenizers_end_does():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tiny.make_tokenizer(template, "<|eot_id|>")
    assert build_prompt(tokenizer, "Say it:")[2] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "has no chat template: put a chat_template.jinja beside it"),
        ("hello", "its chat template does not show what a user says, once"),
        ("{{ messages[0].content * 2 }}", "does not show what a user says, once"),
        ("{{ messages[0].content }}", "does not show what an assistant says"),
        ("{{ messages[0].text[0] }}", r"fails on .*('dict object' has no attribute 'text').*: put"),
        ("{% for %}", "fails on a user's and an assistant's message"),
        ("{{ tools | length }}", r"fails on .*('NoneType').*"),
        ("{{ raise_exception('no') }}", r"fails on .*\(no\): put another one into chat_template"),
    ],
)
def test_a_tokenizer_that_cannot_build_the_prompt_is_refused(template, message):
    tokenizer = tiny.make_tokenizer(template, "<|im_end|>")
    with pytest.raises(InputError, match=message):
        build_prompt(tokenizer, "Say it:")


def test_an_answer_that_nothing_ends_is_refused():
    template = "{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}"  # of no tokenizer
    tokenizer = tiny.make_tokenizer(template, "<|eot_id|>")
    assert build_prompt(tokenizer, "Say it:")[2] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="nothing ends an answer: .* set one in tokenizer_config"):
        build_prompt(tokenizer, "Say it:")
