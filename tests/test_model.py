from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers.generation import GenerateBeamDecoderOnlyOutput

from data import collate, read_manifest
from model import DEFAULTS, IGNORE, Projector, SpeechLLM, build_prompt, load

LLM_DIMS = {"LLaMA3-8B": 4096, "Qwen2-0.5B": 896, "Qwen2-1.5B": 1536, "Qwen2-7B": 3584}
ENCODER_DIMS = {"tiny": 384, "small": 768, "large": 1280}

THINKING = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

GEMMA = """\
<|begin_of_text|>{% for m in messages %}\
{% set role = 'model' if m.role == 'assistant' else m.role %}\
{{ '<|im_start|>' + role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"""


def load_tiny(paths, llm="qwen", whisper="whisper", **options):
    torch.manual_seed(0)
    names = {"llm_model_name_or_path": getattr(paths, llm)}
    names["whisper_model_name_or_path"] = getattr(paths, whisper)
    return load(**names, **options)


def make_batch(model, rows):
    return collate(rows, **model.collation)


def speech_of(batch):
    return {"encoder_lengths": batch["encoder_lengths"], "mel": batch["mel"]}


def prompt_and_answer(model, text=""):
    """Embeddings of the text before and after the audio."""
    embed = model.llm.get_input_embeddings()
    answer = [*model.tokenizer.encode(f" {text}"), model.end_id] if text else []
    return embed(torch.tensor(model.before)), embed(torch.tensor(model.after + answer))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.projector.parameters()])


def millions(encoder, llm):
    projector = Projector(ENCODER_DIMS[encoder], LLM_DIMS[llm], hidden_dim=2048, stride=5)
    return sum(p.numel() for p in projector.parameters()) / 2**20


@pytest.mark.parametrize("encoder, size", [("tiny", 9.46), ("small", 12.32), ("large", 18.32)])
def test_projector_sizes_are_those_of_the_table_by_encoder_for_llama3(encoder, size):
    assert round(millions(encoder, "LLaMA3-8B"), 2) == size


@pytest.mark.parametrize(
    "encoder, llm, size, digits",
    [
        ("large", "Qwen2-0.5B", 12.07, 2),
        ("large", "Qwen2-1.5B", 13.32, 2),
        ("large", "Qwen2-7B", 17.32, 2),
        ("tiny", "Qwen2-1.5B", 4.5, 1),
        ("small", "Qwen2-1.5B", 7.3, 1),
    ],
)
def test_projector_sizes_are_those_of_the_table_by_llm_for_qwen2(encoder, llm, size, digits):
    assert round(millions(encoder, llm), digits) == size


def decode_prompt(tokenizer, prompt="Say it."):
    before, after, end_id = build_prompt(tokenizer, prompt)
    return tokenizer.decode(before), tokenizer.decode(after), tokenizer.decode([end_id])


def test_prompt_of_chatml_puts_the_prompt_first_in_the_user_turn():
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|endoftext|>")
    assert decode_prompt(tokenizer) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nSay it.\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    )


def test_prompt_of_llama3_begins_with_bos_and_a_date_that_stays():
    tokenizer = tiny.make_tokenizer(tiny.LLAMA3, "<|endoftext|>")
    assert decode_prompt(tokenizer) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n26 Jul 2024<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSay it.\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    )


def test_examples_keep_the_space_before_them_where_a_template_trims_what_is_said():
    before, _, _ = decode_prompt(tiny.make_tokenizer(tiny.LLAMA3, "<|endoftext|>"), "Say it.\nyes")
    assert "\n\nSay it.\n yes<|eot_id|>" in before
    assert "assistant<|end_header_id|>\n\n yes<|eot_id|>" in before


def test_prompt_of_a_thinking_model_does_not_think():
    tokenizer = tiny.make_tokenizer(THINKING, "<|endoftext|>")
    before, after, end = decode_prompt(tokenizer)
    assert before == "<|im_start|>user\nSay it.\n"
    assert after.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert end == "<|im_end|>"


