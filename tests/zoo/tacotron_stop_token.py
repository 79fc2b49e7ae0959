"""Frames of speech decoded with attention that knows where it was, until a stop token.

Shen, Pang, Weiss, Schuster, Jaitly, Yang, Chen, Zhang, Wang, Skerry-Ryan, Saurous,
Agiomyrgiannakis, Wu: Natural TTS Synthesis by Conditioning WaveNet on Mel Spectrogram Predictions,
ICASSP 2018, https://arxiv.org/abs/1712.05884 (Tacotron 2 without its convolutions).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, MEL, PHONEMES, LIMIT = 8, 4, 12, 14
SPREAD, LOCATE, STOP = 2.2, 2.0, -0.5


class Tacotron(nn.Module):
    """Phonemes in, frames [L, MEL] and alignments [L, T] out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(PHONEMES, SIZE)
        self.encoder = nn.LSTM(SIZE, SIZE // 2, bidirectional=True)
        self.prenet = nn.Sequential(
            nn.Linear(MEL, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE), nn.ReLU()
        )
        self.attention_rnn = nn.LSTMCell(2 * SIZE, SIZE)
        self.query = nn.Linear(SIZE, SIZE, bias=False)
        self.memory = nn.Linear(SIZE, SIZE, bias=False)
        self.location = nn.Linear(2, SIZE, bias=False)
        self.v = nn.Linear(SIZE, 1)
        self.decoder_rnn = nn.LSTMCell(2 * SIZE, SIZE)
        self.frame = nn.Linear(2 * SIZE, MEL)
        self.gate = nn.Linear(2 * SIZE, 1)

    def forward(self, phonemes: Tensor) -> tuple[Tensor, Tensor]:
        memory, _ = self.encoder(self.embedding(phonemes))
        processed = self.memory(memory)
        frame = torch.zeros(MEL)
        context = torch.zeros(SIZE)
        weights = torch.zeros(len(phonemes))
        cumulative = torch.zeros(len(phonemes))
        attention_state = decoder_state = (torch.zeros(SIZE), torch.zeros(SIZE))
        frames: list[Tensor] = []
        alignments: list[Tensor] = []
        while True:
            x = torch.cat([self.prenet(frame), context])
            attention_state = self.attention_rnn(x, attention_state)
            places = self.location(torch.stack([weights, cumulative], dim=-1))
            energies = self.v(torch.tanh(self.query(attention_state[0]) + processed + places))
            weights = torch.softmax(energies.squeeze(-1), dim=0)
            cumulative = cumulative + weights
            context = torch.matmul(weights, memory)
            x = torch.cat([attention_state[0], context])
            decoder_state = self.decoder_rnn(x, decoder_state)
            x = torch.cat([decoder_state[0], context])
            frame = self.frame(x)
            frames.append(frame)
            alignments.append(weights)
            if torch.sigmoid(self.gate(x)) > 0.5:
                break
            if len(frames) == LIMIT:
                break
        return torch.stack(frames), torch.stack(alignments)


def make() -> nn.Module:
    model = Tacotron()
    with torch.no_grad():  # spreads the stop token: speech ends early, late, or at the limit
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.location.weight.mul_(LOCATE)
        model.gate.bias.add_(STOP)
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(PHONEMES) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 10)
    ]
