"""What a simulation found, for the console, as JSON, and as a plot.

Duty: plain data to tables and one picture, a panel for latencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cellc.bench.plots import COLORS, OURS
from cellc.simulation.curves import Host
from cellc.simulation.runs import CELLULAR, Figure

SHOWN = (1, 8, 64, 512)  # rows whose costs are printed


@dataclass(frozen=True)
class CellCost:
    """A cell, and seconds of a step at SHOWN rows."""

    name: str
    flops: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """All figures of one simulation; `device`: whose costs; `source`: where they are from."""

    application: str
    device: str
    source: str
    devices: int
    max_batch: int
    host: Host
    cells: Sequence[CellCost]
    arrivals: str
    lengths: str
    figures: Sequence[Figure]
    seconds: float  # that simulating took

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        for samples in ("tape", "slower", "lag"):
            del found["host"][samples]
        return found

    @property
    def title(self) -> str:
        many = f"{self.devices} x " if self.devices > 1 else ""
        return f"{self.application}: {many}{self.device}"


def table_of(outcome: Outcome) -> Table:
    """For the console."""
    table = Table(title=outcome.title, title_justify="left")
    table.add_column("load")
    table.add_column("batching")
    timed = any(f.in_time is not None for f in outcome.figures)
    names = ["requests/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "mean batch", "busy"]
    for name in [*names, *(["in time"] if timed else [])]:
        table.add_column(name, justify="right")
    above: str | None = None
    for f in outcome.figures:
        load = _load(f)
        if above not in (None, load):
            table.add_section()
        offered = "" if f.offered is None else f"{f.offered:,.0f}"
        table.add_row(load if load != above else "", f.batching, offered, *_cells(f))
        above = load
    host = outcome.host
    costs = "; ".join(
        f"{c.name} {', '.join(f'{s * 1e6:,.0f}' for s in c.seconds)} us" for c in outcome.cells
    )
    simulated = sum(f.requests for f in outcome.figures)
    table.caption = (
        f"costs: {outcome.source}; {outcome.arrivals}; {outcome.lengths}; "
        f"at most {outcome.max_batch} rows a step; host "
        f"{host.turn * 1e6:.0f} us a launch and {host.request * 1e6:.0f} a request; a step of "
        f"{', '.join(map(str, SHOWN))} rows: {costs}; load: of the peak of the best batching of "
        f"whole requests; mean batch: rows a step, of padded batches requests; "
        f"{simulated:,} requests simulated in {outcome.seconds:.1f} s"
    )
    return table


def _load(f: Figure) -> str:
    if f.offered is None:
        return "at once"
    return "given" if f.share is None else f"{f.share:.0%}"


def _cells(f: Figure) -> list[str]:
    latencies = (f"{ms:,.3g}" if ms < 1000 else f"{ms:,.0f}" for ms in (f.p50, f.p90, f.p99))
    in_time = [] if f.in_time is None else [f"{f.in_time:.1%}"]
    return [f"{f.answered:,.0f}", *latencies, f"{f.batch:,.1f}", f"{f.busy:.0%}", *in_time]


def draw(path: Path, outcome: Outcome) -> None:
    """p50 and p90 against what was answered; one curve for each way of batching."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(7.0, 3.2), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    loads = [f for f in outcome.figures if f.offered is not None]
    names = list(dict.fromkeys(f.batching for f in loads))
    colors = iter([c for c in COLORS if c != OURS])
    for name in names:
        of = [f for f in loads if f.batching == name]
        color = OURS if name == CELLULAR else next(colors)
        at = [f.offered or 0.0 for f in of]
        axes.plot(at, [f.p90 for f in of], "o-", markersize=3, color=color, label=name)
        axes.plot(at, [f.p50 for f in of], "o:", markersize=3, color=color)
    axes.set_yscale("log")
    axes.set_xlabel("requests/s offered")
    axes.set_ylabel("ms: p50 dotted, p90 solid")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set_title(outcome.title, fontsize="medium")
    picture.savefig(path, dpi=80)
