from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from cellc import demo
from cellc.bench import measure as bench
from cellc.bench.arrivals import Load, make_load
from cellc.bench.batch_server import BatchServer, Policy, make_buckets
from cellc.demo_padded import run_bucketed, run_padded
from cellc.demo_text import (
    Classifier,
    load_corpus,
    make_corpus,
    make_model,
    split_sentences,
    tokenise,
)
from cellc.report import Comparison, Findings, LoadRow, caveats, page, sentence


def sentences(lengths: list[int]) -> list[Tensor]:
    return [torch.randint(0, 20, (n,)) for n in lengths]


LENGTHS = [5, 23, 3, 10, 11, 40, 12, 5, 31]


# -- text ------------------------------------------------------------------------------------------


def test_tokenise() -> None:
    assert tokenise("The *value*, 12!") == ["the", "*", "value", "*", ",", "12", "!"]
    assert tokenise("  \n") == []


def test_split_sentences() -> None:
    text = 'One thing. Another\nthing? "Yes."\n\nv. 3.1 stays\n  \nlast'
    expected = ["One thing.", "Another thing?", '"Yes."', "v. 3.1 stays", "last"]
    assert split_sentences(text) == expected


def test_corpus_is_distinct_and_numbered() -> None:
    corpus = make_corpus(["One two three. One two three. Two one three! No.", "a b c d e f g h"], 7)
    assert sorted(corpus.lengths) == [4, 4]
    assert corpus.vocabulary == 5
    assert sorted(set(torch.cat(list(corpus.sentences)).tolist())) == list(range(5))


def test_the_documentation_of_python() -> None:
    corpus = load_corpus(limit=200)
    again = load_corpus(limit=200)
    assert len(corpus.sentences) == 200 and 3 <= min(corpus.lengths) <= max(corpus.lengths) <= 120
    assert all(map(torch.equal, corpus.sentences, again.sentences))


def test_weights_are_the_same_each_time() -> None:
    state = torch.random.get_rng_state()
    a, b = make_model(20, 8), make_model(20, 8)
    assert torch.equal(a.embed.weight, b.embed.weight)
    assert torch.equal(torch.random.get_rng_state(), state)


# -- padded batching -------------------------------------------------------------------------------