def test_examples_are_turns_of_their_own_before_the_audio():
    tokenizer = tiny.make_tokenizer(tiny.CHATML, "<|endoftext|>")
    assert decode_prompt(tokenizer, "Say it.\nyes\noh no") == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "<|im_start|>user\nSay it.\n yes<|im_end|>\n<|im_start|>assistant\n yes<|im_end|>\n"
        "<|im_start|>user\nSay it.\n oh no<|im_end|>\n<|im_start|>assistant\n oh no<|im_end|>\n"
        "<|im_start|>user\nSay it.\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    )


def test_prompt_of_gemma_has_the_roles_and_the_end_of_its_template():
    tokenizer = tiny.make_tokenizer(GEMMA, "<|endoftext|>")
    assert decode_prompt(tokenizer) == (
        "<|begin_of_text|><|im_start|>user\nSay it.\n",
        "<|im_end|>\n<|im_start|>model\n",
        "<|im_end|>",
    )


@pytest.mark.parametrize("length, positions", [(1, 1), (4, 1), (5, 1), (6, 2), (9, 2), (10, 2)])
def test_projector_rounds_lengths_up_and_pads_with_zeros(length, positions):
    projector = Projector(encoder_dim=3, llm_dim=4, hidden_dim=8, stride=5)
    x = torch.randn(2, length, 3)
    padded = torch.cat([x, torch.zeros(2, positions * 5 - length, 3)], dim=1)
    assert projector(x).shape == (2, positions, 4)
    assert torch.equal(projector(x), projector(padded))


@pytest.mark.parametrize(
    "samples, positions, audio",
    [
        (320, 1, 1),
        (321, 2, 1),
        (1600, 5, 1),
        (1601, 6, 2),
        (480_000, 1500, 300),
        (481_000, 1504, 301),
    ],
)
def test_audio_of_any_length_takes_its_true_number_of_positions(
    paths, tmp_path, samples, positions, audio
):
    model = load_tiny(paths)
    path = tiny.make_sound(tmp_path / "a.wav", samples / 16_000, 300)
    batch = make_batch(model, [{"_path": path, "_txt": "go"}])
    assert batch["encoder_lengths"].tolist() == [positions]
    assert model.project(**speech_of(batch))[1].tolist() == [audio]
    assert model(**batch)["loss"].isfinite()


def test_windows_of_long_audio_are_encoded_apart_and_joined(paths):
    model = load_tiny(paths)
    mel = [torch.randn(1, 80, 3000), torch.randn(2, 80, 3000), torch.randn(1, 80, 1000)]
    lengths = torch.tensor([1500, 2050, 480])  # 30 s, 41 s (two windows), 9.6 s
    whole = model.encoder(torch.cat(mel[:2]))
    short, padding = torch.zeros(1, 2050, 32), torch.zeros(1, 550, 32)
    full = model.encoder.positional_embedding
    model.encoder.positional_embedding = full[:500]
    short[:, :480] = model.encoder(mel[2])[:, :480]
    model.encoder.positional_embedding = full
    long = torch.cat([whole[1], whole[2, :550]])[None]
    encoded = torch.cat([torch.cat([whole[:1], padding], 1), long, short])
    audio, counts = model.project(lengths, mel)
    assert counts.tolist() == [300, 410, 96]
    assert torch.allclose(audio, model.rms * model.projector(encoded), atol=1e-5)


