"""The architecture on tiny models: sizes, masks, losses, gradients and hypotheses."""

import pytest
import tiny
import torch
from torch.nn.utils.rnn import pad_sequence

from command import InputError
from data import IGNORE
from manifest import Utterance, read_manifest
from model import Projector

FAMILIES = ["qwen", "llama", "gemma"]


@pytest.fixture
def model(paths):
    return tiny.make_model(paths)


@pytest.fixture
def utterances(paths):
    return read_manifest([paths.manifest])


def embed(model, utterances):
    """Audio and labels of utterances."""
    batch = model.collator()(utterances)
    return model.embed_audio(batch["mel"], batch["lengths"]), batch["labels"]


def count_labels(labels):
    return (labels != IGNORE).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.projector.parameters()])


@pytest.mark.parametrize(
    "encoder_dim, llm_dim, size, digits",
    [
        (384, 4096, 9.46, 2),  # tiny, Llama-3-8B
        (768, 4096, 12.32, 2),  # small
        (1280, 4096, 18.32, 2),  # large
        (1280, 896, 12.07, 2),  # large, Qwen2-0.5B
        (1280, 1536, 13.32, 2),  # large, Qwen2-1.5B
        (1280, 3584, 17.32, 2),  # large, Qwen2-7B
        (384, 1536, 4.5, 1),  # tiny, Qwen2-1.5B
        (768, 1536, 7.3, 1),  # small, Qwen2-1.5B
    ],
)
def test_projectors_have_the_sizes_of_the_eight_published_rows(encoder_dim, llm_dim, size, digits):
    projector = Projector(encoder_dim, llm_dim, hidden_dim=2048, stride=5)
    millions = sum(p.numel() for p in projector.parameters()) / 2**20
    assert round(millions, digits) == size


@pytest.mark.parametrize("length, positions", [(1, 1), (4, 1), (5, 1), (6, 2), (9, 2), (10, 2)])
def test_the_projector_rounds_lengths_up_and_pads_with_zeros(length, positions):
    projector = Projector(encoder_dim=3, llm_dim=4, hidden_dim=8, stride=5)
    x = torch.randn(2, length, 3)
    padded = torch.cat([x, torch.zeros(2, positions * 5 - length, 3)], dim=1)
    assert projector(x).shape == (2, positions, 4)
    assert torch.equal(projector(x), projector(padded))
    rms = projector(x).square().mean(-1).sqrt()
    assert torch.allclose(rms, torch.ones(2, positions), atol=1e-3)


@pytest.mark.parametrize(
    "samples, length, positions",
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
    model, tmp_path, samples, length, positions
):
    path = tiny.make_sound(tmp_path / "a.wav", samples / 16_000, 300)
    batch = model.collator()([Utterance(str(path), 1, "go")])
    assert batch["lengths"] == [length]
    [audio] = model.embed_audio(batch["mel"], batch["lengths"])
    assert audio.shape == (positions, 128)
    assert model(**batch)["loss"].isfinite()


def test_windows_of_long_audio_are_encoded_apart_and_joined(model):
    torch.manual_seed(1)
    mel = [torch.randn(1, 80, 3000), torch.randn(2, 80, 3000), torch.randn(1, 80, 1000)]
    lengths = [1500, 2050, 480]  # 30 s, 41 s in two windows, 9.6 s
    first, second = model.encoder(mel[1][:1]), model.encoder(mel[1][1:])
    encoded = [
        model.encoder(mel[0])[0],
        torch.cat([first[0], second[0, :550]]),
        model.encoder(mel[2])[0, :480],
    ]
    audio = model.embed_audio(mel, lengths)
    assert [len(x) for x in audio] == [300, 410, 96]
    for found, x in zip(audio, encoded):
        wanted = model.embedding_rms * model.projector(x[None])[0]
        assert torch.allclose(found, wanted, atol=1e-4)


def test_a_short_window_is_encoded_as_whisper_encodes_it_with_its_first_positions(model):
    module = model.encoder.module
    mel = torch.randn(1, 80, 100)
    found = model.encoder(mel)
    module.positional_embedding = module.positional_embedding[:50]
    assert torch.equal(found, module(mel))


