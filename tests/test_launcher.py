"""What launches cost, where a device runs them by itself."""

from __future__ import annotations

import torch

import cellc
from cellc.launcher import TIMED, UNTIMED


class FakeClock:
    """Says what a launch took, and counts how often it was asked."""

    SECONDS = 1e-3

    def __init__(self) -> None:
        self.started = self.ended = 0

    def start(self) -> None:
        self.started += 1

    def seconds(self) -> float:
        self.ended += 1
        return self.SECONDS


def test_only_launches_that_are_waited_for_are_measured() -> None:
    torch.manual_seed(0)
    requests = [(torch.randn(n, 1, 4),) for n in (3, 5, 4, 8)]
    with torch.no_grad(), cellc.compile(torch.nn.GRU(4, 8).eval(), backend="eager") as compiled:
        compiled.map(requests)
        launcher = compiled._engine.launcher
        clock = launcher._clock = FakeClock()
        launcher._seconds.clear()
        for _ in range(3 * TIMED):
            compiled.map(requests)
        timed = [min(max(0, n - UNTIMED), TIMED) for n in launcher._timed.values()]
        assert clock.started == clock.ended == sum(timed)
        assert max(timed) == TIMED and all(timed)
        assert set(launcher._timed) == set(launcher._seconds)
        assert all(0 < s <= FakeClock.SECONDS for s in launcher._seconds.values())
        known = dict(launcher._seconds)
        compiled.map(requests)
        assert launcher._seconds == known and clock.started == sum(timed)


def test_submitting_counts_as_the_hosts_and_lets_more_steps_run_ahead() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 1, 4)
    with torch.no_grad(), cellc.compile(torch.nn.GRU(4, 8).eval(), backend="eager") as compiled:
        launcher = compiled._engine.launcher
        launcher._clock = FakeClock()
        for _ in range(20):
            compiled(x)
            compiled.map([x, x[:3]])
        assert launcher._submitting > 0
        launcher._onward.stopping = 0.3
        launcher._submitting = 0.0
        few = launcher.ahead(1e-4)
        launcher._submitting = 1e-2
        assert launcher.ahead(1e-4) > few
