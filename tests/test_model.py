"""The architecture on tiny models: sizes, masks, losses, gradients and hypotheses."""

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from command import InputError
from data import IGNORE
from model import Projector

FAMILIES = ["qwen", "llama", "gemma"]
# those whose attention depends on where a row begins, with windows shorter than any row
WINDOW = {"head_dim": 32, "sliding_window": 8}
WINDOWS = {
    "mistral": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 8, "pad_token_id": 0},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
    "gpt_oss": {**WINDOW, "num_local_experts": 4},
    "mpt": {"max_seq_len": 4096},  # ALiBi
}

# those that keep other states than keys and values
LINEAR = {
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 1, "expand": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def embed(model, utterances):
    """Audio of utterances, and their batch."""
    batch = model.collator()(utterances)
    audio = model.embed_audio(batch["mel"], batch["lengths"])
    return audio, batch


def run(model, utterances, **options):
    """What the forward pass of utterances returns."""
    batch = model.collator()(utterances)
    return model(**batch, **options)


def lengths_of(rows):
    return [len(row) for row in rows]


def close(first, second, atol=1e-5):
    return torch.allclose(first, second, atol=atol)


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
    weights = sum(x.numel() for x in projector.parameters())
    assert round(weights / 2**20, digits) == size


def test_the_projector_rounds_lengths_up_and_pads_with_zeros():
    projector = Projector(encoder_dim=3, llm_dim=4, hidden_dim=8, stride=5)
    whole = torch.randn(2, 10, 3)
    whole[:, 6:] = 0
    out = projector(whole)
    assert out.shape == (2, 2, 4)
    assert torch.equal(projector(whole[:, :6]), out)
    assert torch.equal(projector(whole[:, :5]), out[:, :1])


def test_windows_of_long_audio_are_encoded_together_and_joined(model):
    half_a_minute = torch.randn(1, 80, 3000)
    two_windows = torch.randn(2, 80, 3000)
    short = torch.randn(1, 80, 1000)
    counts = []

    def count_windows(module, args):
        counts.append(len(args[0]))

    model.encoder.module.conv1.register_forward_pre_hook(count_windows)
    mel = [half_a_minute, two_windows, short]
    audio = model.embed_audio(mel, lengths=[1500, 2050, 480])
    assert sorted(counts) == [1, 3]
    assert lengths_of(audio) == [300, 410, 96]
    first, second = model.encoder(two_windows)
    joined = torch.cat([first, second[:550]])
    [projected] = model.projector(joined[None])
    wanted = model.embedding_rms * projected
    assert close(audio[1], wanted, atol=1e-4)


def test_a_short_window_is_encoded_with_the_first_of_whispers_positions(paths, utterances):
    model = tiny.make_model(paths, whisper="whisper128")
    batch = model.collator()(utterances[:1])
    [mel] = batch["mel"]
    assert mel.shape == (1, 128, 150)
    encoded = model.encoder(mel)
    module = model.encoder.module
    module.positional_embedding = module.positional_embedding[:75]
    assert torch.equal(encoded, module(mel))


@pytest.mark.parametrize("family", FAMILIES)
def test_audio_is_as_long_as_embeddings_as_the_llm_reads_them(paths, utterances, family):
    model = tiny.make_model(paths, llm=family)
    stored = model.llm.get_input_embeddings().weight
    rms = stored.square().mean().sqrt()
    if family == "gemma":
        rms = rms * 128**0.5  # Gemma scales what it stores
    assert abs(model.embedding_rms - rms) < 1e-5
    audio, _ = embed(model, utterances)
    squares = torch.cat(audio).square().mean(-1)
    assert torch.allclose(squares.sqrt(), rms, rtol=1e-3)


def test_prompt_audio_and_answer_stand_in_order_and_padding_is_on_the_left(model):
    audio = [torch.ones(3, 128), torch.ones(1, 128)]
    answers = [[5], [6, 7, 8, 9, 10]]
    inputs = model.build_inputs(audio, answers)
    for i, padding in enumerate([2, 0]):
        before = model.embed_text(model.before)
        after = model.embed_text(model.after + answers[i])
        row = torch.cat([before, audio[i], after])
        found = inputs["inputs_embeds"][i]
        mask = inputs["attention_mask"][i]
        assert torch.equal(found[padding:], row)
        assert mask[padding:].all()
        assert not mask[:padding].any()
        assert len(mask) == padding + len(row)


def test_blanks_are_not_shown_to_the_llm(model):
    ids = model.tokenizer.encode(" x")
    blank, other = model.embed_text(ids)
    near = blank + 0.1 * other
    mixed = torch.stack([3 * blank, other, near, -blank])
    audio = [mixed, blank[None]]
    shown = model.drop_blanks(audio)
    assert torch.equal(shown[0], mixed[[1, 3]])
    assert lengths_of(shown) == [2, 0]
    model.speech_config.blank_threshold = 2.0
    shown = model.drop_blanks(audio)
    assert lengths_of(shown) == [4, 1]


def test_the_ctc_loss_leaves_out_spaces_and_the_end_and_is_scaled_by_the_embeddings(model):
    g, o, blank = model.tokenizer.encode("go ")
    audio = [model.embed_text([g, o])]
    answer = [blank, g, blank, o, model.end_id]
    loss = model.ctc_loss(audio, [answer])
    weight = model.llm.get_input_embeddings().weight
    # a typical embedding with itself has a logit of 14
    typical = weight.square().sum(-1).mean()
    products = audio[0] @ weight.T
    log_probs = (14 / typical * products).log_softmax(-1)
    assert close(loss, -log_probs[0, g] - log_probs[1, o])
    [impossible] = model.ctc_loss(audio, [[g, o, g]])
    assert impossible.isinf()


def test_the_training_loss_is_the_weighted_sum_of_both(model, utterances):
    audio, batch = embed(model, utterances)
    labels, answers = batch["labels"], batch["answers"]
    count = (labels != IGNORE).sum()
    losses = model.ctc_loss(audio, answers)
    ctc = losses.sum() / count
    llm = model.llm_loss(audio, answers, labels, count)
    both = run(model, utterances, ctc_weight=0.3)
    assert close(both["llm_loss"], llm)
    assert close(both["ctc_loss"], ctc)
    assert close(both["loss"], llm + 0.3 * ctc)
    first = run(model, utterances, ctc_weight=0.3, ctc_only=True)
    assert close(first["loss"], 0.3 * ctc)
    alone = run(model, utterances)
    assert close(alone["loss"], llm)


def gradient_of(model, loss):
    weights = list(model.projector.parameters())
    parts = torch.autograd.grad(loss, weights)
    return torch.cat([x.flatten() for x in parts])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_for_labels_alone_give_the_full_loss_and_gradients(paths, utterances, family):
    model = tiny.make_model(paths, llm=family)
    sizes = []

    def measure(module, args, logits):
        sizes.append(logits.shape[1])

    model.llm.lm_head.register_forward_hook(measure)
    loss = run(model, utterances)["loss"]
    assert sizes == [1 + len(" left") + 1]
    kept = gradient_of(model, loss)

    audio, batch = embed(model, utterances)
    labels = batch["labels"]
    shown = model.drop_blanks(audio)
    inputs = model.build_inputs(shown, batch["answers"])
    positions = inputs["attention_mask"].cumsum(1) - 1
    inputs["position_ids"] = positions.clamp(min=0)
    logits = model.llm(**inputs).logits
    answers = logits[:, -labels.shape[1] : -1]
    full = cross_entropy(answers.transpose(1, 2), labels[:, 1:])
    assert close(loss, full)
    assert close(kept, gradient_of(model, full))


@pytest.mark.parametrize("ctc_only", [False, True])
def test_the_loss_is_a_mean_over_all_labels_of_an_optimizer_step(model, utterances, ctc_only):
    options = {"ctc_weight": 0.3, "ctc_only": ctc_only}
    whole = run(model, utterances[:4], **options)["loss"]
    options["num_items_in_batch"] = len(" go no up left") + 4
    first = run(model, utterances[:1], **options)["loss"]
    rest = run(model, utterances[1:4], **options)["loss"]
    assert close(first + rest, whole)


def check_batch_against_singles(model, utterances, **options):
    """Losses and hypotheses of a batch are those of its utterances alone.

    Returns the hypotheses by the width of the beam.
    """
    together = run(model, utterances, **options)["loss"]
    apart = 0
    for utterance in utterances:
        apart += run(model, [utterance], **options)["loss"]
    assert abs(together - apart) < 1e-5

    audio, _ = embed(model, utterances)
    by_beams = {}
    for beams in (1, 3):
        hypotheses = []
        for utterance in utterances:
            single, _ = embed(model, [utterance])
            hypotheses += model.generate(single, beams)
        assert model.generate(audio, beams) == hypotheses
        by_beams[beams] = hypotheses
    return by_beams


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_four_equals_four_single_runs(paths, utterances, family):
    model = tiny.make_model(paths, llm=family)
    options = {"num_items_in_batch": 19, "ctc_weight": 0.3}
    by_beams = check_batch_against_singles(model, utterances[::2], **options)
    for hypotheses in by_beams.values():
        assert len({tuple(ids) for ids in hypotheses}) > 2


def replace_llm(model, family, **options):
    """The model with a random LLM of a family of transformers, as wide as the one it had."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 128, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = AutoConfig.for_model(family, vocab_size=263, **{**sizes, **options})
    model.llm = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model.llm.generation_config.eos_token_id = model.end_id
    return model


@pytest.mark.parametrize("family", WINDOWS)
def test_a_row_is_read_the_same_alone_and_beside_a_longer_one(model, utterances, family):
    replace_llm(model, family, **WINDOWS[family])
    model.before, model.after = model.before[:1], model.after[:1]  # padding is within the window
    rows = [utterances[0], utterances[-1]]
    assert rows[1].duration > 2 * rows[0].duration
    check_batch_against_singles(model, rows, num_items_in_batch=8)


@pytest.mark.parametrize("family", [*WINDOWS, *LINEAR])
def test_beams_share_what_is_read_before_them(model, utterances, family, monkeypatch):
    replace_llm(model, family, **{**WINDOWS, **LINEAR}[family])
    audio, _ = embed(model, utterances[:4])
    inputs = model.build_inputs(audio, [[]] * 4)
    assert (model.read_once(inputs, 3) is None) == (family in LINEAR)
    shared = model.generate(audio, num_beams=3)
    monkeypatch.setattr(model, "read_once", lambda *args: None)
    assert model.generate(audio, num_beams=3) == shared


def test_the_listening_gap_is_the_loss_with_the_audio_of_others_less_the_loss(model, utterances):
    model.eval()
    first, second, third = utterances[:3]
    batch = model.collator()([first, second, third])
    others = model.collator()([third, first, second])
    others["labels"], others["answers"] = batch["labels"], batch["answers"]
    out = model(**batch)
    swapped = model(**others)
    gap = swapped["loss"] - out["loss"]
    assert gap.abs() > 1e-3
    assert close(out["listening_gap"], gap.expand(3))
    # the same where the batch is a part of what the loss is a mean over
    count = (batch["labels"] != IGNORE).sum()
    part = model(**batch, num_items_in_batch=4 * count)
    assert close(part["loss"], out["loss"] / 4)
    assert close(part["listening_gap"], out["listening_gap"])


def test_a_batch_of_one_has_no_listening_gap(model, utterances):
    model.eval()
    out = run(model, utterances[:1])
    assert out["loss"].isfinite()
    [gap] = out["listening_gap"]
    assert gap.isnan()


def test_only_the_projector_has_gradients(model, utterances):
    out = run(model, utterances[:2], ctc_weight=0.3)
    out["loss"].backward()
    for parameter in model.projector.parameters():
        assert parameter.grad.any()
    for frozen in (model.llm, model.encoder.module):
        for parameter in frozen.parameters():
            assert not parameter.requires_grad
            assert parameter.grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_under_bfloat16_the_projector_stays_float32(model, utterances, autocast):
    exact = run(model, utterances[:2], ctc_weight=0.3)["loss"]
    model.llm.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = run(model, utterances[:2], ctc_weight=0.3)["loss"]
    assert torch.allclose(loss.float(), exact, rtol=0.03)
    loss.backward()
    for parameter in model.projector.parameters():
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("num_beams", [1, 3])
def test_hypotheses_end_with_their_audio_or_where_they_are_told_to(model, utterances, num_beams):
    audio, _ = embed(model, utterances)
    limits = [len(x) + len(model.after) for x in model.drop_blanks(audio)]
    assert len(set(limits)) > 2
    model.llm.generation_config.eos_token_id = None  # nothing else ends them
    ids = model.generate(audio, num_beams, ctc_weight=0)
    assert lengths_of(ids) == [limit - 1 for limit in limits]
    ids = model.generate(audio, num_beams, ctc_weight=1e-6)
    assert lengths_of(ids) == [len(x) for x in audio]
    for most in (2, max(limits) + 1):  # what is asked for counts alone
        ids = model.generate(audio, num_beams, max_new_tokens=most, ctc_weight=0)
        assert lengths_of(ids) == [most - 1] * len(audio)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_where_all_audio_is_blank_nothing_is_said(model, utterances, num_beams):
    [speech, *_], _ = embed(model, utterances)
    silence = model.embed_text([model.blank_id] * 5)
    [said] = model.generate([speech], num_beams)
    assert model.generate([speech, silence], num_beams) == [said, []]
    assert said


def test_decoding_ends_at_the_llms_own_stops_too(model, utterances):
    audio, _ = embed(model, utterances[:1])
    [free] = model.generate(audio, num_beams=1)
    stop = free[3]
    model.llm.generation_config.eos_token_id = [model.end_id, stop]
    [short] = model.generate(audio, num_beams=1)
    assert short == free[: free.index(stop) + 1]


@pytest.mark.parametrize("ctc_weight", [0, 1.5])
def test_hypotheses_compete_by_the_llms_and_ctcs_log_probabilities(
    model, utterances, monkeypatch, ctc_weight
):
    outputs = []
    generate = model.llm.generate

    def generate_all(**options):
        scored = {"return_dict_in_generate": True, "output_scores": True}
        outputs.append(generate(**options, **scored, num_return_sequences=8))
        return outputs[0].sequences[:1]

    monkeypatch.setattr(model.llm, "generate", generate_all)
    # stops of many kinds, for hypotheses of many lengths
    model.stop_ids = {model.end_id, *range(0, 256, 9)}
    model.llm.generation_config.eos_token_id = sorted(model.stop_ids)
    audio, _ = embed(model, utterances[:1])
    model.generate(audio, num_beams=8, ctc_weight=ctc_weight)
    scores = outputs[0].sequences_scores
    vocabulary = model.embed_text(range(model.llm.get_input_embeddings().num_embeddings))
    logits = audio[0] @ vocabulary.T * model.ctc_scale
    best = logits.log_softmax(-1).amax(-1).sum()  # what CTC's scores are relative to
    counts = set()
    for ids, score in zip(outputs[0].sequences.tolist(), scores):
        count = 1
        while ids[count - 1] not in model.stop_ids:
            count += 1
        labels = torch.tensor([[IGNORE, *ids[:count]]])
        loss = model.llm_loss(audio, [ids[:count]], labels, 1)
        if ctc_weight > 0:
            loss = loss + ctc_weight * (model.ctc_loss(audio, [ids[:count]]) + best)
        assert close(score, -loss, atol=2e-3)
        counts.add(count)
    assert len(counts) > 1
    assert scores.argmax() == 0


def test_a_batch_stays_within_the_positions_that_longrope_turns_alike(model, utterances):
    rope = {"rope_type": "longrope", "rope_theta": 1e4}
    rope |= {"short_factor": [1.0] * 16, "long_factor": [1.5] * 16}
    options = {"rope_parameters": rope, "original_max_position_embeddings": 72}
    replace_llm(model, "phi3", pad_token_id=0, **options)
    prompt = len(model.before) + len(model.after)
    message = f"at most {72 - prompt} are allowed by the LLM's original_max_position_embeddings"
    with pytest.raises(InputError, match=message):
        model.collator()(utterances)


def test_the_llms_positions_limit_what_is_collated_unless_the_flag_is_lower(model, utterances):
    utterances = utterances[:1]
    model.collator(9)(utterances)  # " go" and its end in 5 audio positions
    with pytest.raises(InputError, match="at most 8 are allowed by --model_max_length"):
        model.collator(8)(utterances)
    prompt = len(model.before) + len(model.after)
    model.llm.config.max_position_embeddings = prompt + 8
    with pytest.raises(InputError, match="8 are allowed by the LLM's max_position_embeddings"):
        model.collator(9)(utterances)
