"""CTC against alignments that are written out."""

from itertools import product

import pytest
import torch
from torch import nn

import ctc

BLANK = 0
# how "go", g = 1 and o = 2, can be spoken in three positions
ALIGNMENTS_OF_GO = [
    (0, 1, 2),
    (1, 0, 2),
    (1, 1, 2),
    (1, 2, 0),
    (1, 2, 2),
]


def make_embeddings(classes):
    torch.manual_seed(0)
    return nn.Embedding(classes, 8).requires_grad_(False)


def make_audio(length):
    torch.manual_seed(length)
    return torch.randn(length, 8, requires_grad=True)


def collapse(alignment):
    """What is said in an alignment: repeats are one, and blanks are nothing."""
    said = []
    last = BLANK
    for token in alignment:
        if token not in (BLANK, last):
            said.append(token)
        last = token
    return said


def sum_alignments(audio, alignments, embeddings):
    """-log of the sum of the alignments' probabilities, each a product over positions."""
    probabilities = (audio @ embeddings.weight.T).softmax(-1)
    total = torch.tensor(0.0)
    for alignment in alignments:
        steps = probabilities[range(len(alignment)), list(alignment)]
        total = total + steps.prod()
    return -total.log()


def loss_of(audio, targets, classes=4, blank_id=BLANK, **options):
    embeddings = make_embeddings(classes)
    tensors = [torch.tensor(x, dtype=torch.long) for x in targets]
    return ctc.ctc_loss(audio, tensors, embeddings, blank_id, scale=1.0, **options)


def test_the_loss_of_go_and_its_gradient_are_those_of_its_five_alignments():
    audio = make_audio(3)
    wanted = sum_alignments(audio, ALIGNMENTS_OF_GO, make_embeddings(4))
    [loss] = loss_of([audio], [[1, 2]])
    assert torch.allclose(loss, wanted, rtol=1e-5)
    [gradient] = torch.autograd.grad(loss, audio)
    [wanted] = torch.autograd.grad(wanted, audio)
    assert torch.allclose(gradient, wanted, atol=1e-5)


@pytest.mark.parametrize("target", [[], [3], [1, 1], [1, 2, 1], [3, 3, 2]])
def test_losses_of_a_padded_batch_are_sums_over_all_alignments(target):
    audio = [make_audio(5), make_audio(4), make_audio(3)]
    targets = [target, [2], [1, 2]]
    losses = loss_of(audio, targets)
    for positions, tokens, loss in zip(audio, targets, losses):
        every = product(range(4), repeat=len(positions))
        alignments = [x for x in every if collapse(x) == tokens]
        wanted = sum_alignments(positions, alignments, make_embeddings(4))
        assert torch.allclose(loss, wanted, rtol=1e-4)
    assert alignments == ALIGNMENTS_OF_GO


@pytest.mark.parametrize("target, positions", [([1, 2, 3], 2), ([1, 1], 2), ([1], 0)])
def test_what_cannot_have_been_said_is_infinite_or_without_a_gradient(target, positions):
    audio = [make_audio(positions), make_audio(3)]
    assert loss_of(audio, [target, [1]]).isinf().tolist() == [True, False]
    losses = loss_of(audio, [target, [1]], zero_infinity=True)
    assert losses[0] == 0
    impossible, possible = torch.autograd.grad(losses.sum(), audio)
    assert not impossible.any()
    assert possible.any()


def test_one_audio_may_have_many_hypotheses():
    audio = make_audio(4)
    together = loss_of([audio], [[1, 2], [3], [2, 2]])
    apart = [loss_of([audio], [target]) for target in ([1, 2], [3], [2, 2])]
    assert torch.allclose(together, torch.cat(apart))


def test_of_a_large_vocabulary_common_tokens_the_blank_and_the_targets_count(monkeypatch):
    audio = make_audio(4)
    every = loss_of([audio], [[1, 40]], classes=50, blank_id=45)
    monkeypatch.setattr(ctc, "COMMON_TOKENS", 10)
    few = loss_of([audio], [[1, 40]], classes=50, blank_id=45)
    assert every > few + 0.1
    # the same as with a vocabulary that has no other tokens
    small = make_embeddings(12)
    classes = [*range(10), 40, 45]
    small.weight.data = make_embeddings(50).weight[classes]
    alone = ctc.ctc_loss([audio], [torch.tensor([1, 10])], small, blank_id=11, scale=1.0)
    assert torch.allclose(few, alone, rtol=1e-5)


def test_positions_near_the_blank_are_dropped_whatever_their_length():
    # cosines to the blank of 1, 0.8, 0.6 and -1
    right, near, far, away = [1.0, 0.0], [8.0, 6.0], [0.3, 0.4], [-9.0, 0.0]
    positions = torch.tensor([right, near, far, away])
    blank = torch.tensor([2.0, 0.0])
    kept = ctc.drop_blanks([positions, positions[:2]], blank, threshold=0.7)
    assert torch.equal(kept[0], positions[2:])
    assert len(kept[1]) == 0
    [kept] = ctc.drop_blanks([positions], blank, threshold=0.9)
    assert torch.equal(kept, positions[1:])
