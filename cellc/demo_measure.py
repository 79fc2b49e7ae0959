"""What the demo measures: throughput, one sentence alone, latency under load; and equality.

Duty: run both sides on the demo's sentences, check every result against `model(x)`, and say what
came out as `Comparison`s and `LoadRow`s. Called by `cellc.demo`, times with `cellc.bench.measure`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from cellc.bench import measure as bench
from cellc.bench.arrivals import Load, make_load
from cellc.bench.batch_server import Policy
from cellc.bench.measure import Patience, Round, Served
from cellc.bench.peer_process import PeerProcess
from cellc.compiled import Compiled
from cellc.demo_padded import Sentences, run_bucketed
from cellc.demo_steps import Steps
from cellc.demo_text import MAX_TOKENS, Classifier, Corpus
from cellc.report import CELLULAR, Comparison, LoadRow

RTOL, ATOL = 1e-4, 1e-5
AT_ONCE, WAITING = Policy(0.0), Policy(10.0)
Serve = Callable[[Load], Served]


@dataclass(frozen=True)
class Config:
    """Sizes of the demo; `rounds` and `load_rounds` are kept out of at most twice as many."""

    output: Path
    quick: bool = False
    hidden: int = 256
    max_tokens: int = MAX_TOKENS
    num_sentences: int = 1024
    at_once: int = 512
    rounds: int = 5
    sample_seconds: float = 0.2
    shares: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    seconds: float = 2.0
    load_rounds: int = 2
    patience: float = 15.0  # seconds for repeating what other programs disturbed


@dataclass
class Demo:
    """What the steps share."""

    config: Config
    console: Console
    steps: Steps
    corpus: Corpus
    model: Classifier
    expected: list[Tensor] = field(default_factory=list)
    others: list[float] = field(default_factory=list)  # share of the machine, a measurement
    pids: Sequence[int] = ()  # other processes of the demo
    patience: Patience = field(init=False)

    def __post_init__(self) -> None:
        self.patience = Patience(self.config.patience)

    def note(self, rounds: Sequence[Round[Any]]) -> None:
        share = bench.noise(rounds)
        if share is not None:
            self.others.append(share)


# -- equality --------------------------------------------------------------------------------------


def compare(
    demo: Demo, results: Sequence[Tensor], chosen: Sequence[int] | range, who: str
) -> float | None:
    """Largest difference to what is expected of the chosen sentences; None, and a message, if any
    is not close."""
    got, want = torch.stack(list(results)), torch.stack([demo.expected[i] for i in chosen])
    close = torch.isclose(got, want, rtol=RTOL, atol=ATOL).all(1)
    error = float((got - want).abs().max())
    if bool(close.all()):
        return error
    wrong = int((~close).sum())
    demo.console.print(
        f"MISMATCH: {wrong:,} of {len(close):,} results of {who} differ from model(x), by up to "
        f"{error:.3g}",
        markup=False,
    )
    return None


# -- throughput ------------------------------------------------------------------------------------


def compare_many(demo: Demo, compiled: Compiled) -> Comparison:
    """Many sentences at once: compiled.map against padded buckets."""
    sentences = demo.corpus.sentences[: demo.config.at_once]
    what = f"{len(sentences)} sentences at once"
    seconds = _against(
        demo, what, lambda: compiled.map(sentences), lambda: run_bucketed(demo.model, sentences)
    )
    ours, theirs = (f"{len(sentences) / s:,.0f} sentences/s" for s in seconds)
    return Comparison(what, ours, theirs, seconds[1] / seconds[0])


def compare_alone(demo: Demo, compiled: Compiled) -> Comparison:
    """One sentence of median length: compiled(x) against model(x)."""
    order = sorted(demo.corpus.sentences, key=len)
    sentence = order[len(order) // 2]

    def padded() -> None:
        with torch.inference_mode():
            demo.model(sentence)

    what = f"a sentence of {len(sentence)} tokens alone"
    seconds = _against(demo, what, lambda: compiled(sentence), padded)
    ours, theirs = (f"{s * 1e3:.3g} ms" for s in seconds)
    return Comparison(what, ours, theirs, seconds[1] / seconds[0])


def _against(
    demo: Demo, what: str, cellular: Callable[[], object], padded: Callable[[], object]
) -> list[float]:
    """Median seconds of both, alternated."""
    chosen = demo.config
    with demo.steps.step(f"measuring {what}"):
        works = [bench.repeat_for(work, chosen.sample_seconds) for work in (cellular, padded)]
        rounds = bench.alternate(works, chosen.rounds, 2 * chosen.rounds, demo.patience)
    demo.note(rounds)
    return bench.medians(rounds)


# -- load ------------------------------------------------------------------------------------------


def measure_loads(demo: Demo, compiled: Compiled) -> list[LoadRow] | None:
    """Latencies at each rate; None where a server answered wrongly."""
    chosen, sentences = demo.config, demo.corpus.sentences
    total = len(chosen.shares) * chosen.load_rounds
    described = Sentences(chosen.max_tokens, chosen.num_sentences, chosen.hidden)
    with (
        demo.steps.step("measuring latency under load", total) as tick,
        PeerProcess(described, torch.get_num_threads()) as padded,
        bench.no_long_pauses(),
    ):
        demo.pids = [padded.pid]
        servers: dict[str, Serve] = {
            CELLULAR: lambda load: bench.serve(compiled.submit, sentences, load),
            "padded, no waiting": lambda load: padded.serve(load, AT_ONCE),
            f"padded, waits {WAITING.timeout_ms:.0f} ms": lambda load: padded.serve(load, WAITING),
        }
        bench.burst_rate(compiled.submit, sentences[:256])  # warm
        padded.burst(AT_ONCE, len(sentences))
        peak = statistics.median(padded.burst(AT_ONCE, len(sentences)) for _ in range(3))
        rows: list[LoadRow] = []
        for share in chosen.shares:
            served = _load(demo, servers, peak * share, tick)
            for name, runs in zip(servers, served, strict=True):
                if not all(_right(demo, name, one) for one in runs):
                    return None
                rows.append(_load_row(name, share, peak * share, runs))
    return rows


def _load(
    demo: Demo, servers: dict[str, Serve], rate: float, tick: Callable[[], None]
) -> list[Sequence[Served]]:
    """Runs of each server under equal arrivals, alternated; the quieter ones are kept."""
    chosen, sentences = demo.config, demo.corpus.sentences
    kept = []
    for number in range(chosen.load_rounds):
        seconds = chosen.seconds / chosen.load_rounds
        load = make_load(rate, seconds, len(sentences), seed=number)
        works = [partial(serve, load) for serve in servers.values()]
        kept += bench.alternate(works, 1, 2, demo.patience, demo.pids)
        tick()
    demo.note(kept)
    return list(zip(*(r.results for r in kept), strict=True))


def _right(demo: Demo, name: str, served: Served) -> bool:
    return compare(demo, served.results, served.chosen.tolist(), name) is not None


def _load_row(name: str, share: float, rate: float, runs: Sequence[Served]) -> LoadRow:
    latencies = np.concatenate([one.latencies for one in runs])
    return LoadRow(name, share, rate, len(latencies), *bench.percentiles(latencies))
