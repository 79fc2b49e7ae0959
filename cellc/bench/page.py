"""`docs/benchmarks.md`: what benchmarks found, as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cellc.bench.case import Outcome
from cellc.bench.found import Found, Measured
from cellc.bench.sheets import Sheet, as_markdown, sheets_of


def page(found: Found, summaries: Sequence[tuple[str, Sheet]]) -> str:
    """Summaries (each with the command that prints it), where cellc is slower, then every table."""
    parts = ["# Benchmarks", _introduction(found)]
    if slower := list(_slower(found)):
        parts += ["Where something else is faster than cellc's fastest way:", "\n".join(slower)]
    for command, sheet in summaries:
        parts += [f"## {sheet.title}", f"`{command}`", as_markdown(sheet)]
    for measured in found.cases:
        parts += _section(measured, found.noisy)
    return "\n\n".join(parts) + "\n"


def _introduction(found: Found) -> str:
    dates = sorted({m.date for m in found.cases})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "no day yet"
    shapes = dict.fromkeys(f"{m.requests} requests, {m.lengths}" for m in found.cases)
    return (
        f"Measured on {when}, on {found.machine}, {found.threads} threads, torch {found.torch}: "
        f"{'; '.join(shapes)}. All ways of a table were checked for equal results first; rounds "
        "alternate, and those in which other programs used the machine are dropped. This page is "
        "written by `cellc bench --targets --paper --markdown FILE`, and by its parts: "
        "`cellc bench WORKLOAD --from figures.json --json figures.json` adds one, "
        "`cellc bench --from figures.json --targets --paper --markdown FILE` writes what is there. "
        "GPU: `gpu.md`."
    )


def _section(measured: Measured, anyway: bool) -> Iterator[str]:
    for number, sheet in enumerate(sheets_of(measured.outcome, anyway=anyway)):
        yield f"## {sheet.title}"
        if not number:
            yield f"`{measured.command}`, {measured.date}"
        yield as_markdown(sheet)


def _slower(found: Found) -> Iterator[str]:
    for measured in found.cases:
        outcome = measured.outcome
        if (outcome.quiet or found.noisy) and (line := _lost(outcome)):
            yield f"- {outcome.title}: {line}"


def _lost(outcome: Outcome) -> str:
    """By whom, and how much; nothing where cellc is the fastest."""
    ours = [f for f in outcome.figures if f.way.startswith("cellc")]
    others = [f for f in outcome.figures if not f.way.startswith("cellc")]
    if not ours or not others:
        return ""
    our, other = (max(ways, key=lambda f: f.rate) for ways in (ours, others))
    ratio = outcome.ratio(other.way, our.way)
    return f"{other.way} {ratio:.2f}x" if ratio and ratio > 1 else ""
