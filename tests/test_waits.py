"""How often the CPU waits for the GPU, on a pretended one: never once for each utterance."""

from collections import Counter

import pytest
import tiny
import torch
from accelerate.utils import send_to_device
from pretend_gpu import DEVICE, OURS, PretendGpu

BOTH = {"ctc_weight": 0.3}
CTC_ALONE = {"ctc_weight": 0.3, "ctc_only": True}


def train(model, batch: dict, **options) -> None:
    model.train()
    out = model(**batch, **options)
    out["loss"].backward()


def evaluate(model, batch: dict) -> None:
    model.eval()
    with torch.no_grad():
        model(**batch)


def start_decoding(model, batch: dict) -> None:
    """What comes before the LLM's first token."""
    with torch.no_grad():
        audio = model.embed_audio(batch["mel"], batch["lengths"])
        shown = model.drop_blanks(audio)
        model.build_inputs(shown, [[]] * len(shown))


def decode(model, batch: dict, **options) -> None:
    with torch.no_grad():
        audio = model.embed_audio(batch["mel"], batch["lengths"])
    model.generate(audio, **options)


def move(model) -> None:
    """To the pretended GPU, with what the first step of a run does."""
    model.to(DEVICE)
    model.encoder.module.to(DEVICE)
    assert model.embedding_rms > 0


def count_waits(paths, utterances, step, **options) -> Counter:
    """The waits of a step with these utterances, which are on the GPU already."""
    model = tiny.make_model(paths)
    batch = model.collator()(utterances)
    with PretendGpu() as gpu:
        move(model)
        batch = send_to_device(batch, DEVICE)
        gpu.waits.clear()
        step(model, batch, **options)
    return Counter(str(wait) for wait in gpu.waits)


@pytest.mark.parametrize(
    "step, options, most",
    [
        (train, BOTH, 1),
        (train, CTC_ALONE, 0),
        (evaluate, {}, 2),  # of the loss, and of that with the audio of others
        (start_decoding, {}, 1),
        (decode, {"num_beams": 1, "max_new_tokens": 3}, 3),  # blanks, classes, hypotheses
    ],
)
def test_a_step_waits_as_often_for_six_utterances_as_for_two(
    paths, utterances, step, options, most
):
    two = count_waits(paths, utterances[:2], step, **options)
    six = count_waits(paths, utterances[:6], step, **options)
    assert six == two
    ours = [wait for wait in six.elements() if wait.startswith(OURS)]
    assert len(ours) <= most, ours


def test_losses_and_gradients_on_the_pretended_gpu_are_those_of_the_cpu(model, utterances):
    batch = model.collator()(utterances[:6])
    train(model, batch, **BOTH)
    wanted = [x.grad for x in model.projector.parameters()]
    model.zero_grad()
    with PretendGpu():
        model.to(DEVICE)  # the encoder comes after by itself
        train(model, send_to_device(batch, DEVICE), **BOTH)
        for parameter, gradient in zip(model.projector.parameters(), wanted, strict=True):
            assert torch.allclose(parameter.grad.cpu(), gradient, atol=1e-4)


def test_the_pretended_gpu_counts_what_a_gpu_is_waited_for():
    cpu = torch.arange(3)
    with PretendGpu() as gpu:
        there = cpu.to(DEVICE)
        there = torch.tensor([0, 1, 2], device=DEVICE)
        there.copy_(cpu)
        there = there[cpu]
        there = there[[0, 1, 2]]
        assert there[1].item() == 1
        assert (there < 3).all()
        assert there.tolist() == [0, 1, 2]
        assert torch.equal(there.cpu(), cpu)
        assert len(there[there > 0]) == 2
        assert len(there.nonzero()) == 2
        assert len(there.unique()) == 3
    assert [wait.reason for wait in gpu.waits] == [
        "a copy from the CPU",
        "a copy from the CPU",
        "a copy from the CPU",
        "an index is copied from the CPU",
        "an index is copied from the CPU",
        "a value is read",
        "a value is read",
        "a copy to the CPU",
        "a copy to the CPU",
        "what a mask selects is counted",
        "non-zeros are counted",
        "different values are counted",
    ]
    assert gpu.waits[0].places[0].endswith("there = cpu.to(DEVICE)")


def test_the_pretended_gpu_does_without_waits_what_a_gpu_does():
    with PretendGpu() as gpu:
        there = torch.ones(3, device=DEVICE)
        there = there + torch.tensor(1)
        there = there[there.argsort()]
        there.copy_(torch.ones(3), non_blocking=True)
        there = torch.ones(3).to(DEVICE, non_blocking=True)
        torch.cat([there, there.new_zeros(2)]).cumsum(0)
    assert gpu.waits == []


def test_the_pretended_gpu_refuses_mixed_devices():
    cpu = torch.arange(3)
    with PretendGpu():
        there = torch.arange(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="add.Tensor: some tensors are on cuda:0 and some"):
            there + cpu
        with pytest.raises(RuntimeError, match="cat.default"):
            torch.cat([there, cpu])
        with pytest.raises(RuntimeError, match="index.Tensor"):
            cpu[there]
        with pytest.raises(RuntimeError, match="embedding.default"):
            torch.nn.functional.embedding(cpu, there[:, None])
