"""Cells that copy rows, against the eager backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cellc
from cellc.cells import Cell, CellInput, CellOp, Operand
from cellc.kernels.copies import CopyKernel, copied_inputs
from cellc.kernels.eager import DTYPES, EagerBackend
from cellc.launch import Launch
from cellc.ops import RowType


def reshaping(dtype: str) -> Cell:
    """Two inputs, out in the other order, one in another shape."""
    wide, flat, own = (RowType(shape, dtype) for shape in ((2, 3), (6,), (4,)))
    of_first = Operand("input", 0)
    shape = (("shape", (6,)),)
    return Cell(
        name="shuffle",
        inputs=(CellInput("x0", wide), CellInput("x1", own)),
        params=(),
        ops=(CellOp("reshape", (of_first,), shape, (flat,)),),
        outputs=(Operand("input", 1), Operand("op", 0)),
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64", "i64", "i8", "bool", "c64"])
def test_copies_equal_the_eager_backend(dtype: str) -> None:
    cell = reshaping(dtype)
    copied = copied_inputs(cell)
    assert copied == [1, 0]
    types = {*[i.type for i in cell.inputs], *cell.output_types}
    torch.manual_seed(0)
    ours = {t: torch.randint(0, 2, (40, *t.shape)).to(DTYPES[t.dtype]) for t in types}
    theirs = {t: arena.clone() for t, arena in ours.items()}
    slots = np.arange(5, dtype=np.int32)
    # the second step reads what the first one wrote, of the type that is both read and written
    launch = Launch(
        np.array([0, 3, 5], np.int32), [slots, slots + 5], np.stack([slots + 8, slots + 20])
    )
    assert len(CopyKernel(cell, copied)(launch, ours)) == 0
    EagerBackend().kernel(cell, {})(launch, theirs)
    for type in types:
        assert torch.equal(ours[type], theirs[type]), type


def test_what_is_computed_is_no_copy() -> None:
    row = RowType((3,), "f32")
    sum_ = CellOp("add", (Operand("input", 0), Operand("input", 0)), (), (row,))
    cell = Cell("one", (CellInput("x0", row),), (), (sum_,), (Operand("op", 0),))
    assert copied_inputs(cell) is None
    ragged = Cell("one", (CellInput("x0", row, True),), (), (), (Operand("input", 0),))
    assert copied_inputs(ragged) is None


def test_a_model_that_copies() -> None:
    class Squeezed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.cell = torch.nn.GRU(4, 6), torch.nn.GRUCell(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _, last = self.encoder(x)
            h = last[0, 0]
            while True:
                h = self.cell(h, h)
                if h.sum() < 0.5:
                    return h

    torch.manual_seed(0)
    model = Squeezed().eval()
    requests = [(torch.randn(n, 1, 4),) for n in (3, 5, 1, 8)]
    with torch.no_grad(), cellc.compile(model) as compiled:
        for _ in range(2):
            for (x,), y in zip(requests, compiled.map(requests), strict=True):
                torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)
