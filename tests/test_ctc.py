"""CTC against alignments that are written out."""

from collections import Counter
from itertools import product
from math import log

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
        positions = range(len(alignment))
        steps = probabilities[positions, list(alignment)]
        total = total + steps.prod()
    return -total.log()


def loss_of(audio, targets, classes=4, blank_id=BLANK, **options):
    embeddings = make_embeddings(classes)
    return ctc.ctc_loss(audio, targets, embeddings, blank_id, scale=1.0, **options)


def test_the_loss_of_go_and_its_gradient_are_those_of_its_five_alignments():
    audio = make_audio(3)
    wanted = sum_alignments(audio, ALIGNMENTS_OF_GO, make_embeddings(4))
    [loss] = loss_of([audio], [[1, 2]])
    assert torch.allclose(loss, wanted, rtol=1e-5)
    [gradient] = torch.autograd.grad(loss, audio)
    [wanted] = torch.autograd.grad(wanted, audio)
    assert torch.allclose(gradient, wanted, atol=1e-5)


def test_losses_of_a_padded_batch_are_sums_over_all_alignments():
    audio = [make_audio(length) for length in (5, 5, 4, 3)]
    targets = [[1, 1], [3, 3, 2], [], [1, 2]]
    for target, positions, loss in zip(targets, audio, loss_of(audio, targets)):
        every = product(range(4), repeat=len(positions))
        alignments = [x for x in every if collapse(x) == target]
        wanted = sum_alignments(positions, alignments, make_embeddings(4))
        assert torch.allclose(loss, wanted, rtol=1e-4)
        # one audio may have many targets, the hypotheses of a beam
        _, again = loss_of([positions], [[3], target])
        assert torch.allclose(loss, again)
    assert alignments == ALIGNMENTS_OF_GO


@pytest.mark.parametrize("target", [[1, 2, 3], [1, 1]])
def test_what_cannot_have_been_said_is_infinite_or_without_a_gradient(target):
    audio = [make_audio(2), make_audio(3)]
    assert loss_of(audio, [target, [1]]).isinf().tolist() == [True, False]
    losses = loss_of(audio, [target, [1]], zero_infinity=True)
    assert losses[0] == 0
    impossible, possible = torch.autograd.grad(losses.sum(), audio)
    assert not impossible.any()
    assert possible.any()


def test_of_a_large_vocabulary_common_tokens_the_blank_and_the_targets_count(monkeypatch):
    audio = make_audio(4)
    vocabulary = {"classes": 50, "blank_id": 45}
    every = loss_of([audio], [[1, 40]], **vocabulary)
    monkeypatch.setattr(ctc, "COMMON_TOKENS", 10)
    monkeypatch.setattr(ctc, "RIVALS", 0)
    few = loss_of([audio], [[1, 40]], **vocabulary)
    assert every > few + 0.1
    # the same as with a vocabulary that has no other tokens
    monkeypatch.undo()
    small = make_embeddings(12)
    classes = [45, *range(10), 40]
    small.weight.data = make_embeddings(50).weight[classes]
    alone = ctc.ctc_loss([audio], [[2, 11]], small, blank_id=0, scale=1.0)
    assert torch.allclose(few, alone, rtol=1e-5)


def test_tokens_of_a_large_vocabulary_are_drawn_for_each_batch(monkeypatch):
    audio = make_audio(4)
    vocabulary = {"classes": 50, "blank_id": 45}
    every = loss_of([audio], [[1, 40]], **vocabulary)
    monkeypatch.setattr(ctc, "COMMON_TOKENS", 10)
    monkeypatch.setattr(ctc, "RIVALS", 1000)  # all 40, many times over, but each as one class
    assert torch.allclose(loss_of([audio], [[1, 40]], **vocabulary), every)
    monkeypatch.setattr(ctc, "RIVALS", 5)
    drawn = ctc.draw_rivals([[1], [40]], 50)
    assert min(drawn) >= 10 and max(drawn) < 50
    assert ctc.draw_rivals([[1], [40]], 50) == drawn  # so a run goes on as it would have
    assert ctc.draw_rivals([[1], [41]], 50) != drawn