def test_audio_is_spliced_into_its_place_and_nowhere_else(paths, monkeypatch):
    model = load_tiny(paths)
    batch = make_batch(model, read_manifest([paths.manifest])[:3])
    audio, lengths = model.project(**speech_of(batch))
    out = model.splice(audio, lengths, batch["labels"])
    monkeypatch.setattr(type(model.llm), "_is_stateful", True)
    whole = model.splice(audio, lengths, batch["labels"])
    assert lengths.tolist() == [5, 7, 8] and out["attention_mask"].sum(1).diff().tolist() == [2, 1]
    for i, text in enumerate(tiny.TEXTS[:3]):
        before, after = prompt_and_answer(model, text)
        rest = torch.cat([audio[i, : lengths[i]], after])
        mask = out["attention_mask"][i]
        cached, mask = mask[: len(before)], mask[len(before) :]
        assert cached.all() and mask.tolist() == sorted(mask.tolist())  # then padded on the left
        assert torch.equal(out["inputs_embeds"][i][mask.bool()], rest)
        positions = range(len(before), len(before) + len(rest))
        assert out["position_ids"][i][mask.bool()].tolist() == list(positions)
        mask = whole["attention_mask"][i]
        assert torch.equal(whole["inputs_embeds"][i][mask.bool()], torch.cat([before, rest]))
        assert mask.tolist() == sorted(mask.tolist())
    typical = model.llm.get_input_embeddings().weight.norm() / 263**0.5
    assert torch.allclose(audio.norm(dim=-1), typical, rtol=1e-3)


def test_blanks_are_not_shown_to_the_llm(paths):
    model = load_tiny(paths)
    batch = make_batch(model, read_manifest([paths.manifest])[3:5])
    audio, lengths = model.project(**speech_of(batch))
    blank = model.llm.get_input_embeddings().weight[model.tokenizer.encode(" ")[0]]
    audio[0, [0, 2]] = 3 * blank
    audio[1] = blank + 0.1 * blank.norm() * torch.nn.functional.normalize(audio[1], dim=-1)
    out = model.splice(audio, lengths, batch["labels"][:, :0])
    before, after = prompt_and_answer(model)
    kept = audio[0, [1, *range(3, lengths[0])]]
    assert torch.equal(out["inputs_embeds"][0], torch.cat([kept, after]))
    silent = out["inputs_embeds"][1][out["attention_mask"][1, len(before) :].bool()]
    assert torch.equal(silent, after)


def test_ctc_loss_is_the_probability_of_all_alignments_written_out(paths):
    model = load_tiny(paths)
    embeddings = model.llm.get_input_embeddings().weight
    g, o = model.tokenizer.encode("go")
    blank = model.blank
    torch.manual_seed(1)
    audio = embeddings[torch.tensor([[g, o, blank, g], [g, o, o, g]])] + 0.1 * torch.randn(
        2, 4, 128
    )
    audio.requires_grad_()
    # a space in a transcript is the blank, and leaves "go"; of the second audio, 1 position counts
    labels = torch.tensor(
        [[blank, g, blank, o, model.end_id], [IGNORE, IGNORE, g, o, model.end_id]]
    )
    losses = model.train().ctc_loss(audio, torch.tensor([3, 1]), labels)
    sharpness = 14 / model.rms**2 / 128
    probabilities = (sharpness * audio[0] @ embeddings.T).softmax(-1)
    paths_of_go = [(g, o, blank), (g, blank, o), (blank, g, o), (g, g, o), (g, o, o)]
    total = sum(
        probabilities[0, x] * probabilities[1, y] * probabilities[2, z] for x, y, z in paths_of_go
    )
    assert torch.allclose(losses, torch.stack([-total.log(), torch.tensor(0.0)]), rtol=1e-4)
    [gradient] = torch.autograd.grad(losses.sum(), audio)
    [wanted] = torch.autograd.grad(-total.log(), audio)
    assert torch.allclose(gradient, wanted, atol=1e-4 * wanted.abs().max())
    assert not gradient[0, 3].any() and not gradient[1].any()
    # when decoding, what cannot have been said is no choice; one audio may have both as hypotheses
    losses = model.eval().ctc_loss(audio[:1], torch.tensor([3, 1]), labels)
    assert torch.allclose(losses, torch.stack([-total.log(), torch.tensor(torch.inf)]), rtol=1e-4)


