"""`python -m cellc.bench.gpu` without a GPU: all but CUDA's own calls, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cellc.bench import gpu, gpu_work
from cellc.bench.gpu_clock import Clock
from cellc.kernels.triton_backend import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=0")
CPU = torch.device("cpu")
TINY = "--dry-run --hidden 8 --batches 1 3 --requests 3 --rounds 1 --cells".split()


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_work, "STEPS", 4)
    monkeypatch.setattr(gpu_work, "LEAVES", 4)
    monkeypatch.setattr(gpu_work, "VOCABULARY", 20)
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "COUNTS", (1, 3))


def figures(path: Path, *argv: str) -> dict[str, Any]:
    gpu.main([*TINY, *argv, "--json", str(path)])
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(
    ("kind", "name"), [("lstm", "f32"), ("gru", "bf16"), ("treelstm", "f32"), ("decoder", "f32")]
)
def test_all_of_it_runs(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures(tmp_path / "figures.json", kind, "--dtypes", name)
    assert [(r["cell"], r["B"]) for r in found["steps"]] == [(f"{kind}-8", 1), (f"{kind}-8", 3)]
    for row in found["steps"]:
        for way in ("cellc_us", "peer_us", "compile_us", "roofline_us", "tflops", "gb_s"):
            assert isinstance(row[way], float) and row[way] > 0, row
    ways = {(r["way"], r["K"]) for r in found["launches"]}
    if kind in ("lstm", "gru"):
        assert ways == {
            (way, K) for way in ("kernel by kernel", "graph") for K in (1, 3)
        } | {("persistent, untuned", 3)}  # fmt: skip
        assert found["whole"][0]["cellc"] > 0
    else:
        assert ("graph", 1) in ways and not found["whole"]
    assert "a step on the device" in capsys.readouterr().out


def test_a_compiler_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", fail)
    row, _ = figures(tmp_path / "figures.json", "lstm", "--dtypes", "f32")["steps"]
    assert "no compiler" in row["compile_us"] and row["cellc_us"] > 0


def test_results_that_differ_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = gpu_work.make("lstm", 8, "f32", CPU)
    other = gpu_work.make("lstm", 8, "f32", CPU)
    with torch.no_grad():
        for p in other.model.parameters():
            p.mul_(1.01)
    x = work.batch(2)
    with pytest.raises(SystemExit, match="differ by"):
        gpu.same(work.peer(x), other.peer(x), "f32")


@pytest.mark.parametrize("kind", gpu.CELLS)
def test_peers_do_what_the_model_does(kind: str) -> None:
    work = gpu_work.make(kind, 8, "f32", CPU)
    batch = work.batch(3)
    want = [
        work.result(work.model(*r) if isinstance(r, tuple) else work.model(r))
        for r in work.requests(batch)
    ]
    for got in (work.peer(batch), work.by_step(batch, lambda f: f)):
        gpu.same(got, want, "f32")


def test_roofline() -> None:
    """By hand: an LSTM step's products, its rows and its weights."""
    H, B, T = 8, 3, gpu_work.STEPS
    work, clock = gpu_work.make("lstm", H, "f32", CPU), Clock("cpu")
    batch = work.batch(B)
    with gpu.compiling(clock, work, 8, "f32") as compiled:
        compiled.map(work.requests(batch))
        kept = gpu.recorded(compiled, work.requests(batch))
    products = T * B * 2 * 2 * 4 * H * H
    weights = 4 * (2 * 4 * H * H)
    for ceiling, bound in ((1e-9, "arithmetic"), (1e9, "memory")):
        ceilings = {"f32_tflops": ceiling, "copy_gb_s": 1.0}
        flops, moved, least = gpu.roofline(kept, "f32", ceilings)
        assert products < flops < 1.7 * products
        assert weights + T * B * 4 * H * 4 < moved < weights + T * B * 4 * H * 20
        want = flops / (1e12 * ceiling) if bound == "arithmetic" else moved / 1e9
        assert math.isclose(least, want)


def test_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.main([])
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1"):
        gpu.main(["--dry-run"])
