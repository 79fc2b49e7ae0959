"""Branches: where the answers of forwards that read values lead.

Duty: give for a request whose answer is not the one that its leg expected the leg that it goes on
with: one that is known, or what the forward does when it is run on stand-ins once more, along the
answers that the request got. Comes in from `cellc.onward`, by `cellc.compiler.Compiler`: asks; goes
out: branches.
"""

from __future__ import annotations

from collections.abc import Sequence

from cellc.frontends.points import told
from cellc.frontends.stub import CannotUnfold
from cellc.kernels.native import find_arithmetic
from cellc.legs import Branch, make_branch, make_leg
from cellc.paths import Ask, Replan
from cellc.planner import make_plans
from cellc.structures import Structures
from cellc.unfolded import Wanted
from cellc.unfolder import Steers


class Branches(Structures):
    """What is known of one model, with where answers lead."""

    def onward(self, asks: Sequence[Ask]) -> dict[Ask, Branch | Exception]:
        """Where requests go on whose answers are not those that their legs expected."""
        with self._lock:
            found: dict[Ask, Branch | Exception] = {}
            for ask in dict.fromkeys(asks):
                request = ask.leg.root.wanted.request
                branch = self.paths.known(ask)
                if request.nested and request.steering != self.arguments.steering:
                    found[ask] = Replan()  # its numbers were data, and are not any more
                elif branch is not None:
                    found[ask] = branch
            new = [ask for ask in dict.fromkeys(asks) if ask not in found]
            for ask in new:
                self.paths.answered(ask)
            if new:
                found.update(self._learned_alone(new))
            return found

    def _learned_alone(self, asks: Sequence[Ask]) -> dict[Ask, Branch | Exception]:
        """`_learned`, where what goes wrong with one is that one's error."""
        try:
            return self._learned(asks)
        except Exception as error:
            if len(asks) == 1:
                return {asks[0]: error}
        found: dict[Ask, Branch | Exception] = {}
        for ask in asks:
            found.update(self._learned_alone([ask]))
        return found

    def _learned(
        self, asks: Sequence[Ask], *, plainly: bool = False
    ) -> dict[Ask, Branch | Exception]:
        """Run the forward on along answers never seen; `plainly`: from its start, with no
        stand-in for what it reads.
        """
        wanted = [self._wanted(ask, plainly) for ask in asks]
        before = self.unfolder.generation
        try:
            (_, runs, _), forest = self._runs(wanted)
        except Steers as error:
            return self._decided(error, asks)
        except CannotUnfold as error:
            raise self._reads_and(str(error), asks[0].place) from error
        if self.unfolder.generation != before:
            self._forget()
        plans = make_plans(forest, self.store.tables, find_arithmetic())
        self.store.number(forest.graph)
        found: dict[Ask, Branch | Exception] = {}
        lost, doubtful = [], []
        for ask, run, want, plan in zip(asks, runs, wanted, plans, strict=True):
            if isinstance(run.error, TypeError) and not run.plain:
                doubtful.append(ask)  # of a stand-in, it may be
                continue
            if run.failed and not run.raises:
                reason = run.reason or "recurses too deep"
                raised = run.error and told(run.error)
                found[ask] = raised or self._reads_and(reason, ask.place)
                continue
            root = ask.leg.root.plain() if plainly else ask.leg.root
            leg = make_leg(run, root, want.script, plan, self.unfolder.epoch)
            self.paths.learned += 1
            branch = make_branch(ask.leg, ask.number, leg, again=ask.again or plainly)
            if branch is None:
                lost.append(ask)
                continue
            found[ask] = branch
            if leg.error is None:
                self.paths.keep(ask, branch)
            self._use(plan)
        if doubtful:
            self.read_plainly()
            found.update(self._learned(doubtful, plainly=True))
        if lost:
            again = self.onward([ask._replace(again=True) for ask in lost])
            found.update({ask: again[ask._replace(again=True)] for ask in lost})
        self.store.keep_unfolded(self.unfolder.templates.cells())
        return found

    def _wanted(self, ask: Ask, plainly: bool) -> Wanted:
        """The request again, with the answers known."""
        root = ask.leg.root.plain() if plainly else ask.leg.root
        script = () if plainly else ask.leg.script_to(ask.number, ask.answer)
        start = 0 if ask.again else len(script)
        guesses = self.paths.guesses(script, ask)
        _, args, kwargs, *_ = root.wanted
        request = self.arguments.flatten(args, kwargs)
        return Wanted(request, args, kwargs, script, guesses, start, root.wanted.plain)

    def _decided(self, error: Steers, asks: Sequence[Ask]) -> dict[Ask, Branch | Exception]:
        """Numbers that were data decide: requests that hold some are planned anew."""
        steering = self.arguments.steering
        if steering is None or error.place in steering:
            raise self._reads_and("numbers decide", asks[0].place) from error
        self._steered_by(steering, error.place)
        self._forget()
        found: dict[Ask, Branch | Exception] = {
            ask: Replan() for ask in asks if ask.leg.root.wanted.request.nested
        }
        others = [ask for ask in asks if ask not in found]
        return {**found, **self._learned_alone(others)} if others else found
