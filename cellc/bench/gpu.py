"""Recurrences, trees and a decoder on a GPU: cellc's generated kernels against cuDNN, PyTorch by
hand and `torch.compile`, on the same weights. `python -m cellc.bench.gpu`.

A step is timed on the device alone, from a CUDA graph of the launches that the runtime made for B
requests of equal length, kernel by kernel; peers run the same B as one batch, in a graph, too. The
roofline is the least time that the measured ceilings allow: every row read and written once, every
weight once in all steps. Then what a launch costs the host, and whole requests of different
lengths, host included. Results are checked against each other first; rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cellc.bench import gpu_work
from cellc.bench.gpu_clock import Clock
from cellc.bench.gpu_launches import Ran, again, compiling, joined, recorded
from cellc.bench.gpu_overhead import overheads
from cellc.bench.gpu_tuning import tune_work
from cellc.bench.gpu_work import BY_STEP, DTYPES, KINDS, Work
from cellc.cells import Cell
from cellc.kernels.triton_backend import TritonKernel, interpreting
from cellc.kernels.triton_devices import launch_bytes

BATCHES = (1, 8, 64, 256, 512, 1024)
CELLS = (*KINDS, "treelstm", "decoder")
TOLERANCE = {"f32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
ROUNDS = 3
COUNTS = (1, 8, 24)  # steps of a launch whose cost is measured


def same(got: Sequence[Tensor], want: Sequence[Tensor], name: str) -> None:
    """Stop where results differ."""
    for a, b in zip(got, want, strict=True):
        error = float(torch.norm((a - b).float()) / torch.norm(b.float()))
        if not error <= TOLERANCE[name]:
            raise SystemExit(f"cellc and its peer differ by {error:.1e} ({name})")


# -- a step on the device --------------------------------------------------------------------------


def steps(
    clock: Clock, work: Work, name: str, batches: Sequence[int], ceilings: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Microseconds a step on the device at every batch size."""
    rows = []
    for B in batches:
        batch = work.batch(B)
        requests = work.requests(batch)
        with compiling(clock, work, max(batches), name) as compiled:
            compiled.map(requests)
            got = [work.result(made) for made in compiled.map(requests)]
            want = work.peer(batch)
            same(got, want, name)
            kept = recorded(compiled, requests)
            ways: dict[str, Callable[[], object] | None] = {
                "cellc": clock.graphed(again(compiled, kept)),
                "peer": clock.graphed(partial(work.peer, batch)),
            }
            ways[BY_STEP], reason = _by_step(clock, work, batch, want, name)
            took: dict[str, list[float]] = {k: [] for k in ways}
            for _ in range(ROUNDS):
                for k, way in ways.items():
                    took[k].append(clock.seconds(way) if way is not None else float("nan"))
        us = {k: statistics.median(t) / work.steps * 1e6 for k, t in took.items()}
        flops, moved, least = roofline(kept, name, ceilings)
        whole = us["cellc"] * work.steps / 1e6
        rows.append(
            {
                "cell": work.name, "dtype": name, "B": B, "cellc_us": us["cellc"],
                "peer_us": us["peer"], "compile_us": reason or us[BY_STEP],
                "tflops": flops / whole / 1e12, "gb_s": moved / whole / 1e9,
                "roofline_us": least / work.steps * 1e6, "share": f"{least / whole:.1%}",
            }
        )  # fmt: skip
    return rows


def _by_step(
    clock: Clock, work: Work, batch: Tensor, want: Sequence[Tensor], name: str
) -> tuple[Callable[[], object] | None, str]:
    """The peer step by step, each compiled by `torch.compile`; or why that fails."""
    torch._dynamo.reset()
    made = partial(torch.compile, dynamic=False, backend="inductor" if clock.real else "eager")
    try:
        got = work.by_step(batch, made)
        same(got, want, name)
        return clock.graphed(partial(work.by_step, batch, _once(made))), ""
    except Exception as error:  # whatever a compiler says
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:60]


def _once(made: Callable[..., Any]) -> Callable[..., Any]:
    """What is compiled once is not looked up again."""
    known: dict[Any, Any] = {}

    def step(function: Any) -> Any:
        if function not in known:
            known[function] = made(function)
        return known[function]

    return step


def roofline(
    kept: Sequence[Ran], name: str, ceilings: Mapping[str, float]
) -> tuple[float, float, float]:
    """Operations, bytes, and the least seconds of launches together."""
    rows: dict[str, tuple[Cell, int]] = {}
    for cell, _, launch in kept:
        rows[cell.key] = (cell, rows.get(cell.key, (cell, 0))[1] + launch.num_rows)
    flops = float(sum(n * cell.flops_per_row for cell, n in rows.values()))
    moved = float(sum(launch_bytes(cell, n) for cell, n in rows.values()))
    peak = 1e12 * ceilings[f"{name}_tflops"]
    return flops, moved, max(flops / peak, moved / (1e9 * ceilings["copy_gb_s"]))


