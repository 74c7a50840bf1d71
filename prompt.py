"""The prompt: one function builds it, for training and decoding."""

from command import InputError

AUDIO = "<|speech-goes-here|>"  # marks the audio's place, and is never tokenised


def build_prompt(tokenizer, prompt: str) -> tuple[list[int], list[int], int]:
    """Token ids before the audio and after it, and the token that ends the answer.

    The prompt and the audio are the user's turn in the tokenizer's chat template.
    """
    name = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        raise InputError(f"{name} has no chat template: put a chat_template.jinja beside it")
    options = {
        "tokenize": False,
        "enable_thinking": False,  # of Qwen3
        "date_string": "26 Jul 2024",  # else Llama 3's system turn changes from day to day
    }
    messages = [{"role": "user", "content": f"{prompt}\n{AUDIO}"}]
    render = tokenizer.apply_chat_template
    text = render(messages, add_generation_prompt=True, **options)
    if text.count(AUDIO) != 1:
        raise InputError(f"{name}: its chat template does not show what a user says, once")
    before, after = text.split(AUDIO)

    messages.append({"role": "assistant", "content": AUDIO})
    text = render(messages, **options)
    end = text.split(AUDIO)[-1].strip()
    ends = encode(tokenizer, end)
    end_id = ends[0] if ends else tokenizer.eos_token_id
    return encode(tokenizer, before), encode(tokenizer, after), end_id


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a part of a text, without those that stand around a whole one."""
    return tokenizer.encode(text, add_special_tokens=False)
