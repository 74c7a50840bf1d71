"""CTC between projected audio and text, whose classifier is the LLM's own input embeddings.

So each audio position moves to the embedding of the word piece that is spoken in it, in the space
that the LLM reads anyway, or to that of the blank, a space, where nothing is spoken. No weight is
added.

Shapes: B utterances, A audio positions, D width of the LLM, P classes, N hypotheses.
"""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

COMMON_TOKENS = 8192  # always among the classes: the first tokens of a vocabulary are the common


def drop_blanks(audio: list[Tensor], blank: Tensor, threshold: float) -> list[Tensor]:
    """Audio (A, D) of each utterance less the positions that are near the blank's embedding (D,).

    Near is a cosine of `threshold` or more.
    """
    joined = torch.cat(audio)
    similarity = nn.functional.cosine_similarity(joined, blank, dim=-1)
    kept = (similarity < threshold).cpu()  # waits for the device, and once for all utterances
    lengths = [len(x) for x in audio]
    counts = [int(part.sum()) for part in kept.split(lengths)]
    indices = send(kept.nonzero()[:, 0], joined.device)
    return list(joined[indices].split(counts))


def ctc_loss(
    audio: list[Tensor],
    targets: list[list[int]],
    embeddings: nn.Embedding,
    blank_id: int,
    scale: float,
    zero_infinity: bool = False,
) -> Tensor:
    """Negative log-likelihoods of token ids `targets`, in nats: (B,).

    Audio is (A, D) for each target, or that of one utterance for all targets. Logits are `scale`
    times the products with the embeddings of the classes: the blank, common tokens, and what
    `targets` have. Of a target with more tokens than its audio has positions (or as many, one of
    them doubled) the loss is infinite, or 0 with `zero_infinity`.
    """
    common = range(min(COMMON_TOKENS, embeddings.num_embeddings))
    # classes are counted on the CPU: how many there are, a GPU could not say without a wait
    tokens = torch.tensor([*common, blank_id, *chain(*targets)])
    classes, index = tokens.unique(return_inverse=True)  # (P,), and the place of each token in it
    blank_class = int(index[len(common)])
    target_classes = index[len(common) + 1 :]

    device = audio[0].device
    rows = embeddings(send(classes, device))  # (P, D)
    padded = pad_sequence(audio, batch_first=True)
    logits = padded.to(rows.dtype) @ rows.T * scale  # (B, A, P)
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    log_probs = log_probs.expand(-1, len(targets), -1)

    lengths = [len(x) for x in audio]
    audio_lengths = torch.tensor(lengths).expand(len(targets))
    target_lengths = torch.tensor([len(ids) for ids in targets])
    loss = nn.CTCLoss(blank_class, reduction="none", zero_infinity=zero_infinity)
    return loss(log_probs, send(target_classes, device), audio_lengths, target_lengths)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor's copy on the device, for which the CPU does not wait until the device is idle."""
    return tensor.to(device, non_blocking=True)


def align(
    audio: Tensor, target: list[int], embeddings: nn.Embedding, blank_id: int
) -> list[tuple[int, int]] | None:
    """Where each token of `target` is spoken in audio (A, D): (first position, one past the last).

    This is the most probable alignment (Viterbi). The softmax needs no other classes, as their sum
    is the same for all alignments. None if the target has more tokens than the audio has positions,
    or as many, one of them doubled.
    """
    tokens = torch.tensor([blank_id, *target])
    rows = embeddings(send(tokens, audio.device))
    logits = audio.to(rows.dtype) @ rows.T  # (A, 1 + T)
    # blank, first token, blank, second token, ... blank: the states, each with a column of logits
    states = 2 * len(target) + 1
    columns = torch.zeros(states, dtype=torch.long)
    columns[1::2] = torch.arange(1, len(tokens))
    logits = logits.float().cpu()[:, columns]  # (A, states)
    # the blank may be left out between two tokens that differ
    may_skip = torch.zeros(states, dtype=torch.bool)
    may_skip[3::2] = tokens[2:] != tokens[1:-1]

    best = torch.full([2 + states], -torch.inf)  # two more, so that each state has two before it
    best[2:4] = logits[0, :2]
    steps = []  # how many states back each state comes from, for all positions but the first
    for position in logits[1:]:
        two_back = best[:-2].where(may_skip, -torch.inf)
        ways = torch.stack([best[2:], best[1:-1], two_back])  # (3, states)
        score, step = ways.max(0)
        best[2:] = score + position
        steps.append(step.to(torch.uint8))

    state = states - 1  # the blank behind the last token, or that token
    if target and best[-2] > best[-1]:
        state -= 1
    if best[2 + state] == -torch.inf:
        return None
    path = [state]
    for step in reversed(steps):
        state -= int(step[state])
        path.append(state)
    path.reverse()
    spans = []
    for state in range(1, states, 2):
        first = path.index(state)
        spans.append((first, first + path.count(state)))
    return spans