# -- the host's part -------------------------------------------------------------------------------


def launches(clock: Clock, work: Work, name: str, B: int) -> list[dict[str, Any]]:
    """What launches of the work's recurrent cells cost, each way."""
    batch = work.batch(B)
    found = []
    with compiling(clock, work, 1024, name) as compiled:
        compiled.map(work.requests(batch))
        longest: dict[str, Ran] = {}
        for ran in joined(recorded(compiled, work.requests(batch))):
            known = longest.get(ran.cell.key)
            if known is None or ran.launch.num_steps > known.launch.num_steps:
                longest[ran.cell.key] = ran
        for cell, kernel, launch in longest.values():
            if cell.recurrent and isinstance(kernel, TritonKernel):
                arenas = compiled._engine._arenas
                for row in overheads(clock, kernel, launch, arenas, COUNTS):
                    found.append({"cell": work.name, "dtype": name, **row})
    return found


def requests_of(count: int, hidden: int, like: Tensor) -> list[Tensor]:
    """Lengths of 4 to 60, mean 24."""
    draw = random.Random(0)
    lengths = [min(60, max(4, round(draw.gauss(24, 11)))) for _ in range(count)]
    return [torch.randn(t, hidden, device=like.device, dtype=like.dtype) for t in lengths]


def packed(model: nn.RNNBase, requests: Sequence[Tensor]) -> list[Tensor]:
    """cuDNN on one packed sequence."""
    out, _ = model(nn.utils.rnn.pack_sequence(list(requests), enforce_sorted=False))
    y, lengths = nn.utils.rnn.pad_packed_sequence(out)
    return [y[:t, i] for i, t in enumerate(lengths.tolist())]


def whole(clock: Clock, work: Work, name: str, count: int, rounds: int) -> dict[str, Any]:
    """Requests a second, host included, all of them given at once."""
    model = work.model
    assert isinstance(model, nn.RNNBase)
    requests = requests_of(count, model.input_size, next(model.parameters()))
    with compiling(clock, work, 1024, name) as compiled:
        ways: dict[str, Callable[[], list[Tensor]]] = {
            "cudnn_packed": lambda: packed(model, requests),
            "cellc": lambda: [y for y, _ in compiled.map(requests)],
        }
        for _ in range(3):
            same(ways["cellc"](), ways["cudnn_packed"](), name)
        rates: dict[str, list[float]] = {k: [] for k in ways}
        for _ in range(rounds):
            for k, way in ways.items():
                clock.synchronize()
                start = time.perf_counter()
                way()
                clock.synchronize()
                rates[k].append(count / (time.perf_counter() - start))
        stats = compiled.stats()
    found: dict[str, Any] = {k: statistics.median(v) for k, v in rates.items()}
    return {"cell": work.name, "dtype": name, "requests": count, **found,
            "launches": stats["launches"], "rows": stats["rows"]}  # fmt: skip


# -- the command -----------------------------------------------------------------------------------


def show(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:,.1f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cellc.bench.gpu", description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["f32", "tf32", "bf16"], choices=DTYPES)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="measure tiles first, and keep them")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file as well")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="on the CPU, in Triton's interpreter, to see that all of it runs: no figure means "
        "anything",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run(arguments().parse_args(argv), Console(highlight=False, width=120))


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure; returns all figures. Raises SystemExit where there is no GPU, or results differ."""
    if args.dry_run:
        if not interpreting():
            raise SystemExit("--dry-run needs TRITON_INTERPRET=1")
    elif not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU that torch sees (torch.cuda.is_available())")
    clock = Clock("cpu" if args.dry_run else "cuda")
    found: dict[str, Any] = {"card": clock.name, "torch": torch.__version__}
    found |= {"ceilings": clock.ceilings(), "steps": [], "launches": [], "whole": []}
    console.print(f"{clock.name}, torch {torch.__version__}: {found['ceilings']}")
    for kind in args.cells:
        for hidden in args.hidden:
            for name in args.dtypes:
                work = gpu_work.make(kind, hidden, name, clock.device)
                if args.tune and clock.real:
                    tune_work(console, clock, work, name)
                rows = steps(clock, work, name, args.batches, found["ceilings"])
                show(console, f"{work.name} {name}, a step on the device", rows)
                found["steps"] += rows
                costs = launches(clock, work, name, min(64, max(args.batches)))
                show(console, f"{work.name} {name}, a launch", costs)
                found["launches"] += costs
                if kind in KINDS:
                    found["whole"].append(whole(clock, work, name, args.requests, args.rounds))
                if args.json:
                    with open(args.json, "w") as file:
                        json.dump(found, file, indent=1)
    show(console, "whole requests a second", found["whole"])
    return found


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
