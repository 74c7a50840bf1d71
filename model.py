"""The architecture: a frozen Whisper encoder, a trainable Conv1d projector, a frozen LLM.

Shapes: B utterances, W windows of an utterance, M mel bins, F mel frames of a window (100 a
second), E encoder positions (50 a second), C encoder width, A audio positions (E / stride), H the
projector's hidden width, D LLM width, T tokens.
"""

import time
import warnings
from functools import cached_property, partial
from pathlib import Path

import torch
import whisper
from accelerate import PartialState
from safetensors.torch import load_file, safe_open, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

# what to do with the audio behind it, and, a line each, examples: text that was repeated before
PROMPT = "Repeat word for word:\nshe went to the old house by the sea\nseven three nine\ngood night"
# metadata of a projector file: its format, to be raised when older code must not read newer files,
# the encoder positions that the projector joins, the width of its hidden layer, and the prompt
DEFAULTS = {"format": "4", "stride": "5", "hidden_dim": "2048", "prompt": PROMPT}
CTC_PIECES = 8192  # word pieces that the CTC loss always tells apart: the first are the most common
CTC_SHARPNESS = 14.0  # logit of a position that equals a typical embedding; no certainty far off it
BLANK_COSINE = 0.7  # audio nearer than this to the blank's embedding is not shown to the LLM
IGNORE = -100  # the label of a position without loss, as in transformers and torch


def run(main) -> None:
    """Call a command's main; what users cause, in a data worker, too, becomes a message.

    That is ValueError, ours and the libraries', what the system, an accelerator, another process or
    a missing package refuses, and Ctrl-C. Called without this, main has its traceback.
    """
    try:
        main()
        # gloo's threads need the interpreter to let their last tensor go, or abort the exit
        time.sleep(PartialState().num_processes > 1)
    except (ValueError, OSError, RuntimeError, ImportError, KeyboardInterrupt) as e:
        text = str(e).split("ValueError: ")[-1].strip() or repr(e)
        # torch.save's words for a full disk
        raise SystemExit(f"error: {text}{' (disk full?)' * ('unexpected pos' in text)}") from None


