"""CTC between projected audio and text, whose classifier is the LLM's own input embeddings.

So each audio position moves to the embedding of the word piece that is spoken in it, in the space
that the LLM reads anyway, or to that of the blank, a space, where nothing is spoken. No weight is
added.

Shapes: B utterances, A audio positions, D width of the LLM, P classes, N hypotheses.
"""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor

COMMON_TOKENS = 8192  # always among the classes: the first tokens of a vocabulary are the common
RIVALS = 4096  # other tokens that are drawn as classes in training, for each batch
NEAREST = 10  # of the other tokens that are classes in recognition, for each position
CTC_WEIGHT = 2.0  # of CTC beside the LLM in recognition
NEVER = -1e6  # log-probability of what cannot be; finite, so that differences are numbers


def drop_blanks(audio: list[Tensor], blank: Tensor, threshold: float) -> list[Tensor]:
    """Audio (A, D) of each utterance less the positions that are near the blank's embedding (D,).

    Near is a cosine of `threshold` or more.
    """
    joined = torch.cat(audio)
    similarity = nn.functional.cosine_similarity(joined, blank, dim=-1)
    kept = (similarity < threshold).cpu()  # waits for the device, and once for all utterances
    lengths = [len(x) for x in audio]
    parts = kept.split(lengths)
    counts = [int(part.sum()) for part in parts]
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
    times the products with the embeddings of the classes: the blank, common tokens, what `targets`
    have, and some of the others, as what is never a class is never told to keep away from audio. Of
    a target with more tokens than its audio has positions (or as many, one of them doubled) the
    loss is infinite, or 0 with `zero_infinity`.
    """
    # classes are counted on the CPU: how many there are, a GPU could not say without a wait
    tokens = [blank_id, *chain(*targets)]
    said, index = torch.tensor(tokens).unique(return_inverse=True)
    common = range(min(COMMON_TOKENS, embeddings.num_embeddings))
    rivals = draw_rivals(targets, embeddings.num_embeddings)
    others = torch.tensor(sorted({*common, *rivals} - {*tokens}), dtype=torch.long)

    device = audio[0].device
    rows = embeddings(send(torch.cat([said, others]), device))  # (P, D)
    padded = pad_sequence(audio, batch_first=True)
    logits = padded.to(rows.dtype) @ rows.T * scale  # (B, A, P)
    # classes that no target has become one, as CTCLoss would spend most of its time on them
    logits_of_said, logits_of_others = logits.float().split([len(said), len(others)], dim=-1)
    other = logits_of_others.logsumexp(-1, keepdim=True)
    log_probs = torch.cat([logits_of_said, other], dim=-1).log_softmax(-1)
    log_probs = log_probs.transpose(0, 1)  # (A, B, those that are said and the other)
    log_probs = log_probs.expand(-1, len(targets), -1)

    lengths = [len(x) for x in audio]
    audio_lengths = torch.tensor(lengths).expand(len(targets))
    target_lengths = torch.tensor([len(ids) for ids in targets])
    blank, target_classes = index.split([1, len(index) - 1])
    loss = nn.CTCLoss(int(blank), reduction="none", zero_infinity=zero_infinity)
    return loss(log_probs, send(target_classes, device), audio_lengths, target_lengths)


def draw_rivals(targets: list[list[int]], vocabulary: int) -> list[int]:
    """RIVALS tokens that are not common, some of them twice; the same for the same targets."""
    if vocabulary <= COMMON_TOKENS:
        return []
    generator = torch.Generator().manual_seed(sum(chain(*targets)))
    rivals = torch.randint(COMMON_TOKENS, vocabulary, [RIVALS], generator=generator)
    return rivals.tolist()


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
    other = tokens[2:] != tokens[1:-1]
    may_skip[3::2] = other

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


class PrefixScores(LogitsProcessor):
    """Adds CTC's log-probabilities, times `weight`, to the LLM's in each step of a search.

    From Watanabe et al. 2017, "Hybrid CTC/Attention Architecture for End-to-End Speech
    Recognition", algorithm 2; the sum over positions is a product of matrices here, for all classes
    at once. So what a hypothesis leaves out or makes up counts at once.

    Probabilities of each position are divided by that of its best class. This adds the same to all
    hypotheses when they end, but until then it charges what they have not come to yet as if the
    best were said there. Without it, those that put off what is hard to hear push out the others.

    Classes are the blank, common tokens, and of the others those that are nearest to a position at
    which something is said. Nothing else is ever said, and `stop_ids` end. A blank says nothing and
    costs nothing, so it is said only where the LLM prefers it to all else together, as before
    digits, and never twice.
    """

    def __init__(
        self,
        audio: list[Tensor],
        heard: list[Tensor],
        embeddings: nn.Embedding,
        blank_id: int,
        stop_ids: set[int],
        scale: float,
        num_beams: int,
        weight: float,
    ):
        """Audio (A, D) of each utterance, and `heard`, what `drop_blanks` leaves of it."""
        device = audio[0].device
        self.blank_id = blank_id
        self.stop_ids = send(torch.tensor(sorted(stop_ids)), device)
        self.num_beams = num_beams
        self.weight = weight
        common = range(min(COMMON_TOKENS, embeddings.num_embeddings))
        always = torch.tensor([*common, blank_id])
        nearest = find_nearest(torch.cat(heard), embeddings, NEAREST)
        classes = torch.cat([send(always, device), nearest.flatten()])
        self.classes = classes.unique()  # (P,), sorted
        self.is_blank = self.classes == blank_id
        # what is near to another utterance alone is no class of this one: batches change nothing
        is_rare = (self.classes >= COMMON_TOKENS) & ~self.is_blank
        is_foreign = is_rare.repeat(len(heard), 1)
        counts = [len(x) for x in heard]
        for row, tokens in zip(is_foreign, nearest.split(counts)):
            row[self.find(tokens.flatten())] = False

        rows = embeddings(self.classes)  # (P, D)
        padded = pad_sequence(audio, batch_first=True)
        logits = padded.to(rows.dtype) @ rows.T * scale
        logits = logits.masked_fill(is_foreign[:, None], -torch.inf)
        best = logits.float().amax(-1, keepdim=True)
        probabilities = (logits - best).exp()  # over that of the best class
        # behind its end an utterance goes on in blanks, which cost nothing
        lengths = torch.tensor([len(x) for x in audio])
        positions = torch.arange(padded.shape[1])
        is_behind = send(positions >= lengths[:, None], device)
        silence = self.is_blank.float()
        self.probabilities = silence.where(is_behind[..., None], probabilities)  # (B, A, P)
        blanks = log(self.probabilities @ silence)
        self.blanks = blanks.double().repeat_interleave(num_beams, 0)  # (B * N, A)
        self.is_foreign = is_foreign.repeat_interleave(num_beams, 0)  # (B * N, P)

        # log-probabilities that an alignment of a hypothesis stands before each position, and at
        # the end, with a blank as its last step, or with the token that is said last
        start = self.blanks.cumsum(1)
        self.in_blank = pad(start, (1, 0))  # (B * N, A + 1)
        self.in_token = torch.full_like(self.in_blank, NEVER)
        self.prefix = self.in_blank[:, 0]  # (B * N,), that the hypothesis is said to its end
        hypotheses = len(self.prefix)
        self.said_last = torch.full([hypotheses], blank_id, device=device)  # tokens
        self.hypotheses = self.said_last[:, None][:, :0]  # none has a token yet

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Hypotheses (B * N, T) and the LLM's scores (B * N, V) of the next -> both's scores."""
        if input_ids.shape[1] > 0:
            self.extend(input_ids)
        both = torch.full_like(scores, -torch.inf)
        in_either = torch.logaddexp(self.in_blank, self.in_token)
        parts = [
            (self.classes, self.score_classes(input_ids, scores, in_either)),
            (self.stop_ids, self.score_end(in_either)),
        ]
        for tokens, gains in parts:
            weighted = self.weight * gains.to(scores.dtype)
            both[:, tokens] = scores[:, tokens] + weighted
        return both

    def score_classes(self, input_ids: Tensor, scores: Tensor, in_either: Tensor) -> Tensor:
        """What each class (B * N, P) as the next token adds to a hypothesis's log-probability."""
        shares = self.share(in_either)
        of_utterances = shares.unflatten(0, (-1, self.num_beams))  # (B, N, A)
        said_next = of_utterances @ self.probabilities  # (B, N, P)
        gains = log(said_next).flatten(0, 1)
        # to be said twice a token needs a blank between
        said_again = self.share(self.in_blank) * self.look_up(self.said_last)
        gains_again = log(said_again.sum(1))
        classes = self.find(self.said_last)[:, None]
        gains.scatter_(1, classes, gains_again[:, None])
        begun = pad(input_ids, (1, 0), value=-1)
        is_preferred = scores.softmax(-1)[:, self.blank_id] > 0.5
        may_follow = is_preferred & (begun[:, -1] != self.blank_id)
        gains_of_blank = torch.where(may_follow, 0.0, NEVER)
        gains = torch.where(self.is_blank, gains_of_blank[:, None], gains)
        return gains.masked_fill(self.is_foreign, -torch.inf)

    def score_end(self, in_either: Tensor) -> Tensor:
        """What its end adds to a hypothesis's log-probability (B * N, 1)."""
        whole = in_either[:, -1]
        gains = whole - self.prefix
        return gains[:, None]

    def extend(self, input_ids: Tensor) -> None:
        """Go on from the states of the hypotheses before to those of these, with a token more."""
        parents = self.find_parents(input_ids)
        in_blank = self.in_blank[parents]
        in_token = self.in_token[parents]
        prefix = self.prefix[parents]
        said_last = self.said_last[parents]

        token = input_ids[:, -1].contiguous()
        steps = log(self.look_up(token)).double()
        in_either = torch.logaddexp(in_blank, in_token)
        is_again = token == said_last
        before = torch.where(is_again[:, None], in_blank, in_either)
        before = before[:, :-1]
        into_token = add_alignments(before, steps)
        into_blank = add_alignments(into_token[:, :-1], self.blanks)
        extended = (before + steps).logsumexp(1)
        extended = extended.clamp(min=NEVER)

        is_blank = token == self.blank_id
        self.prefix = torch.where(is_blank, prefix, extended)
        self.said_last = torch.where(is_blank, said_last, token)
        is_blank = is_blank[:, None]
        self.in_token = torch.where(is_blank, in_token, into_token)
        self.in_blank = torch.where(is_blank, in_blank, into_blank)
        self.hypotheses = input_ids

    def find_parents(self, input_ids: Tensor) -> Tensor:
        """Which of the hypotheses before (B * N,) each of these begins with.

        Beams change places within an utterance, and a processor is not told how.
        """
        grouped = (-1, self.num_beams)
        before = self.hypotheses.unflatten(0, grouped)  # (B, N, T)
        begun = input_ids[:, :-1].unflatten(0, grouped)
        is_same = begun[:, :, None] == before[:, None]
        is_parent = is_same.all(-1)  # (B, N, N)
        beam = is_parent.int().argmax(-1)
        utterance = torch.arange(len(beam), device=beam.device)
        first = utterance * self.num_beams
        return (first[:, None] + beam).flatten()

    def share(self, state: Tensor) -> Tensor:
        """A state's part of the hypothesis's probability, before each position (B * N, A)."""
        logarithms = state[:, :-1] - self.prefix[:, None]
        return logarithms.exp().float()

    def find(self, tokens: Tensor) -> Tensor:
        """The classes of tokens, in their shape; any class for those that have none."""
        classes = torch.searchsorted(self.classes, tokens)
        return classes.clamp(max=len(self.classes) - 1)

    def look_up(self, tokens: Tensor) -> Tensor:
        """The probability (B * N, A) of each hypothesis's token at each position."""
        count = len(self.probabilities)
        utterances = torch.arange(count, device=tokens.device)
        utterances = utterances.repeat_interleave(self.num_beams)
        return self.probabilities[utterances, :, self.find(tokens)]


