"""A policy of your own: which cell runs next.

`Oldest` serves requests in the order in which they came, with a twist: among cells that have waited
about as long it takes the one with most ready calls, since one launch serves them all. What it is
given is in `cellc.policies`. Run as a script it is compared with cellc's own policy on a model of
two recurrences; `cellc simulate treelstm --device v100 --policy examples/policy.py:Oldest` has it
beside cellc's own on a virtual clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import cellc
from cellc.policies import Turn
from cellc.queues import Queue

PATIENCE = 4  # admissions and launches that make no difference


class Oldest:
    """See the module."""

    def pick(self, ready: Sequence[Queue], turn: Turn) -> Queue:
        return max(ready, key=lambda queue: (queue.age // PATIENCE, queue.size))


class Soonest:
    """The cell with the most urgent call first: simpler than cellc's `deadline`, and worse."""

    deadlines = True

    def pick(self, ready: Sequence[Queue], turn: Turn) -> Queue:
        return min(ready, key=lambda queue: queue.slack)


class Reader(nn.Module):
    """Two recurrences that do not wait for each other, so that there is something to choose."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        self.forwards, self.backwards = nn.GRUCell(16, hidden), nn.LSTMCell(16, hidden)

    def forward(self, x: Tensor) -> Tensor:  # [T, 16]
        h, state = torch.zeros(self.hidden), (torch.zeros(self.hidden), torch.zeros(self.hidden))
        for row in x:
            h = self.forwards(row, h)
        for row in x.flip(0):
            state = self.backwards(row, state)
        return torch.cat([h, state[0]])


torch.manual_seed(0)
model = Reader().eval().requires_grad_(False)


def example_inputs() -> list[Tensor]:
    return [torch.randn(n, 16) for n in (9, 30, 2, 17)]


def main() -> None:
    requests = [torch.randn(2 + i % 40, 16) for i in range(256)]
    for policy in ("cellular", Oldest()):
        with cellc.compile(model, options={"policy": policy}) as compiled:
            compiled.map(requests)
            start = time.perf_counter()
            results = compiled.map(requests)
            seconds = time.perf_counter() - start
            name = policy if isinstance(policy, str) else type(policy).__name__
            print(f"{name}: {len(requests) / seconds:,.0f} requests/s")
    torch.testing.assert_close(results[1], model(requests[1]), rtol=1e-4, atol=1e-5)
    print("equal to eager PyTorch")


if __name__ == "__main__":
    main()
