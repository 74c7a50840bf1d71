from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data import Collator, read_manifest
from model import IGNORE, InputError, Projector, load

LLM_DIMS = {"LLaMA3-8B": 4096, "Qwen2-0.5B": 896, "Qwen2-1.5B": 1536, "Qwen2-7B": 3584}
ENCODER_DIMS = {"tiny": 384, "small": 768, "large": 1280}


def load_tiny(paths, llm="qwen", whisper="whisper", **options):
    torch.manual_seed(0)
    names = {"llm_model_name_or_path": getattr(paths, llm)}
    names["whisper_model_name_or_path"] = getattr(paths, whisper)
    return load(**names, **options)


def make_batch(model, tokenizer, rows, **options):
    return Collator(tokenizer, model.settings, model.n_mels, **options)(rows)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.projector.parameters()])


def millions(encoder, llm):
    projector = Projector(ENCODER_DIMS[encoder], LLM_DIMS[llm])
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
    model, tokenizer = load_tiny(paths)
    path = tiny.make_sound(tmp_path / "a.wav", samples / 16_000, 300)
    batch = make_batch(model, tokenizer, [{"_path": path, "txt": "go"}])
    assert batch["encoder_lengths"].tolist() == [positions]
    assert model.encode(batch["encoder_lengths"], batch["mel"]).shape[:2] == (1, positions)
    assert model.project(batch["encoder_lengths"], batch["mel"])[1].tolist() == [audio]
    assert model(**batch)["loss"].isfinite()


def test_windows_of_long_audio_are_encoded_apart_and_joined(paths):
    model, _ = load_tiny(paths)
    mel = [torch.randn(1, 80, 3000), torch.randn(2, 80, 3000), torch.randn(1, 80, 1000)]
    lengths = torch.tensor([1500, 2050, 480])  # 30 s, 41 s (two windows), 9.6 s
    whole = model.encoder(torch.cat(mel[:2]))
    encoded = model.encode(lengths, mel)
    assert encoded.shape == (3, 2050, 32)
    assert torch.allclose(encoded[0, :1500], whole[0], atol=1e-6)
    assert torch.allclose(encoded[1], torch.cat([whole[1], whole[2, :550]]), atol=1e-6)
    assert torch.equal(encoded[2:, :480], model.encode(lengths[2:], mel[2:]))
    assert not encoded[0, 1500:].any() and not encoded[2, 480:].any()


def test_audio_is_spliced_into_its_place_and_nowhere_else(paths):
    model, tokenizer = load_tiny(paths)
    batch = make_batch(model, tokenizer, read_manifest([paths.manifest])[:3], answers=False)
    audio, lengths = model.project(batch["encoder_lengths"], batch["mel"])
    out = model.splice(audio, lengths, batch["before"], batch["after"])
    embed = model.llm.get_input_embeddings()
    assert lengths.tolist() == [5, 7, 8] and out["attention_mask"].sum(1).diff().tolist() == [2, 1]
    for row, mask, own, n in zip(out["inputs_embeds"], out["attention_mask"], audio, lengths):
        before, after = embed(batch["before"]), embed(batch["after"][0])
        assert torch.equal(row[mask.bool()], torch.cat([before, own[:n], after]))
        assert mask.tolist() == sorted(mask.tolist())  # padded on the left
        assert torch.allclose(own.norm(dim=1), embed.weight.norm() / 263**0.5, rtol=1e-3)


def test_blanks_are_not_shown_to_the_llm(paths):
    model, tokenizer = load_tiny(paths)
    batch = make_batch(model, tokenizer, read_manifest([paths.manifest])[3:5], answers=False)
    audio, lengths = model.project(batch["encoder_lengths"], batch["mel"])
    text = batch["before"], batch["after"]
    embed = model.llm.get_input_embeddings()
    blank = embed.weight[tokenizer.encode(" ")[0]]
    audio[0, [0, 2]] = 3 * blank
    audio[1] = blank + 0.1 * blank.norm() * torch.nn.functional.normalize(audio[1], dim=-1)
    out = model.splice(audio, lengths, *text)
    kept = audio[0, [1, *range(3, lengths[0])]]
    assert torch.equal(
        out["inputs_embeds"][0], torch.cat([embed(text[0]), kept, embed(text[1][0])])
    )
    silent = out["inputs_embeds"][1][out["attention_mask"][1].bool()]
    assert torch.equal(silent, torch.cat([embed(text[0]), embed(text[1][1])]))


