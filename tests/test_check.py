"""`cellc.check` and `cellc check`: what is equal, what is not, and that it is said."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernel_cells as kc
import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc import check_cells, checking, entry
from cellc.cells import Cell
from cellc.cli import main
from cellc.comparing import Tolerance, compare, compare_tensors
from cellc.errors import BackendError, UsageError
from cellc.kernels import narrow
from cellc.kernels.cpp import CppBackend
from cellc.kernels.eager import EagerBackend
from cellc.launch import Kernel, Launch
from cellc.ops import RowType
from cellc.samples import collect, drawn, outputs

HERE = Path(__file__).parent


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(50, 16), nn.LSTM(16, 16), nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        y, state = self.rnn(self.emb(tokens))
        return {"tags": self.out(y), "state": state}


def requests() -> list[Tensor]:
    return [torch.randint(0, 50, (n,)) for n in (3, 7, 1)]


def test_all_equal() -> None:
    report = cellc.check(Tagger(), requests(), backends=["eager", "cpp"])
    assert report and report.equal and not report.failures
    assert [(r.request, r.backend) for r in report.requests] == [
        (i, b) for b in ("eager", "cpp") for i in range(3)
    ]
    assert report.requests[1].outputs == ["float32[7, 5]", "float32[1, 16]", "float32[1, 16]"]
    assert {(c.cell, c.dtype) for c in report.cells} == {
        (cell, dtype) for cell in ("rnn.l0", "out") for dtype in ("f32", "f64")
    }
    assert all(c.backend == "cpp" and not c.left for c in report.cells)
    assert "all equal" in str(report)


class Wrong:
    """A backend whose kernels are off where a launch has many rows."""

    name = "cpp"

    def kernel(self, cell: Cell, params: Mapping[str, Tensor]) -> Kernel:
        right = EagerBackend().kernel(cell, params)

        class Off:
            source = right.source

            def __call__(self, launch: Launch, arenas: Mapping[RowType, Tensor]) -> Sequence[int]:
                bad = right(launch, arenas)
                if launch.num_rows > 60:
                    for slots, kind in zip(launch.outputs, cell.output_types, strict=True):
                        if arenas[kind].is_floating_point():
                            arenas[kind][int(slots[-1])] += 0.01
                return bad

        return Off()


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = entry.make_backend

    def make(name: Any, *rest: Any) -> Any:
        return Wrong() if name == "cpp" else right(name, *rest)

    monkeypatch.setattr(checking, "make_backend", make)
    report = cellc.check(Tagger(), requests(), backends=["cpp"], dtypes=["f32"])
    assert all(r.found.equal for r in report.requests)  # they run on the right one
    assert not report and all(not c.found.equal for c in report.cells)
    assert math.isclose(report.cells[0].found.difference, 0.01, rel_tol=0.01)
    assert "cell rnn.l0, cpp, f32: differs by 0.01" in str(report)
    assert cellc.check(
        Tagger(), requests(), backends=["cpp"], dtypes=["f32"], batch_sizes=[1, 2]
    ).equal
    monkeypatch.setattr(entry, "make_backend", make)
    report = cellc.check(Tagger(), [torch.arange(3)] * 70, backends=["eager", "cpp"])
    wrong = {r.backend for r in report.requests if not r.found.equal}
    assert wrong == {"cpp"}


def test_what_the_forward_takes_from_outside_differs() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * random.random()

    report = cellc.check(Noisy(), torch.ones(3), backends=["eager"])
    assert not report and report.requests[0].found.difference > 0


def test_requests_that_fail() -> None:
    outside = torch.tensor([3, 99])
    report = cellc.check(Tagger(), [outside, torch.arange(3)], backends=["eager"])
    assert report.equal and "PyTorch raises, too: IndexError" in report.requests[0].found.problem
    assert report.requests[0].raises.startswith("IndexError") and not report.requests[1].raises
    assert str(report).startswith("Tagger: 1 results and 0 kernels compared, all equal")


def test_nothing_is_compared_where_every_request_fails() -> None:
    report = cellc.check(Tagger(), [torch.tensor([99]), torch.tensor([77])], backends=["eager"])
    assert not report and report.all_raise and report.failures == [checking.NOTHING]


def grown(cell: Cell, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters whose matrices are off by half a per cent."""
    return {p.name: params[p.name] * (1.005 if len(p.type.shape) == 2 else 1) for p in cell.params}


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_with_narrower_weights(weights: str) -> None:
    report = cellc.check(Tagger(), requests(), weights=weights, dtypes=["f32"])
    assert report and "weights='" in report.skipped["eager"]
    assert {c.weights for c in report.cells} == {weights} and report.as_json()["weights"] == weights
    for found in [*(r.found for r in report.requests), *(c.found for c in report.cells)]:
        assert 1e-5 < found.difference <= 2 * narrow.CLOSE[weights]
    strict = cellc.check(Tagger(), requests(), weights=weights, dtypes=["f32"], rtol=1e-5)
    assert len(strict.failures) == len(strict.requests) + len(strict.cells)


