"""Tapes: how fast a machine was, turn after turn.

Duty: a machine that is shared is slower for a while, and now and then a turn stalls: what turns
took, of what they should have taken, is replayed in the order it was seen, as work goes on. A turn
takes what the stretch of tape took that it runs over, however long it is. Comes in: turns that were
seen, from `cellc.simulation.fitting`; goes out: a `Player`, to servers. No torch.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STALL = 3e-3  # seconds that a turn takes more than it should, for others that use the processor


@dataclass(frozen=True)
class Tape:
    """Seconds of turns one after the other: what each should have taken, and took."""

    should: Sequence[float] = ()
    took: Sequence[float] = ()

    def part(self, turns: slice) -> Tape:
        """Some of the turns."""
        return Tape(self.should[turns], self.took[turns])

    def calm(self) -> Tape:
        """Stalls as they were, and all other turns at one pace: how these differ is more what costs
        do not explain than what the machine did, and what requests do to each other is simulated.
        """
        if not self.should:
            return self
        should, took, pace = np.array(self.should), np.array(self.took), 1.0
        stalled = np.zeros(len(should), bool)
        for _ in range(5):
            stalled = took - pace * should > STALL
            if stalled.all():
                return self
            pace = float(took[~stalled].sum() / max(should[~stalled].sum(), 1e-9))
        return Tape(self.should, np.where(stalled, took, pace * should).tolist())


class Player:
    """Plays a tape from some turn on, round and round; the same for a seed."""

    def __init__(self, tape: Tape, seed: int = 0) -> None:
        self._ends, self._took = [0.0], [0.0]  # sums
        for should, took in zip(tape.should, tape.took, strict=True):
            self._ends.append(self._ends[-1] + should)
            self._took.append(self._took[-1] + took)
        turns = len(tape.should)
        self._at = self._ends[random.Random(seed).randrange(turns)] if turns else 0.0

    def next(self, seconds: float) -> float:
        """What the turn takes that should take so long."""
        length = self._ends[-1]
        if not length:
            return seconds
        before, (rounds, after) = self._at, divmod(self._at + seconds, length)
        self._at = after
        return self._read(after) - self._read(before) + rounds * self._took[-1]

    def _read(self, at: float) -> float:
        """What the tape up to there took."""
        ends, took = self._ends, self._took
        k = min(bisect_right(ends, at), len(ends) - 1)
        share = (at - ends[k - 1]) / (ends[k] - ends[k - 1])
        return took[k - 1] + share * (took[k] - took[k - 1])
