"""The architecture: a frozen Whisper encoder, a trainable Conv1d projector, a frozen LLM.

Shapes: B utterances, W windows of an utterance, M mel bins, F mel frames of a window (100 a
second), E encoder positions (50 a second), C encoder width, A audio positions (E / stride), D LLM
width, T tokens.
"""

import math
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
PROMPT = "Repeat the following text:"  # stands before the audio
CTC_PIECES = 8192  # word pieces that the CTC loss always tells apart: the first are the most common
CTC_SHARPNESS = 14.0  # logit of a position that equals a typical embedding; no certainty far off it
BLANK_COSINE = 0.7  # audio nearer than this to the blank's embedding is not shown to the LLM
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
    """An LLM that reads speech between `before` and `after`; only the projector learns.

    A batch is data.Collator's: encoder_lengths (B,), the true lengths in encoder positions; mel, a
    list of each utterance's windows (W, M, F); before (T,), and after, a list of each utterance's
    (T,), token ids that stand before and after the audio; in training, labels (B, T), the answers
    at the right edge, and transcripts, a list of each utterance's ids (T,) for the CTC loss.
    """

    def __init__(self, encoder: nn.Module, llm: nn.Module, settings: dict[str, str], blank: int):
        super().__init__()
        self.settings = settings
        self.blank = blank  # id of the token that audio without speech becomes
        self.encoder = encoder.requires_grad_(False)
        self.n_mels = encoder.conv1.in_channels  # 80, or 128 from large-v3 on
        self.positions = encoder.positional_embedding  # (1500, C), of 30 s
        self.llm = llm.requires_grad_(False)
        embeddings = llm.get_input_embeddings().weight  # (vocabulary, D)
        self.rms = float(embeddings.norm(dtype=torch.float32)) / math.sqrt(embeddings.numel())
        dims = encoder.ln_post.normalized_shape[0], embeddings.shape[1]
        self.projector = Projector(*dims, int(settings["hidden_dim"]), int(settings["stride"]))
        self.activation_checkpointing_enable = llm.activation_checkpointing_enable
        stop = llm.generation_config.eos_token_id
        self.stop_ids = [stop] if isinstance(stop, int) else stop or []
        llm.generation_config = GenerationConfig()  # no sampling, no repetition penalty of a chat

    @torch.no_grad()
    def encode(self, encoder_lengths: Tensor, mel: list[Tensor]) -> Tensor:
        """Log-mel windows -> encoder output (B, E, C), zero beyond each length.

        Windows of one size are encoded together, so that no result depends on the rest of a batch.
        """
        encoded = {}
        for size in {windows.shape[-1] for windows in mel}:
            rows = [i for i, windows in enumerate(mel) if windows.shape[-1] == size]
            self.encoder.positional_embedding = self.positions[: size // 2]
            # the float32 weights of Whisper's layers follow their input's dtype
            batch = self.encoder(torch.cat([mel[i] for i in rows]).to(self.llm.dtype))
            encoded |= zip(rows, batch.split([len(mel[i]) for i in rows]))
        lengths = enumerate(encoder_lengths.tolist())
        return pad_sequence([encoded[i].flatten(0, 1)[:n] for i, n in lengths], batch_first=True)

    def project(self, encoder_lengths: Tensor, mel: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Audio (B, A, D), each position as long as a typical embedding, and true lengths (B,)."""
        encoded = self.encode(encoder_lengths, mel).to(self.projector.conv.weight.dtype)
        audio = self.projector(encoded)
        audio = self.rms * F.rms_norm(audio, audio.shape[-1:])
        return audio, -(-encoder_lengths // self.projector.stride)

    def ctc_loss(self, audio: Tensor, lengths: Tensor, transcripts: list[Tensor]) -> Tensor:
        """CTC losses (B,) of audio against transcripts, with the LLM's embeddings as classifier.

        So audio moves to the embedding of the word piece spoken in it. The loss is zero where a
        transcript has more tokens than its audio has positions.
        """
        targets = [ids[ids != self.blank] for ids in transcripts]
        common = torch.arange(min(CTC_PIECES, self.llm.config.vocab_size), device=audio.device)
        pieces = torch.cat([common, *targets, lengths.new_tensor([self.blank])]).unique()
        rows = self.llm.get_input_embeddings()(pieces)  # (P, D)
        logits = audio.to(rows.dtype) @ rows.T * (CTC_SHARPNESS / self.rms**2 / rows.shape[1])
        log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # (A, B, P)
        target_lengths = lengths.new_tensor([len(ids) for ids in targets])
        targets = torch.searchsorted(pieces, torch.cat(targets))
        options = {"blank": int(torch.searchsorted(pieces, self.blank)), "zero_infinity": True}
        return F.ctc_loss(log_probs, targets, lengths, target_lengths, reduction="none", **options)

    def splice(self, audio: Tensor, lengths: Tensor, before, after) -> dict[str, Tensor]:
        """The LLM's input, padded on the left: embeddings of text and audio, less its blanks."""
        ids = [before, *after, before.new_tensor([self.blank])]
        text = self.llm.get_input_embeddings()(torch.cat(ids)).split([len(x) for x in ids])
        speech = F.cosine_similarity(audio, text[-1], dim=-1) < BLANK_COSINE  # (B, A)
        rows = []
        for x, kept, n, tail in zip(audio.to(text[0].dtype), speech, lengths, text[1:-1]):
            rows.append(torch.cat([text[0], x[:n][kept[:n]], tail]))
        masks = [row.new_ones(len(row), dtype=torch.long) for row in rows]
        inputs = {"inputs_embeds": rows, "attention_mask": masks}
        return {key: pad_sequence(x, True, padding_side="left") for key, x in inputs.items()}

    def forward(self, labels, num_items_in_batch=None, ctc_weight=0.0, ctc_alone=False, **batch):
        """The LLM's loss, of the answers alone, and with `ctc_weight` or `ctc_alone` the CTC loss.

        Each is a mean over `num_items_in_batch` labels (all of an optimizer's step), or its own.
        """
        audio, lengths = self.project(batch["encoder_lengths"], batch["mel"])
        items = num_items_in_batch or (labels != IGNORE).sum()
        out = {"loss": 0.0}
        if ctc_weight:
            losses = self.ctc_loss(audio, lengths, batch["transcripts"])
            out = {"ctc_loss": losses.sum() / items, "ctc_skipped": (losses == 0).sum()}
            out["loss"] = ctc_weight * out["ctc_loss"]
        if not ctc_alone:
            inputs = self.splice(audio, lengths, batch["before"], batch["after"])
            options = {"logits_to_keep": labels.shape[1], "use_cache": False}
            llm = self.llm(**inputs, labels=labels, num_items_in_batch=items, **options)
            out |= {"llm_loss": llm.loss, "loss": out["loss"] + llm.loss}
        return out

    def generate(self, end_id: int, beam: dict, encoder_lengths, mel, before, after) -> Tensor:
        """New token ids (B, T), filled up with `end_id`; `beam` is options of generate()."""
        inputs = self.splice(*self.project(encoder_lengths, mel), before, after)
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
    blank = tokenizer.encode(" ", add_special_tokens=False)[-1]
    model = SpeechLLM(encoder, llm, settings, blank)
    if projector_model_path:
        model.load_projector(projector_model_path)
    return model, tokenizer
