"""Profiles: the form of traces, and that they agree with what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc import timeline


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]


def counting(x: Tensor) -> Any:
    for _ in range(6):
        x = x + 1
        yield x


def requests() -> list[Tensor]:
    return [torch.randn(1 + n % 5, 4) for n in range(20)]


def check_form(events: list[dict[str, Any]]) -> None:
    """As the trace event format has it."""
    spans: dict[tuple[Any, ...], list[str]] = {}
    flows: dict[int, list[str]] = {}
    last = 0.0
    for event in events:
        assert isinstance(event["name"], str) and event["ph"] in set("MXCbestf")
        assert {type(event["pid"]), type(event["tid"])} == {int}
        assert event["ts"] >= last if event["ph"] != "M" else event["ts"] == 0
        last = event["ts"]
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["cat"] in ("host", "launch", "request")
        elif event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        elif event["ph"] in "be":
            spans.setdefault((event["cat"], event["id"]), []).append(event["ph"] + event["name"])
        elif event["ph"] in "sf":
            flows.setdefault(event["id"], []).append(event["ph"])
    for told in spans.values():
        open_ones: list[str] = []
        for one in told:
            if one[0] == "b":
                open_ones.append(one[1:])
            else:
                assert open_ones.pop() == one[1:]
        assert not open_ones and told[0] == "brequest" and told[-1] == "erequest"
    assert all(told == ["s", "f"] for told in flows.values())
    assert {number for _, number in spans} == set(flows)
    tracks = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} <= tracks


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_trace_agrees_with_what_is_counted(backend: Any, tmp_path: Path) -> None:
    try:
        compiled = cellc.compile(Tagger().eval(), backend=backend)
    except cellc.BackendError as error:
        pytest.skip(str(error))
    with compiled:
        x = torch.randn(3, 4)
        compiled(x)  # alone: its launches run again
        before = compiled.stats()
        with compiled.profile(tmp_path / "trace.json") as p:
            compiled.map(requests())
            compiled(x)
            for future in [compiled.submit(x) for x in requests()]:
                future.result(30)
            asyncio.run(compiled.submit_async(x))
        after = compiled.stats()
        compiled(x)  # is not in it
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["traceEvents"] == p.events and trace["otherData"] == {"dropped_events": 0}
    check_form(p.events)
    launches = [e for e in p.events if e.get("cat") == "launch"]
    assert len(launches) == after["launches"] - before["launches"] > 3
    for key in ("rows", "steps"):
        assert sum(e["args"][key] for e in launches) == after[key] - before[key]
    seconds = after["kernel_seconds"] - before["kernel_seconds"]
    assert sum(e["dur"] for e in launches) / 1e6 == pytest.approx(seconds)
    summary = p.summary()
    assert set(summary) <= set(compiled.cells)
    assert sum(cell["launches"] for cell in summary.values()) == len(launches)
    ended = Counter(e["args"]["ended"] for e in p.events if e["ph"] == "e" and "ended" in e["args"])
    assert ended == {"done": after["requests"] - before["requests"]} == {"done": 42}
    names = {e["name"] for e in p.events if e.get("cat") == "host"}
    assert names == {"admit", "schedule", "launch", "complete", "deliver"}
    counted = [e["args"] for e in p.events if e["ph"] == "C"]
    assert max(c["waiting"] for c in counted) >= 20


def test_how_requests_end_is_said() -> None:
    class Raises:
        source = ""

        def __call__(self, *_: Any) -> Any:
            raise RuntimeError("injected")

    with cellc.compile(Tagger().eval(), backend="eager") as compiled:
        compiled.map(requests())
        with compiled.profile() as p:
            with compiled._engine._loop.holding():
                futures = [compiled.submit(x) for x in requests()]
                assert futures[3].cancel()
            for k, future in enumerate(futures):
                if k != 3:
                    future.result(30)
            kernels = compiled._compiler.kernels
            kept = dict(kernels)
            kernels.update(dict.fromkeys(kept, Raises()))
            with pytest.raises(RuntimeError):
                compiled.map(requests())
            kernels.update(kept)
        check_form(p.events)
        ended = Counter(e["args"]["ended"] for e in p.events if "ended" in e.get("args", {}))
        assert ended == {"done": 19, "cancelled": 1, "failed": 20}
        assert any("injected" in str(e.get("args", {}).get("failed")) for e in p.events)
        stats = compiled.stats()
        assert stats["failed"] == 20 and stats["cancelled"] == 1


def test_streams_and_values() -> None:
    with cellc.compile(counting, backend="eager") as compiled:
        with compiled.profile() as p:
            assert len(list(compiled.stream(torch.zeros(3)))) == 6
            stream = compiled.stream(torch.zeros(3))
            next(stream)
            stream.close()
            left = compiled.stream(torch.zeros(3))  # ends with the profile
            next(left)
        check_form(p.events)
        assert len([e for e in p.events if e["ph"] == "s"]) == 3
        left.close()


def test_use() -> None:
    with cellc.compile(Tagger().eval(), backend="eager") as compiled:
        profile = compiled.profile()
        for use in (profile.summary, lambda: profile.events):
            with pytest.raises(cellc.CellcError, match="with"):
                use()
        with profile:
            with pytest.raises(cellc.CellcError, match="already"), compiled.profile():
                pass
        assert profile.summary() == {}
        with contextlib.suppress(ZeroDivisionError), compiled.profile() as p:
            compiled.map(requests())
            raise ZeroDivisionError
        assert p.summary() and compiled._engine.counters.timeline is None


def test_long_profiles_are_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timeline, "MAX_EVENTS", 100)
    with cellc.compile(Tagger().eval(), backend="eager") as compiled:
        with compiled.profile() as p:
            for _ in range(5):
                compiled.map(requests())
        check_form(p.events)
        p.save(tmp_path / "cut.json")
        assert json.loads((tmp_path / "cut.json").read_text())["otherData"]["dropped_events"] > 100
        assert len(p.events) < 1000


def test_the_schedule_log() -> None:
    program = """
import torch, cellc
compiled = cellc.compile(torch.nn.GRU(3, 4).eval(), backend="eager")
compiled.map([torch.randn(3, 3)] * 4)
compiled(torch.randn(3, 3))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"CELLC_LOGS": "+schedule", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "[cellc schedule] 4 begin, 0 wait, 0 run" in done.stderr
    assert "rows in 3 steps" in done.stderr


def test_what_begins_while_a_profile_ends_is_whole_or_not_there() -> None:
    compiled = cellc.compile(Tagger().eval(), backend="eager", options={"workers": 2})
    with compiled:
        compiled.map(requests())
        stopped = threading.Event()

        def ask() -> None:
            while not stopped.is_set():
                compiled.map(requests())

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(200):
                with compiled.profile() as seen:
                    time.sleep(0.001)
                check_form(seen.events)
        finally:
            stopped.set()
            for thread in threads:
                thread.join(30)
