"""The demo's report: what was measured, as data, as one sentence, and as a page of HTML.

Duty: words and a page for `Findings`, which hold measured numbers only. Comes in from `cellc.demo`;
goes out: a sentence for the console, and self-contained HTML, readable in light and dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from cellc.report_chart import Curve, latency_chart
from cellc.survey import CellReport, short_ops

CELLULAR = "cellc"
QUIET = 0.08  # a machine is quiet where other programs take less of it


@dataclass(frozen=True)
class Comparison:
    """One amount for both sides; `better` is how many times better cellc's is."""

    what: str
    cellular: str
    padded: str
    better: float


@dataclass(frozen=True)
class LoadRow:
    """Latencies in ms of one server under one load, from the scheduled arrival to the result."""

    server: str
    share: float  # of the padded server's peak
    rate: float  # requests a second
    requests: int
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Findings:
    """All that the demo found out."""

    machine: Sequence[tuple[str, str]]
    text: str  # what was served
    how: Sequence[str]  # how it was measured, a line each
    cells: Sequence[CellReport]
    checked: int
    max_error: float
    comparisons: Sequence[Comparison]
    loads: Sequence[LoadRow]
    others: float | None  # largest share of the machine that other programs took
    quick: bool


def sentence(found: Findings) -> str:
    """What came out, in one sentence of measured numbers."""
    many, alone = found.comparisons[:2]
    busy = found.others is not None and found.others >= QUIET
    where = f", while other programs took up to {found.others:.0%} of it, " if busy else ""
    parts = [
        f"On this machine{where or ' '}cellc ran {many.what} {many.better:.2f} times as fast as "
        f"bucketed padding in PyTorch ({many.cellular} against {many.padded})",
        f"{alone.what} in {alone.cellular} against {alone.padded}",
    ]
    load = _shown_load(found)
    if load:
        rivals = " and ".join(f"{row.p90:.2f} ms ({row.server})" for row in load[1:])
        parts.append(
            f"and at {load[0].share:.0%} of the padded server's peak, {load[0].rate:,.0f} requests "
            f"a second, its p90 latency was {load[0].p90:.2f} ms against {rivals}"
        )
    return ", ".join(parts) + "."


def caveats(found: Findings) -> list[str]:
    """What a reader must know to trust the numbers."""
    lines = []
    if found.quick:
        lines.append("This was a quick run with a small model: its numbers say nothing of speed.")
    if found.others is not None and found.others >= QUIET:
        lines.append(
            f"Other programs took up to {found.others:.0%} of this machine meanwhile, which slows "
            "PyTorch's threads more than cellc's: run it again on an idle machine."
        )
    return lines


def _shown_load(found: Findings) -> list[LoadRow]:
    """The rows of the load nearest to 70% of the peak, cellc's first."""
    if not found.loads:
        return []
    share = min((row.share for row in found.loads), key=lambda s: abs(s - 0.7))
    rows = [row for row in found.loads if row.share == share]
    return sorted(rows, key=lambda row: row.server != CELLULAR)


# -- tables ----------------------------------------------------------------------------------------

THROUGHPUT_HEAD = ("", "cellc", "PyTorch, padded", "cellc is better by")
LOAD_HEAD = ("load", "requests/s", "server", "requests", "p50 ms", "p90 ms", "p99 ms")


def throughput_rows(found: Findings) -> Iterator[tuple[str, ...]]:
    for row in found.comparisons:
        yield row.what, row.cellular, row.padded, f"{row.better:.2f}x"


def load_rows(found: Findings) -> Iterator[tuple[str, ...]]:
    for row in found.loads:
        yield (
            f"{row.share:.0%} of peak",
            f"{row.rate:,.0f}",
            row.server,
            f"{row.requests:,}",
            f"{row.p50:.2f}",
            f"{row.p90:.2f}",
            f"{row.p99:.2f}",
        )


# -- the page --------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --bg: #ffffff; --fg: #1c2530; --dim: #56606e; --line: #d5dae1;
  --s0: #1f6feb; --s1: #b45309; --s2: #7c3aed; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181d; --fg: #e4e8ed; --dim: #9aa5b1;
  --line: #343c46; --s0: #6cb0ff; --s1: #f2a65a; --s2: #b79cff; } }
body { background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.lead { font-size: 1.1rem; } .dim, figcaption { color: var(--dim); }
.note { border-left: 3px solid var(--s1); padding-left: .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; } .right td:nth-child(n+4), .right th:nth-child(n+4) { text-align: right; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
code { font-family: ui-monospace, Menlo, monospace; font-size: .9em; }
"""


def page(found: Findings) -> str:
    """Self-contained HTML; nothing is loaded from elsewhere."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>cellc demo</title><style>{_STYLE}</style></head><body>",
            "<h1>cellc demo: cellular against padded batching</h1>",
            f'<p class="lead">{escape(sentence(found))}</p>',
            *(f'<p class="note">{escape(line)}</p>' for line in caveats(found)),
            *_body(found),
            "</body></html>\n",
        ]
    )


def _body(found: Findings) -> Iterator[str]:
    yield f"<p>{escape(found.text)}</p>"
    yield (
        f"<p>Results of all {found.checked:,} distinct sentences were compared with "
        f"<code>model(x)</code>: largest absolute difference {found.max_error:.2g}.</p>"
    )
    yield "<h2>Throughput</h2>"
    yield _table(THROUGHPUT_HEAD, throughput_rows(found))
    yield "<h2>Latency under load</h2>"
    if found.loads:
        yield f"<figure>{latency_chart(_curves(found))}"
        yield (
            "<figcaption>Poisson arrivals; p90 solid, p50 dashed; logarithmic scale.</figcaption>"
        )
        yield "</figure>"
    yield _table(LOAD_HEAD, load_rows(found), "right")
    yield "<h2>Cells found</h2>"
    head = ("cell", "recurrent", "calls in the longest sentence", "FLOPs a row", "operations")
    yield _table(head, (_cell_row(cell) for cell in found.cells))
    yield "<h2>How it was measured</h2>"
    yield "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in found.how) + "</ul>"
    yield "<h2>Machine</h2>"
    yield _table((), found.machine)


def _cell_row(cell: CellReport) -> tuple[str, ...]:
    recurrent = "yes" if cell.recurrent else "no"
    return cell.name, recurrent, f"{cell.calls:,}", f"{cell.flops_per_row:,}", short_ops(cell.ops)


def _curves(found: Findings) -> list[Curve]:
    servers = dict.fromkeys(row.server for row in found.loads)
    return [
        Curve(
            server,
            [row.rate for row in found.loads if row.server == server],
            [row.p50 for row in found.loads if row.server == server],
            [row.p90 for row in found.loads if row.server == server],
        )
        for server in servers
    ]


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]],
           kind: str = "") -> str:  # fmt: skip
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><tr>{cells}</tr>{lines}</table></div>'
