"""Plots of what `cellc bench` measured: bars of throughput, latency against load.

Duty: outcomes to one picture, a panel each. matplotlib is an extra: `check` says so before
anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cellc.bench.case import Outcome
from cellc.bench.online_figures import CELLC, LoadFigure, OnlineOutcome
from cellc.errors import UsageError

COLORS = ("#4c72b0", "#8c8c8c", "#dd8452", "#55a868", "#c44e52", "#8172b3")
OURS = COLORS[2]
LINES = {"p50": ":", "p90": "-", "p99": "--"}
WIDTH = 12.0  # inches, as all lengths here
BAR, PANEL = 0.32, 3.2


def check(path: Path) -> None:
    """Raises UsageError where no such plot can be written."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'cellc[bench]'") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise UsageError(f"--plot {path}: a name ends in .png, .svg or .pdf")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no such folder")


def draw(path: Path, outcomes: Sequence[Outcome], online: Sequence[OnlineOutcome]) -> None:
    """Write the picture: offline outcomes first, in the order measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    outcomes = [o for o in outcomes if o.figures]  # costs and counts have no rates
    heights = [BAR * len(o.figures) + 0.9 for o in outcomes]
    heights += [PANEL if _num_loads(o) > 1 else BAR * len(o.figures) + 0.9 for o in online]
    if not heights:
        raise UsageError(f"--plot {path}: nothing was measured that can be drawn")
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, outcome in zip(panels, outcomes, strict=False):
        _bars(axes, outcome)
    for axes, one in zip(panels[len(outcomes) :], online, strict=True):
        (_curves if _num_loads(one) > 1 else _spreads)(axes, one)
    figure.savefig(path, dpi=64)


def _bars(axes: Any, outcome: Outcome) -> None:
    names = [f.way for f in outcome.figures]
    rates = [f.rate for f in outcome.figures]
    spread = [
        [f.rate - f.least for f in outcome.figures],
        [f.most - f.rate for f in outcome.figures],
    ]
    colors = [OURS if name.startswith(CELLC) else COLORS[0] for name in names]
    axes.barh(names, rates, xerr=spread, color=colors, ecolor="#555555")
    axes.invert_yaxis()
    axes.set_xlabel(f"{outcome.unit}/s, median; lines: least to most")
    axes.set_title(_titled(outcome.title, outcome.quiet), fontsize="medium")


def _curves(axes: Any, outcome: OnlineOutcome) -> None:
    for (label, figures), color in zip(_servers(outcome), _colors(), strict=False):
        of = sorted(figures, key=lambda f: f.offered)
        for name, style in LINES.items():
            axes.plot(
                [f.offered for f in of],
                [getattr(f, name) for f in of],
                linestyle=style,
                marker="o",
                markersize=3,
                color=color,
                label=label if name == "p90" else None,
            )
    axes.set_yscale("log")
    lines = ", ".join(f"{k} {_DRAWN[v]}" for k, v in LINES.items())
    axes.set_xlabel(f"requests/s offered; ms: {lines}")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize="small")
    axes.set_title(_titled(outcome.title, outcome.quiet), fontsize="medium")


def _spreads(axes: Any, outcome: OnlineOutcome) -> None:
    """Of one load: a line a server, from p50 to p99."""
    of = outcome.figures
    names = [f"{f.server} (best)" if f.best else f.server for f in of]
    colors = [OURS if f.server == CELLC else COLORS[0] for f in of]
    axes.hlines(names, [f.p50 for f in of], [f.p99 for f in of], colors=colors, linewidth=3)
    axes.scatter([f.p90 for f in of], names, color=colors, zorder=3)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"ms at {of[0].offered:,.0f} requests/s offered: p50 to p99, p90 a point")
    axes.set_title(_titled(outcome.title, outcome.quiet), fontsize="medium")


def _num_loads(outcome: OnlineOutcome) -> int:
    return len({f.share for f in outcome.figures})


_DRAWN = {":": "dotted", "-": "solid", "--": "dashed"}


def _servers(outcome: OnlineOutcome) -> list[tuple[str, list[LoadFigure]]]:
    """Curves: cellc; the peer at its best, which may be another configuration at each load; and
    configurations that were measured at every load.
    """
    figures, loads = outcome.figures, {f.share for f in outcome.figures}
    curves = []
    for name in dict.fromkeys(f.server for f in figures):
        of = [f for f in figures if f.server == name]
        if {f.share for f in of} == loads and not all(f.best for f in of):
            curves.append((name, of))
    best = f"{outcome.peer}, the best at each load"
    return [curves[0], (best, [f for f in figures if f.best]), *curves[1:]]


def _colors() -> list[str]:
    return [OURS, *(color for color in COLORS if color != OURS)]


def _titled(title: str, quiet: bool) -> str:
    return title if quiet else f"{title} (others used the machine)"