def test_narrower_weights_that_are_too_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that multiplies with others than those that it should, and whole results."""
    right = CppBackend.kernel

    def wrong(self: CppBackend, cell: Cell, params: Mapping[str, Tensor]) -> Kernel:
        return right(self, cell, grown(cell, params))

    monkeypatch.setattr(CppBackend, "kernel", wrong)
    report = cellc.check(Tagger(), requests(), weights="int8", dtypes=["f32"])
    assert all(r.found.equal for r in report.requests)  # 1.2e-2 of their norm are allowed
    assert report.cells and not any(c.found.equal for c in report.cells)


def test_generators_of_both_kinds() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, x: Tensor, g: torch.Generator) -> Iterator[Tensor]:
            for _ in range(3):
                yield torch.multinomial(torch.softmax(self.linear(x), -1), 1, generator=g)

    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    states = [g.get_state() for g in seeds]
    report = cellc.check(Draws(), [(torch.ones(4), g) for g in seeds], backends=["eager", "cpp"])
    assert report.equal, report
    assert report.requests[0].outputs == ["int64[1]"] * 3
    assert all(torch.equal(g.get_state(), s) for g, s in zip(seeds, states, strict=True))


def test_one_request_in_each_form() -> None:
    model = Tagger()
    for example in (torch.arange(4), (torch.arange(4),), {"tokens": torch.arange(4)}):
        assert len(cellc.check(model, example, backends=["eager"]).requests) == 1
    assert model.training  # as it was


def test_a_cell_alone() -> None:
    with cellc.compile(Tagger(), backend="eager") as compiled:
        compiled(torch.arange(3))
        view = compiled.cells["rnn.l0"]
    report = cellc.check(view, backends=["cpp"])
    assert report.equal and not report.requests
    assert [(c.cell, c.dtype) for c in report.cells] == [("rnn.l0", "f32"), ("rnn.l0", "f64")]
    report = cellc.check(kc.fallback_cell(3), backends=["cpp"])
    assert [c.left for c in report.cells] == [("cumsum.default", "sort.default", "stack.default")]


def test_halves_in_the_interpreter() -> None:
    report = cellc.check(kc.lstm_cell(5, 8), backends=["triton"], batch_sizes=[1, 5])
    assert report.equal, report
    assert [c.dtype for c in report.cells] == ["f32", "bf16", "f16"]
    report = cellc.check(kc.softmax_head(4, 5), backends=["triton"], batch_sizes=[2])
    assert [c.dtype for c in report.cells] == ["f32"]  # argmax jumps


@pytest.mark.parametrize("name", ["lstm_folded-V11-H17", "ragged-H9", "ints-H7", "views-A3-B4"])
def test_cells_of_every_kind(name: str) -> None:
    report = cellc.check(kc.CELLS[name](), backends=["cpp"], batch_sizes=[1, 4])
    assert report.equal and report.cells, report


def test_of_many_cells_the_largest_are_checked_in_other_dtypes() -> None:
    samples = [drawn(kc.lstm_cell(2, size), 2) for size in range(1, 40)]
    work = check_cells.plan(samples, "cpp", None)
    others = {s.cell.flops_per_row for s, dtype in work if dtype == "f64"}
    assert len(work) - len(samples) == len(others) < check_cells.MOST_OTHERS
    assert min(others) > samples[5].cell.flops_per_row
    assert len(check_cells.plan(samples, "cpp", ["f64"])) == len(samples)
    assert len(check_cells.plan(samples[:30], "cpp", None)) == 60


def test_samples_are_rows_that_ran() -> None:
    model = Tagger().eval()
    (rnn,) = [s for s in collect(model, requests()) if s.cell.recurrent]
    assert rnn.num_rows == rnn.num_calls == 11
    launch, arenas = rnn.launch(20, num_steps=2)
    assert launch.num_rows == 40 and launch.steps.tolist() == [0, 20, 40]
    EagerBackend().kernel(rnn.cell, rnn.params)(launch, arenas)
    for made in outputs(rnn, launch, arenas):
        assert torch.equal(made[:9], made[11:20]) and made.std() > 0


def test_random_indices_lie_in_their_tables() -> None:
    cell = kc.lstm_folded(3, 4)
    sample = drawn(cell)
    launch, arenas = sample.launch(64)
    assert not EagerBackend().kernel(cell, sample.params)(launch, arenas)


@dataclass
class Pair:
    a: Tensor
    b: list[float]


@pytest.mark.parametrize(
    ("got", "want", "equal"),
    [
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), True),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, -math.inf]), False),
        (torch.tensor([1.0]), torch.tensor([1.0 + 1e-3]), False),
        (torch.tensor([1.0]), torch.tensor([1.0 + 1e-5]), True),
        (torch.tensor([5]), torch.tensor([6]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.zeros(1, 2), torch.zeros(2, 1), False),
        ([torch.zeros(1)], (torch.zeros(1),), False),
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, False),
        (Pair(torch.zeros(1), [1.0]), Pair(torch.zeros(1), [1.0]), True),
        (Pair(torch.zeros(1), [1.0]), Pair(torch.ones(1), [1.0]), False),
        (Pair(torch.zeros(1), [1.0]), Pair(torch.zeros(1), [1.5]), False),
        (("x", None, 3), ("x", None, 3), True),
        (("x", None, 3), ("x", None, True), False),
        (torch.zeros(0), torch.zeros(0), True),
    ],
)
def test_compare(got: Any, want: Any, equal: bool) -> None:
    found = compare(got, want, Tolerance())
    assert found.equal == equal
    assert equal or found.problem or found.difference > 0


def test_tolerances() -> None:
    a, b = torch.tensor([100.0, 0.0]), torch.tensor([100.0, 1e-4])
    assert not compare_tensors(a, b, Tolerance()).equal
    assert compare_tensors(a, b, Tolerance(), scaled=True).equal
    assert compare_tensors(a, b, Tolerance(atol=1e-3)).equal
    assert not compare_tensors(a, a + 1e-4, Tolerance(0.0, 0.0)).equal


def test_wrong_use_of_the_function() -> None:
    with pytest.raises(UsageError, match="needs an example"):
        cellc.check(Tagger())
    with pytest.raises(UsageError, match="there are eager, cpp, triton"):
        cellc.check(Tagger(), requests(), backends=["cuda"])
    with pytest.raises(UsageError, match="f32, f64"):
        cellc.check(Tagger(), requests(), backends=["cpp"], dtypes=["i64"])


# -- the command -----------------------------------------------------------------------------------

FILE = """
import random
import torch
from torch import nn


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def noisy(x):
    return x * random.random()


