"""Timeline: what an engine did when, as trace events that Perfetto and Chrome show.

Duty: note launches (on a track a cell), what turns of the loop took on the host (on a track a
thread), how many requests wait and run, and each request's way from submission to delivery. Comes
in from the engine and its parts while somebody profiles (`Compiled.profile`): they look at
`Counters.timeline` once a turn, which is None otherwise. Goes out: events, a summary, a file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

HOST, DEVICE = 1, 2  # process ids of the trace: tracks of threads, tracks of cells
MAX_EVENTS = 1 << 20  # what comes after is counted, and left out

Event = dict[str, Any]


class Way(Protocol):
    """What is noted of a request (`cellc.ticket`)."""

    arrived: float
    dropped: bool
    error: BaseException | None
    trial: bool


@dataclass
class _Open:
    """A request under way; it is kept, so that no other has its id."""

    number: int
    request: Way
    runs: bool = False


class Timeline:
    """Events of one engine, in microseconds since the timeline began."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._start = time.perf_counter()
        self._end: float | None = None
        self._events: list[Event] = []
        self.dropped = 0
        self._threads: dict[int, str] = {}
        self._tracks: dict[str, int] = {}  # of cells, by name
        self._open: dict[int, _Open] = {}  # requests under way, by id
        self._count = 0
        self._lock = threading.RLock()  # several engines may note requests
        self._mark = self._start
        self._lengths = (-1, -1)

    # -- what the engine notes --

    def begin_turn(self, waiting: int, running: int) -> None:
        self._mark = now = time.perf_counter()
        if self._lengths != (waiting, running):
            self._lengths = waiting, running
            counts = {"waiting": waiting, "running": running}
            self._note("requests", "C", now, pid=HOST, tid=0, args=counts)

    def phase(self, name: str) -> None:
        """What the loop did since the last mark."""
        now = time.perf_counter()
        self._slice(name, "host", self._mark, now - self._mark, HOST, self._thread())
        self._mark = now

    def launch(
        self, cell: str, rows: int, steps: int, begin: float, took: float, failed: str | None = None
    ) -> None:
        """A kernel ran; `rows` over all steps."""
        track = self._tracks.setdefault(cell, len(self._tracks) + 1)
        args = {"rows": rows, "steps": steps, **({"failed": failed} if failed else {})}
        self._slice(cell, "launch", begin, took, DEVICE, track, args)

    def submitted(self, requests: Iterable[Way]) -> None:
        with self._lock:
            self._submitted(requests)

    def _submitted(self, requests: Iterable[Way]) -> None:
        now, thread = time.perf_counter(), self._thread()
        for request in requests:
            if request.trial:  # nobody asked for it
                continue
            begin = request.arrived
            self._count += 1
            number = self._count
            if not self._span("b", "request", number, begin):
                return
            self._open[id(request)] = _Open(number, request)
            self._slice("submit", "request", begin, now - begin, HOST, thread, {"request": number})
            self._flow("s", number, begin, thread)
            self._span("b", "waiting", number, begin)

    def admitted(self, requests: Iterable[Way]) -> None:
        self._turned(requests, True)

    def requeued(self, requests: Iterable[Way]) -> None:
        """They begin again."""
        self._turned(requests, False)

    def _turned(self, requests: Iterable[Way], runs: bool) -> None:
        now = time.perf_counter()
        names = ("waiting", "running") if runs else ("running", "waiting")
        for request in requests:
            known = self._open.get(id(request))
            if known is not None and known.runs is not runs:
                with self._lock:
                    known.runs = runs
                    self._span("e", names[0], known.number, now)
                    self._span("b", names[1], known.number, now)

    def ended(self, requests: Iterable[Way]) -> None:
        """They were answered, or nobody wants them any more."""
        with self._lock:
            self._ended(requests)

    def _ended(self, requests: Iterable[Way]) -> None:
        now, thread = time.perf_counter(), self._thread()
        for request in requests:
            known = self._open.pop(id(request), None)
            if known is None:
                continue
            number = known.number
            how = "cancelled" if request.dropped else "failed" if request.error else "done"
            self._span("e", "running" if known.runs else "waiting", number, now)
            self._slice("deliver", "request", now, 0.0, HOST, thread, {"request": number})
            self._flow("f", number, now, thread)
            self._span("e", "request", number, now, {"ended": how})

    def finish(self) -> None:
        """Nothing more is noted; requests under way end here."""
        with self._lock:
            if self._end is None:
                self._ended([known.request for known in self._open.values()])
                self._end = time.perf_counter()

    # -- events --

    def _span(
        self, ph: str, name: str, number: int, at: float, args: dict[str, Any] | None = None
    ) -> bool:
        args = args or {}
        return self._note(name, ph, at, cat="request", id=number, pid=HOST, tid=0, args=args)

    def _flow(self, ph: str, number: int, at: float, thread: int) -> None:
        ends = {"bp": "e"} if ph == "f" else {}
        self._note("request", ph, at, cat="flow", id=number, pid=HOST, tid=thread, **ends)

    def _slice(
        self,
        name: str,
        cat: str,
        begin: float,
        took: float,
        pid: int,
        tid: int,
        args: dict[str, Any] | None = None,
    ) -> None:
        more = {"args": args} if args else {}
        self._note(name, "X", begin, cat=cat, dur=took * 1e6, pid=pid, tid=tid, **more)

    def _note(self, name: str, ph: str, at: float, **fields: Any) -> bool:
        """Add an event; what ends something is added always, so that it does not stay open."""
        full = len(self._events) >= MAX_EVENTS and name != "running" and ph not in "ef"
        if self._end is not None or full:
            self.dropped += 1
            return False
        ts = max(0.0, (at - self._start) * 1e6)
        self._events.append({"name": name, "ph": ph, "ts": ts, **fields})
        return True

    def _thread(self) -> int:
        number = threading.get_native_id()
        if number not in self._threads:
            self._threads[number] = threading.current_thread().name
        return number

    # -- what came of it --

    def trace(self) -> dict[str, Any]:
        """The trace as JSON holds it."""
        names = [(HOST, 0, "process_name", "host"), (DEVICE, 0, "process_name", self._device)]
        names += [(HOST, tid, "thread_name", name) for tid, name in list(self._threads.items())]
        names += [(DEVICE, tid, "thread_name", cell) for cell, tid in list(self._tracks.items())]
        named = [
            {"name": what, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": {"name": name}}
            for pid, tid, what, name in names
        ]
        events = [*named, *sorted(list(self._events), key=lambda event: event["ts"])]
        about = {"dropped_events": self.dropped}
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}

    def summary(self) -> dict[str, dict[str, float]]:
        """By cell: launches, rows, steps and microseconds."""
        found: dict[str, dict[str, float]] = {}
        for event in list(self._events):
            if event.get("cat") == "launch":
                zero = dict.fromkeys(("launches", "rows", "steps", "microseconds"), 0.0)
                cell = found.setdefault(event["name"], zero)
                cell["launches"] += 1
                cell["rows"] += event["args"]["rows"]
                cell["steps"] += event["args"]["steps"]
                cell["microseconds"] += event["dur"]
        return found
