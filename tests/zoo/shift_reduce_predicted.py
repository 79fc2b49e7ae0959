"""SPINN that parses for itself: its tracking LSTM chooses to shift or to reduce.

Bowman, Gauthier, Rastogi, Gupta, Manning, Potts: A Fast Unified Model for Parsing and Sentence
Understanding, ACL 2016, https://arxiv.org/abs/1603.06021 (section 3, at test time).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

SIZE, TRACKING, VOCABULARY, CLASSES, SHIFT, REDUCE = 8, 6, 12, 3, 0, 1
SPREAD, BIAS = 5.0, 2.5


class ParsingSPINN(nn.Module):
    """Tokens in, scores of the sentence and its transitions out."""

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

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[int]]:
        nothing = torch.zeros(SIZE)
        buffer = [word.chunk(2) for word in self.word(self.embedding(tokens))][::-1]
        stack: list[Any] = []
        state = torch.zeros(TRACKING), torch.zeros(TRACKING)
        transitions: list[int] = []
        while buffer or len(stack) > 1:
            first = buffer[-1][0] if buffer else nothing
            top = stack[-1][0] if stack else nothing
            second = stack[-2][0] if len(stack) > 1 else nothing
            state = self.tracker(torch.cat([first, top, second]), state)
            scores = self.transition(state[0])
            valid = torch.tensor([len(buffer) > 0, len(stack) > 1])
            action = int(scores.masked_fill(~valid, float("-inf")).argmax())
            if action == SHIFT:
                stack.append(buffer.pop())
            else:
                right, left = stack.pop(), stack.pop()
                stack.append(self.reduce(left, right, state[0]))
            transitions.append(action)
        h, _ = stack.pop()
        return self.out(h), transitions


def make() -> nn.Module:
    model = ParsingSPINN()
    with torch.no_grad():  # spreads the scores: trees lean to the left, to the right, or neither
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
        model.transition.bias[REDUCE] += BIAS
    return model


def requests() -> list[Any]:
    draw = random.Random(0)
    return [
        torch.tensor([draw.randrange(VOCABULARY) for _ in range(n)])
        for n in (1, 2, 3, 5, 8, 12, 5, 7, 4, 6)
    ]