def test_ctc_loss_of_a_large_vocabulary_tells_common_pieces_and_the_answers_apart(
    paths, monkeypatch
):
    model = load_tiny(paths)
    monkeypatch.setattr("model.CTC_PIECES", 40)
    batch = make_batch(model, read_manifest([paths.manifest])[:2])
    audio, lengths = model.project(**speech_of(batch))
    few = model.ctc_loss(audio, lengths, batch["labels"])
    text = model.tokenizer.encode("gono")
    pieces = sorted({*range(40), *text, model.blank})
    model.llm.get_input_embeddings().weight.data[[i for i in range(263) if i not in pieces]] = (
        -1e4 * audio.sum((0, 1))
    )  # of no probability
    assert torch.allclose(few, model.ctc_loss(audio, lengths, batch["labels"]), rtol=1e-4)
    monkeypatch.setattr("model.CTC_PIECES", 263)
    assert torch.allclose(few, model.ctc_loss(audio, lengths, batch["labels"]), rtol=1e-4)


def test_the_training_loss_is_the_weighted_sum_of_both(paths):
    model = load_tiny(paths)
    batch = make_batch(model, read_manifest([paths.manifest]))
    both = model(**batch, ctc=0.3)["loss"]
    alone = model(**batch, ctc=1.0, ctc_alone=True)["loss"]
    each = model.ctc_loss(*model.project(**speech_of(batch)), batch["labels"])
    assert (each > 0).all()
    assert torch.allclose(alone, each.sum() / (batch["labels"] != IGNORE).sum())
    assert torch.allclose(both, 0.3 * alone + model(**batch)["loss"], rtol=1e-5)


@pytest.mark.parametrize("llm", ["qwen", "llama"])
def test_logits_for_labels_alone_give_the_full_loss_and_gradients(paths, llm, monkeypatch):
    model = load_tiny(paths, llm)
    batch = make_batch(model, read_manifest([paths.manifest]))
    positions = []
    model.llm.lm_head.register_forward_hook(lambda *x: positions.append(x[2].shape[1]))
    loss = model(**batch)["loss"]
    assert torch.equal(model(**batch)["loss"], loss)
    labelled = 1 + len(" left") + 1
    assert positions == [len(model.before), labelled, labelled]  # the prompt is read once
    monkeypatch.setattr(type(model.llm), "_is_stateful", True)
    speech = model.project(**speech_of(batch))
    logits = model.llm(**model.splice(*speech, batch["labels"])).logits
    labels = batch["labels"]
    logits = logits[:, -labels.shape[1] - 1 : -1].flatten(0, 1)
    full = torch.nn.functional.cross_entropy(logits, labels.flatten())
    assert torch.allclose(loss, full, atol=1e-5)
    assert torch.allclose(gradients(model, loss), gradients(model, full), atol=1e-5)


@pytest.mark.parametrize("weights", [{}, {"ctc": 0.3}, {"ctc": 1.0, "ctc_alone": True}])
def test_loss_is_a_mean_over_all_labels_of_an_optimizer_step(paths, weights):
    model = load_tiny(paths)
    rows = read_manifest([paths.manifest])[:4]  # answers of unequal lengths
    whole = make_batch(model, rows)
    total = (whole["labels"] != IGNORE).sum()
    parts = [make_batch(model, part) for part in (rows[:1], rows[1:])]
    loss = sum(model(**part, num_items_in_batch=total, **weights)["loss"] for part in parts)
    assert torch.allclose(loss, model(**whole, **weights)["loss"], atol=1e-5)


