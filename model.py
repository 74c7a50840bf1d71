"""The architecture: a frozen Whisper encoder, a trainable Conv1d projector, a frozen LLM.

Shapes: B utterances, W windows of an utterance, M mel bins, F mel frames of a window (100 a
second), E encoder positions (50 a second), C encoder width, A audio positions (E / stride), H the
projector's hidden width, D LLM width, T tokens, N hypotheses of a beam.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, LogitsProcessor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cache import Encoder
from command import InputError
from ctc import CTC_WEIGHT, PrefixScores, ctc_loss, drop_blanks, send
from data import IGNORE, Collator
from prompt import build_prompt

FORMAT = 5  # of projector files; raised when older code must not read newer files
ROWS = 8192  # of the embeddings that are looked at together


@dataclass
class Config:
    """What a projector file says beside its weights, which make no sense with anything else."""

    llm_model_name_or_path: str
    whisper_model_name_or_path: str
    prompt: str = "Repeat word for word:"
    stride: int = 5  # encoder positions (20 ms) that are joined into one audio position
    hidden_dim: int = 2048
    blank_threshold: float = 0.7  # audio at this cosine to a space or nearer is not shown
    ctc_sharpness: float = 14.0  # logit of a position that equals a typical embedding


class Projector(nn.Module):
    """Encoder output (B, E, C) -> audio (B, ceil(E / stride), D), as in WeST but of unit RMS."""

    def __init__(self, encoder_dim: int, llm_dim: int, hidden_dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(encoder_dim, encoder_dim, kernel_size=stride, stride=stride)
        self.hidden = nn.Linear(encoder_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, llm_dim)

    def forward(self, x: Tensor) -> Tensor:
        padding = -x.shape[1] % self.stride
        x = nn.functional.pad(x, (0, 0, 0, padding))
        x = self.conv(x.transpose(1, 2)).relu()  # (B, C, A)
        x = self.hidden(x.transpose(1, 2)).relu()  # (B, A, H)
        x = self.output(x)  # (B, A, D)
        return nn.functional.rms_norm(x, [self.output.out_features])


class SpeechLLM(nn.Module):
    """An LLM that reads speech within its prompt; only the projector learns.

    A batch is data.Collator's: labels (B, 1 + T), answers, mel, lengths.
    """

    accepts_loss_kwargs = True  # so that the Trainer passes num_items_in_batch

    def __init__(self, encoder: Encoder, llm: nn.Module, tokenizer, config: Config):
        super().__init__()
        self.encoder = encoder
        self.llm = llm.requires_grad_(False)
        self.tokenizer = tokenizer
        self.speech_config = config
        self.config = llm.config  # the Trainer asks for it, as its width is ZeRO's size of buckets
        self.activation_checkpointing_enable = llm.activation_checkpointing_enable
        self.register_load_state_dict_post_hook(expect_the_projector_alone)

        self.before, self.after, self.end_id = build_prompt(tokenizer, config.prompt)
        self.stop_ids = {self.end_id}  # what ends a hypothesis; `build` adds the LLM's own stops
        self.blank_id = tokenizer.encode(" ", add_special_tokens=False)[-1]
        llm_dim = llm.get_input_embeddings().embedding_dim
        self.projector = Projector(encoder.width, llm_dim, config.hidden_dim, config.stride)

    def embed_text(self, ids: list[int]) -> Tensor:
        """The LLM's input embeddings (T, D) of token ids."""
        # a call of the module: under ZeRO-3 only that gathers its weights
        return self.llm.get_input_embeddings()(send(torch.tensor(ids), self.llm.device))

    @cached_property
    def embedding_rms(self) -> float:
        """Of the embeddings as the LLM reads them, which in Gemma is not as they are stored."""
        vocabulary = range(self.llm.get_input_embeddings().num_embeddings)
        total = 0.0
        for start in vocabulary[::ROWS]:  # in float32 all of a large LLM's would fill gigabytes
            embedded = self.embed_text(vocabulary[start : start + ROWS]).float()
            total += embedded.square().mean(1).sum()
        return (total / len(vocabulary)).sqrt().item()

    @property
    def ctc_scale(self) -> float:
        """What makes the product of a typical embedding with itself `ctc_sharpness`."""
        width = self.llm.get_input_embeddings().embedding_dim
        return self.speech_config.ctc_sharpness / (self.embedding_rms**2 * width)

    def encode(self, mel: list[Tensor]) -> list[Tensor]:
        """Log-mels (W, M, F) -> encoder outputs (W * F / 2, C) of each utterance."""
        outputs = [None] * len(mel)
        for frames in {x.shape[2] for x in mel}:  # windows of one size go through it together
            indices = [i for i, x in enumerate(mel) if x.shape[2] == frames]
            windows = torch.cat([mel[i] for i in indices])
            encoded = self.encoder(windows)
            counts = [len(mel[i]) for i in indices]
            for i, x in zip(indices, encoded.split(counts)):
                outputs[i] = x.flatten(0, 1)
        return outputs

    def embed_audio(self, mel: list[Tensor], lengths: list[int]) -> list[Tensor]:
        """Audio (A, D) of each utterance, each position as long as a typical embedding."""
        encoded = [x[:length] for x, length in zip(self.encode(mel), lengths)]
        padded = pad_sequence(encoded, batch_first=True)  # (B, E, C)
        projected = self.projector(padded.to(self.projector.conv.bias.dtype))
        audio = []
        for x, length in zip(projected * self.embedding_rms, lengths):
            positions = math.ceil(length / self.projector.stride)
            audio.append(x[:positions])
        return audio

    def drop_blanks(self, audio: list[Tensor]) -> list[Tensor]:
        """What of the audio the LLM is shown."""
        blank = self.embed_text([self.blank_id])
        return drop_blanks(audio, blank, self.speech_config.blank_threshold)

    def build_inputs(self, audio: list[Tensor], answers: list[list[int]]) -> dict[str, Tensor]:
        """[prompt, audio, end of prompt, answer] as embeddings, padded on the left."""
        texts = [self.before]
        for answer in answers:
            texts.append(self.after + answer)
        # all in one call: under ZeRO-3 processes must call the embeddings equally often
        embedded = self.embed_text(list(chain(*texts)))
        before, *rest = embedded.split([len(text) for text in texts])
        rows, masks = [], []
        for speech, after in zip(audio, rest):
            row = torch.cat([before, speech.to(before.dtype), after])
            rows.append(row)
            masks.append(torch.ones(len(row), dtype=torch.long, device=row.device))
        return {
            "inputs_embeds": pad_sequence(rows, batch_first=True, padding_side="left"),
            "attention_mask": pad_sequence(masks, batch_first=True, padding_side="left"),
        }

    def ctc_loss(self, audio: list[Tensor], answers: list[list[int]], **options) -> Tensor:
        """CTC's loss (B,) of answers, less their blanks and ends."""
        targets = []
        for answer in answers:
            targets.append([i for i in answer if i != self.blank_id and i not in self.stop_ids])
        embeddings = self.llm.get_input_embeddings()
        return ctc_loss(audio, targets, embeddings, self.blank_id, self.ctc_scale, **options)

    def llm_loss(
        self, audio: list[Tensor], answers: list[list[int]], labels: Tensor, num_items
    ) -> Tensor:
        """The LLM's loss of the answers alone: their sum over `num_items`."""
        inputs = self.build_inputs(self.drop_blanks(audio), answers)
        positions = inputs["attention_mask"].cumsum(1) - 1
        # answers stand at the end of every row, so that nothing else needs logits; indices, as a
        # slice is not contiguous, and a CPU would copy the classifier B times
        keep = torch.arange(-labels.shape[1], 0, device=labels.device)
        output = self.llm(
            **inputs,
            position_ids=positions.clamp(min=0),
            labels=labels,
            logits_to_keep=keep,
            num_items_in_batch=num_items,
        )
        return output.loss

    def forward(
        self, labels, answers, mel, lengths, num_items_in_batch=None, ctc_weight=0.0, ctc_only=False
    ) -> dict[str, Tensor]:
        """Losses in nats a token: means over `num_items_in_batch` labels, or over the batch's own.

        In training the sum of the LLM's loss (not with `ctc_only`) and `ctc_weight` times CTC's,
        and these two. In evaluation the LLM's loss and the listening gap (B,).
        """
        audio = self.embed_audio(mel, lengths)
        num_items = num_items_in_batch
        if num_items is None:
            num_items = (labels != IGNORE).sum()
        if not self.training:
            loss = self.llm_loss(audio, answers, labels, num_items)
            return {
                "loss": loss,
                "listening_gap": self.listening_gap(audio, answers, labels, num_items, loss),
            }

        losses = {}
        loss = 0.0
        if ctc_weight > 0:
            ctc = self.ctc_loss(audio, answers, zero_infinity=True)
            losses["ctc_loss"] = ctc.sum() / num_items
            loss = loss + ctc_weight * losses["ctc_loss"]
        if not ctc_only:
            losses["llm_loss"] = self.llm_loss(audio, answers, labels, num_items)
            loss = loss + losses["llm_loss"]
        return {"loss": loss, **losses}

    def listening_gap(self, audio, answers, labels, num_items, loss: Tensor) -> Tensor:
        """What the loss rises by without the right audio, in nats a token: (B,), all the same.

        Each utterance is given the audio of the one before it. NaN in a batch of one.
        """
        # computed there, too: under ZeRO-3 processes must call the LLM equally often
        swapped = self.llm_loss(audio[-1:] + audio[:-1], answers, labels, num_items)
        gap = (swapped - loss) * num_items / (labels != IGNORE).sum()
        if len(audio) == 1:
            gap = gap * torch.nan
        return gap.expand(len(audio))

    @torch.no_grad()
    def generate(
        self,
        audio: list[Tensor],
        num_beams: int,
        max_new_tokens: int | None = None,
        ctc_weight: float = CTC_WEIGHT,
    ) -> list[list[int]]:
        """Token ids of the best hypothesis for each utterance, of `embed_audio`'s audio.

        Best is the sum of the LLM's log-probability and `ctc_weight` times CTC's.

        So that loops end, a hypothesis has at most as many tokens as the LLM reads positions from
        the audio on, or `max_new_tokens`, its end included; with CTC as many as the audio has
        positions, and an end.
        """
        heard = self.drop_blanks(audio)
        limits = [len(x) + len(self.after) for x in heard]
        processors = []
        if ctc_weight > 0:
            limits = [len(x) + 1 for x in audio]
            processors.append(self.score_by_ctc(audio, heard, num_beams, ctc_weight))
        if max_new_tokens is not None:
            limits = [max_new_tokens] * len(audio)
        processors.append(EndAtLimit(limits, num_beams, self.end_id, audio[0].device))
        inputs = self.build_inputs(heard, [[]] * len(heard))
        if num_beams > 1:
            inputs["cache"] = self.read_once(inputs, num_beams)
            inputs["length_penalty"] = 0.0  # by probability; its mean over tokens rewards loops
        rows = self.llm.generate(
            **inputs,
            num_beams=num_beams,
            max_new_tokens=max(limits),
            logits_processor=processors,
            pad_token_id=self.end_id,
        )
        answers = []
        for row, positions in zip(rows.tolist(), heard):
            answer = [i for i in row if i not in self.stop_ids]
            # an LLM that is shown no audio makes something up
            answers.append(answer if len(positions) else [])
        return answers

    def read_once(self, inputs: dict[str, Tensor], num_beams: int) -> Cache | None:
        """Keys and values of all positions but the last, which all beams of an utterance share.

        None for an LLM that keeps other states, as those of linear attention cannot be repeated.
        """
        embedded = inputs["inputs_embeds"][:, :-1]
        mask = inputs["attention_mask"][:, :-1]
        positions = mask.cumsum(1) - 1
        output = self.llm(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        kinds = {type(layer) for layer in getattr(output.cache, "layers", [])}
        if not kinds or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            return None
        output.cache.batch_repeat_interleave(num_beams)
        return output.cache

    def score_by_ctc(
        self, audio: list[Tensor], heard: list[Tensor], num_beams: int, weight: float
    ) -> PrefixScores:
        """CTC's part in a search, for audio and what the LLM is shown of it."""
        return PrefixScores(
            audio,
            heard,
            self.llm.get_input_embeddings(),
            self.blank_id,
            self.stop_ids,
            self.ctc_scale,
            num_beams,
            weight,
        )

    def collator(self, model_max_length: int | None = None) -> Collator:
        """The collator for this model, which allows no more positions than flag and LLM do."""
        name = "max_position_embeddings"
        room = getattr(self.llm.config, name, torch.inf)
        rope = getattr(self.llm.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            # beyond it one long row makes the LLM read all rows of its batch in another way
            name = f"original_{name}"
            room = rope[name]
        room -= len(self.before) + len(self.after)
        limit = f"the LLM's {name}, less the prompt: take another LLM"
        if model_max_length is not None and model_max_length <= room:
            room, limit = model_max_length, "--model_max_length: raise it"
        n_mels, stride = self.encoder.n_mels, self.projector.stride
        return Collator(self.tokenizer, self.end_id, n_mels, stride, room, limit)

    def save_projector(self, path: str | Path) -> None:
        """Write the projector's weights, with the config as metadata, as safetensors."""
        metadata = {"format": str(FORMAT)}
        for name, value in asdict(self.speech_config).items():
            metadata[name] = str(value)
        content = save(self.projector.state_dict(prefix="projector."), metadata)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)  # by Python, and so with the user's umask

    def load_projector(self, path: str | Path) -> None:
        weights = {}
        for name, tensor in load_file(path).items():
            weights[name.removeprefix("projector.")] = tensor
        try:
            self.projector.load_state_dict(weights)
        except RuntimeError as error:  # another LLM or encoder stands where it was trained with
            raise InputError(f"{path} does not fit its LLM and encoder: {error}") from error


class EndAtLimit(LogitsProcessor):
    """Hypotheses that have reached their limit, less one token, can only end."""

    def __init__(self, limits: list[int], num_beams: int, end_id: int, device: torch.device):
        of_each = send(torch.tensor(limits), device)
        self.limits = of_each.repeat_interleave(num_beams)[:, None]  # (B * N, 1)
        self.end_id = end_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        is_end = torch.arange(scores.shape[1], device=scores.device) == self.end_id
        may_go_on = input_ids.shape[1] < self.limits - 1
        return scores.where(is_end | may_go_on, -torch.inf)


def expect_the_projector_alone(module: nn.Module, keys) -> None:
    """A checkpoint is the projector: for the Trainer and DeepSpeed the rest is not missing."""
    keys.missing_keys.clear()
