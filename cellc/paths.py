"""Paths: what is known of a forward that reads values.

Duty: the legs that answers lead to, kept while there is room, and what is expected of answers
never seen: the forward is run on stubs along the answers that its questions usually get, as far as
earlier requests went. Used by `cellc.compiler`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from cellc.frontends.asking import Asked
from cellc.frontends.reads import OPEN, Answer
from cellc.legs import Branch, Leg

MAX_BRANCHES = 1 << 14
MAX_OUTCOMES = 64  # answers to one question that are kept: with more, what follows is not
MAX_GUESSES = 64  # questions of a leg
MAX_DRAWN = 8  # the same, of a forward that draws random numbers: they are drawn ahead


class Ask(NamedTuple):
    """A request came to an answer that its leg does not go on with; `again`: its leg's rows are no
    use, it starts from its data.
    """

    leg: Leg
    number: int
    answer: Answer
    again: bool = False
    sign: float = 1.0  # of the answer: zeros differ

    @property
    def place(self) -> str:
        """file:line of the question."""
        return self.leg.asked[self.number].origin


class Replan(Exception):
    """Numbers of requests turned out to decide: they are no data, and requests are planned anew."""


@dataclass
class Site:
    """A place in the code where a value is read."""

    answers: Counter[Answer]

    @property
    def usual(self) -> Answer:
        return self.answers.most_common(1)[0][0]


class Paths:
    """See the module."""

    def __init__(self) -> None:
        self.on = False  # does the forward read values, or yield
        self.longest = 0  # questions that a request had
        self.learned = 0  # legs made by running the forward
        self._branches: OrderedDict[Ask, Branch] = OrderedDict()
        self._onward: dict[Leg, set[Ask]] = {}  # branches kept, by the leg that they leave
        self._sites: dict[Hashable, Site] = {}

    def __len__(self) -> int:
        return len(self._branches)

    def known(self, ask: Ask) -> Branch | None:
        branch = self._branches.get(ask)
        if branch is not None:
            self._branches.move_to_end(ask)
        return branch

    def keep(self, ask: Ask, branch: Branch) -> None:
        """Unless it is never come to again: its leg is not kept itself, or the question has had too
        many answers.
        """
        leg, outcomes = ask.leg, ask.leg.outcomes
        if leg.script and leg not in self._onward:
            return
        if ask in self._branches or outcomes.get(ask.number, 0) >= MAX_OUTCOMES:
            return
        outcomes[ask.number] = outcomes.get(ask.number, 0) + 1
        self._branches[ask] = branch
        self._onward.setdefault(leg, set()).add(ask)
        self._onward[branch.leg] = set()
        while len(self._branches) > MAX_BRANCHES:
            self._drop(next(iter(self._branches)))

    def _drop(self, ask: Ask) -> None:
        """Forget a branch, and what is come to by it alone."""
        kept = self._onward[ask.leg]
        kept.remove(ask)
        if not kept and not ask.leg.script:
            del self._onward[ask.leg]
        gone = [ask]
        while gone:
            ask = gone.pop()
            ask.leg.outcomes[ask.number] -= 1
            gone += self._onward.pop(self._branches.pop(ask).leg)

    def forget(self) -> None:
        self._branches.clear()
        self._onward.clear()

    def answered(self, ask: Ask) -> None:
        """Learn from the answers that led to a branch never seen."""
        self.longest = max(self.longest, ask.number + 1)
        for question in ask.leg.asked[ask.leg.first : ask.number]:
            self._count(question, question.answer)
        self._count(ask.leg.asked[ask.number], ask.answer)

    def _count(self, question: Asked, answer: Answer) -> None:
        if question.kind is not bool or answer is OPEN:
            return  # numbers are not guessed
        self._sites.setdefault(question.site, Site(Counter())).answers[answer] += 1

    @property
    def habits(self) -> dict[Hashable, Answer]:
        return {place: site.usual for place, site in self._sites.items()}

    def guesses(self, script: tuple[Answer, ...], ask: Ask | None) -> int:
        """How many answers to guess: as far as earlier requests went, or twice as far as the leg
        that ended too early.
        """
        far = self.longest - len(script)
        if ask is not None and ask.leg.asked[ask.number].answer is OPEN:
            far = max(far, 2 * (ask.number - ask.leg.first))
        drawing = ask is not None and ask.leg.draws
        return min(max(far, 0), MAX_DRAWN if drawing else MAX_GUESSES)