@pytest.mark.parametrize("llm", ["qwen", "llama"])
def test_a_batch_of_four_equals_four_single_runs(paths, llm):
    model = load_tiny(paths, llm)
    rows = read_manifest([paths.manifest])[::2]
    batch = make_batch(model, rows)
    count = (batch["labels"] != IGNORE).sum()
    together = model.tokenizer.batch_decode(model.generate(3, **batch), skip_special_tokens=True)
    loss, apart = 0, []
    for row in rows:
        loss += model(**make_batch(model, [row]), num_items_in_batch=count)["loss"]
        single = model.generate(3, **make_batch(model, [row]))
        apart += model.tokenizer.batch_decode(single, skip_special_tokens=True)
    assert torch.allclose(model(**batch)["loss"], loss, atol=1e-5)
    assert together == apart and len(set(apart)) > 1


def test_an_llm_whose_state_is_no_cache_of_keys_reads_the_prompt_each_time(paths, monkeypatch):
    model = load_tiny(paths)
    batch = make_batch(model, read_manifest([paths.manifest]))
    loss, ids = model(**batch)["loss"], model.generate(3, **batch)
    monkeypatch.setattr(type(model.llm), "_is_stateful", True)  # as in Qwen3.5
    reads = []
    model.llm.register_forward_pre_hook(lambda *x: reads.append(x), with_kwargs=True)
    assert torch.allclose(model(**batch)["loss"], loss, atol=1e-5)
    assert reads[0][2]["cache"] is None
    assert torch.equal(model.generate(3, **batch), ids)


def test_audio_is_as_long_as_embeddings_that_the_llm_scales_when_it_reads_them(paths):
    model = load_tiny(paths)
    embeddings = model.llm.get_input_embeddings()
    rms = model.rms
    embeddings.register_forward_hook(lambda *x: 5 * x[2])  # as in Gemma
    scaled = SpeechLLM(model.encoder, model.llm, model.tokenizer, model.settings)
    assert scaled.rms == pytest.approx(5 * rms, rel=1e-5)


def test_only_the_projector_has_gradients(paths):
    model = load_tiny(paths)
    model(**make_batch(model, read_manifest([paths.manifest])[:2]))["loss"].backward()
    encoder = model.encoder.named_parameters(prefix="encoder")
    for name, parameter in [*model.named_parameters(), *encoder]:
        trained = name.startswith("projector.")
        assert (parameter.grad is not None) == parameter.requires_grad == trained, name


def test_under_bfloat16_the_projector_stays_float32(paths):
    model = load_tiny(paths)
    model.llm.to(torch.bfloat16)  # on any machine, as it is tiny
    batch = make_batch(model, read_manifest([paths.manifest])[:2])
    assert model.llm.dtype == torch.bfloat16
    exact = load_tiny(paths)(**batch)["loss"]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch)["loss"]
        loss.backward()
        assert torch.allclose(loss.float(), exact, rtol=0.03)
        assert {p.grad.dtype for p in model.projector.parameters()} == {torch.float32}


def test_windows_of_one_size_go_through_the_encoder_together(paths, tmp_path):
    model = load_tiny(paths)
    seconds = [0.3, 1.2, 0.4, 31, 0.2, 29.9]  # windows of 1; 2; 1; twice 30; 1; 30 s
    rows = [
        {"_path": tiny.make_sound(tmp_path / f"{i}.wav", x, 200 + 50 * i), "_txt": ""}
        for i, x in enumerate(seconds)
    ]
    calls = []
    model.encoder.conv1.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    audio, lengths = model.project(**make_batch(model, rows))
    assert sorted((x[0], x[2]) for x in calls) == [(1, 200), (3, 100), (3, 3000)]
    for row, together, length in zip(rows, audio, lengths):
        single, [size] = model.project(**make_batch(model, [row]))
        assert size == length
        assert torch.allclose(single[0], together[:length], rtol=1e-4, atol=1e-4 * model.rms)


def test_encoders_of_128_mel_bins_are_read(paths):
    model = load_tiny(paths, whisper="whisper128")
    batch = make_batch(model, read_manifest([paths.manifest])[:2])
    assert [mel.shape for mel in batch["mel"]] == [(1, 128, 150), (1, 128, 150)]
    assert model(**batch)["loss"].isfinite()


