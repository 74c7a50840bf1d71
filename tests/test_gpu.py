"""What runs on a GPU, against the same on the CPU. Skipped where no GPU is:

bash tests/run.sh -m gpu
"""

import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file
from test_recognize import read
from test_train import equal, flags, log, run

import ctc
import recognize
import train
from cache import Encoder
from loading import build, load, load_whisper
from model import Config, Projector, SpeechLLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA sees"),
]
DEVICE = torch.device("cuda", 0)
ROOT = Path(ctc.__file__).parent
BOTH = {"ctc_weight": 0.3}
CTC_ALONE = {"ctc_weight": 0.3, "ctc_only": True}


@pytest.fixture(autouse=True)
def full_float32():
    """Convolutions without TF32, which rounds to 10 bits; products are without it anyway."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def deterministic():
    """Sums in the same order each time, wherever torch can; a CTC loss this small always can."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_cpu(paths) -> SpeechLLM:
    return tiny.make_model(paths)


@pytest.fixture
def on_gpu(paths) -> SpeechLLM:
    return tiny.make_model(paths).to(DEVICE)


def collate(model, utterances) -> dict:
    """Their batch where the model is."""
    return send_to_device(model.collator()(utterances), model.llm.device)


def embed(model, utterances) -> list[torch.Tensor]:
    batch = collate(model, utterances)
    with torch.no_grad():
        return model.embed_audio(batch["mel"], batch["lengths"])


def check_same(found, wanted, tolerance: float = 1e-4) -> None:
    """Tensors on the GPU against those of the CPU, one by one where they are lists."""
    if isinstance(found, torch.Tensor):
        found, wanted = [found], [wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.device == DEVICE
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.cpu(), other, atol=tolerance, rtol=tolerance)


def gradient_of(model) -> torch.Tensor:
    return torch.cat([x.grad.flatten().cpu() for x in model.projector.parameters()])


def test_the_projector():
    torch.manual_seed(0)
    projector = Projector(encoder_dim=32, llm_dim=128, hidden_dim=64, stride=5)
    encoded = torch.randn(2, 23, 32)
    with torch.no_grad():
        wanted = projector(encoded)
        check_same(projector.to(DEVICE)(encoded.to(DEVICE)), wanted)


def test_each_step_from_log_mels_to_the_llms_inputs(on_gpu, on_cpu, utterances):
    batch, there = collate(on_cpu, utterances), collate(on_gpu, utterances)
    encoded = on_gpu.encode(there["mel"])
    check_same(encoded, on_cpu.encode(batch["mel"]))
    audio = on_gpu.embed_audio(there["mel"], batch["lengths"])
    wanted = on_cpu.embed_audio(batch["mel"], batch["lengths"])
    check_same(audio, wanted)
    check_same(on_gpu.drop_blanks(audio), on_cpu.drop_blanks(wanted))
    inputs = on_gpu.build_inputs(audio, batch["answers"])
    on_the_cpu = on_cpu.build_inputs(wanted, batch["answers"])
    check_same(inputs["inputs_embeds"], on_the_cpu["inputs_embeds"])
    check_same(inputs["attention_mask"], on_the_cpu["attention_mask"])
    assert abs(on_gpu.embedding_rms - on_cpu.embedding_rms) < 1e-5


def test_blanks_are_dropped():
    torch.manual_seed(0)
    blank, other = torch.randn(2, 16, device=DEVICE)
    audio = [torch.stack([3 * blank, other, -blank]), blank[None], other[None]]
    shown = ctc.drop_blanks(audio, blank, threshold=0.7)
    assert [len(x) for x in shown] == [2, 0, 1]
    assert torch.equal(shown[0], audio[0][1:])


def test_the_ctc_loss_and_its_gradient():
    torch.manual_seed(0)
    embeddings = torch.nn.Embedding(50, 16)
    targets = [[3, 3, 7], [], [9] * 9]  # the last has no room for blanks between
    losses, gradients = [], []
    for device in (DEVICE, torch.device("cpu")):
        torch.manual_seed(1)
        rows = [torch.randn(length, 16) for length in (9, 4, 12)]
        audio = [x.to(device).requires_grad_() for x in rows]
        embeddings.to(device)
        options = {"blank_id": 5, "scale": 0.5, "zero_infinity": True}
        loss = ctc.ctc_loss(audio, targets, embeddings, **options)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.sum(), audio))
    check_same(*losses)
    check_same(*gradients)
    assert losses[0][2] == 0
    impossible = ctc.ctc_loss(audio[2:], targets[2:], embeddings, blank_id=5, scale=0.5)
    assert impossible.isinf()


