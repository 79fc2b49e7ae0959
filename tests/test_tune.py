"""Curves of cells: measured, kept, read; `cellc tune`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import kernel_cells as kc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cellc
from cellc import costs, tuning
from cellc.cli import main
from cellc.costs import GUESS, Costs, Curve, Place
from cellc.kernels.cpp import CppBackend
from cellc.machines import place
from cellc.samples import drawn

HERE = Place("cpp", "Some (R) CPU @ 2 GHz", 2)
CURVE = Curve((1, 4, 16), (1e-6, 2e-6, 8e-6), 3e-6)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path / "cache"))
    return tmp_path


# -- curves ----------------------------------------------------------------------------------------


def test_a_curve_goes_through_its_points() -> None:
    assert [CURVE(n) for n in (1, 4, 16)] == pytest.approx([1e-6, 2e-6, 8e-6])
    assert CURVE(8) == pytest.approx(4e-6)  # half way in logarithms
    assert CURVE(2) == pytest.approx(1e-6 * 2**0.5)
    assert CURVE(0) == 1e-6
    assert CURVE(160) == pytest.approx(80e-6)
    assert CURVE.of_launch(4, 3) == pytest.approx(9e-6)


def test_enough_rows() -> None:
    rates = [1 / 4e-6, 4 / 5e-6, 16 / 11e-6]
    assert CURVE.best_rate == pytest.approx(max(rates))
    assert CURVE.enough(0.9) == 16 and CURVE.enough(0.5) == 4 and CURVE.enough(0.1) == 1


@given(
    st.dictionaries(
        st.integers(1, 2048), st.floats(1e-9, 1.0, allow_subnormal=False), min_size=1, max_size=8
    ),
    st.integers(0, 5000),
)
def test_between_its_points_a_curve_is_between_their_values(
    points: dict[int, float], num_rows: int
) -> None:
    rows = tuple(sorted(points))
    curve = Curve(rows, tuple(points[n] for n in rows))
    below = [n for n in rows if n <= num_rows] or [rows[0]]
    above = [n for n in rows if n >= num_rows]
    low, high = points[below[-1]], points[above[0]] if above else curve.seconds[-1] * num_rows
    assert min(low, high) * (1 - 1e-9) <= curve(num_rows) <= max(low, high) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 1.0)), ((1,), (0.0,)), ((0,), (1.0,))],
)
def test_what_is_no_curve(rows: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="no curve"):
        Curve(rows, seconds)


# -- what is kept ----------------------------------------------------------------------------------


def test_what_is_kept_is_read() -> None:
    cell, other = kc.lstm_cell(3, 5), kc.gru_cell(3, 5)
    assert Costs(HERE).seconds(cell, 8) == GUESS * 8
    costs.keep(HERE, {cell.key: CURVE})
    costs.keep(HERE, {other.key: Curve((2,), (1e-3,))})
    known = Costs(HERE)
    assert known.curve(cell) == CURVE and known.seconds(cell, 8) == CURVE(8)
    assert known.seconds(other, 2) == 1e-3
    assert known.curve(kc.lstm_cell(3, 6)) is None
    for there in (Place("triton", HERE.device, 2), Place("cpp", "Another", 2), Place("cpp", "", 1)):
        assert Costs(there).curve(cell) is None


def test_names_do_not_matter() -> None:
    cell = kc.lstm_cell(3, 5)
    costs.keep(HERE, {cell.key: CURVE})
    assert Costs(HERE).curve(cell.named("another")) == CURVE


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"a": {"rows": [1]}}'])
def test_a_broken_file_counts_as_empty(text: str) -> None:
    path = costs.keep(HERE, {"a": CURVE})
    path.write_text(text)
    assert costs.known(HERE) == {}
    costs.keep(HERE, {"b": CURVE})
    assert costs.known(HERE) == {"b": CURVE}


# -- measuring -------------------------------------------------------------------------------------


def test_measuring_a_kernel() -> None:
    sample = drawn(kc.lstm_cell(32, 64))
    backend = CppBackend()
    try:
        kernel = backend.kernel(sample.cell, sample.params)
        curve, _ = tuning.measure(sample, kernel, [1, 8, 256], 0.002)
    finally:
        backend.close()
    assert curve.rows == (1, 8, 256)
    assert curve.seconds[2] > curve.seconds[0] > 0 and curve.launch >= 0


def test_what_is_launched() -> None:
    """Rows and steps as they are called."""
    seen = []

    class Kernel:
        source = ""

        def __call__(self, launch: object, arenas: object) -> tuple[int, ...]:
            seen.append((launch.num_rows, launch.num_steps))  # type: ignore[attr-defined]
            return ()

    tuning._launch(drawn(kc.lstm_cell(2, 3)), Kernel(), 5, 4)()
    assert seen == [(20, 4)]


def test_steps_and_launches_are_told_apart() -> None:
    assert tuning._a_step(10.0, 10.0 + 3 * 2.0) == 2.0
    assert tuning._a_step(10.0, 9.0) == 10.0  # noise


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(x)[0])


def test_a_model() -> None:
    model, requests = Tagger().eval(), [torch.randn(n, 8) for n in (3, 5)]
    found = tuning.tune(model, requests, "cpp", batch_sizes=[1, 16], seconds=0.001)
    assert found.place == place("cpp", torch.device("cpu")) and found.place.device
    assert len(found.cells) >= 2 and all(one.curve for one in found.cells)
    known = Costs(found.place)
    with cellc.compile(model, backend="cpp") as compiled:
        compiled.map(requests)
        for view in compiled.cells.values():
            assert known.curve(view.cell) is not None


def test_the_scheduler_reads_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step known to take long is not followed by others in its first launch, when some could
    join; one known to be short is.
    """
    model, x = Tagger().eval(), torch.randn(40, 8)

    def first_launch(seconds: float) -> int:
        asked: list[int] = []
        with cellc.compile(model, backend="eager") as compiled:
            compiled(x[:2])
            curves = {view.cell.key: Curve((1,), (seconds,)) for view in compiled.cells.values()}
            costs.keep(place("eager", torch.device("cpu")), curves)
        with cellc.compile(model, backend="eager") as compiled:
            scheduler = compiled._engine._scheduler
            plain = scheduler.next

            def next_launch(steps: int | None = None, *, hold: bool = False) -> object:
                asked.append(steps or 0)
                return plain(steps, hold=hold)

            monkeypatch.setattr(scheduler, "next", next_launch)
            compiled.map([x, x])
        return asked[0]

    assert first_launch(1.0) == 1
    assert first_launch(1e-6) > 50  # 80 rows by a guess: 5