def test_ctc_loss_is_the_probability_of_all_alignments_written_out(paths):
    model, tokenizer = load_tiny(paths)
    embeddings = model.llm.get_input_embeddings().weight
    g, o = tokenizer.encode("go")
    blank = model.blank
    torch.manual_seed(1)
    audio = embeddings[torch.tensor([[g, o, blank, g], [g, o, o, g]])] + 0.1 * torch.randn(
        2, 4, 128
    )
    audio.requires_grad_()
    # a space in a transcript is the blank, and leaves "go"; of the second audio, 1 position counts
    transcripts = [torch.tensor([blank, g, blank, o]), torch.tensor([g, o])]
    losses = model.ctc_loss(audio, torch.tensor([3, 1]), transcripts)
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


def test_ctc_loss_of_a_large_vocabulary_tells_common_pieces_and_the_answers_apart(
    paths, monkeypatch
):
    model, tokenizer = load_tiny(paths)
    monkeypatch.setattr("model.CTC_PIECES", 40)
    batch = make_batch(model, tokenizer, read_manifest([paths.manifest])[:2])
    audio, lengths = model.project(batch["encoder_lengths"], batch["mel"])
    few = model.ctc_loss(audio, lengths, batch["transcripts"])
    text = tokenizer.encode("gono")
    pieces = sorted({*range(40), *text, model.blank})
    model.llm.get_input_embeddings().weight.data[[i for i in range(263) if i not in pieces]] = (
        -1e4 * audio.sum((0, 1))
    )  # of no probability
    assert torch.allclose(few, model.ctc_loss(audio, lengths, batch["transcripts"]), rtol=1e-4)
    monkeypatch.setattr("model.CTC_PIECES", 263)
    assert torch.allclose(few, model.ctc_loss(audio, lengths, batch["transcripts"]), rtol=1e-4)


def test_the_training_loss_is_the_weighted_sum_of_both(paths):
    model, tokenizer = load_tiny(paths)
    batch = make_batch(model, tokenizer, read_manifest([paths.manifest]))
    both = model(**batch, ctc_weight=0.3)
    alone = model(**batch, ctc_weight=1.0, ctc_alone=True)
    assert alone.keys() == {"loss", "ctc_loss", "ctc_skipped"} and alone["ctc_skipped"] == 0
    assert torch.equal(alone["loss"], alone["ctc_loss"])
    loss = 0.3 * alone["loss"] + model(**batch)["loss"]
    assert torch.allclose(both["loss"], loss, rtol=1e-5)


@pytest.mark.parametrize("llm", ["qwen", "llama"])
def test_logits_for_labels_alone_give_the_full_loss_and_gradients(paths, llm, monkeypatch):
    model, tokenizer = load_tiny(paths, llm)
    batch = make_batch(model, tokenizer, read_manifest([paths.manifest]))
    positions = []
    model.llm.lm_head.register_forward_hook(lambda *x: positions.append(x[2].shape[1]))
    loss = model(**batch)["loss"]
    assert positions == [1 + len("left") + 1]
    speech = model.project(batch["encoder_lengths"], batch["mel"])
    logits = model.llm(**model.splice(*speech, batch["before"], batch["after"])).logits
    labels = batch["labels"][:, 1:]
    logits = logits[:, -labels.shape[1] - 1 : -1].flatten(0, 1)
    full = torch.nn.functional.cross_entropy(logits, labels.flatten())
    assert torch.allclose(loss, full, atol=1e-5)
    assert torch.allclose(gradients(model, loss), gradients(model, full), atol=1e-5)


