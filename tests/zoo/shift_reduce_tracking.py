"""SPINN with its tracking LSTM, whose state takes part in every composition; transitions are given.

Bowman, Gauthier, Rastogi, Gupta, Manning, Potts: A Fast Unified Model for Parsing and Sentence
Understanding, ACL 2016, https://arxiv.org/abs/1603.06021 (the tracking LSTM reads the top of the
buffer and the top two of the stack; its scores of the transitions are returned too).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, TRACKING, VOCABULARY, CLASSES = 8, 6, 20, 3


class TrackingSPINN(nn.Module):
    """Tokens and transitions in, scores of the sentence and of its transitions out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        self.word = nn.Linear(SIZE, 2 * SIZE)
        self.tracker = nn.LSTMCell(3 * SIZE, TRACKING)
        self.transition = nn.Linear(TRACKING, 2)
        self.compose = nn.Linear(2 * SIZE + TRACKING, 5 * SIZE)
        self.out = nn.Linear(SIZE, CLASSES)

    def reduce(self, left: Any, right: Any, e: Tensor) -> tuple[Tensor, Tensor]:
        (h_left, c_left), (h_right, c_right) = left, right
        i, f_left, f_right, o, g = self.compose(torch.cat([h_left, h_right, e])).chunk(5)
        c = torch.sigmoid(f_left) * c_left + torch.sigmoid(f_right) * c_right
        c = c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, tokens: Tensor, transitions: list[str]) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(SIZE)
        buffer = [self.word(self.embedding(token)).chunk(2) for token in tokens][::-1]
        stack: list[Any] = []
        state = torch.zeros(TRACKING), torch.zeros(TRACKING)
        scores = []
        for transition in transitions:
            first = buffer[-1][0] if buffer else nothing
            top = stack[-1][0] if stack else nothing
            second = stack[-2][0] if len(stack) > 1 else nothing
            state = self.tracker(torch.cat([first, top, second]), state)
            scores.append(self.transition(state[0]))
            if transition == "shift":
                stack.append(buffer.pop())
            else:
                right, left = stack.pop(), stack.pop()
                stack.append(self.reduce(left, right, state[0]))
        h, _ = stack.pop()
        return self.out(h), torch.stack(scores)


def make() -> nn.Module:
    return TrackingSPINN()


def requests() -> list[Any]:
    draw = random.Random(0)

    def transitions(leaves: int) -> list[str]:
        if leaves == 1:
            return ["shift"]
        left = draw.randint(1, leaves - 1)
        return [*transitions(left), *transitions(leaves - left), "reduce"]

    def sentence(length: int) -> Any:
        tokens = torch.tensor([draw.randrange(VOCABULARY) for _ in range(length)])
        return tokens, transitions(length)

    return [sentence(n) for n in (1, 2, 3, 5, 4, 6, 5, 3, 4, 6)]
