"""What launches cost, where a device runs them by itself."""

from __future__ import annotations

import torch

import cellc
from cellc.launcher import TIMED


def test_only_launches_that_are_waited_for_are_measured() -> None:
    torch.manual_seed(0)
    requests = [(torch.randn(n, 1, 4),) for n in (3, 5, 4, 8)]
    with torch.no_grad(), cellc.compile(torch.nn.GRU(4, 8).eval(), backend="eager") as compiled:
        compiled.map(requests)
        launcher = compiled._engine.launcher
        waits = 0

        def wait() -> None:
            nonlocal waits
            waits += 1

        launcher._wait = wait
        launcher._seconds.clear()
        for _ in range(3 * TIMED):
            compiled.map(requests)
        assert waits == 2 * sum(launcher._timed.values())
        assert set(launcher._timed) == set(launcher._seconds)
        assert max(launcher._timed.values()) == TIMED
        known = dict(launcher._seconds)
        compiled.map(requests)
        assert launcher._seconds == known and waits == 2 * sum(launcher._timed.values())
