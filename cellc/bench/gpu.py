"""LSTM and GRU on a GPU: cellc's generated kernels against cuDNN, on the same weights.
`python -m cellc.bench.gpu`.

A step is timed on the device alone, from a CUDA graph of the launches that the runtime made for B
requests of equal length; cuDNN runs the same B sequences as one padded batch. Then whole requests
of different lengths, host included. Results are checked against each other first; rounds alternate.
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

from cellc.compiled import Compiled
from cellc.entry import compile
from cellc.launch import Bindable, Kernel, Launch

STEPS = 24
BATCHES = (1, 8, 64, 256, 512, 1024)
KINDS: Mapping[str, Callable[[int, int], nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU}
GATES = {"lstm": 4, "gru": 3}
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"f32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}


class Recorded:
    """A kernel that keeps what it was launched with."""

    def __init__(self, kernel: Kernel, kept: list[tuple[Kernel, Launch]]) -> None:
        self.source, self._kernel, self._kept = kernel.source, kernel, kept

    def __call__(self, launch: Launch, arenas: Any) -> Sequence[int]:
        self._kept.append((self._kernel, launch))
        return self._kernel(launch, arenas)


def seconds(run: Callable[[], object], times: int = 20) -> float:
    """Median time on the device of a call, which may be a graph's replay."""
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(True) for _ in "ab")  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return float(statistics.median(found))


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """A call as a CUDA graph, where it can be captured."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def make(kind: str, hidden: int, name: str) -> nn.RNNBase:
    torch.manual_seed(0)
    exact = name != "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
    model = KINDS[kind](hidden, hidden).eval().requires_grad_(False)
    model = model.to("cuda", DTYPES[name])
    model.flatten_parameters()
    return model


def same(got: Sequence[Tensor], want: Sequence[Tensor], name: str) -> None:
    """Stop where results differ."""
    for a, b in zip(got, want, strict=True):
        error = float(torch.norm((a - b).float()) / torch.norm(b.float()))
        if not error <= TOLERANCE[name]:
            raise SystemExit(f"cellc and cuDNN differ by {error:.1e} ({name})")


def steps(kind: str, hidden: int, name: str, batches: Sequence[int]) -> list[dict[str, Any]]:
    """Microseconds a step on the device at every batch size."""
    model, rows = make(kind, hidden, name), []
    for B in batches:
        x = torch.randn(STEPS, B, hidden, device="cuda", dtype=DTYPES[name])
        requests = [x[:, i] for i in range(B)]
        with compile(model, max_batch=max(batches), options={"tf32": name == "tf32"}) as compiled:
            compiled.map(requests)
            got = [y for y, _ in compiled.map(requests)]
            same(got, list(model(x)[0].unbind(1)), name)
            replay = graphed(again(compiled, recorded(compiled, requests)))
            cudnn = graphed(partial(model, x))
            ours, theirs = [], []
            for _ in range(3):
                theirs.append(seconds(cudnn))
                ours.append(seconds(replay))
        flops = 2 * B * 2 * GATES[kind] * hidden * hidden
        weights = 2 * GATES[kind] * hidden * hidden * x.element_size()
        a, b = (statistics.median(t) / STEPS for t in (ours, theirs))
        rows.append(
            {
                "cell": f"{kind}-{hidden}", "dtype": name, "B": B, "cellc_us": a * 1e6,
                "cudnn_us": b * 1e6, "tflops": flops / a / 1e12, "weights_gb_s": weights / a / 1e9,
            }
        )  # fmt: skip
    return rows


def recorded(compiled: Compiled, requests: Sequence[Tensor]) -> list[tuple[Kernel, Launch]]:
    """The launches that these requests need together, in order."""
    kept: list[tuple[Kernel, Launch]] = []
    kernels = compiled._compiler.kernels
    plain = dict(kernels)
    kernels.update({k: Recorded(v, kept) for k, v in plain.items()})
    compiled._engine._replays.clear()
    compiled.map(requests)
    kernels.update(plain)
    compiled._engine._replays.clear()
    return kept


def again(compiled: Compiled, kept: Sequence[tuple[Kernel, Launch]]) -> Callable[[], None]:
    """Those of generated kernels, to run again: uploaded once."""
    arenas = compiled._engine._arenas
    runs = [k.bind(launch, arenas) for k, launch in kept if isinstance(k, Bindable)]

    def run() -> None:
        for one in runs:
            one()

    return run


def tune_model(console: Console, kind: str, hidden: int, name: str) -> None:
    """Measure tiles for the kernels of a model and keep the best for this card."""
    from cellc.kernels.triton_backend import TritonKernel
    from cellc.kernels.triton_tune import keep_best, tune

    model, found = make(kind, hidden, name), dict[int, tuple[TritonKernel, list[Launch]]]()
    with compile(model, max_batch=512, options={"tf32": name == "tf32"}) as compiled:
        for B in (64, 256, 512):
            x = torch.randn(STEPS, B, hidden, device="cuda", dtype=DTYPES[name])
            compiled.map([x[:, i] for i in range(B)])
            for kernel, launch in recorded(compiled, [x[:, i] for i in range(B)]):
                if isinstance(kernel, TritonKernel):
                    launches = found.setdefault(id(kernel), (kernel, []))[1]
                    if all(int(kept.steps[1]) != int(launch.steps[1]) for kept in launches):
                        launches.append(launch)
        for kernel, launches in found.values():
            start = time.perf_counter()
            timed = tune(kernel, launches, compiled._engine._arenas)
            keep_best(kernel, timed)
            for choices in timed:
                took = time.perf_counter() - start
                console.print(f"{choices[0].kernel.name} {name}: {len(choices)} in {took:.0f} s")
                refused = [t for t in choices if t.refusal]
                for t in refused[:1]:
                    console.print(f"  {len(refused)} refused, as {t.tiles}: {t.refusal[:200]}")
                for t in choices[:4]:
                    us = {n: f"{s * 1e6:.1f} us" for n, s in t.seconds.items()}
                    console.print(f"  {t.tiles} {us}")


def requests_of(count: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """Lengths of 4 to 60, mean 24."""
    draw = random.Random(0)
    lengths = [min(60, max(4, round(draw.gauss(24, 11)))) for _ in range(count)]
    return [torch.randn(t, hidden, device="cuda", dtype=dtype) for t in lengths]


def packed(model: nn.RNNBase, requests: Sequence[Tensor]) -> list[Tensor]:
    """cuDNN on one packed sequence."""
    out, _ = model(nn.utils.rnn.pack_sequence(list(requests), enforce_sorted=False))
    y, lengths = nn.utils.rnn.pad_packed_sequence(out)
    return [y[:t, i] for i, t in enumerate(lengths.tolist())]


def whole(kind: str, hidden: int, name: str, count: int, rounds: int) -> dict[str, Any]:
    """Requests a second, host included, all of them given at once."""
    model, requests = make(kind, hidden, name), requests_of(count, hidden, DTYPES[name])
    with compile(model, max_batch=1024, options={"tf32": name == "tf32"}) as compiled:
        ways: dict[str, Callable[[], list[Tensor]]] = {
            "cudnn_packed": lambda: packed(model, requests),
            "cellc": lambda: [y for y, _ in compiled.map(requests)],
        }
        for _ in range(3):
            same(ways["cellc"](), ways["cudnn_packed"](), name)
        rates: dict[str, list[float]] = {k: [] for k in ways}
        for _ in range(rounds):
            for k, way in ways.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                way()
                torch.cuda.synchronize()
                rates[k].append(count / (time.perf_counter() - start))
        stats = compiled.stats()
    found: dict[str, Any] = {k: statistics.median(v) for k, v in rates.items()}
    return {"cell": f"{kind}-{hidden}", "dtype": name, "requests": count, **found,
            "launches": stats["launches"], "rows": stats["rows"]}  # fmt: skip


def ceilings() -> dict[str, float]:
    """What the card gives: a large product in bf16 and f32, and a copy."""
    found = {}
    for name, dtype in (("bf16_tflops", torch.bfloat16), ("f32_tflops", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = False
        a = torch.randn(4096, 4096, device="cuda", dtype=dtype)
        run = graphed(partial(torch.mm, a, a))
        found[name] = 2 * 4096**3 / seconds(run) / 1e12
    x = torch.empty(1 << 28, device="cuda")
    y = torch.empty_like(x)
    found["copy_gb_s"] = 2 * x.numel() * 4 / seconds(lambda: y.copy_(x)) / 1e9
    return found


def show(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:,.1f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cellc.bench.gpu", description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["f32", "tf32", "bf16"], choices=DTYPES)
    parser.add_argument("--cells", nargs="+", default=["lstm", "gru"], choices=KINDS)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="measure tiles first, and keep them")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file as well")
    args, console = parser.parse_args(), Console(highlight=False, width=120)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU that torch sees (torch.cuda.is_available())")
    card = torch.cuda.get_device_name()
    found: dict[str, Any] = {"card": card, "torch": torch.__version__, "ceilings": ceilings()}
    found |= {"steps": [], "whole": []}
    console.print(f"{card}, torch {torch.__version__}: {found['ceilings']}")
    for kind in args.cells:
        for hidden in args.hidden:
            for name in args.dtypes:
                if args.tune:
                    tune_model(console, kind, hidden, name)
                rows = steps(kind, hidden, name, args.batches)
                show(console, f"{kind}-{hidden} {name}, a step on the device", rows)
                found["steps"] += rows
                found["whole"].append(whole(kind, hidden, name, args.requests, args.rounds))
                if args.json:
                    with open(args.json, "w") as file:
                        json.dump(found, file, indent=1)
    show(console, "whole requests a second", found["whole"])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
