"""The prompt: one function builds it, for training and decoding."""

from datetime import datetime

from jinja2 import TemplateError

from command import InputError

AUDIO = "<|speech-goes-here|>"  # these two mark places, and are never tokenised
ANSWER = "<|answer-goes-here|>"
# The day that a template shows as today; it is the one that Llama 3's falls back to.
DAY = datetime(2024, 7, 26)
DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"  # of strftime; others stay as they are


def build_prompt(tokenizer, prompt: str) -> tuple[list[int], list[int], int]:
    """Token ids before the audio and after it, and the token that ends the answer.

    The prompt and the audio are the user's turn in the tokenizer's chat template, and the answer
    stands where the template puts what an assistant said. So no thinking stands before it.
    """
    name = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        raise InputError(f"{name} has no chat template: put a chat_template.jinja beside it")
    text = render_chat(tokenizer, f"{prompt}\n{AUDIO}")
    before, *rest = text.split(AUDIO)
    if len(rest) != 1:
        raise InputError(f"{name}: its chat template does not show what a user says, once")
    after, *ends = rest[0].split(ANSWER)
    if not ends:
        raise InputError(f"{name}: its chat template does not show what an assistant says")
    # a transcript starts with a space itself
    after = after.rstrip(" ")
    end_id = find_end(tokenizer, ends[-1])
    return encode_start(tokenizer, before), encode(tokenizer, after), end_id


def render_chat(tokenizer, question: str) -> str:
    """The text of a user's question and an assistant's ANSWER, the same on each day."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": ANSWER},
    ]
    try:
        template = fix_date() + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            enable_thinking=False,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"{tokenizer.name_or_path}: its chat template fails on a user's and an assistant's "
            f"message ({error}): put another one into chat_template.jinja beside it"
        ) from error


def fix_date() -> str:
    """A macro that stands for strftime_now, which is the only clock that a template can read."""
    value = "format"
    for directive in DIRECTIVES:
        value += f" | replace('%{directive}', '{DAY.strftime('%' + directive)}')"
        value += f" | replace('%-{directive}', '{DAY.strftime('%-' + directive)}')"
    return "{%- macro strftime_now(format) -%}{{ " + value + " }}{%- endmacro -%}"


def find_end(tokenizer, text: str) -> int:
    """The first token of what a template puts behind an answer, if that is a token of its own.

    Else the tokenizer's end: where the template puts nothing, or words.
    """
    ids = encode(tokenizer, text.strip())
    if ids and ids[0] in tokenizer.added_tokens_decoder:
        return ids[0]
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{tokenizer.name_or_path}: nothing ends an answer: neither its chat template does, "
            "nor has it an eos_token: set one in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def encode_start(tokenizer, text: str) -> list[int]:
    """Token ids of a text's beginning, with those that the tokenizer puts in front of any text.

    Some templates leave these to the tokenizer, as Zephyr's does, others have them.
    """
    ids = encode(tokenizer, text)
    plain = encode(tokenizer, "a")
    marked = tokenizer.encode("a")
    front = marked[: marked.index(plain[0])]
    if ids[: len(front)] == front:
        return ids
    return front + ids


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a part of a text, without those that stand around a whole one."""
    return tokenizer.encode(text, add_special_tokens=False)
