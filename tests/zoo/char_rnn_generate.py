"""A character model that goes on from a prompt, always with the likeliest, to the end of the line.

Graves: Generating Sequences With Recurrent Neural Networks, 2013, https://arxiv.org/abs/1308.0850
(section 3: stacked LSTMs whose output reads every layer).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, CHARACTERS, NEWLINE, LAYERS = 8, 12, 0, 2
SPREAD, STOP = 3.3, 1.0


class CharRNN(nn.Module):
    """A prompt and the most characters to add in, the prompt and what follows out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, SIZE)
        self.rnn = nn.LSTM(SIZE, SIZE, num_layers=LAYERS)
        self.out = nn.Linear(LAYERS * SIZE, CHARACTERS)

    def step(self, characters: Tensor, state: Any) -> tuple[Tensor, Any]:
        _, state = self.rnn(self.embedding(characters), state)
        return self.out(state[0].flatten()), state

    def forward(self, prompt: Tensor, most: int = 10) -> list[int]:
        text: list[int] = prompt.tolist()
        scores, state = self.step(prompt, None)
        for _ in range(most):
            tok = scores.argmax()
            text.append(int(tok))
            if int(tok) == NEWLINE:
                break
            scores, state = self.step(tok.view(1), state)
        return text


def make() -> nn.Module:
    model = CharRNN()
    with torch.no_grad():  # spreads the scores: lines end early, late, or at the limit
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.out.bias[NEWLINE] += STOP
    return model


def requests() -> list[Any]:
    draw = random.Random(0)

    def prompt(length: int) -> Tensor:
        return torch.tensor([draw.randrange(1, CHARACTERS) for _ in range(length)])

    given: list[Any] = [prompt(n) for n in (1, 2, 3, 5, 8, 12, 6)]
    given += [(prompt(n), most) for n, most in ((5, 16), (3, 2), (7, 12))]
    return [*given, {"prompt": prompt(4), "most": 6}]
