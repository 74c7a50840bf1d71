"""Word times, from audio whose positions are the embeddings of what is said."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_recognize import read
from torch import nn

import recognize
from words import find_loud, split_words, time_words


@pytest.fixture(scope="module")
def model():
    """What time_words needs of a model; a token is a byte, and its embedding is one-hot."""
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|im_end|>")
    embeddings = nn.Embedding.from_pretrained(torch.eye(300))
    return SimpleNamespace(
        projector=SimpleNamespace(stride=5),
        tokenizer=tokenizer,
        llm=SimpleNamespace(get_input_embeddings=lambda: embeddings),
        blank_id=tokenizer.encode(" ")[0],
    )


def make_audio(model, spoken, loud):
    """Audio and log-mel of a position of 100 ms a character; `loud` has x where it is loud."""
    ids = model.tokenizer.encode(spoken)
    audio = model.llm.get_input_embeddings()(torch.tensor(ids))
    levels = torch.tensor([float(character == "x") for character in loud])
    mel = levels.repeat_interleave(10).expand(1, 80, -1)  # (W, M, F)
    return audio, mel


def test_words_start_and_end_where_ctc_and_loudness_have_them(model):
    # a word begins with its first token, and ends when it is quiet
    audio, mel = make_audio(model, "  goo  on    ", "  xxxx xxx   ")
    assert time_words(model, audio, mel, "go on") == [
        {"word": "go", "start": 0.2, "end": 0.6},
        {"word": "on", "start": 0.7, "end": 1.0},
    ]
    # at the next word at the latest
    audio, mel = make_audio(model, "go   on", "xxxxxxx")
    words = time_words(model, audio, mel, "go on")
    assert [word["end"] for word in words] == [0.5, 0.7]
    # and half a second behind its last token, whatever the noise
    audio, mel = make_audio(model, "go          ", "xxxxxxxxxx  ")
    assert time_words(model, audio, mel, "go")[0]["end"] == 0.7


def test_what_ctc_cannot_align_has_the_times_of_the_piece_and_says_so(model):
    audio, mel = make_audio(model, "go ", "xx ")
    times = {"start": 0.0, "end": 0.3, "aligned": False}
    assert time_words(model, audio, mel, "go on") == [
        {"word": "go", **times},
        {"word": "on", **times},
    ]
    assert time_words(model, audio, mel, "") == []


def test_words_end_at_spaces_and_characters_of_chinese_are_words(model):
    def split(text):
        words = split_words(model.tokenizer, model.tokenizer.encode(text))
        joined = [i for _, ids in words for i in ids]
        assert joined == model.tokenizer.encode(text)
        return [word for word, _ in words]

    assert split(" it's set, the-fan  café") == ["it's", "set,", "the-fan", "café"]
    assert split(" 今天 is好x") == ["今", "天", "is", "好", "x"]
    assert split("go") == ["go"]


def test_loud_is_what_is_not_near_the_quietest():
    mel = torch.tensor([[0.0, 1.0, 0.2, 1.0], [0.4, 0.9, 1.0, 7.0]])  # two windows, of four parts
    mel = mel.repeat_interleave(10, dim=1)[:, None]
    assert find_loud(mel, 7, stride=5) == [False, True, False, True, True, True, True]


def test_results_have_words_where_they_are_wanted(paths, projector, tmp_path):
    command = f"--projector_model_path {projector} --data_path {paths.manifest} --num_beams 1 2"
    command += f" --result_path {tmp_path}/out.jsonl --word_times True --num_workers 0"
    recognize.main(command.split())
    for beams in (1, 2):
        results = read(tmp_path / f"out.beam{beams}.jsonl")
        assert json.dumps(results).count('"start"') > 8
        for result in results:
            words = result["words"]
            assert words[0]["start"] >= 0
            assert words[-1]["end"] <= result["duration"] + 0.1