def test_windows_of_one_size_go_through_the_encoder_together(model, tmp_path):
    utterances = []
    for i, seconds in enumerate([0.3, 1.2, 0.4, 31, 0.2, 29.9]):
        path = tiny.make_sound(tmp_path / f"{i}.wav", seconds, 200 + 50 * i)
        utterances.append(Utterance(str(path), seconds))
    calls = []
    model.encoder.module.conv1.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    together, _ = embed(model, utterances)
    # windows of 1; 2; 1; twice 30; 1; 30 s
    assert sorted((len(x), x.shape[2]) for x in calls) == [(1, 200), (3, 100), (3, 3000)]
    for utterance, audio in zip(utterances, together):
        [[single], _] = embed(model, [utterance])
        assert torch.allclose(single, audio, atol=1e-4)


def test_encoders_of_128_mel_bins_are_read(paths, utterances):
    model = tiny.make_model(paths, whisper="whisper128")
    batch = model.collator()(utterances[:2])
    assert [mel.shape for mel in batch["mel"]] == [(1, 128, 150)] * 2
    assert model(**batch)["loss"].isfinite()


@pytest.mark.parametrize("family", FAMILIES)
def test_audio_is_as_long_as_embeddings_as_the_llm_reads_them(paths, utterances, family):
    model = tiny.make_model(paths, llm=family)
    weight = model.llm.get_input_embeddings().weight
    scale = 128**0.5 if family == "gemma" else 1  # by which Gemma multiplies what it stores
    rms = scale * weight.square().mean().sqrt().item()
    assert model.embedding_rms == pytest.approx(rms, rel=1e-5)
    audio, _ = embed(model, utterances)
    lengths = torch.cat(audio).square().mean(-1).sqrt()
    assert torch.allclose(lengths, torch.tensor(rms), rtol=1e-3)


def test_prompt_audio_and_answer_stand_in_order_and_padding_is_on_the_left(model):
    audio = [torch.full((3, 128), 1.0), torch.full((1, 128), 2.0)]
    answers = [[5], [6, 7, 8, 9, 10]]
    inputs = model.build_inputs(audio, answers)
    before = len(model.before)
    size = before + len(model.after) + 6
    mask = inputs["attention_mask"]
    assert mask.tolist() == [[0] * (size - s) + [1] * s for s in (size - 2, size)]
    for row, keep, speech, answer in zip(inputs["inputs_embeds"], mask.bool(), audio, answers):
        wanted = [model.embed_text(model.before), speech, model.embed_text(model.after + answer)]
        assert torch.equal(row[keep], torch.cat(wanted))


def test_blanks_are_not_shown_to_the_llm(model, utterances):
    audio, _ = embed(model, utterances[:2])
    [blank] = model.embed_text(model.tokenizer.encode(" "))
    audio[0][[0, 2]] = 3 * blank  # of any length
    noise = torch.nn.functional.normalize(audio[1], dim=-1) * blank.norm()
    audio[1] = blank + 0.1 * noise
    shown = model.drop_blanks(audio)
    assert torch.equal(shown[0], audio[0][[1, 3, 4]])
    assert len(shown[1]) == 0
    model.speech_config.blank_threshold = 2.0
    assert [len(x) for x in model.drop_blanks(audio)] == [len(x) for x in audio]


def test_the_ctc_loss_leaves_out_spaces_and_the_end_and_is_scaled_by_the_embeddings(model):
    g, o, blank = model.tokenizer.encode("go ")
    audio = [model.embed_text([g, o, blank])]
    loss = model.ctc_loss(audio, [[blank, g, blank, o, model.end_id]])
    assert torch.allclose(loss, model.ctc_loss(audio, [[g, o]]))
    weight = model.llm.get_input_embeddings().weight
    typical = weight.square().sum(-1).mean()  # a typical embedding with itself has a logit of 14
    log_probs = (14 * audio[0] @ weight.T / typical).log_softmax(-1)
    alignments = [(g, o, blank), (g, blank, o), (blank, g, o), (g, g, o), (g, o, o)]
    total = sum(log_probs[range(3), list(x)].sum().exp() for x in alignments)
    assert torch.allclose(loss, -total.log(), rtol=1e-4)
    assert model.ctc_loss(audio, [[g, o, g, o]]).isinf()