def test_sampling_and_penalties_of_a_chat_model_are_dropped_but_its_stops_kept(paths, tmp_path):
    model = load_tiny(paths)
    llm = model.llm
    llm.generation_config.update(eos_token_id=[3, 4], do_sample=True, repetition_penalty=9.0)
    llm.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    chat = load(llm_model_name_or_path=str(tmp_path), whisper_model_name_or_path=paths.whisper)
    assert chat.llm.generation_config.eos_token_id == [chat.end_id, 3, 4]
    assert not chat.llm.generation_config.do_sample
    assert chat.llm.generation_config.repetition_penalty is None


def test_a_tokenizer_without_a_chat_template_is_refused_until_it_has_one(paths, tmp_path):
    model = load_tiny(paths)
    model.llm.save_pretrained(tmp_path)
    tiny.make_tokenizer(None, "<|im_end|>").save_pretrained(tmp_path)
    names = {"llm_model_name_or_path": str(tmp_path), "whisper_model_name_or_path": paths.whisper}
    with pytest.raises(ValueError, match=r"cannot load.*chat_template is not set"):
        load(**names)
    (tmp_path / "chat_template.jinja").write_text(tiny.CHATML)
    assert load(**names).before == model.before


def test_an_llm_may_have_no_pad_no_eos_and_more_tokens_than_its_tokenizer(paths, tmp_path):
    model = load_tiny(paths)
    size, more = model.llm.config.vocab_size, 64
    model.llm.resize_token_embeddings(size + more, mean_resizing=False)
    model.llm.config.tie_word_embeddings = False
    model.llm.generation_config.eos_token_id = None
    model.llm.save_pretrained(tmp_path)
    model.tokenizer.pad_token = model.tokenizer.eos_token = None
    model.tokenizer.save_pretrained(tmp_path)
    names = {"llm_model_name_or_path": str(tmp_path), "whisper_model_name_or_path": paths.whisper}
    model = load(**names).eval()
    batch = make_batch(model, read_manifest([paths.manifest])[:3])
    assert model(**batch, ctc=0.3)["loss"].isfinite()
    # the tokens that no tokenizer knows are what it likes best
    torch.nn.init.zeros_(model.llm.lm_head.weight[:size])
    tokens = model.generate(3, **batch)
    assert (tokens >= size).any()
    assert all(isinstance(x, str) for x in model.tokenizer.batch_decode(tokens, True))


def test_an_llm_that_was_saved_without_its_cache_has_one(paths, tmp_path):
    model = load_tiny(paths)
    model.llm.config.use_cache = False
    model.llm.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = load(llm_model_name_or_path=str(tmp_path), whisper_model_name_or_path=paths.whisper)
    assert again.prompt_layers[0].keys.shape[2] == len(model.before)


def test_decoding_ends_at_the_llms_own_stops_too(paths):
    model = load_tiny(paths)
    batch = make_batch(model, read_manifest([paths.manifest])[:1])
    model.llm.generation_config.eos_token_id = None
    free = model.generate(1, **batch)[0].tolist()
    model.llm.generation_config.eos_token_id = [model.end_id, free[3]]
    short = model.generate(1, **batch)[0].tolist()
    assert short == free[: free.index(free[3]) + 1]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_loop_ends_with_its_own_audio_and_costs_what_it_is_worth(paths, monkeypatch, num_beams):
    model = load_tiny(paths)
    batch = make_batch(model, read_manifest([paths.manifest]))
    inputs = model.splice(*model.project(*speech_of(batch).values()), batch["labels"][:, :0])
    most = (inputs["attention_mask"].sum(1) - len(model.before)).tolist()
    assert len(set(most)) > 2
    model.llm.generation_config.eos_token_id = None  # nothing else ends
    for ids, size in zip(model.generate(num_beams, **batch).tolist(), most):
        assert model.end_id not in ids[: size - 1] and set(ids[size - 1 :]) == {model.end_id}
    for top in (min(most) - 1, max(most) + 1):  # what is asked for counts alone
        ids = model.generate(num_beams, top, **batch)
        ends = (ids == model.end_id).tolist()
        assert ends == [[False] * (top - 1) + [True]] * len(most)
    options, generate = {}, model.llm.generate
    monkeypatch.setattr(model.llm, "generate", lambda **x: generate(**(options.update(x) or x)))
    model.generate(num_beams, **batch)
    [limit] = options["logits_processor"]
    rows = len(most) * num_beams
    scores = torch.rand(rows, model.llm.config.vocab_size)
    limited = limit(torch.zeros(rows, min(most), dtype=torch.long), scores)
    assert torch.equal(limited[:, model.end_id], scores[:, model.end_id])