# -- the command -----------------------------------------------------------------------------------

FILE = """
import torch
from torch import nn

model = nn.GRU(4, 8)
none = []


def summing(x):
    return x.cumsum(-1) * 2


def example_inputs():
    return [torch.randn(n, 4) for n in (3, 5)]
"""


@pytest.fixture
def target(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    (folder / "gru.py").write_text(FILE)
    return "gru.py:model"


def test_command(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tune", target, "--backend", "cpp", "--batch", "1", "--batch", "32"]
    assert main([*argv, "--seconds", "0.001"]) == 0
    out = capsys.readouterr().out
    for text in ("gru.py:model: cpp on ", "us a step", "rows/s", "90% of its best", "kept in"):
        assert text in out
    assert main([*argv, "--seconds", "0.001", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == "cpp" and found["threads"] >= 1 and Path(found["file"]).is_file()
    for cell in found["cells"]:
        assert cell["rows"] == [1, 32] and len(cell["seconds_a_step"]) == 2 and not cell["left"]


@pytest.mark.usefixtures("target")
def test_what_runs_through_torch_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "gru.py:summing", "--backend", "cpp", "--batch", "1"]) == 0
    out = capsys.readouterr().out
    assert "not measured: cpp writes no kernel for it" in out


@pytest.mark.parametrize(
    "argv",
    [
        ["tune"],
        ["tune", "nowhere.py:model"],
        ["tune", "gru.py:model", "--batch", "0"],
        ["tune", "gru.py:model", "--seconds", "0"],
        ["tune", "gru.py:model", "--backend", "cuda"],
        ["tune", "gru.py:model", "--input", "gru.py:none"],
    ],
)
@pytest.mark.usefixtures("target")
def test_wrong_use(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.err and "Traceback" not in said.err and not said.out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--help"]) == 0
    assert "cellc tune model.py:model" in capsys.readouterr().out
