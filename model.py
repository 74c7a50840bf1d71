"""The architecture: a frozen Whisper encoder, a trainable Conv1d projector, a frozen LLM.

Shapes: B utterances, W windows of 30 s, M mel bins, F = 3000 mel frames a window, E encoder
positions (50 a second), C encoder width, A audio positions (E / stride), D LLM width, T tokens.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import whisper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

HIDDEN_DIM = 2048  # width of the projector's hidden layer
STRIDE = 5  # encoder positions that the projector joins
PROMPT = "Transcribe the speech."
# metadata of a projector file; the format is to be raised when older code must not read newer files
DEFAULTS = {"format": "1", "stride": str(STRIDE), "hidden_dim": str(HIDDEN_DIM), "prompt": PROMPT}
IGNORE = -100  # the label of a position without loss, as in transformers and torch


class InputError(ValueError):
    """What a user can cause and mend."""


def run(main) -> None:
    """Call a command's main; an InputError, a data worker's too, becomes one line on stderr."""
    try:
        main()
    except InputError as error:
        sys.exit(f"{sys.argv[0]}: {str(error).rsplit('InputError: ', 1)[-1].strip()}")


class Projector(nn.Module):
    """Encoder output (B, E, C) -> audio embeddings (B, ceil(E / stride), D), as in WeST."""

    def __init__(self, encoder_dim: int, llm_dim: int, hidden_dim=HIDDEN_DIM, stride=STRIDE):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(encoder_dim, encoder_dim, kernel_size=stride, stride=stride)
        self.hidden = nn.Linear(encoder_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, llm_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.stride))  # (B, A * stride, C)
        x = F.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)  # (B, A, C)
        return self.output(F.relu(self.hidden(x)))  # (B, A, D)


class SpeechLLM(nn.Module):
    """An LLM that reads speech at the True positions of `audio_mask`; only the projector learns.

    A batch is data.Collator's: input_ids, attention_mask, audio_mask, labels (B, T), padded on the
    left; mel (W, M, F), the windows of all utterances in order; encoder_lengths (B,), their true
    lengths in encoder positions.
    """

    def __init__(self, encoder: nn.Module, llm: nn.Module, settings: dict[str, str]):
        super().__init__()
        self.settings = settings
        self.encoder = encoder.requires_grad_(False)
        self.n_mels = encoder.conv1.in_channels  # 80, or 128 from large-v3 on
        dims = encoder.ln_post.normalized_shape[0], llm.get_input_embeddings().embedding_dim
        self.projector = Projector(*dims, int(settings["hidden_dim"]), int(settings["stride"]))
        self.llm = llm.requires_grad_(False)
        self.activation_checkpointing_enable = llm.activation_checkpointing_enable
        stop = llm.generation_config.eos_token_id
        self.stop_ids = [stop] if isinstance(stop, int) else stop or []
        llm.generation_config = GenerationConfig()  # no sampling, no repetition penalty of a chat

    @torch.no_grad()
    def encode(self, mel: Tensor, encoder_lengths: Tensor) -> Tensor:
        """Log-mel windows (W, M, F) -> encoder output (B, E, C), zero beyond each length."""
        # the float32 weights of Whisper's layers follow their input's dtype
        windows = self.encoder(mel.to(self.llm.dtype))  # (W, 1500, C)
        lengths = encoder_lengths.tolist()
        counts = [-(-length // windows.shape[1]) for length in lengths]
        utterances = [part.flatten(0, 1) for part in windows.split(counts)]
        return pad_sequence([x[:n] for x, n in zip(utterances, lengths)], batch_first=True)

    def embed(self, input_ids, audio_mask, mel, encoder_lengths) -> Tensor:
        """Token embeddings (B, T, D) with the projected audio spliced in."""
        encoded = self.encode(mel, encoder_lengths).to(self.projector.conv.weight.dtype)
        audio = self.projector(encoded)  # (B, A, D)
        audio = torch.cat([x[:n] for x, n in zip(audio, audio_mask.sum(1))])  # (B * its A, D)
        tokens = self.llm.get_input_embeddings()(input_ids)  # (B, T, D)
        return tokens.masked_scatter(audio_mask[..., None], audio.to(tokens.dtype))

    def forward(self, attention_mask, labels, num_items_in_batch=None, **speech):
        """The LLM's output; `loss` is of the answers, which end at the batch's right edge.

        A mean over `num_items_in_batch` labels (all of an optimizer's step), or else over its own.
        """
        n = int((labels != IGNORE).any(0).sum()) + 1  # the position before an answer predicts it
        inputs = {"inputs_embeds": self.embed(**speech), "attention_mask": attention_mask}
        target = {"labels": labels[:, -n:], "num_items_in_batch": num_items_in_batch}
        return self.llm(**inputs, **target, logits_to_keep=n, use_cache=False)

    def generate(self, attention_mask, end_id: int, beam: dict, **speech) -> Tensor:
        """New token ids (B, T), filled up with `end_id`; `beam` is options of generate()."""
        inputs = {"inputs_embeds": self.embed(**speech), "attention_mask": attention_mask}
        ends = {"eos_token_id": [end_id, *self.stop_ids], "pad_token_id": end_id}
        return self.llm.generate(**inputs, **ends, **beam)

    def save_projector(self, path: Path) -> None:
        """Write the projector's weights, with the settings as metadata, as safetensors."""
        part = Path(f"{path}.part")  # written by Python, and so with the user's umask
        part.write_bytes(save(self.projector.state_dict(prefix="projector."), self.settings))
        part.replace(path)

    def load_projector(self, path: Path) -> None:
        """Read the projector's weights; InputError where they are not for these models."""
        read_settings(path, self.settings)
        try:
            nn.ModuleDict({"projector": self.projector}).load_state_dict(load_file(path))
        except RuntimeError as error:
            raise InputError(f"{path} does not fit these models: {error}") from error


def read_settings(path: Path, wanted: dict[str, str]) -> dict[str, str]:
    """The settings in a projector file; InputError where it is none, or `wanted` differs.

    A model may have moved: only the last part of its path, without ".pt", must be the same.
    """
    try:
        with safe_open(path, "pt") as file:
            settings = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as a projector file: {error}") from error
    if settings.get("format") != DEFAULTS["format"]:
        raise InputError(f"{path} is no projector file of this version of train.py")
    for key in wanted.keys() & settings.keys():
        part = (lambda x: Path(x).name.removesuffix(".pt")) if key.endswith("path") else str
        if part(wanted[key]) != part(settings[key]):
            got = f"--{key} is {wanted[key]!r}, but {path} was trained with"
            raise InputError(f"{got} {settings[key]!r}; leave that option out, or train for it")
    return settings


def load(projector_model_path=None, dtype=torch.float32, **given):
    """A SpeechLLM, on the CPU, and the tokenizer of its LLM.

    `given` are llm_model_name_or_path (for transformers' Auto classes), whisper_model_name_or_path
    (a name of openai-whisper's or a .pt file), stride and prompt. What is None is the projector
    file's, or else the default.
    """
    given = {key: str(value) for key, value in given.items() if value is not None}
    saved = read_settings(projector_model_path, given) if projector_model_path else {}
    settings = {**DEFAULTS, **saved, **given}
    for key in {"llm_model_name_or_path", "whisper_model_name_or_path"} - settings.keys():
        raise InputError(f"--{key} is needed where there is no projector file that names it")
    # on a CPU in bfloat16, eager attention trains 1.4 times as fast as torch's own
    eager = dtype == torch.bfloat16 and not torch.accelerator.is_available()
    options = {"dtype": dtype, "attn_implementation": "eager" if eager else None}
    try:
        encoder = whisper.load_model(settings["whisper_model_name_or_path"], "cpu").encoder
        tokenizer = AutoTokenizer.from_pretrained(settings["llm_model_name_or_path"])
        llm = AutoModelForCausalLM.from_pretrained(settings["llm_model_name_or_path"], **options)
    except (OSError, RuntimeError, ValueError) as error:
        got = "what --llm_model_name_or_path or --whisper_model_name_or_path names cannot be loaded"
        raise InputError(f"{got}: {error}") from error
    model = SpeechLLM(encoder, llm, settings)
    if projector_model_path:
        model.load_projector(projector_model_path)
    return model, tokenizer