def test_the_training_loss_is_the_weighted_sum_of_both(model, utterances):
    batch = model.collator()(utterances)
    audio, labels = embed(model, utterances)
    count = count_labels(labels)
    answers = [row[row != IGNORE].tolist() for row in labels]
    ctc = model.ctc_loss(audio, answers).sum() / count
    llm = model.llm_loss(audio, labels, count)
    both = model(**batch, ctc_weight=0.3)
    assert torch.allclose(both["llm_loss"], llm) and torch.allclose(both["ctc_loss"], ctc)
    assert torch.allclose(both["loss"], llm + 0.3 * ctc)
    first = model(**batch, ctc_weight=0.3, ctc_only=True)
    assert torch.allclose(first["loss"], 0.3 * ctc) and "llm_loss" not in first
    assert torch.allclose(model(**batch)["loss"], llm) and "ctc_loss" not in model(**batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_for_labels_alone_give_the_full_loss_and_gradients(paths, utterances, family):
    model = tiny.make_model(paths, llm=family)
    audio, labels = embed(model, utterances)
    answers = [row[row != IGNORE].tolist() for row in labels]
    sizes = []
    model.llm.lm_head.register_forward_hook(lambda *x: sizes.append(x[2].shape[1]))
    batch = model.collator()(utterances)
    loss = model(**batch)["loss"]
    assert sizes == [1 + len(" left") + 1]
    kept = gradients(model, loss)
    audio, _ = embed(model, utterances)
    inputs = model.build_inputs(model.drop_blanks(audio), answers)
    logits = model.llm(**inputs).logits[:, -labels.shape[1] : -1]
    full = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(loss, full, atol=1e-5)
    assert torch.allclose(kept, gradients(model, full), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"ctc_weight": 0.3}, {"ctc_weight": 1, "ctc_only": True}])
def test_the_loss_is_a_mean_over_all_labels_of_an_optimizer_step(model, utterances, options):
    whole = model.collator()(utterances[:4])  # answers of unequal lengths
    options["num_items_in_batch"] = count_labels(whole["labels"])
    loss = 0
    for part in (utterances[:1], utterances[1:4]):
        loss += model(**model.collator()(part), **options)["loss"]
    assert torch.allclose(loss, model(**whole, **options)["loss"], atol=1e-5)
    del options["num_items_in_batch"]
    assert torch.allclose(loss, model(**whole, **options)["loss"], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_four_equals_four_single_runs(paths, utterances, family):
    model = tiny.make_model(paths, llm=family)
    utterances = utterances[::2]
    options = {"num_items_in_batch": 19, "ctc_weight": 0.3}
    loss = 0
    for utterance in utterances:
        loss += model(**model.collator()([utterance]), **options)["loss"]
    together = model(**model.collator()(utterances), **options)["loss"]
    assert torch.allclose(together, loss, atol=1e-5, rtol=0)
    audio, _ = embed(model, utterances)
    for num_beams in (1, 3):
        apart = []
        for utterance in utterances:
            single, _ = embed(model, [utterance])
            apart += model.generate(single, num_beams)
        assert model.generate(audio, num_beams) == apart
        assert len({tuple(ids) for ids in apart}) == 4


def test_the_listening_gap_is_the_loss_with_the_audio_of_others_less_the_loss(model, utterances):
    model.eval()
    batch = model.collator()(utterances[:3])
    others = model.collator()([utterances[2], utterances[0], utterances[1]])
    out = model(**batch)
    swapped = model(batch["labels"], others["mel"], others["lengths"])["loss"]
    gap = (swapped - out["loss"]).expand(3)
    assert torch.allclose(out["listening_gap"], gap, atol=1e-5) and gap[0].abs() > 1e-3
    # the same where the batch is a part of what the loss is a mean over
    part = model(**batch, num_items_in_batch=4 * count_labels(batch["labels"]))
    assert torch.allclose(part["loss"], out["loss"] / 4)
    assert torch.allclose(part["listening_gap"], gap, atol=1e-5)


def test_a_batch_of_one_has_a_loss_in_evaluation_but_no_gap(model, utterances):
    batch = model.collator()(utterances[:1])
    loss = model(**batch)["loss"]
    out = model.eval()(**batch)
    assert torch.allclose(out["loss"], loss)
    assert out["listening_gap"].shape == (1,) and out["listening_gap"].isnan().all()


def test_only_the_projector_has_gradients(model, utterances):
    model(**model.collator()(utterances[:2]), ctc_weight=0.3)["loss"].backward()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"llm", "projector"}
    encoder = model.encoder.module.named_parameters(prefix="encoder")
    for name, parameter in [*model.named_parameters(), *encoder]:
        trained = name.startswith("projector.")
        assert (parameter.grad is not None) == parameter.requires_grad == trained, name
    assert all(parameter.grad.any() for parameter in model.projector.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_under_bfloat16_the_projector_stays_float32(model, utterances, autocast):
    batch = model.collator()(utterances[:2])
    exact = model(**batch, ctc_weight=0.3)["loss"]
    model.llm.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch, ctc_weight=0.3)["loss"]
    assert torch.allclose(loss.float(), exact, rtol=0.03)
    loss.backward()
    assert {p.grad.dtype for p in model.projector.parameters()} == {torch.float32}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_hypotheses_end_with_their_audio_or_where_they_are_told_to(model, utterances, num_beams):
    audio, _ = embed(model, utterances)
    limits = [len(x) + len(model.after) for x in model.drop_blanks(audio)]
    assert len(set(limits)) > 2
    model.llm.generation_config.eos_token_id = None  # nothing else ends them
    lengths = [len(ids) + 1 for ids in model.generate(audio, num_beams)]
    assert lengths == limits
    for most in (1, 4, max(limits) + 1):  # what is asked for counts alone
        ids = model.generate(audio, num_beams, max_new_tokens=most)
        assert [len(x) for x in ids] == [most - 1] * len(audio)