@pytest.mark.parametrize(
    "weights", [{}, {"ctc_weight": 0.3}, {"ctc_weight": 1.0, "ctc_alone": True}]
)
def test_loss_is_a_mean_over_all_labels_of_an_optimizer_step(paths, weights):
    model, tokenizer = load_tiny(paths)
    rows = read_manifest([paths.manifest])[:4]  # answers of unequal lengths
    whole = make_batch(model, tokenizer, rows)
    total = (whole["labels"] != IGNORE).sum()
    parts = [make_batch(model, tokenizer, part) for part in (rows[:1], rows[1:])]
    loss = sum(model(**part, num_items_in_batch=total, **weights)["loss"] for part in parts)
    assert torch.allclose(loss, model(**whole, **weights)["loss"], atol=1e-5)


@pytest.mark.parametrize("llm", ["qwen", "llama"])
def test_a_batch_of_four_equals_four_single_runs(paths, llm):
    model, tokenizer = load_tiny(paths, llm)
    rows = read_manifest([paths.manifest])[::2]
    options = {"end_id": tokenizer.eos_token_id}
    options["beam"] = {"num_beams": 3, "max_new_tokens": 12}
    batch = make_batch(model, tokenizer, rows)
    count = (batch["labels"] != IGNORE).sum()
    decode = make_batch(model, tokenizer, rows, answers=False)
    together = tokenizer.batch_decode(model.generate(**decode, **options), skip_special_tokens=True)
    loss, apart = 0, []
    for row in rows:
        loss += model(**make_batch(model, tokenizer, [row]), num_items_in_batch=count)["loss"]
        single = model.generate(**make_batch(model, tokenizer, [row], answers=False), **options)
        apart += tokenizer.batch_decode(single, skip_special_tokens=True)
    assert torch.allclose(model(**batch)["loss"], loss, atol=1e-5)
    assert together == apart and len(set(apart)) > 1


def test_only_the_projector_has_gradients(paths):
    model, tokenizer = load_tiny(paths)
    model(**make_batch(model, tokenizer, read_manifest([paths.manifest])[:2]))["loss"].backward()
    for name, parameter in model.named_parameters():
        trained = name.startswith("projector.")
        assert (parameter.grad is not None) == parameter.requires_grad == trained, name


def test_under_bfloat16_the_projector_stays_float32(paths):
    model, tokenizer = load_tiny(paths, dtype=torch.bfloat16)
    batch = make_batch(model, tokenizer, read_manifest([paths.manifest])[:2])
    assert model.llm.dtype == torch.bfloat16
    exact = load_tiny(paths)[0](**batch)["loss"]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch)["loss"]
        loss.backward()
        assert torch.allclose(loss.float(), exact, rtol=0.03)
        assert {p.grad.dtype for p in model.projector.parameters()} == {torch.float32}


def test_encoders_of_128_mel_bins_are_read(paths):
    model, tokenizer = load_tiny(paths, whisper="whisper128")
    batch = make_batch(model, tokenizer, read_manifest([paths.manifest])[:2])
    assert [mel.shape for mel in batch["mel"]] == [(1, 128, 200)] * 2
    assert model(**batch)["loss"].isfinite()


def test_sampling_and_penalties_of_a_chat_model_are_dropped_but_its_stops_kept(paths, tmp_path):
    model, tokenizer = load_tiny(paths)
    llm = model.llm
    llm.generation_config.update(eos_token_id=[3, 4], do_sample=True, repetition_penalty=9.0)
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chat, _ = load(llm_model_name_or_path=str(tmp_path), whisper_model_name_or_path=paths.whisper)
    assert chat.stop_ids == [3, 4]
    assert not chat.llm.generation_config.do_sample
    assert chat.llm.generation_config.repetition_penalty is None


