"""CTC against alignments that are written out."""

from itertools import product

import pytest
import torch
from torch import nn

import ctc

BLANK = 0
# how "go", g = 1 and o = 2, can be spoken in three positions, written by hand
ALIGNMENTS_OF_GO = [(1, 2, 0), (1, 0, 2), (0, 1, 2), (1, 1, 2), (1, 2, 2)]


def make_embeddings(classes=4, width=8):
    torch.manual_seed(0)
    return nn.Embedding(classes, width).requires_grad_(False)


def make_audio(*lengths, width=8):
    torch.manual_seed(1)
    return [torch.randn(length, width, requires_grad=True) for length in lengths]


def collapse(alignment):
    """What is said in an alignment: repeats are one, and blanks are nothing."""
    said = []
    for i, token in enumerate(alignment):
        repeated = i > 0 and alignment[i - 1] == token
        if token != BLANK and not repeated:
            said.append(token)
    return said


def sum_loss(audio, alignments, embeddings, scale):
    """-log of the sum of the alignments' probabilities, each a product over positions."""
    probabilities = (scale * audio @ embeddings.weight.T).softmax(-1)
    total = torch.tensor(0.0)
    for alignment in alignments:
        total = total + probabilities[range(len(alignment)), list(alignment)].prod()
    return -total.log()


def test_the_alignments_written_by_hand_are_all_that_say_go():
    found = [x for x in product(range(4), repeat=3) if collapse(x) == [1, 2]]
    assert sorted(found) == sorted(ALIGNMENTS_OF_GO)


def test_the_loss_of_go_and_its_gradient_are_those_of_its_five_alignments():
    embeddings, [audio] = make_embeddings(), make_audio(3)
    wanted = sum_loss(audio, ALIGNMENTS_OF_GO, embeddings, scale=0.7)
    [loss] = ctc.ctc_loss([audio], [torch.tensor([1, 2])], embeddings, BLANK, scale=0.7)
    assert torch.allclose(loss, wanted, rtol=1e-5)
    [gradient] = torch.autograd.grad(loss, audio)
    [wanted] = torch.autograd.grad(wanted, audio)
    assert torch.allclose(gradient, wanted, atol=1e-5)


@pytest.mark.parametrize("target", [[], [3], [1, 1], [1, 2, 1], [3, 3, 2]])
def test_losses_of_a_padded_batch_are_sums_over_all_alignments(target):
    embeddings, audio = make_embeddings(), make_audio(5, 4, 5)
    targets = [torch.tensor(target, dtype=torch.long), torch.tensor([2]), torch.tensor([1, 3])]
    losses = ctc.ctc_loss(audio, targets, embeddings, BLANK, scale=1.3)
    wanted = []
    for speech, tokens in zip(audio, targets):
        every = product(range(4), repeat=len(speech))
        alignments = [x for x in every if collapse(x) == tokens.tolist()]
        wanted.append(sum_loss(speech, alignments, embeddings, scale=1.3))
    assert torch.allclose(losses, torch.stack(wanted), rtol=1e-4)


@pytest.mark.parametrize("target, positions", [([1, 2, 3], 2), ([1, 1], 2), ([1], 0)])
def test_what_cannot_have_been_said_is_infinite_or_without_a_gradient(target, positions):
    embeddings, audio = make_embeddings(), make_audio(positions, 3)
    targets = [torch.tensor(target), torch.tensor([1])]
    losses = ctc.ctc_loss(audio, targets, embeddings, BLANK, scale=1.0)
    assert losses.isinf().tolist() == [True, False]
    losses = ctc.ctc_loss(audio, targets, embeddings, BLANK, scale=1.0, zero_infinity=True)
    assert losses[0] == 0 and losses[1] > 0
    gradients = torch.autograd.grad(losses.sum(), audio)
    assert not gradients[0].any() and gradients[1].any()


def test_one_audio_may_have_many_hypotheses():
    embeddings, audio = make_embeddings(), make_audio(4)
    targets = [torch.tensor(x) for x in ([1, 2], [3], [2, 2])]
    together = ctc.ctc_loss(audio, targets, embeddings, BLANK, scale=1.0)
    apart = [ctc.ctc_loss(audio, [x], embeddings, BLANK, scale=1.0)[0] for x in targets]
    assert torch.allclose(together, torch.stack(apart))


def test_of_a_large_vocabulary_common_tokens_the_blank_and_the_targets_count(monkeypatch):
    embeddings, audio = make_embeddings(classes=50), make_audio(4)
    targets, blank_id = [torch.tensor([1, 40])], 45
    monkeypatch.setattr(ctc, "COMMON_TOKENS", 10)
    few = ctc.ctc_loss(audio, targets, embeddings, blank_id, scale=1.0)
    monkeypatch.setattr(ctc, "COMMON_TOKENS", 50)
    every = ctc.ctc_loss(audio, targets, embeddings, blank_id, scale=1.0)
    assert every > few + 0.1
    # the same as the small vocabulary that has no other tokens
    small = make_embeddings(classes=12)
    small.weight.data = embeddings.weight[[*range(10), 40, 45]]
    alone = ctc.ctc_loss(audio, [torch.tensor([1, 10])], small, 11, scale=1.0)
    assert torch.allclose(few, alone, rtol=1e-5)


def test_positions_near_the_blank_are_dropped_whatever_their_length():
    blank = torch.tensor([2.0, 0.0])
    right, near, far, away = [1.0, 0.0], [8.0, 6.0], [0.3, 0.4], [-9.0, 0.0]  # 1, 0.8, 0.6, -1
    audio = [torch.tensor([right, near, far, away]), torch.tensor([near])]
    kept = ctc.drop_blanks(audio, blank, threshold=0.7)
    assert [x.tolist() for x in kept] == [torch.tensor([far, away]).tolist(), []]
    kept = ctc.drop_blanks(audio, blank, threshold=0.9)
    assert [len(x) for x in kept] == [3, 1]