def choose_bf16(wanted: bool) -> bool:
    """Whether to compute in bfloat16: where it is wanted and this machine does not emulate it.

    A CPU without AVX512-BF16 or AMX does. oneDNN knows what DNNL_MAX_CPU_ISA leaves of them.
    """
    native = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if wanted and not (native or torch.accelerator.is_available()):
        warnings.warn(
            "this processor emulates bfloat16, which is about 100 times slower: "
            "computing in float32",
            stacklevel=2,
        )
        return False
    return wanted


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of `text` without those around a whole text; ▁ is a space that no template trims.

    Transcripts begin with one, so that a word has the same pieces wherever it stands.
    """
    return tokenizer.encode(text.replace("▁", " "), add_special_tokens=False)


def build_prompt(tokenizer, prompt: str) -> tuple[list[int], list[int], int]:
    """Token ids before the audio and after it, and the token that ends the answer.

    The first line of `prompt`, then the audio, are the user's turn in the tokenizer's chat
    template. Each further line was given in the audio's place, and repeated, in the turns before.
    ValueError from transformers where there is no template.
    """
    # Qwen3 must not think aloud, and Llama 3's system turn must not change from day to day
    fixed = {"tokenize": False, "enable_thinking": False, "date_string": "26 Jul 2024"}
    render = partial(tokenizer.apply_chat_template, **fixed)
    # the last is rendered by the template, and marks the audio's place, but is never tokenised
    task, *examples = [*prompt.split("\n"), "<|speech-goes-here|>"]
    # the user's and the assistant's in turn
    texts = [text for example in examples for text in (f"{task}\n▁{example}", f"▁{example}")]
    turns = [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(texts)]
    before, after = render(turns[:-1], add_generation_prompt=True).split(f"▁{examples[-1]}")
    ends = encode(tokenizer, render(turns).rsplit(examples[-1], 1)[1].strip())
    return encode(tokenizer, before), encode(tokenizer, after), [*ends, tokenizer.eos_token_id][0]


class Projector(nn.Module):
    """Encoder output (B, E, C) -> audio (B, ceil(E / stride), D), as in WeST but of unit RMS."""

    def __init__(self, encoder_dim: int, llm_dim: int, hidden_dim: int, stride: int):
        super().__init__()
        self.conv = nn.Conv1d(encoder_dim, encoder_dim, kernel_size=stride, stride=stride)
        self.hidden = nn.Linear(encoder_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, llm_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % self.conv.stride[0]))  # (B, A * stride, C)
        x = self.hidden(self.conv(x.transpose(1, 2)).relu().transpose(1, 2)).relu()  # (B, A, H)
        # (B, A, D); the width comes from the layer, as under ZeRO-3 its weights have no shape
        return nn.functional.rms_norm(self.output(x), [self.output.out_features])


class SpeechLLM(nn.Module):
    """An LLM that reads speech within its prompt; only the projector learns.

    A batch is data.collate's: encoder_lengths (B,), the true lengths in encoder positions; mel, a
    list of each utterance's windows (W, M, F); labels (B, 1 + T), the answers, padded on the left
    by one IGNORE at least, as a label is predicted from the position before.
    """

    def __init__(self, encoder: nn.Module, llm: nn.Module, tokenizer, settings: dict[str, str]):
        super().__init__()
        self.before, self.after, self.end_id = build_prompt(tokenizer, settings["prompt"])
        # the blank is the token that audio without speech is to be like
        self.settings, self.tokenizer, self.blank = settings, tokenizer, encode(tokenizer, " ")[-1]
        # no submodule, as ZeRO would shard it: each process calls it as often as its audio needs
        self.__dict__["encoder"] = encoder.requires_grad_(False)
        # the Trainer asks for the config, as its width is ZeRO's size of buckets
        self.llm, self.config = llm.requires_grad_(False), llm.config
        # 80 mel bins, or 128 from large-v3 on
        n_mels, encoder_dim = encoder.conv1.in_channels, encoder.conv1.out_channels
        stride, llm_dim = int(settings["stride"]), llm.get_input_embeddings().embedding_dim
        self.projector = Projector(encoder_dim, llm_dim, int(settings["hidden_dim"]), stride)
        # a checkpoint is the projector: the rest is not missing
        self.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())
        self.activation_checkpointing_enable = llm.activation_checkpointing_enable
        stops = torch.tensor(llm.generation_config.eos_token_id or []).flatten().tolist()
        # no sampling, no penalties of a chat
        llm.generation_config = GenerationConfig(eos_token_id=[int(self.end_id), *stops])
        # what data.collate is to know
        self.collation = dict(tokenizer=tokenizer, end_id=self.end_id, stride=stride, n_mels=n_mels)
        # positions for the audio and what follows it
        self.room = getattr(llm.config, "max_position_embeddings", torch.inf) - len(self.before)

    @cached_property
    def rms(self) -> float:
        """Of the embeddings as the LLM reads them, which in Gemma is not as they are stored."""
        # a call of the module, here and elsewhere, as under ZeRO-3 only that gathers its weights
        ids = torch.arange(self.llm.config.vocab_size, device=self.llm.device)
        return float(self.llm.get_input_embeddings()(ids).square().mean(dtype=torch.float32)) ** 0.5

    @cached_property
    def prompt_layers(self) -> list:
        """Keys and values of the tokens before the audio, which are the same in every batch."""
        ids = torch.tensor([self.before], device=self.llm.device)
        return self.llm(ids, use_cache=True).cache.layers  # the Trainer says no cache

    def project(self, encoder_lengths, mel, **_) -> tuple[Tensor, Tensor]:
        """Audio (B, A, D), each position as long as a typical embedding, and true lengths (B,)."""
        encoder, outputs = self.encoder.to(encoder_lengths.device), {}
        for frames in {x.shape[2] for x in mel}:  # windows of one size at once
            windows = torch.cat([x for x in mel if x.shape[2] == frames]).to(self.llm.dtype)
            # Whisper's encoder is made for 30 s, but its positions are sines, and end anywhere
            positions = {"positional_embedding": encoder.positional_embedding[: frames // 2]}
            outputs[frames] = iter(torch.func.functional_call(encoder, positions, windows))
        # each utterance takes its own from those of their size, which are in its order: (E, C)
        joined = [torch.cat([next(outputs[x.shape[2]]) for _ in x]) for x in mel]
        encoded = nn.utils.rnn.pad_sequence([x[:n] for x, n in zip(joined, encoder_lengths)], True)
        audio = self.rms * self.projector(encoded.to(self.projector.conv.bias))
        return audio, -(-encoder_lengths // self.projector.conv.stride[0])

    def ctc_loss(self, audio: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """CTC losses (B,) of labels (B, T), with the LLM's embeddings as classifier of audio.

        So audio moves to the embedding of the word piece spoken in it. Audio is (B, A, D), or one
        for all labels. The loss of more labels than there are positions (or as many, with one
        doubled) is infinite, or zero in training.
        """
        targets = [x[(x != IGNORE) & (x != self.end_id) & (x != self.blank)] for x in labels]
        sizes = lengths.new_tensor([len(ids) for ids in targets])
        n = min(CTC_PIECES, self.llm.config.vocab_size)
        ids = [torch.arange(n, device=audio.device), sizes.new_tensor([self.blank]), *targets]
        pieces, ids = torch.cat(ids).unique(return_inverse=True)  # (P,), and each id's place in it
        rows = self.llm.get_input_embeddings()(pieces)  # (P, D)
        logits = audio.to(rows.dtype) @ rows.T * (CTC_SHARPNESS / self.rms**2 / rows.shape[1])
        # (A, B, P)
        log_p = logits.float().log_softmax(-1).transpose(0, 1).expand(-1, len(labels), -1)
        return nn.CTCLoss(int(ids[n]), "none", self.training)(log_p, ids[n + 1 :], lengths, sizes)

    def splice(self, audio: Tensor, lengths: Tensor, labels: Tensor, beams: int = 1) -> dict:
        """The LLM's input, padded on the left: prompt, audio less its blanks, and answer.

        What is before the audio is in a cache, for `beams` times B rows, where one is allowed.
        """
        # gradient checkpointing allows none, nor does a state that is more than keys and values
        cached = not (self.llm.is_activation_checkpointing or self.llm._is_stateful)
        start, past = (len(self.before), self.prompt_layers) if cached else (0, [])
        kv = [[x.expand(len(audio) * beams, -1, -1, -1) for x in (y.keys, y.values)] for y in past]
        tails = [torch.cat([labels.new_tensor(self.after), x[x != IGNORE]]) for x in labels]
        ids = [labels.new_tensor([self.blank]), labels.new_tensor(self.before[start:]), *tails]
        text = self.llm.get_input_embeddings()(torch.cat(ids)).split([len(x) for x in ids])
        speech = nn.functional.cosine_similarity(audio, text[0], dim=-1) < BLANK_COSINE  # (B, A)
        parts = zip(audio.to(text[0].dtype), speech, lengths, text[2:])
        rows = [torch.cat([text[1], x[:n][kept[:n]], tail]) for x, kept, n, tail in parts]
        mask = nn.utils.rnn.pad_sequence([labels.new_ones(len(x)) for x in rows], True, 0, "left")
        mask = nn.functional.pad(mask, (start, 0), value=1)  # is of the cache as well
        inputs = {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, start:] - 1}
        inputs["inputs_embeds"] = nn.utils.rnn.pad_sequence(rows, True, 0, "left")
        return inputs | {"cache": DynamicCache(kv, config=self.llm.config) if cached else None}

    def forward(self, labels, num_items_in_batch=None, ctc=0.0, ctc_alone=False, **batch):
        """The LLM's loss, of the answers alone, and `ctc` times the CTC loss, in nats a label.

        A mean over `num_items_in_batch` labels (all of an optimizer's step), or else over its own.
        When not training there is also the listening gap (B,), the same in each place: the loss
        with each utterance's audio taken from the one before it in the batch, less the loss.
        """
        audio, lengths = self.project(**batch)
        items = num_items_in_batch or (labels != IGNORE).sum()
        loss = ctc and ctc * self.ctc_loss(audio, lengths, labels).sum() / items
        if not ctc_alone:
            # indices, as a slice is not contiguous: for it a CPU would copy the classifier B times
            keep = torch.arange(-labels.shape[1], 0, device=labels.device)
            options = {"labels": labels, "num_items_in_batch": items, "logits_to_keep": keep}
            loss = loss + self.llm(**self.splice(audio, lengths, labels), **options).loss
        if self.training:
            return {"loss": loss}
        swapped = self.splice(audio.roll(1, 0), lengths.roll(1, 0), labels)
        gap = (self.llm(**swapped, **options).loss - loss) * items / (labels != IGNORE).sum()
        return {"loss": loss, "listening_gap": gap.expand(len(labels))}

    @torch.no_grad()
    def generate(self, beams: int, top: int = 0, **batch) -> Tensor:
        """New token ids (B, T), filled up with `end_id`.

        Of a beam's hypotheses the best by the product of the LLM's probability and CTC's: an LLM
        likes to leave out words, and CTC misses each. None has more tokens, its end included, than
        `top`, or with 0 than there are positions of audio and of the prompt after it: so loops end.
        """
        audio, lengths = self.project(**batch)
        inputs = self.splice(audio, lengths, batch["labels"][:, :0], beams)
        mask, rows = inputs["attention_mask"], inputs["inputs_embeds"]
        # generate() wants a place for what is in the cache
        inputs["inputs_embeds"] = nn.functional.pad(rows, (0, 0, mask.shape[1] - rows.shape[1], 0))
        # the most tokens of each hypothesis, (B * beams, 1), or of all
        top = torch.asarray(top or mask.repeat_interleave(beams, 0).sum(1, True) - len(self.before))
        end = torch.arange(self.llm.config.vocab_size, device=mask.device) == self.end_id
        limit = [lambda x, scores: scores.where(end | (x.shape[1] < top - 1), -torch.inf)]
        beam = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": int(top.max())}
        # by probability; the usual mean of a token's rewards loops
        beam |= {"length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
        out = self.llm.generate(**inputs, **beam, logits_processor=limit, pad_token_id=self.end_id)
        tokens = out.sequences.unflatten(0, (-1, beams))  # (B, beams, T)
        ctc = [self.ctc_loss(audio[[i]], lengths[[i] * beams], x) for i, x in enumerate(tokens)]
        # a greedy hypothesis has no score, and needs none
        scores = out.get("sequences_scores", lengths).view(-1, beams) - torch.stack(ctc)
        return tokens[range(len(ctc)), scores.argmax(1)]

    def save_projector(self, path: str | Path) -> None:
        """Write the projector's weights, with the settings as metadata, as safetensors."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # by Python, and so with the user's umask
        Path(path).write_bytes(save(self.projector.state_dict(prefix="projector."), self.settings))


def load(projector_model_path=None, bf16=False, attention=None, **given):
    """A SpeechLLM, on the CPU, or under ZeRO-3 with its LLM sharded.

    Of a command's arguments, `given`, these count: llm_model_name_or_path (for transformers' Auto
    classes), whisper_model_name_or_path (a name of openai-whisper's or a .pt file), stride and
    prompt. What is missing or None is the projector file's, or else the default. ValueError where
    they differ; but a model may have moved: the last part of its path must be the same. Attention
    is the LLM's implementation, or None for the default of transformers.
    """
    path, what = projector_model_path, None
    dtype = torch.bfloat16 if choose_bf16(bf16) else torch.float32
    given = {k: str(x) for k, x in given.items() if x and ("_name_or_path" in k or k in DEFAULTS)}
    try:
        saved = (safe_open(what := path, "pt").metadata() or {}) if path else {}
        for key, value in {"format": DEFAULTS["format"], **given}.items():
            part = (lambda x: Path(x).name.removesuffix(".pt")) if "path" in key else str
            if path and part(saved.get(key, "")) != part(value):
                raise ValueError(f"{path} is for {key} {saved.get(key)!r}, not {value!r}")
        spec = {**DEFAULTS, **saved, **given}
        with PartialState().local_main_process_first():  # one process downloads
            encoder = whisper.load_model(what := spec["whisper_model_name_or_path"], "cpu").encoder
        tokenizer = AutoTokenizer.from_pretrained(what := spec["llm_model_name_or_path"])
        llm = AutoModelForCausalLM.from_pretrained(what, dtype=dtype, attn_implementation=attention)
        model = SpeechLLM(encoder, llm, tokenizer, spec)
        if path:
            nn.ModuleDict({"projector": model.projector}).load_state_dict(load_file(what := path))
    except Exception as error:
        raise ValueError(f"cannot load {what}: {error!r} (projector: {path})") from error
    return model