def test_decoding_ends_at_the_end_of_turn_and_at_the_models_own_stops(paths):
    model, tokenizer = load_tiny(paths)
    batch = make_batch(model, tokenizer, read_manifest([paths.manifest])[:1], answers=False)
    beam = {"num_beams": 1, "max_new_tokens": 40}
    free = model.generate(**batch, end_id=0, beam=beam)[0].tolist()
    end_id = next(token for token in free if token != free[0])
    assert (
        model.generate(**batch, end_id=end_id, beam=beam)[0].tolist()
        == free[: free.index(end_id) + 1]
    )
    model.stop_ids = [free[0]]
    assert model.generate(**batch, end_id=end_id, beam=beam)[0].tolist() == free[:1]


def test_a_projector_file_holds_the_projector_and_brings_all_settings_back(paths, tmp_path):
    model, _ = load_tiny(paths, stride=4, prompt="Repeat it.")
    path = str(tmp_path / "model.safetensors")
    model.save_projector(path)
    with safe_open(path, "pt") as file:
        assert file.keys() and all(name.startswith("projector.") for name in file.keys())  # noqa: SIM118
    again, _ = load(path)
    assert again.settings == model.settings
    (tmp_path / "plain").write_text("")  # has the mode that the user's umask asks for
    assert Path(path).stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert again.projector.hidden.out_features == 2048  # that of the published tables
    assert again.settings["stride"] == "4" and again.settings["prompt"] == "Repeat it."
    for name, tensor in model.projector.state_dict().items():
        assert torch.equal(tensor, again.projector.state_dict()[name])


def test_a_model_that_moved_is_taken_from_its_new_place(paths, tmp_path):
    load_tiny(paths)[0].save_projector(tmp_path / "model.safetensors")
    (tmp_path / "elsewhere").mkdir()
    moved = tiny.make_llm(tmp_path / "elsewhere" / "qwen", "qwen")
    path = str(tmp_path / "model.safetensors")
    for place in (str(moved), f"{moved}/"):
        model, _ = load(path, llm_model_name_or_path=place)
        assert model.settings["llm_model_name_or_path"] == place
    with pytest.raises(InputError, match="cannot be loaded"):  # agreed to, though it is not there
        load(path, whisper_model_name_or_path=str(tmp_path / "tiny"))


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("llm_model_name_or_path", "other/llm", "'other/llm', but .* was trained with '.*qwen'"),
        ("whisper_model_name_or_path", "base", "'base', but .* was trained with '.*tiny.pt'"),
        ("stride", 4, "--stride is '4', but .* was trained with '5'"),
        ("prompt", "or/Transcribe the speech.", "--prompt is 'or/Transcribe the speech.'"),
    ],
)
def test_a_projector_of_other_settings_is_refused(paths, tmp_path, setting, value, message):
    path = str(tmp_path / "model.safetensors")
    load_tiny(paths)[0].save_projector(path)
    with pytest.raises(InputError, match=message):
        load(path, **{setting: value})
    model = load_tiny(paths)[0]
    model.settings[setting] = str(value)  # as where a run with other flags would be resumed
    with pytest.raises(InputError, match=message):
        model.load_projector(path)


def test_a_projector_of_other_sizes_is_refused(paths, tmp_path):
    path = str(tmp_path / "model.safetensors")
    load_tiny(paths)[0].save_projector(path)
    wide = str(tiny.make_whisper(tmp_path / "tiny.pt", width=48))
    with pytest.raises(InputError, match=r"(?s)does not fit.*mismatch for projector.conv"):
        load(path, whisper_model_name_or_path=wide)


def test_files_that_are_no_projector_are_refused(paths, tmp_path):
    path = str(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="cannot be read as a projector file"):
        load(path)
    load_tiny(paths)[0].save_projector(path)
    save_file(load_file(path), path)  # without metadata
    with pytest.raises(InputError, match="no projector file of this version"):
        load(path)


def test_missing_and_unknown_models_are_named(paths):
    with pytest.raises(InputError, match="--llm_model_name_or_path is needed"):
        load(whisper_model_name_or_path=paths.whisper)
    with pytest.raises(InputError, match=r"Model huge not found; available models = .*'tiny'"):
        load(llm_model_name_or_path=paths.qwen, whisper_model_name_or_path="huge")