def test_decoding_ends_at_the_llms_own_stops_too(model, utterances):
    audio, _ = embed(model, utterances[:1])
    [free] = model.generate(audio, num_beams=1)
    stop = free[3]
    model.llm.generation_config.eos_token_id = [model.end_id, stop]
    [short] = model.generate(audio, num_beams=1)
    assert short == free[: free.index(stop) + 1]


def test_of_a_beam_the_best_for_llm_and_ctc_together_is_chosen(model, utterances):
    audio, _ = embed(model, utterances[:2])  # "go" and "no"
    texts = [" go", " no", " " + "no" * 40, " up", " no", ""]  # the third is longer than its audio
    ids = [torch.tensor([*model.tokenizer.encode(text), model.end_id]) for text in texts]
    beams = pad_sequence(ids, batch_first=True, padding_value=model.end_id).view(2, 3, -1)
    losses = [model.ctc_loss([x], beam.tolist()) for x, beam in zip(audio, beams)]
    assert losses[0].isinf().tolist() == [False, False, True]
    other, best = losses[0][:2].argsort().flip(0).tolist()
    margin = losses[0][other] - losses[0][best]
    second = int(losses[1].argmin())
    # the LLM agrees; dislikes CTC's best by less than CTC likes it; dislikes it by more
    for penalty, wanted in ((0, best), (0.9 * margin, best), (1.1 * margin, other)):
        scores = torch.zeros(2, 3)
        scores[0, best] = -penalty
        scores[0, 2] = 99.0
        chosen = model.choose(audio, beams, scores)
        assert torch.equal(chosen, torch.stack([beams[0, wanted], beams[1, second]]))


def test_beams_compete_by_probability_and_not_by_its_mean_a_token(model, utterances, monkeypatch):
    # stops of many kinds, for hypotheses of many lengths in a beam
    stops = [model.end_id, *range(0, 256, 9)]
    model.llm.generation_config.eos_token_id = stops
    beams = []

    def choose(audio, hypotheses, scores):
        beams.append((hypotheses[0].tolist(), scores[0]))
        return hypotheses[:, 0]

    monkeypatch.setattr(model, "choose", choose)
    lengths = set()
    for utterance in utterances[:4]:
        audio, _ = embed(model, [utterance])
        model.generate(audio, num_beams=3)
        hypotheses, scores = beams.pop()
        wanted = []
        for ids in hypotheses:
            end = min(i for i, token in enumerate(ids) if token in stops)
            labels = torch.tensor([[IGNORE, *ids[: end + 1]]])
            wanted.append(-model.llm_loss(audio, labels, 1))
            lengths.add(end)
        assert torch.allclose(scores, torch.stack(wanted), atol=1e-3)
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert len(lengths) > 2


def test_the_llms_positions_limit_what_is_collated_unless_the_flag_is_lower(model, utterances):
    utterances = utterances[:1]
    model.collator(9)(utterances)  # " go" and its end in 5 audio positions
    with pytest.raises(InputError, match="at most 8 are allowed by --model_max_length: raise it,"):
        model.collator(8)(utterances)
    model.llm.config.max_position_embeddings = len(model.before) + 8
    for flag in (None, 9):
        with pytest.raises(InputError, match="8 are allowed by the LLM's max_position_embeddings"):
            model.collator(flag)(utterances)
