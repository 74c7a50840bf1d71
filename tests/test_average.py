"""tools/average.py: one projector of several."""

import pytest
import torch
from safetensors.torch import load_file

from command import InputError
from loading import build, load, read_config
from model import Config
from tools import average


def write_checkpoint(folder, paths, seed: int, **settings):
    """A folder with a random projector, as train.py writes it."""
    torch.manual_seed(seed)
    build(Config(paths.qwen, paths.whisper, **settings)).save_projector(
        folder / "model.safetensors"
    )
    return str(folder)


def run(output, *checkpoints):
    average.main(["--output_path", str(output), "--projector_model_paths", *checkpoints])


def test_an_average_is_the_mean_of_its_projectors_and_keeps_their_metadata(paths, tmp_path):
    folders = []
    for seed in range(3):
        folders.append(write_checkpoint(tmp_path / f"checkpoint-{seed}", paths, seed))
    files = [f"{folder}/model.safetensors" for folder in folders]
    run(tmp_path / "new" / "average.safetensors", *folders[:2], files[2])
    output = tmp_path / "new" / "average.safetensors"
    assert average.read_metadata(output) == average.read_metadata(files[0])
    assert read_config(str(output)) == read_config(files[0])
    weights = [load_file(file) for file in files]
    for name, tensor in load_file(output).items():
        expected = torch.stack([x[name].double() for x in weights]).mean(0)
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-7)


def test_an_average_in_float16_has_half_the_size_and_loads(paths, tmp_path):
    folders = [write_checkpoint(tmp_path / f"{seed}", paths, seed) for seed in range(2)]
    run(tmp_path / "full.safetensors", *folders)
    run(tmp_path / "half.safetensors", *folders, "--half", "True")
    full, half = (load_file(tmp_path / f"{name}.safetensors") for name in ("full", "half"))
    for name, tensor in half.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.float(), full[name], rtol=1e-3, atol=1e-7)
    model = load(str(tmp_path / "half.safetensors"))
    assert model.projector.conv.weight.dtype == torch.float32


def test_projectors_of_different_trainings_are_refused(paths, tmp_path):
    first = write_checkpoint(tmp_path / "first", paths, 0)
    other = write_checkpoint(tmp_path / "other", paths, 0, prompt="Say:")
    output = tmp_path / "average.safetensors"
    with pytest.raises(InputError, match="other.* has prompt 'Say:', but .*first.*'Repeat"):
        run(output, first, other)
    with pytest.raises(InputError, match="no such file: .*third"):
        run(output, first, str(tmp_path / "third"))
    with pytest.raises(InputError, match="must be two or more, got 1"):
        run(output, first)
    with pytest.raises(InputError, match="would replace .*other.*, which is averaged"):
        run(f"{other}/model.safetensors", first, other)
    assert not output.exists()


def test_projectors_of_other_shapes_are_refused(paths, tmp_path):
    first = write_checkpoint(tmp_path / "first", paths, 0)
    moved = tmp_path / "moved"
    moved.mkdir()
    weights = load_file(f"{first}/model.safetensors")
    weights["projector.output.bias"] = torch.zeros(7)
    metadata = average.read_metadata(f"{first}/model.safetensors")
    average.write_projector(moved / "model.safetensors", weights, metadata)
    with pytest.raises(InputError, match=r"moved.* has projector.output.bias \[7\], but .*\[128\]"):
        run(tmp_path / "average.safetensors", first, str(moved))