def find_nearest(audio: Tensor, embeddings: nn.Embedding, count: int) -> Tensor:
    """Of the tokens that are not common, the nearest (A, `count`) to each position of audio."""
    vocabulary = range(COMMON_TOKENS, embeddings.num_embeddings)
    if not vocabulary:
        return torch.empty([len(audio), 0], dtype=torch.long, device=audio.device)
    values, tokens = [], []
    # in parts, as the products with all of a large vocabulary would fill gigabytes
    for start in vocabulary[::COMMON_TOKENS]:
        part = vocabulary[start - COMMON_TOKENS :][:COMMON_TOKENS]
        rows = embeddings(send(torch.tensor(part), audio.device))
        products = audio.to(rows.dtype) @ rows.T
        best = products.topk(min(count, len(part)))
        values.append(best.values)
        tokens.append(best.indices + start)
    values = torch.cat(values, 1)
    tokens = torch.cat(tokens, 1)
    best = values.topk(min(count, values.shape[1]))
    return tokens.gather(1, best.indices)


def log(probabilities: Tensor) -> Tensor:
    """Logarithms, but none below that of the smallest float32, -87."""
    smallest = torch.finfo(torch.float32).tiny
    return probabilities.clamp(min=smallest).log()


def add_alignments(before: Tensor, steps: Tensor) -> Tensor:
    """Log-probabilities (N, A + 1) that an alignment stands in a state before each position.

    At each position it comes from elsewhere (`before`, (N, A)) or stands there already, and takes a
    step (N, A). So x[t + 1] = (x[t] + before[t]) * steps[t], from x[0] = 0 on.
    """
    taken = pad(steps.cumsum(1), (1, 0))
    started = before - taken[:, :-1]
    state = started.logcumsumexp(1) + taken[:, 1:]
    state = state.clamp(min=NEVER)
    return pad(state, (1, 0), value=NEVER)
