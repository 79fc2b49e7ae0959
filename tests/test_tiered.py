"""Cells that differ in sizes only: few are compiled at once, the rest when it pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc.kernels import cpp, tiered

H, WORDS = 8, 12


class Attending(nn.Module):
    """A decoder whose encoder is a library's: its memory is taken whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(WORDS, H), nn.Linear(H, WORDS)
        self.encoder = nn.GRU(H, H, batch_first=True)
        self.decoder = nn.GRUCell(2 * H, H)

    def forward(self, tokens: Tensor) -> list[int]:
        memory, last = self.encoder(self.embedding(tokens)[None])
        memory, h = memory[0], last[0, 0]
        token, told = tokens[0], []
        for _ in range(6):
            read = torch.softmax(memory @ h, 0) @ memory
            h = self.decoder(torch.cat([self.embedding(token), read]), h)
            token = self.out(h).argmax()
            told.append(int(token))
            if told[-1] == 2:
                break
        return told


@pytest.mark.parametrize("enough", [tiered.ENOUGH, 0.0])
def test_lengths_without_end(enough: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no patience at all, every kernel is made after its first launch."""
    made = []
    compile_cell = cpp.CppKernel.__init__

    def counted(
        self: cpp.CppKernel, cell: cellc.cells.Cell, params: list[Tensor], weights: str = ""
    ) -> None:
        made.append(cell.key)
        compile_cell(self, cell, params, weights)

    monkeypatch.setattr(cpp.CppKernel, "__init__", counted)
    monkeypatch.setattr(tiered, "ENOUGH", enough)
    torch.manual_seed(0)
    model = Attending().eval()
    requests = [torch.randint(0, WORDS, (n,)) for n in range(2, 12)]
    want = [model(x) for x in requests]
    with cellc.compile(model, backend="cpp") as compiled:
        for _ in range(2):
            assert compiled.map(requests) == want
        sizes = len(compiled.cells)
    assert len(made) == len(set(made))
    if enough:
        assert len(made) < sizes - 5
    else:
        assert len(made) > 10


def test_forms() -> None:
    """Sizes and how many are put together make no difference; operations and weights do."""
    with cellc.compile(Attending().eval(), backend="eager") as compiled:
        compiled.map([torch.randint(0, WORDS, (n,)) for n in range(3, 12)])
        cells = list(compiled._compiler.store.cells.values())
    by_form: dict[object, list[cellc.cells.Cell]] = {}
    for cell in cells:
        by_form.setdefault(tiered.form_of(cell), []).append(cell)
    assert max(len(alike) for alike in by_form.values()) > 5
    for alike in by_form.values():
        assert len({tuple(p.name for p in cell.params) for cell in alike}) == 1
        assert len({frozenset(op.op for op in cell.ops) for cell in alike}) == 1
    assert len(by_form) > 3
