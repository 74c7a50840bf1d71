"""The data flow of the published recipe, WeST's, which bench/speed.py compares with.

30 s of mel for every utterance, the encoder in every step, 300 positions of audio in front of the
chat, all padded to 512 positions, logits for each.

Shapes: B utterances, M mel bins, F mel frames, T tokens, D width of the LLM.
"""

import torch
from torch import Tensor, nn
from whisper.audio import log_mel_spectrogram, pad_or_trim

from data import IGNORE
from manifest import Utterance
from model import SpeechLLM

POSITIONS, AUDIO_POSITIONS = 512, 300  # in all, and of audio


class Reference(nn.Module):
    """The recipe's flow, with the modules of a SpeechLLM."""

    def __init__(self, ours: SpeechLLM):
        super().__init__()
        self.encoder = ours.encoder.module
        self.projector = ours.projector
        self.llm = ours.llm
        self.llm.set_attn_implementation("sdpa")  # the default of transformers
        self.tokenizer = ours.tokenizer

    def collate(self, utterances: list[Utterance]) -> dict[str, Tensor]:
        """mel (B, M, F); ids (B, T) of the chats, padded; ask (B, T) of the chats to answer."""
        mel, chats = [], []
        for utterance in utterances:
            window = pad_or_trim(utterance.load())
            mel.append(log_mel_spectrogram(window, self.encoder.conv1.in_channels))
            chat = [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "Transcribe the speech"},
                {"role": "assistant", "content": utterance.text},
            ]
            chats.append(chat)
        ids = self.tokenizer.apply_chat_template(
            chats,
            return_dict=False,
            padding="max_length",
            truncation=True,
            max_length=POSITIONS - AUDIO_POSITIONS,
        )
        ask = self.tokenizer.apply_chat_template(
            [chat[:2] for chat in chats],
            return_dict=False,
            add_generation_prompt=True,
        )
        return {"mel": torch.stack(mel), "ids": torch.tensor(ids), "ask": torch.tensor(ask)}

    def embed(self, mel: Tensor, ids: Tensor) -> Tensor:
        """The audio's 300 positions, then the text's: (B, 300 + T, D)."""
        with torch.no_grad():
            encoded = self.encoder(mel.to(self.llm.dtype))
        audio = self.projector(encoded.to(self.projector.conv.bias.dtype))
        text = self.llm.get_input_embeddings()(ids)
        return torch.cat([audio.to(text.dtype), text], dim=1)

    def forward(self, mel: Tensor, ids: Tensor, ask: Tensor):
        audio = ids.new_ones(len(ids), AUDIO_POSITIONS)
        is_text = ids != self.tokenizer.pad_token_id
        mask = torch.cat([audio, is_text], dim=1)
        text_labels = ids.where(is_text, IGNORE)
        labels = torch.cat([audio * IGNORE, text_labels], dim=1)
        inputs = self.embed(mel, ids)
        return self.llm(inputs_embeds=inputs, attention_mask=mask, labels=labels)

    def generate(self, mel: Tensor, ask: Tensor, num_beams: int, max_new_tokens: int) -> None:
        self.llm.generate(
            inputs_embeds=self.embed(mel, ask),
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