@pytest.mark.parametrize("options", [BOTH, CTC_ALONE, {}])
def test_training_in_float32_has_the_cpus_loss_and_gradient(on_gpu, on_cpu, utterances, options):
    found = on_gpu(**collate(on_gpu, utterances), **options)
    wanted = on_cpu(**collate(on_cpu, utterances), **options)
    for name, loss in wanted.items():
        check_same(found[name], loss)
    found["loss"].backward()
    wanted["loss"].backward()
    difference = gradient_of(on_gpu) - gradient_of(on_cpu)
    assert difference.norm() < 1e-3 * gradient_of(on_cpu).norm()


def test_evaluation_in_float32_has_the_cpus_loss_and_listening_gap(on_gpu, on_cpu, utterances):
    with torch.no_grad():
        found = on_gpu.eval()(**collate(on_gpu, utterances))
        wanted = on_cpu.eval()(**collate(on_cpu, utterances))
    check_same(found["loss"], wanted["loss"])
    check_same(found["listening_gap"], wanted["listening_gap"], tolerance=1e-3)


def test_bfloat16_has_the_cpus_losses_in_float32_to_a_percent(paths, on_cpu, utterances):
    exact = on_cpu(**collate(on_cpu, utterances), **BOTH)
    torch.manual_seed(0)
    model = build(Config(paths.qwen, paths.whisper), bf16=True, training=True).to(DEVICE)
    for autocast in (False, True):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            out = model(**collate(model, utterances), **BOTH)
        for name, loss in out.items():
            torch.testing.assert_close(loss.float().cpu(), exact[name], rtol=0.01, atol=0)
        model.zero_grad()
        out["loss"].backward()
        assert gradient_of(model).dtype == torch.float32
        assert gradient_of(model).isfinite().all()


def test_a_batch_of_four_equals_four_single_runs(on_gpu, utterances):
    utterances = utterances[::2]
    options = {"num_items_in_batch": 19, **BOTH}
    with torch.no_grad():
        together = on_gpu(**collate(on_gpu, utterances), **options)["loss"]
        apart = 0
        for utterance in utterances:
            apart += on_gpu(**collate(on_gpu, [utterance]), **options)["loss"]
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)
    for beams in (1, 4):
        hypotheses = []
        for utterance in utterances:
            hypotheses += on_gpu.generate(embed(on_gpu, [utterance]), beams)
        assert on_gpu.generate(embed(on_gpu, utterances), beams) == hypotheses
        assert len({tuple(ids) for ids in hypotheses}) == 4


@pytest.mark.parametrize("num_beams", [1, 4])
def test_hypotheses_end_where_they_are_told_to(on_gpu, utterances, num_beams):
    on_gpu.llm.generation_config.eos_token_id = None  # nothing else ends them
    audio = embed(on_gpu, utterances[:3])
    ids = on_gpu.generate(audio, num_beams, max_new_tokens=5)
    assert [len(row) for row in ids] == [4] * 3


def test_the_encoder_comes_to_its_input_and_its_cache_to_any_device(paths, tmp_path):
    torch.manual_seed(0)
    windows = torch.randn(3, 80, 100)
    cached = Encoder(load_whisper(paths.whisper).encoder, tmp_path)
    plain = Encoder(load_whisper(paths.whisper).encoder)
    there = plain(windows.to(DEVICE))
    assert plain.module.conv1.weight.device == DEVICE
    check_same(there, Encoder(load_whisper(paths.whisper).encoder)(windows))
    first = cached(windows.to(DEVICE))
    again = cached(windows.to(DEVICE))
    assert first.device == again.device == DEVICE
    assert torch.equal(first, there)
    assert torch.equal(again, first)
    # the hash of the weights is the same, wherever they are
    moved = Encoder(plain.module, tmp_path)
    assert moved.folder == cached.folder
    on_cpu = Encoder(load_whisper(paths.whisper).encoder, tmp_path)
    assert torch.equal(on_cpu(windows), first.cpu())


