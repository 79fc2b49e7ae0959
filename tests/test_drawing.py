"""Random numbers that a forward draws from its request's generator, whatever answers lead to."""

from __future__ import annotations

import random

import pytest
import torch
from comparing import alike
from torch import Tensor, nn

import cellc

H, V = 8, 12


class Gumbel(nn.Module):
    """Draws something else after some answers: what is drawn ahead may be drawn in vain."""

    def __init__(self, after: tuple[int, ...]) -> None:
        super().__init__()
        self.embed, self.cell, self.out = nn.Embedding(V, H), nn.GRUCell(H, H), nn.Linear(H, V)
        self.after = after

    def forward(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
        h, said = torch.zeros(1, H), []
        for token in tokens:
            h = self.cell(self.embed(token[None]), h)
            noise = torch.rand(1, H, generator=generator)
            best = (self.out(h) + 4 * noise[:, :1] * torch.arange(V).sin()).argmax()
            if best == 2:
                h = h + noise
            elif best % 3 == 1:
                h = h + torch.randn(self.after, generator=generator).mean()
            said.append(int(best))
        return h, said


def check(after: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Gumbel(after).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2.5)
    draw = random.Random(1)
    words = [[draw.randrange(V) for _ in range(draw.randint(3, 9))] for _ in range(16)]

    def requests() -> list[tuple[Tensor, torch.Generator]]:
        return [(torch.tensor(w), torch.Generator().manual_seed(i)) for i, w in enumerate(words)]

    first = requests()
    want = [model(*request) for request in first]
    assert len({x for _, said in want for x in said}) > 3
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            others = requests()
            alike([compiled(*request) for request in others], want, rtol=1e-4, atol=1e-5)
            for (_, a), (_, b) in zip(first, others, strict=True):
                assert torch.equal(a.get_state(), b.get_state())
        alike(compiled.map(requests()), want, rtol=1e-4, atol=1e-5)
        assert compiled._engine._arenas.idle()


def test_other_numbers_than_were_drawn_ahead() -> None:
    check((1, H))  # of the same shape, another distribution
    check((2, 3))


def test_what_cannot_be_drawn_is_said() -> None:
    def coins(x: Tensor, generator: torch.Generator) -> Tensor:
        return x * torch.bernoulli(torch.full((3,), 0.5), generator=generator)

    with (
        cellc.compile(coins, backend="eager") as compiled,
        pytest.raises(cellc.CellcError, match=r"(?s)bernoulli.*torch\.rand,.*test_drawing\.py"),
    ):
        compiled(torch.ones(3), torch.Generator())