torch.manual_seed(0)
model = Tagger()


def example_inputs():
    return [torch.randn(n, 4) for n in (3, 5)]


none = []
wrong = [torch.ones(2, 5), torch.ones(3, 6)]
mixed = [torch.ones(2, 5), torch.ones(2, 4)]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tagger.py").write_text(FILE)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tagger.py:model", "--backend", "eager", "--backend", "cpp"]) == 0
    out = capsys.readouterr().out
    for text in ("Tagger (tagger.py:model)", "float32[5, 3]", "rnn.l0", "f64", "4 of 4 results"):
        assert text in out
    assert main(["check", "tagger.py:model", "--backend", "cpp", "--dtype", "f32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and found["model"] == "Tagger" and len(found["requests"]) == 2
    assert all(r["equal"] and 0 <= r["difference"] < 1e-4 for r in found["requests"])
    assert {c["dtype"] for c in found["cells"]} == {"f32"}


@pytest.mark.usefixtures("folder")
def test_command_exits_1_on_a_mismatch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tagger.py:noisy", "--backend", "eager"]) == 1
    out = capsys.readouterr().out
    assert "NO" in out and "differs: request 0, eager: differs by" in out
    assert main(["check", "tagger.py:noisy", "--backend", "eager", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["equal"] is False


@pytest.mark.parametrize(
    "argv",
    [
        ["check"],
        ["check", "nowhere.py:model"],
        ["check", "tagger.py:model", "--backend", "cuda"],
        ["check", "tagger.py:model", "--batch", "0"],
        ["check", "tagger.py:model", "--rtol", "-1"],
        ["check", "tagger.py:model", "--dtype", "i64"],
        ["check", "tagger.py:model", "--input", "tagger.py:none"],
    ],
)
@pytest.mark.usefixtures("folder")
def test_command_wrong_use(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.err and "Traceback" not in said.err and not said.out


@pytest.mark.usefixtures("folder")
def test_a_backend_that_cannot_run_is_wrong_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise BackendError("no GPU", backend="triton")

    monkeypatch.setattr(checking, "make_backend", refuse)
    assert main(["check", "tagger.py:model", "--backend", "triton"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_command_where_requests_raise(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check", "tagger.py:model", "--backend", "eager", "--input"]
    assert main([*argv, "tagger.py:wrong"]) == 1
    out = capsys.readouterr().out
    assert "PyTorch raises RuntimeError" in out and checking.NOTHING in out and "0 of 0" not in out
    assert main([*argv, "tagger.py:mixed"]) == 0
    out = capsys.readouterr().out
    assert "raises, too" in out and "1 of 1 results" in out
    assert main([*argv, "tagger.py:wrong", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["equal"] and found["requests"][0]["raises"].startswith("RuntimeError")


@pytest.mark.usefixtures("folder")
def test_command_with_narrower_weights(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check", "tagger.py:model", "--weights", "int8"]
    assert main([*argv, "--dtype", "f32"]) == 0
    assert "with int8 weights are near" in capsys.readouterr().out
    assert main([*argv, "--backend", "eager"]) == 1
    assert "use backend='cpp' or 'triton'" in capsys.readouterr().err


def test_check_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    out = capsys.readouterr().out
    assert "cellc check model.py:model" in out and "example_inputs()" in out