def sum_alignments_to(audio, embeddings) -> tuple[Counter, Counter]:
    """Of texts: the sums over alignments that end in their last token, and over whole ones.

    An alignment counts as the product of its probabilities over those of each position's best.
    """
    probabilities = (audio @ embeddings.weight.T).double().softmax(-1)
    relative = probabilities / probabilities.amax(-1, keepdim=True)
    beginnings, wholes = Counter({(): 1.0}), Counter()
    for length in range(1, len(audio) + 1):
        for alignment in product(range(len(embeddings.weight)), repeat=length):
            steps = relative[range(length), list(alignment)]
            said = collapse(alignment)
            if collapse(alignment[:-1]) == said[:-1] and said:
                beginnings[tuple(said)] += steps.prod().item()
            if length == len(audio):
                wholes[tuple(said)] += steps.prod().item()
    return beginnings, wholes


def make_scores(audio, embeddings, num_beams=1, weight=1.0, stop_ids=(3,)):
    options = {"scale": 1.0, "num_beams": num_beams, "weight": weight}
    return ctc.PrefixScores(audio, audio, embeddings, BLANK, set(stop_ids), **options)


def test_scores_of_a_search_are_sums_over_all_alignments():
    embeddings = make_embeddings(4)
    audio = [make_audio(5).detach(), make_audio(3).detach()]
    sums = [sum_alignments_to(x, embeddings) for x in audio]
    # two beams of two utterances; the last step of each comes from the other beam of the one before
    steps = [
        [[1], [2], [2], [1]],
        [[1, 1], [2, 1], [2, 1], [1, 0]],
        [[2, 1, 2], [1, 1, 2], [1, 0, 1], [2, 1, 2]],
    ]
    scores = make_scores(audio, embeddings, num_beams=2, weight=0.5)
    scores(torch.empty(4, 0, dtype=torch.long), torch.zeros(4, 4))
    for hypotheses in steps:
        of_llm = torch.randn(4, 4) / 4  # so that no blank is preferred
        both = scores(torch.tensor(hypotheses), of_llm)
        for i, hypothesis in enumerate(hypotheses):
            beginnings, wholes = sums[i // 2]
            said = tuple(token for token in hypothesis if token != BLANK)
            wanted = {3: wholes[said] / beginnings[said]}  # the end
            for token in (1, 2):
                wanted[token] = beginnings[(*said, token)] / beginnings[said]
            for token, share in wanted.items():
                added = both[i, token] - of_llm[i, token]
                if share == 0:
                    assert added < -40  # more tokens than positions
                else:
                    assert abs(added - 0.5 * log(share)) < 1e-5
            assert both[i, BLANK] < -1e5  # the LLM does not prefer it


def test_of_other_tokens_those_that_are_near_to_the_audio_can_be_said(monkeypatch):
    monkeypatch.setattr(ctc, "COMMON_TOKENS", 10)
    monkeypatch.setattr(ctc, "NEAREST", 2)
    embeddings = make_embeddings(35)
    audio = make_audio(3).detach()
    both = make_scores([audio], embeddings)(torch.empty(1, 0, dtype=torch.long), torch.zeros(1, 35))
    products = audio @ embeddings.weight[10:].T
    nearest = products.topk(2).indices.flatten() + 10
    [can_be_said] = both.isfinite().nonzero(as_tuple=True)[1:]
    assert set(can_be_said.tolist()) == {*range(10), *nearest.tolist()}


def test_an_utterance_has_the_same_scores_alone_and_in_a_batch(monkeypatch):
    monkeypatch.setattr(ctc, "COMMON_TOKENS", 10)
    monkeypatch.setattr(ctc, "NEAREST", 2)
    embeddings = make_embeddings(200)
    audio = [make_audio(length).detach() for length in (3, 5, 4)]
    hypotheses = torch.tensor([[1, 4]] * 3)
    scores = torch.zeros(3, 200)

    def search(audio):
        processor = make_scores(audio, embeddings)
        for length in range(3):
            both = processor(hypotheses[: len(audio), :length], scores[: len(audio)])
        return both

    for row, positions in zip(search(audio), audio):
        [alone] = search([positions])
        assert torch.equal(row.isfinite(), alone.isfinite())
        said = alone.isfinite()
        assert torch.allclose(row[said], alone[said], atol=1e-5)


def test_a_blank_is_said_once_where_the_llm_prefers_it():
    embeddings = make_embeddings(4)
    processor = make_scores([make_audio(3).detach()], embeddings)
    preferred = torch.tensor([[0.6, 0.2, 0.1, 0.1]]).log()
    both = processor(torch.empty(1, 0, dtype=torch.long), preferred)
    assert both[0, BLANK] == preferred[0, BLANK]
    both = processor(torch.tensor([[BLANK]]), preferred)
    assert both[0, BLANK] < -1e5
    processor = make_scores([make_audio(3).detach()], embeddings)
    both = processor(torch.empty(1, 0, dtype=torch.long), torch.zeros(1, 4))
    assert both[0, BLANK] < -1e5


def test_a_hypothesis_that_puts_off_what_is_hard_to_hear_is_not_preferred():
    """Of three positions the first is hard to hear: 1 or 2; then come a blank and 2."""
    logits = torch.tensor([[0.0, 4.0, 3.9, -9], [9, 0, 0, -9], [0, 0, 9, -9]])
    embeddings = torch.nn.Embedding.from_pretrained(torch.eye(4))
    processor = make_scores([logits], embeddings)
    start = processor(torch.empty(1, 0, dtype=torch.long), torch.zeros(1, 4))
    assert start[0].argmax() == 1
    assert start[0, 1] > -0.1  # as good as the best that can be said there


def test_what_cannot_be_gains_nothing():
    embeddings = make_embeddings(4)
    processor = make_scores([make_audio(2).detach()], embeddings, stop_ids=(0,))
    hypothesis = torch.tensor([[1, 2, 1, 2, 1, 2]])  # more tokens than positions
    for length in range(7):
        both = processor(hypothesis[:, :length], torch.zeros(1, 4))
        assert not both.isnan().any()
        if length == 2:  # a third token, but no end
            assert (both[0, 1:] < -40).all()
        if length > 2:  # what it has cost is not given back
            assert (both < 3).all()


def test_positions_near_the_blank_are_dropped_whatever_their_length():
    angles = torch.tensor([0, 0.6, 0.9, 3.1])  # cosines of 1, 0.83, 0.62 and -1
    lengths = torch.tensor([1, 10, 0.5, 9])
    positions = torch.stack([lengths * angles.cos(), lengths * angles.sin()], dim=1)
    blank = torch.tensor([2.0, 0.0])
    kept = ctc.drop_blanks([positions, positions[:2]], blank, threshold=0.7)
    assert torch.equal(kept[0], positions[2:])
    assert len(kept[1]) == 0
    [kept] = ctc.drop_blanks([positions], blank, threshold=0.9)
    assert torch.equal(kept, positions[1:])


def read_spans(alignment):
    """Where each token of an alignment is: (first position, one past the last)."""
    spans = []
    last = BLANK
    for position, token in enumerate(alignment):
        if token != BLANK:
            if token == last:
                spans[-1] = (spans[-1][0], position + 1)
            else:
                spans.append((position, position + 1))
        last = token
    return spans


@pytest.mark.parametrize("target", [[], [1], [1, 1], [1, 2], [3, 3, 2]])
def test_tokens_stand_where_the_most_probable_alignment_has_them(target):
    embeddings = make_embeddings(4)
    for length in range(1, 6):
        audio = make_audio(length).detach()
        logits = audio @ embeddings.weight.T
        alignments = [x for x in product(range(4), repeat=length) if collapse(x) == target]
        spans = ctc.align(audio, target, embeddings, BLANK)
        if alignments:
            best = max(alignments, key=lambda x: logits[range(length), list(x)].sum().item())
            assert spans == read_spans(best)
        else:
            assert spans is None
