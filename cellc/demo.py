"""`cellc demo`: the main job, end to end on real text.

Duty: compile a classifier, show its cells, prove that its results equal PyTorch's, measure
throughput and latency against padded batching, print tables, write the report. Comes in: a
`Config`; goes out: an exit code and an HTML file.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cellc import report
from cellc.bench import measure as bench
from cellc.bench.batch_server import MAX_BATCH, WIDTH
from cellc.compiled import Compiled
from cellc.demo_measure import (
    ATOL,
    RTOL,
    Config,
    Demo,
    compare,
    compare_alone,
    compare_many,
    measure_loads,
)
from cellc.demo_steps import Steps
from cellc.demo_text import load_corpus, make_model
from cellc.entry import compile
from cellc.errors import UsageError
from cellc.inspect import cells_table
from cellc.report import Comparison, Findings, LoadRow
from cellc.survey import Survey, survey


def config(seconds: float | None, output: str, *, quick: bool) -> Config:
    """From the command line."""
    path = Path(output)
    if quick:
        chosen = Config(
            path, True, hidden=32, max_tokens=24, num_sentences=64, at_once=32, rounds=2,
            sample_seconds=0.01, shares=(0.4, 0.7), seconds=0.2, load_rounds=1, patience=0.5,
        )  # fmt: skip
    else:
        chosen = Config(path)
    return chosen if seconds is None else replace(chosen, seconds=seconds)


def run(chosen: Config, console: Console) -> int:
    """The demo; returns its exit code: 1 where a result differs from PyTorch's."""
    if not chosen.output.parent.is_dir():
        raise UsageError(f"there is no folder {chosen.output.parent} to write the report to")
    corpus = load_corpus(chosen.max_tokens, chosen.num_sentences)
    model = make_model(corpus.vocabulary, chosen.hidden)
    demo = Demo(chosen, console, Steps(console), corpus, model)
    console.print(_text(demo), markup=False)
    with compile(model) as compiled:
        with demo.steps.step("finding cells, generating kernels"):
            found = survey(compiled, corpus.sentences)
        console.print(cells_table(found, "Cells found; calls in the longest sentence"))
        error = _check(demo, compiled)
        if error is None:
            return 1
        comparisons = [compare_many(demo, compiled), compare_alone(demo, compiled)]
        loads = measure_loads(demo, compiled)
        if loads is None:
            return 1
    findings = _findings(demo, found, error, comparisons, loads)
    _print(findings, console)
    _write(report.page(findings), chosen.output)
    console.print(f"wrote {chosen.output}", markup=False)
    return 0


def _text(demo: Demo) -> str:
    lengths = demo.corpus.lengths
    return (
        f"{len(lengths):,} distinct sentences of Python {platform.python_version()}'s own "
        f"documentation, {min(lengths)} to {max(lengths)} tokens long, mean "
        f"{statistics.mean(lengths):.1f}, vocabulary {demo.corpus.vocabulary:,}; embedding, LSTM "
        f"of {demo.config.hidden} hidden units, linear layer; random weights, f32."
    )


# -- equality --------------------------------------------------------------------------------------


def _check(demo: Demo, compiled: Compiled) -> float | None:
    """Largest difference of all results to `model(x)`, or None where one is wrong."""
    sentences = demo.corpus.sentences
    with demo.steps.step("running model(x) on each sentence", len(sentences)) as tick:
        for sentence in sentences:
            with torch.inference_mode():
                demo.expected.append(demo.model(sentence))
            tick()
    results = compiled.map(sentences)
    error = compare(demo, results, range(len(sentences)), "compiled.map")
    if error is not None:
        demo.console.print(
            f"equal: all {len(results):,} results are model(x)'s, largest difference {error:.2g} "
            f"(allowed: rtol {RTOL:g}, atol {ATOL:g})",
            markup=False,
        )
    return error


# -- the end ---------------------------------------------------------------------------------------


def _findings(
    demo: Demo,
    found: Survey,
    error: float,
    comparisons: Sequence[Comparison],
    loads: Sequence[LoadRow],
) -> Findings:
    kernels = dict.fromkeys(name for cell in found.cells for name in cell.kernels)
    return Findings(
        machine=[
            ("processor", bench.machine_name()),
            ("cores", str(os.cpu_count() or 1)),
            ("threads of PyTorch and cellc", str(torch.get_num_threads())),
            ("PyTorch", torch.__version__),
            ("Python", platform.python_version()),
            ("kernels", ", ".join(kernels)),
        ],
        text=_text(demo),
        how=_how(demo),
        cells=found.cells,
        checked=len(demo.corpus.sentences),
        max_error=error,
        comparisons=comparisons,
        loads=loads,
        others=max(demo.others, default=None),
        quick=demo.config.quick,
    )


def _how(demo: Demo) -> list[str]:
    chosen = demo.config
    return [
        "Both sides get the same token tensors and use the same weights and number of threads.",
        f"Throughput: median of {chosen.rounds} rounds, each the median of its runs, sides "
        "alternated, both warmed up. PyTorch "
        f"sorts sentences by length, pads buckets of width {WIDTH}, and takes each sentence's last "
        "state, in inference mode. A sentence alone: compiled(x) against model(x).",
        f"Load: Poisson arrivals, open loop, {chosen.load_rounds} runs of "
        f"{chosen.seconds / chosen.load_rounds:g} s for each server and rate, equal arrivals, "
        "servers alternated. Latency counts from the scheduled arrival.",
        f"The padded server batches by bucket, at most {MAX_BATCH} sentences; it runs when a "
        "bucket is full or its oldest request has waited. Its peak is what it served of "
        f"{len(demo.corpus.sentences):,} sentences that were all there at once.",
        "The padded servers run in a process of their own, each server beside a load generator of "
        "its own; a process that isn't measured sleeps.",
        "Results under load were compared with model(x) too. During the load Python's garbage "
        "collector looked at new objects only (gc.freeze), for all servers alike: a full "
        "collection stops every thread for a few hundred ms.",
        "Where the system tells how busy it is, rounds in which other programs took "
        f"{report.QUIET:.0%} of the machine or more were repeated (for {chosen.patience:g} seconds "
        "in all) and the quietest kept.",
    ]


def _print(found: Findings, console: Console) -> None:
    for title, head, rows in (
        ("Throughput", report.THROUGHPUT_HEAD, report.throughput_rows(found)),
        ("Latency under Poisson load", report.LOAD_HEAD, report.load_rows(found)),
    ):
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in (*report.caveats(found), report.sentence(found)):
        console.print(line, markup=False)


def _write(text: str, path: Path) -> None:
    """All of the file, or nothing."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
