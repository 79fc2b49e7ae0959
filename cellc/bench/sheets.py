"""Outcomes as tables of text, for the console and for Markdown.

Duty: words for figures and facts. What was measured while others used the machine is not quoted,
unless `anyway`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from cellc.bench.case import Outcome
from cellc.bench.online_figures import CELLC, LoadFigure, OnlineOutcome
from cellc.report import QUIET

DISTURBED = "disturbed"


@dataclass(frozen=True)
class Sheet:
    """One table: columns of text, `left` of them, then of numbers. Where the first cell of a row is
    empty, the row belongs to the one above; `grouped`: a line is drawn between such groups.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: str = ""
    left: int = 1
    grouped: bool = False


def sheets_of(outcome: Outcome, *, anyway: bool = False) -> list[Sheet]:
    """The rates, then the facts; notes of the first name what was not measured."""
    quoted = outcome.quiet or anyway
    notes = _notes(outcome, anyway)
    sheets = []
    if outcome.figures:
        sheets.append(_rates(outcome, quoted, notes))
    if outcome.facts or not outcome.figures:
        rows = [(k, number(v) if quoted else DISTURBED) for k, v in outcome.facts.items()]
        title = outcome.title + (": costs and counts" if outcome.figures else "")
        sheets.append(Sheet(title, ("what", "value"), rows, "" if outcome.figures else notes))
    return sheets


def _rates(outcome: Outcome, quoted: bool, notes: str) -> Sheet:
    bases = [outcome.base, *outcome.against]
    rows: list[list[str]] = []
    for f in outcome.figures:
        if quoted:
            ratios = [_times(outcome.ratio(f.way, base)) for base in bases]
            rows.append([f.way, f"{f.rate:,.0f}", f"{f.least:,.0f} to {f.most:,.0f}", *ratios])
        else:
            rows.append([f.way, DISTURBED, *[""] * (1 + len(bases))])
    columns = ("way", f"{outcome.unit}/s", "least to most", *(f"to {base}" for base in bases))
    return Sheet(outcome.title, columns, rows, notes)


def online_sheet(outcome: OnlineOutcome, *, anyway: bool = False) -> Sheet:
    """Latency against load: every server under every load."""
    quoted, rows, above = outcome.quiet or anyway, [], -1.0
    for f in outcome.figures:
        load = "" if f.share == above else f"{f.share:.0%}"
        above = f.share
        cells = _latencies(f) if quoted else [DISTURBED, *[""] * 6]
        rows.append([load, f"{f.server} (best)" if f.best else f.server, *cells])
    columns = (
        *("load", "server", "requests/s", "answered/s", "p50 ms", "p90 ms", "p99 ms"),
        *("p90 least to most", f"p90 to {CELLC}'s"),
    )
    peaks = (
        f"load: of the peer's peak, {outcome.peak:,.0f} requests/s ({outcome.policy}); {CELLC}'s "
        f"own is {outcome.own_peak:,.0f}; arrivals: {outcome.arrivals}"
    )
    notes = f"{peaks}; {_notes(outcome, anyway)}"
    return Sheet(outcome.title, columns, rows, notes, left=2, grouped=True)


def _latencies(f: LoadFigure) -> list[str]:
    spread = f"{f.p90_least:.3g} to {f.p90_most:.3g}"
    latencies = (f"{ms:.3g}" for ms in (f.p50, f.p90, f.p99))
    return [f"{f.offered:,.0f}", f"{f.achieved:,.0f}", *latencies, spread, f"{f.p90_to_cellc:.2f}x"]


def _notes(outcome: Outcome | OnlineOutcome, anyway: bool) -> str:
    parts = []
    if outcome.figures:
        parts.append(f"medians of {outcome.figures[0].rounds} alternated rounds")
    parts.append(f"{outcome.dropped} rounds dropped")
    share = outcome.others
    quiet = "what else ran is not known" if share is None else f"others took up to {share:.0%}"
    if not outcome.quiet:
        quiet += f" of the machine, more than the {QUIET:.0%} of a quiet one"
        quiet += "" if anyway else ": not quoted (--noisy does)"
    parts.append(quiet)
    if outcome.figures:
        parts.append(f"largest difference {outcome.largest_difference:.1e}")
    if isinstance(outcome, Outcome):
        parts += [f"{way}: {why}" for way, why in outcome.missing.items()]
    return "; ".join(parts)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def number(value: float) -> str:
    """Three digits, or all before the point.

    >>> number(1234.5), number(3.14159), number(0.0)
    ('1,234', '3.14', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def as_table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, caption=sheet.notes)
    for i, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if i < sheet.left else "right")
    for i, row in enumerate(sheet.rows):
        if i and sheet.grouped and row[0]:
            table.add_section()
        table.add_row(*row)
    return table


def as_markdown(sheet: Sheet) -> str:
    """The table alone, with what is to be said of it below."""
    rows = [sheet.columns, ["---"] * len(sheet.columns), *sheet.rows]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    notes = f"\n\n{sheet.notes[0].upper()}{sheet.notes[1:]}." if sheet.notes else ""
    return "\n".join(lines) + notes
