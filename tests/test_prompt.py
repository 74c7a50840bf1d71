"""The prompt and the labels, written out by hand for the genuine templates of published models."""

from pathlib import Path

import pytest
import tiny

from command import InputError
from data import IGNORE, Collator
from manifest import Utterance
from prompt import build_prompt

FOLDER = Path(__file__).parent / "chat_templates"
# for each file: its tokens, of which the first starts a text and the last ends one; then what
# stands before the audio and after it, and what ends the answer
TEMPLATES = {
    "qwen2.5": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nSay it:\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen3": (  # it would think aloud if it were let
        ["<|endoftext|>", "<|im_start|>", "<think>", "</think>", "<|im_end|>"],
        "<|im_start|>user\nSay it:\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "llama3.2": (  # it would show today's date
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSay it:\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma2": (
        ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
        "<bos><start_of_turn>user\nSay it:\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "mistral": (
        ["<s>", "[INST]", "[/INST]", "</s>"],
        "<s>[INST]Say it:\n",
        "[/INST]",
        "</s>",
    ),
}


def make_tokenizer(name):
    specials = TEMPLATES[name][0]
    template = (FOLDER / f"{name}.jinja").read_text()
    return tiny.make_tokenizer(template, specials[-1], specials, start=specials[0])


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
    _, before, after, end = TEMPLATES[name]
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
    [end_id] = spell(tokenizer, TEMPLATES[name][3])
    first = tiny.make_sound(tmp_path / "a.wav", 0.3, 300)
    second = tiny.make_sound(tmp_path / "b.wav", 0.2201, 300)
    collator = Collator(tokenizer, end_id, n_mels=80, stride=5, max_length=99, limit="")
    batch = collator([Utterance(first, 0.3, "hi"), Utterance(second, 0.22, "a")])
    assert batch["labels"].tolist() == [
        [IGNORE, *spell(tokenizer, " hi"), end_id],
        [IGNORE, IGNORE, *spell(tokenizer, " a"), end_id],
    ]
    assert batch["lengths"] == [15, 12]  # of 20 ms, rounded up


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
    ],
)
def test_a_tokenizer_that_cannot_build_the_prompt_is_refused(template, message):
    tokenizer = tiny.make_tokenizer(template, "<|im_end|>")
    with pytest.raises(InputError, match=message):
        build_prompt(tokenizer, "Say it:")
