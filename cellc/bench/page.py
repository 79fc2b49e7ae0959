"""`docs/benchmarks.md`: what benchmarks found, as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cellc.bench.case import Outcome
from cellc.bench.found import Found, Measured
from cellc.bench.online_figures import OnlineOutcome
from cellc.bench.sheets import Sheet, as_markdown, online_sheet, sheets_of

_ONLINE = (
    "Latency in ms from the arrival that was drawn beforehand to the result, of cellc (`submit`) "
    "and of a dynamic batcher around padded PyTorch batches (PyTorch one at a time for a model of "
    "yours) in a process of its own, which answer the same requests. At each load the batcher's "
    "best configurations (buckets of 10 or one queue; timeouts of 0, 1, 2, 5, 10 ms) are searched "
    "for: the two most promising are measured, beside buckets of 10 with a timeout of 10 ms. The "
    "load generator is a thread beside each server, and takes part of the cores from both."
)


def page(found: Found, summaries: Sequence[tuple[str, Sheet]], picture: str = "") -> str:
    """Summaries (each with the command that prints it), where cellc is slower, then every table.
    `picture`: the link to what `--plot` drew.
    """
    parts = ["# Benchmarks", _introduction(found)]
    if slower := [*_slower(found), *_later(found)]:
        parts += ["Where something else is faster than cellc's fastest way:", "\n".join(slower)]
    for command, sheet in summaries:
        parts += [f"## {sheet.title}", f"`{command}`", as_markdown(sheet)]
    drawn = [f"![figures, drawn by --plot]({picture})"] if picture else []
    if not found.online:
        parts += drawn
    for measured in found.cases:
        parts += _section(measured, found.noisy)
    if found.online:
        parts += ["## Requests as they come", _ONLINE, *drawn]
    for served in found.online:
        sheet = online_sheet(served.outcome, anyway=found.noisy)
        parts += [f"### {sheet.title}", _command(served), as_markdown(sheet)]
    return "\n\n".join(parts) + "\n"


def _introduction(found: Found) -> str:
    dates = sorted({m.date for m in found.all})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "no day yet"
    shapes = dict.fromkeys(f"{m.requests} requests, {m.lengths}" for m in found.all)
    return (
        f"Measured on {when}, on {found.machine}, {found.threads} threads, torch {found.torch}: "
        f"{'; '.join(shapes)}. All ways of a table were checked for equal results first; rounds "
        "alternate, and those in which other programs used the machine are dropped. This page is "
        "written by `cellc bench --targets --paper --peers --markdown FILE`, and by its parts: "
        "`cellc bench WORKLOAD --from figures.json --json figures.json` adds one (`--online` its "
        "latencies), `cellc bench --from figures.json --targets --paper --peers --markdown FILE` "
        "writes what is there, and `--plot` a picture beside it (with `--online`, of latencies "
        "only). GPU: `gpu.md`. What varies in latencies: `online.md`. How peers are tuned: "
        "`peers.md`."
    )


def _command(measured: Measured[OnlineOutcome] | Measured[Outcome]) -> str:
    return f"`{measured.command}`, {measured.date}"


def _section(measured: Measured[Outcome], anyway: bool) -> Iterator[str]:
    for number, sheet in enumerate(sheets_of(measured.outcome, anyway=anyway)):
        yield f"## {sheet.title}"
        if not number:
            yield _command(measured)
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


def _later(found: Found) -> Iterator[str]:
    """Loads under which the peer's best answers sooner."""
    for measured in found.online:
        outcome = measured.outcome
        for f in outcome.figures if outcome.quiet or found.noisy else ():
            if f.best and f.p90_to_cellc < 1:
                load = f"{outcome.title}, {f.share:.0%} of the peer's peak"
                yield f"- {load}: {f.server}, p90 {f.p90_to_cellc:.2f}x of cellc's"