def test_of_a_beam_the_best_by_the_probabilities_of_llm_and_ctc_is_chosen(paths, monkeypatch):
    model = load_tiny(paths).eval()
    batch = make_batch(model, read_manifest([paths.manifest])[:2])  # " go" and " no"
    audio, lengths = model.project(**speech_of(batch))
    texts = [" go", " no", " " + "no" * 40, " up", " no", ""]  # the third has no place in its audio
    ids = [torch.tensor([*model.tokenizer.encode(x), model.end_id]) for x in texts]
    tokens = pad_sequence(ids, True, model.end_id)
    ctc = [model.ctc_loss(audio[[i // 3]], lengths[[i // 3]], x[None]) for i, x in enumerate(ids)]
    ctc = torch.cat(ctc)
    assert ctc[2].isinf() and ctc[[0, 1, 3, 4, 5]].isfinite().all()
    # what CTC says, but for one that the LLM finds less likely by more than that
    margin = (ctc[0] - ctc[1]).abs() + 1
    worse = 0 if ctc[0] < ctc[1] else 1
    scores = torch.tensor([0.0, 0.0, 99.0, 0.0, 0.0, 0.0])
    for penalty, chosen in ((0.0, worse), (margin, 1 - worse)):
        scores[worse] = -penalty
        out = GenerateBeamDecoderOnlyOutput(sequences=tokens, sequences_scores=scores)
        monkeypatch.setattr(model.llm, "generate", lambda out=out, **_: out)
        best = model.generate(3, **batch).tolist()
        assert best[0] == tokens[chosen].tolist()
        assert best[1] == tokens[3 + int(ctc[3:].argmin())].tolist()


def test_beams_compete_by_probability_and_not_by_its_mean_a_token(paths, monkeypatch):
    model = load_tiny(paths)
    monkeypatch.setattr(model, "ctc_loss", lambda _, lengths, labels: torch.zeros(len(labels)))
    stops = list(range(0, model.llm.config.vocab_size, 9))
    model.llm.generation_config.eos_token_id = stops

    def log_prob(batch, ids):  # of a hypothesis, up to its end
        ends = [i for i, token in enumerate(ids) if token in stops]
        labels = torch.tensor([[IGNORE, *(ids[: ends[0] + 1] if ends else ids)]])
        return -model(labels, 1, **speech_of(batch))["loss"].item()

    generate, gains = model.llm.generate, []

    def by_mean(**options):
        return generate(**options | {"length_penalty": 1.0})

    for row in read_manifest([paths.manifest]):
        batch = make_batch(model, [row])
        gains.append(log_prob(batch, model.generate(3, **batch)[0].tolist()))
        with monkeypatch.context() as patch:
            patch.setattr(model.llm, "generate", by_mean)
            mean = model.generate(3, **batch)[0].tolist()
        gains[-1] -= log_prob(batch, mean)
    assert min(gains) > -1e-3 and max(gains) > 0.1


def test_a_projector_file_holds_the_projector_and_brings_all_settings_back(paths, tmp_path):
    model = load_tiny(paths, stride=4, prompt="Repeat it.")
    path = str(tmp_path / "model.safetensors")
    model.save_projector(path)
    with safe_open(path, "pt") as file:
        assert file.keys() and all(name.startswith("projector.") for name in file.keys())  # noqa: SIM118
    again = load(path)
    assert again.settings == model.settings
    (tmp_path / "plain").write_text("")  # has the mode that the user's umask asks for
    assert Path(path).stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert again.projector.hidden.out_features == 2048  # that of the published tables
    assert again.settings["stride"] == "4" and again.settings["prompt"] == "Repeat it."
    for name, tensor in model.projector.state_dict().items():
        assert torch.equal(tensor, again.projector.state_dict()[name])


def test_a_model_that_moved_is_taken_from_its_new_place(paths, tmp_path):
    load_tiny(paths).save_projector(tmp_path / "model.safetensors")
    (tmp_path / "elsewhere").mkdir()
    moved = tiny.make_llm(tmp_path / "elsewhere" / "qwen", "qwen")
    path = str(tmp_path / "model.safetensors")
    for place in (str(moved), f"{moved}/"):
        model = load(path, llm_model_name_or_path=place)
        assert model.settings["llm_model_name_or_path"] == place
    with pytest.raises(ValueError, match="cannot load"):  # agreed to, though it is not there
        load(path, whisper_model_name_or_path=str(tmp_path / "tiny"))


@pytest.mark.parametrize(
    "setting, value, message",
    [
        (
            "llm_model_name_or_path",
            "other/llm",
            "for llm_model_name_or_path '.*qwen', not 'other/llm'",
        ),
        ("whisper_model_name_or_path", "base", "path '.*tiny.pt', not 'base'"),
        ("stride", 4, "stride '5', not '4'"),
        ("prompt", f"or/{DEFAULTS['prompt']}", "not 'or/Repeat word"),
    ],
)
def test_a_projector_of_other_settings_is_refused(paths, tmp_path, setting, value, message):
    path = str(tmp_path / "model.safetensors")
    load_tiny(paths).save_projector(path)
    with pytest.raises(ValueError, match=message):
        load(path, **{setting: value})


def test_a_projector_of_other_sizes_is_refused(paths, tmp_path):
    path = str(tmp_path / "model.safetensors")
    load_tiny(paths).save_projector(path)
    wide = str(tiny.make_whisper(tmp_path / "tiny.pt", width=48))
    with pytest.raises(ValueError, match=r"(?s)cannot load.*mismatch for projector.conv"):
        load(path, whisper_model_name_or_path=wide)


def test_files_that_are_no_projector_are_refused(paths, tmp_path):
    path = str(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cannot load .*model.safetensors: .*No such file"):
        load(path)
    Path(path).write_bytes(b"not a projector")
    with pytest.raises(ValueError, match="cannot load .*model.safetensors: .*Error while d"):
        load(path)
    with pytest.raises(ValueError, match=f"cannot load {tmp_path}: "):  # a folder
        load(str(tmp_path))
    load_tiny(paths).save_projector(path)
    weights = load_file(path)
    save_file(weights, path)  # without metadata
    with pytest.raises(ValueError, match="model.safetensors is for format None, not '4'"):
        load(path)
    metadata = load_tiny(paths).settings
    save_file({"projector.conv.bias": weights["projector.conv.bias"]}, path, metadata)
    with pytest.raises(ValueError, match="Missing key.*projector.conv.weight"):
        load(path)


def test_missing_and_unknown_models_are_named(paths):
    with pytest.raises(ValueError, match="cannot load.*'llm_model_name_or_path'"):
        load(whisper_model_name_or_path=paths.whisper)
    with pytest.raises(ValueError, match=r"Model huge not found; available models = .*'tiny'"):
        load(llm_model_name_or_path=paths.qwen, whisper_model_name_or_path="huge")
