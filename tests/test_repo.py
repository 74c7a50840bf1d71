"""The demo's converters, and what README and docs say of the code."""

import ast
import re
import struct
from pathlib import Path

import tiny
import torch
import whisper
from transformers import HfArgumentParser

from arguments import RecognitionArguments, TrainingArguments
from demo import models, speech
from tools import prepare, score, serve, transcribe, upload, whisper_baseline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def write_ctranslate2(path, state, layers):
    """A Whisper state dict as CTranslate2 writes it: stacked attention weights, half floats."""
    names = {"encoder/conv1": "encoder.conv1", "encoder/conv2": "encoder.conv2"}
    names |= {"encoder/layer_norm": "encoder.ln_post", "decoder/layer_norm": "decoder.ln"}
    stacks = {}
    for side in ("encoder", "decoder"):
        for i in range(layers):
            ours, theirs = f"{side}.blocks.{i}", f"{side}/layer_{i}"
            names |= {f"{theirs}/ffn/layer_norm": f"{ours}.mlp_ln"}
            names |= {f"{theirs}/ffn/linear_{j}": f"{ours}.mlp.{2 * j}" for j in (0, 1)}
            names |= {f"{theirs}/self_attention/layer_norm": f"{ours}.attn_ln"}
            parts = [f"{ours}.attn.{part}" for part in ("query", "key", "value")]
            stacks |= {f"{theirs}/self_attention/linear_0": parts}
            names |= {f"{theirs}/self_attention/linear_1": f"{ours}.attn.out"}
    for i in range(layers):
        ours, theirs = f"decoder.blocks.{i}.cross_attn", f"decoder/layer_{i}/attention"
        names |= {f"{theirs}/layer_norm": f"{ours}_ln", f"{theirs}/linear_0": f"{ours}.query"}
        names |= {f"{theirs}/linear_2": f"{ours}.out"}
        stacks |= {f"{theirs}/linear_1": [f"{ours}.key", f"{ours}.value"]}
    variables = {
        "encoder/position_encodings/encodings": state["encoder.positional_embedding"],
        "decoder/position_encodings/encodings": state["decoder.positional_embedding"],
        "decoder/embeddings/weight": state["decoder.token_embedding.weight"],
    }
    stacks |= {theirs: [ours] for theirs, ours in names.items()}
    for theirs, parts in stacks.items():
        leaves = ("gamma", "beta") if "layer_norm" in theirs else ("weight", "bias")
        for leaf, kind in zip(leaves, ("weight", "bias")):
            zero = torch.zeros(len(state[f"{parts[0]}.weight"]))  # a key has no bias
            tensors = [state.get(f"{part}.{kind}", zero) for part in parts]
            variables[f"{theirs}/{leaf}"] = torch.cat(tensors)

    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    with open(path, "wb") as file:
        file.write(struct.pack("<I", 6) + string("WhisperSpec"))
        file.write(struct.pack("<II", 3, len(variables) + 1))
        file.write(string("decoder/num_heads") + struct.pack("<BBIh", 0, 2, 2, 1))
        for name, tensor in variables.items():
            file.write(string(name))
            file.write(struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape))
            data = tensor.half().numpy().tobytes()
            file.write(struct.pack("<BI", 4, len(data)) + data)
        file.write(struct.pack("<I", 0))


def test_a_ctranslate2_whisper_becomes_the_whisper_it_was(tmp_path):
    tiny.make_whisper(tmp_path / "tiny.pt", width=64)
    state = whisper.load_model(str(tmp_path / "tiny.pt")).state_dict()
    write_ctranslate2(tmp_path / "model.bin", state, layers=1)
    models.convert_whisper(tmp_path / "model.bin", tmp_path / "again.pt")
    again = whisper.load_model(str(tmp_path / "again.pt")).state_dict()
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name].float(), tensor.half().float()), name


def test_no_sentence_of_the_demo_is_in_two_sets():
    drawn = speech.sentences(seed=0)
    assert (len(drawn["train"]), len(drawn["test"])) == (1000, 100)
    different = {text for texts in drawn.values() for text in texts}
    assert len(different) == sum(map(len, drawn.values()))
    assert drawn == speech.sentences(seed=0) != speech.sentences(seed=1)
    words = {word for text in drawn["train"] for word in text.split()}
    assert words >= {word for text in drawn["test"] for word in text.split()}


def count_code_lines(path):
    """Lines that are no blank, comment or docstring."""
    source = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return len([n for n, x in lines if n not in docstrings and not re.match(r"\s*(#|$)", x)])


def test_readme_is_short_and_has_the_true_counts():
    counts = {path.name: count_code_lines(path) for path in ROOT.glob("*.py")}
    stated = re.findall(r"^\[(\w+\.py)\]\(.*?\) \| (\d+) \|", README, re.MULTILINE)
    assert {name: int(count) for name, count in stated} == counts
    assert f"in {sum(counts.values()):,} plain lines of Python" in README
    assert len(README.split()) <= 1300


def test_what_readme_and_docs_link_to_is_there():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = page.read_text(encoding="utf-8")
        named = {page.parent / link for link in re.findall(r"\]\((?!http)(.*?)\)", text)}
        folders = "bench|demo|docs|experiments|tests|tools"
        named |= {ROOT / path for path in re.findall(rf"\b(?:{folders})/\w+\.\w+", text)}
        for folder, module in re.findall(rf"-m ({folders})\.(\w+)", text):
            named.add(ROOT / folder / f"{module}.py")
        assert not [path for path in named if not path.exists()], page


def flags(arguments_class):
    return set(re.findall(r"--\w+", HfArgumentParser(arguments_class).format_help()))


def test_the_flags_in_readme_are_those_of_the_commands():
    known = {"train": flags(TrainingArguments), "recognize": flags(RecognitionArguments)}
    for module in (prepare, score, serve, transcribe, upload, whisper_baseline):
        known[module.__name__.removeprefix("tools.")] = flags(module.Arguments)
    text = README.replace("\\\n", " ")
    commands = re.findall(r"^(?:python|torchrun) .*?(?:tools\.(\w+)|(\w+)\.py) +(--.*)", text, re.M)
    assert len(commands) >= 6
    for tool, recipe, rest in commands:
        assert set(re.findall(r"--\w+", rest)) <= known[tool or recipe]
    assert set(re.findall(r"`(--\w+)`", README)) <= set().union(*known.values())