def test_a_projector_is_saved_from_a_gpu_and_loaded_onto_it(on_gpu, paths, tmp_path):
    path = tmp_path / "model.safetensors"
    with torch.no_grad():
        on_gpu.projector.conv.bias.add_(1)
    on_gpu.save_projector(path)
    other = tiny.make_model(paths).to(DEVICE)
    other.load_projector(path)
    new = load(str(path)).to(DEVICE)
    for model in (other, new):
        for name, tensor in model.projector.state_dict().items():
            assert tensor.device == DEVICE
            assert torch.equal(tensor, on_gpu.projector.state_dict()[name])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_recognize_gives_the_hypotheses_of_generate(on_gpu, utterances, num_workers):
    on_gpu.eval()
    for _ in recognize.recognize(on_gpu, utterances, [1, 4], 3, num_workers=num_workers):
        pass
    for utterance in utterances[::3]:
        audio = embed(on_gpu, [utterance])
        for beams, text in utterance.hypotheses.items():
            [ids] = on_gpu.generate(audio, beams)
            decoded = on_gpu.tokenizer.decode(ids, skip_special_tokens=True)
            assert text == " ".join(decoded.split())


def test_from_training_to_a_table_in_bfloat16(paths, tmp_path, monkeypatch, capsys):
    devices = set()
    forward = SpeechLLM.forward

    def look(self, labels, *args, **options):
        devices.update(str(x.device) for x in (labels, *options["mel"]))
        devices.update(str(x.device) for x in self.parameters())
        return forward(self, labels, *args, **options)

    monkeypatch.setattr(SpeechLLM, "forward", look)
    options = "--bf16 True --max_steps 40 --learning_rate 2e-3 --save_strategy no --ctc_first 0.2"
    options += " --eval_strategy steps --eval_steps 40 --eval_hypotheses 4 --gradient_checkpointing"
    options += f" --eval_data_path {paths.manifest} --encoder_cache {tmp_path}/cache"
    train.main(flags(paths, tmp_path, options))
    assert devices == {str(DEVICE)}
    losses = log(tmp_path, "llm_loss")
    assert len(losses) == 32
    assert losses[-1] < losses[0]
    [gap] = log(tmp_path, "eval_listening_gap")
    assert gap > -100
    assert len(log(tmp_path, "eval_wer")) == 1

    capsys.readouterr()
    command = f"--projector_model_path {tmp_path}/model.safetensors --data_path {paths.manifest}"
    command += f" --result_path {tmp_path}/out.jsonl --bf16 True --encoder_cache {tmp_path}/cache"
    recognize.main(f"{command} --num_beams 1 4".split())
    assert "| 4 |" in capsys.readouterr().out
    for beams in (1, 4):
        assert len(read(tmp_path / f"out.beam{beams}.jsonl")) == 8


def test_training_goes_on_exactly_from_a_checkpoint(paths, tmp_path, deterministic):
    options = "--bf16 True --max_steps 6 --save_steps 3 --learning_rate 1e-2"
    whole = run(paths, tmp_path, options)
    losses = log(tmp_path, "loss")
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "model.safetensors").unlink()
    assert equal(run(paths, tmp_path, options), whole)
    assert log(tmp_path, "loss") == losses
    assert not equal(whole, load_file(tmp_path / "checkpoint-3" / "model.safetensors"))


def count_waits(model, batch: dict) -> Counter:
    """By file and line how often a training step waits for the GPU, as CUDA tells."""
    for mode in ("default", "warn"):  # the first step warms up
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode(mode)
            try:
                model(**batch, **BOTH)["loss"].backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = Counter()
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            waits[f"{warning.filename}:{warning.lineno}"] += 1
    return waits


def test_a_training_step_waits_as_often_for_six_utterances_as_for_two(on_gpu, utterances):
    two = count_waits(on_gpu, collate(on_gpu, utterances[:2]))
    six = count_waits(on_gpu, collate(on_gpu, utterances[:6]))
    assert six == two
    ours = [place for place in six.elements() if Path(place).parent == ROOT]
    assert 1 <= len(ours) <= 3, ours
    print(f"waits in a training step: {six}")