def test_buckets() -> None:
    buckets = make_buckets(LENGTHS)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(LENGTHS)))
    for bucket in buckets:
        found = [LENGTHS[i] for i in bucket]
        assert found == sorted(found) and len({(n - 1) // 10 for n in found}) == 1
    assert [LENGTHS[bucket[0]] for bucket in buckets] == [3, 11, 23, 40 - 9, 40][: len(buckets)]


@torch.inference_mode()
def test_padded_equals_the_model() -> None:
    model, requests = make_model(20, 16), sentences(LENGTHS)
    expected = [model(x) for x in requests]
    torch.testing.assert_close(run_bucketed(model, requests), expected)
    torch.testing.assert_close(run_padded(model, requests), torch.stack(expected))


def padded_server(model: Classifier, policy: Policy) -> BatchServer:
    return BatchServer(lambda batch: run_padded(model, batch).unbind(), policy=policy)


@pytest.mark.parametrize("timeout", [0.0, 5.0])
def test_padded_server(timeout: float) -> None:
    model, requests = make_model(20, 16), sentences(LENGTHS * 3)
    with padded_server(model, Policy(timeout, max_batch=4)) as server:
        results = [f.result(30) for f in [server.submit(x) for x in requests]]
    with torch.inference_mode():
        torch.testing.assert_close(results, [model(x) for x in requests])
    assert not any(t.name == "batch-server" for t in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        server.submit(requests[0])


def test_padded_server_waits_for_more_but_not_for_ever() -> None:
    model, (request,) = make_model(20, 16), sentences([4])
    with padded_server(model, Policy(200.0, max_batch=2)) as server:
        start = time.perf_counter()
        server.submit(request).result(30)
        alone = time.perf_counter() - start
        assert alone >= 0.2
        start = time.perf_counter()
        for future in [server.submit(request), server.submit(request)]:  # full
            future.result(30)
        assert time.perf_counter() - start < alone


def test_padded_server_reports_errors_and_goes_on() -> None:
    with padded_server(make_model(20, 16), Policy()) as server:
        with pytest.raises(IndexError):
            server.submit(torch.tensor([99])).result(30)
        assert server.submit(torch.tensor([9])).result(30).shape == (5,)


# -- measuring -------------------------------------------------------------------------------------


def test_percentiles() -> None:
    latencies = np.random.default_rng(0).permutation(np.arange(1001) / 1000)
    assert bench.percentiles(latencies) == pytest.approx((500, 900, 990))


def test_alternate_keeps_the_quietest(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.5, 0.01, 0.3, 0.2, 0.02, 0.9])
    monkeypatch.setattr(bench, "_share_of_others", lambda before, after: next(shares))
    done: list[str] = []
    works = [lambda n=name: done.append(n) or len(done) for name in "ab"]
    rounds = bench.alternate(works, 3, 5, bench.Patience(60))
    assert done == ["a", "b"] * 5
    assert [r.results for r in rounds] == [(3, 4), (9, 10), (7, 8)]
    assert bench.noise(rounds) == 0.2
    assert bench.medians(rounds) == [7, 8]


def test_alternate_ends_early_on_a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_share_of_others", lambda before, after: None)
    rounds = bench.alternate([lambda: 1.0], 3, 9, bench.Patience(60))
    assert len(rounds) == 3 and bench.noise(rounds) is None


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_share_of_others", lambda before, after: 0.5)
    patience = bench.Patience(0.03)
    rounds = bench.alternate([lambda: time.sleep(0.02)], 2, 99, patience)
    assert len(rounds) == 2 and -0.5 < patience.seconds <= 0
    done: list[int] = []
    bench.alternate([lambda: done.append(1)], 3, 99, patience)
    assert len(done) == 3


def test_load_is_poisson_and_the_same_each_time() -> None:
    load = make_load(1000, 20, 7, seed=1)
    gaps = np.diff(load.arrivals)
    assert len(gaps) == 19_999 and gaps.mean() == pytest.approx(1e-3, rel=0.05)
    assert gaps.std() == pytest.approx(1e-3, rel=0.05)
    assert set(load.chosen.tolist()) == set(range(7))
    assert np.array_equal(load.arrivals, make_load(1000, 20, 7, seed=1).arrivals)


def test_latency_counts_from_the_scheduled_arrival() -> None:
    """A server that blocks its caller cannot hide that later requests waited."""

    def slow(sentence: Tensor) -> Future[Tensor]:
        time.sleep(0.02)
        future: Future[Tensor] = Future()
        future.set_result(sentence)
        return future

    load = Load(np.arange(5) * 1e-3, np.array([0, 1, 0, 1, 0]))
    served = bench.serve(slow, sentences([3, 4]), load)
    assert [len(r) for r in served.results] == [3, 4, 3, 4, 3]
    assert (np.diff(served.latencies) > 0.015).all() and served.latencies[-1] > 0.08


# -- the report ------------------------------------------------------------------------------------


def findings(others: float | None = 0.01) -> Findings:
    loads = [
        LoadRow(server, share, 1000 * share, 100, 0.5 * i, 2.0 * i, 3.0 * i)
        for share in (0.3, 0.7)
        for i, server in enumerate(("cellc", "padded, no waiting"), 1)
    ]
    comparisons = [
        Comparison("512 sentences at once", "20 sentences/s", "10 sentences/s", 2.0),
        Comparison("a sentence of 3 tokens alone", "1 ms", "0.5 ms", 0.5),
    ]
    return Findings(
        [("cores", "2")], "<text>", ["how"], [], 9, 1e-7, comparisons, loads, others, False
    )


def test_sentence_says_what_was_measured() -> None:
    text = sentence(findings())
    assert text == (
        "On this machine cellc ran 512 sentences at once 2.00 times as fast as bucketed padding in "
        "PyTorch (20 sentences/s against 10 sentences/s), a sentence of 3 tokens alone in 1 ms "
        "against 0.5 ms, and at 70% of the padded server's peak, 700 requests a second, its p90 "
        "latency was 2.00 ms against 4.00 ms (padded, no waiting)."
    )


def test_a_busy_machine_is_not_hidden() -> None:
    assert caveats(findings()) == [] == caveats(findings(None))
    assert "On this machine, while other programs took up to 40% of it, cellc ran" in sentence(
        findings(0.4)
    )
    assert "up to 40%" in caveats(findings(0.4))[0]


class Page(HTMLParser):
    """Checks that tags close, and keeps what would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained() -> None:
    text = page(findings())
    parsed = Page(text)
    assert parsed.open == [] and parsed.loaded == []
    assert "http" not in text and "url(" not in text
    assert "&lt;text&gt;" in text and "prefers-color-scheme: dark" in text
    assert text.count("<polyline") == 4


def test_quick_demo(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    out = StringIO()
    assert demo.run(demo.config(None, str(output), quick=True), Console(file=out, width=140)) == 0
    said = out.getvalue()
    assert "lstm.l0" in said and "equal: all 64 results" in said and "quick run" in said
    assert Page(output.read_text()).open == []
    assert list(tmp_path.iterdir()) == [output]
    assert not any(t.name in ("batch-server", "cellc-engine") for t in threading.enumerate())


def test_a_wrong_result_exits_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellc.compiled import Compiled

    right = Compiled.map

    def wrong(self: Compiled, requests: list[Tensor]) -> list[Tensor]:
        results = right(self, requests)
        return [*results[:-1], results[-1] + 1]

    monkeypatch.setattr(Compiled, "map", wrong)
    out = StringIO()
    chosen = demo.config(None, str(tmp_path / "report.html"), quick=True)
    assert demo.run(chosen, Console(file=out, width=140)) == 1
    assert "MISMATCH: 1 of 64 results" in out.getvalue()
    assert list(tmp_path.iterdir()) == []
