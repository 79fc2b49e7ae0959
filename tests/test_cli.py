from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cellc import cli, demo
from cellc.cli import main

MODEL = """
import torch
from torch import nn


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.rnn = nn.Embedding(50, 16), nn.LSTM(16, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, tokens):
        y, (h, c) = self.rnn(self.emb(tokens))
        return {"tags": self.out(y), "state": (h, c)}


class Summing(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 5)

    def forward(self, x):
        return self.out(x.cumsum(-1))


def square(x):
    return x @ x


torch.manual_seed(0)
model, summing = Tagger().eval(), Summing().eval()
vectors = [torch.randn(3, 4)]


def example_inputs():
    return [(torch.randint(0, 50, (n,)),) for n in (3, 7, 2, 5)]
"""
KEYS = {"model", "nodes", "edges", "coverage", "cells", "unfold"}
CELL_KEYS = {
    "name", "recurrent", "parameters", "calls", "ops", "inputs", "outputs", "flops_per_row",
    "kernels",
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tagger.py").write_text(MODEL)
    return tmp_path


def inspect(*args: str, backend: str = "eager") -> int:
    return main(["inspect", "tagger.py:model", "--backend", backend, *args])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "cellc inspect model.py:model" in capsys.readouterr().out
    assert main(["inspect", "--help"]) == 0
    out = capsys.readouterr().out
    assert "TARGET is path/to/file.py:name" in out and "example_inputs()" in out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["inspect"],
        ["inspect", "nowhere.py:model"],
        ["inspect", "tagger.py:nothing"],
        ["inspect", "tagger.py:model", "--input", "tagger.py:nothing"],
        ["inspect", "tagger.py:model", "--backend", "cuda"],
        ["inspect", "tagger.py:model", "--ir", "nothing"],
        ["inspect", "tagger.py:model", "--code", "nothing", "--backend", "eager"],
        ["inspect", "tagger.py:model", "--backend", "eager", "--graph", "cells.png"],
        ["inspect", "tagger.py:model", "--json", "--ir", "rows"],
        ["demo", "--seconds", "0"],
        ["demo", "--output", "nowhere/report.html"],
    ],
)
def test_wrong_use_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.err and "Traceback" not in said.err and not said.out


def test_wrong_names_list_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--ir", "row") == 2
    assert "there are graph, rows, extract, passes, plan" in capsys.readouterr().err
    assert inspect("--code", "nothing") == 2
    assert "there are rnn.l0, out" in capsys.readouterr().err


def test_a_model_that_cannot_be_handled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tagger.py:square", "--input", "tagger.py:vectors"]) == 1
    assert "tagger.py:27" in capsys.readouterr().err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect() == 0
    out = capsys.readouterr().out
    for text in ("Tagger (tagger.py:model)", "rnn.l0", "rnn.weight_hh_l0.T", "sigmoid x3", "eager"):
        assert text in out
    assert "14 cell calls" in out and "coverage: 100.0%" in out and "closed form" in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == KEYS and found["model"] == "Tagger" and found["coverage"] == 1
    assert found["nodes"] > 50 and found["edges"] > 50
    assert found["unfold"]["kind"] == "closed form" and found["unfold"]["us_per_cell"] > 0
    assert all(cell.keys() == CELL_KEYS for cell in found["cells"])
    cells = {cell["name"]: cell for cell in found["cells"]}
    assert cells["rnn.l0"]["recurrent"] and cells["rnn.l0"]["calls"] == 7
    assert cells["out"]["flops_per_row"] == 160 and cells["out"]["kernels"] == ["eager"]


def test_leftovers_are_not_covered(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["inspect", "tagger.py:summing", "--input", "tagger.py:vectors", "--backend", "eager"]
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["coverage"] == 0  # all of its one cell runs there
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "left to torch: cumsum" in out and "operator-level tracing" in out


@pytest.mark.parametrize("stage", ["graph", "rows", "extract", "passes", "plan"])
def test_ir(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--ir", stage) == 0
    assert capsys.readouterr().out.startswith("# ")


@pytest.mark.parametrize(
    ("backend", "text"),
    [("triton", "@triton.jit"), ("cpp", "extern"), ("eager", "def ")],
)
def test_code(backend: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--code", backend=backend) == 0
    both = capsys.readouterr().out
    assert "######## rnn.l0" in both and text in both
    assert inspect("--code", "out", backend=backend) == 0
    one = capsys.readouterr().out
    assert one.strip() in both and len(one) < len(both) / 2


def test_code_of_both_languages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tagger.py:model", "--code", "rnn"]) == 0
    out = capsys.readouterr().out
    cpp, triton = out.split("######## rnn.l0, Triton\n")
    assert cpp.startswith("######## rnn.l0, C++\n") and "extern" in cpp and "@triton" not in cpp
    assert "@triton.jit" in triton and "extern" not in triton


def test_code_of_the_backend_that_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tagger.py:model", "--code", "rnn", "--backend", "auto"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", ["cells.svg", "cells.dot", "cells.html"])
def test_graph(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--graph", name) == 0
    assert capsys.readouterr().out == f"wrote {name}\n"
    text = (folder / name).read_text()
    assert "tokens" in text and "rnn.l0" in text and "7 calls" in text
    if name.endswith(".svg"):
        ElementTree.fromstring(text)


def test_inspect_a_model_that_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "draws.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(4, 5)\n\n"
        "    def forward(self, x, g):\n"
        "        return torch.multinomial(torch.softmax(self.linear(x), -1), 1, generator=g)\n\n\n"
        "model = Model().eval()\n\n\n"
        "def example_inputs():\n"
        "    return [(torch.ones(4), torch.Generator().manual_seed(i)) for i in range(3)]\n"
    )
    assert main(["inspect", "draws.py:model", "--backend", "eager", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"]


@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_where_figures_go_is_looked_at_first(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "lstm-256", option, str(tmp_path / "none" / "figures.png")]) == 2
    assert f"{option} " in (said := capsys.readouterr().err) and "there is no folder" in said


def test_figures_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--from", str(tmp_path / "none.json"), "--targets"]) == 2
    assert "No such file" in capsys.readouterr().err
