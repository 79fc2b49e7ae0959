"""Unfolding: plans of new structures from calls of cells alone.

Duty: run new requests on stubs, again and again until nothing new is learned of the model's
segments (see `frontends.unfold`), and write the calls of all of them at once, by numpy. Comes in
from `cellc.structures`: requests; goes out: a `Forest` for `cellc.planner`. Over `cellc.stand_ins`
(requests as stubs), `cellc.flow` (which segments feed themselves, what others read of them) and
`cellc.templates` (the call graph that each becomes).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from cellc import log
from cellc.calls import Forest
from cellc.dtypes import DTYPE_NAMES, TORCH_DTYPES
from cellc.flow import Flow
from cellc.forests import make_forest
from cellc.frontends.asking import Asked
from cellc.frontends.callees import RefusedCell
from cellc.frontends.dims import Dims
from cellc.frontends.effects import asks_for_types, asks_what_it_is, holds, why_not
from cellc.frontends.reads import OPEN
from cellc.frontends.segments import LEAF, OutType, Study
from cellc.frontends.stub import CannotUnfold, NumberSteers, StubType
from cellc.frontends.unfold import Recorder
from cellc.ops import RowType
from cellc.patterns import Patterns
from cellc.roles import Roles
from cellc.skeleton import Steering
from cellc.stand_ins import StandIns
from cellc.templates import Templates, Tools, example
from cellc.unfolded import Stamped, Unfolded, Wanted

SAMPLE = 3  # requests from which a model's segments are first learned
ROUNDS = 12  # of learning, at most
ROOM = 1 << 29  # bytes of stack for structures deeper than Python's limit
DEPTH = 100_000  # frames that fit in it

_MOVES = frozenset("embedding slice cat reshape cast permute".split())

T = TypeVar("T")


class Steers(Exception):
    """Python code decides by the numbers at a place."""

    def __init__(self, place: Hashable) -> None:
        super().__init__(place)
        self.place = place


class Unfolding(NamedTuple):
    """Requests that were run, what they did, and what was stamped."""

    wanted: Sequence[Wanted]
    runs: list[Unfolded]
    stamped: list[Stamped]


@dataclass
class Stats:
    requests: int = 0
    cells: int = 0
    seconds: float = 0.0
    planning: float = 0.0  # of these


@dataclass
class Unfolder:
    """What is known of one model's unfolding."""

    tools: Tools
    forward: Callable[..., Any]
    names: list[str]  # of its arguments
    modules: dict[str, nn.Module]
    device: torch.device
    reason: str | None = None  # why requests are traced instead, once that was found
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self._study, self.device)
        self.recorder.constant_value = self._constant_value
        self.reason = why_not(self.modules.values())
        self.numbers_stay = asks_for_types(self.modules.values())
        self.plain = asks_what_it_is(self.forward, self.modules.values())
        self.epoch = 0  # of how rows are numbered
        self._roomy = False  # is there room for deep recursion
        self.ran = 0  # forwards, the last time
        self.to_check = 2  # requests whose results are still compared with the model's own
        self.stand_ins = StandIns(self.names, self.recorder)
        self.templates = Templates(self.tools, self.device)
        self.flow = Flow(self.recorder, self.templates)
        self.patterns = Patterns(self.recorder, self.forward, self.stand_ins)

    @property
    def generation(self) -> int:
        """Of what was learned: older plans hold other cells."""
        return self.templates.generation

    def _constant_value(self, key: Hashable, kind: StubType) -> Any:
        return self.tools.constant_value(key, RowType(kind.shape, DTYPE_NAMES[kind.dtype]))

    # -- one request on stubs --

    def _run(self, out: Unfolded, wanted: Wanted) -> None:
        recorder = self.recorder
        recorder.parts, recorder.data = out.parts, out.rows
        out.start, out.plain = wanted.start, wanted.plain
        recorder.plain = wanted.plain
        recorder.begin(wanted.script, wanted.guesses, wanted.start - 1)
        try:
            out.returned = recorder.run(self.forward, *out.call)
        except NumberSteers as error:
            place = self.stand_ins.place_of(error.row, out, wanted.args, wanted.kwargs)
            raise Steers(place) from error
        except (Exception, CannotUnfold) as error:
            if not _unsaid(recorder.asked):
                raise
            log.info("plan", f"what was guessed of an answer raises: {error!r}")
        finally:
            out.asked, out.yields = recorder.asked, recorder.yields
            out.generates, out.draws = recorder.generates, recorder.draws
            if out.open:
                out.yields = [y for y in out.yields if y[0] < len(out.asked)]
            recorder.holdings.check()
        if len(out.asked) < len(wanted.script):
            raise CannotUnfold("it asks other questions when it runs again")
        if recorder.repeating and not all(holds(*shell) for shell in out.shells):
            recorder.repeating, recorder.relearn = False, True
            recorder.memos.clear()

    # -- learning --

    def _study(
        self,
        alone: Callable[..., Any],
        rows: Sequence[tuple[StubType, int]],
        is_cell: bool,
        lists: bool,
        called: bool,
    ) -> Study | None:
        traced = self.tools.trace_alone(alone, [example(t, self.device) for t, _ in rows])
        if called and traced.escaped:  # its body keeps tensors elsewhere: it has to run each time
            return None
        kept, spec = traced.outputs
        for kind, value in kept:
            if kind == "v" and not isinstance(value, (int, float, bool, str, type(None))):
                return None
        lowered = self.tools.lower_alone(traced, 1 if lists else 2)
        device = self.recorder.device
        keys = {value: key for key, value in lowered.constants.items()}
        refs = [int(r) for out in lowered.outputs for r in out.refs.reshape(-1)]
        constant = None
        if all(r in keys for r in refs):  # whole, whatever it is used for
            lowered = self.tools.lower_alone(traced, [False] * len(lowered.outputs))
            keys = {value: key for key, value in lowered.constants.items()}
            refs = [int(r) for out in lowered.outputs for r in out.refs.reshape(-1)]
            constant = tuple(keys.get(r) for r in refs) if all(r in keys for r in refs) else None
        outputs = []
        for out in lowered.outputs:
            kind = StubType.of(out.shape, TORCH_DTYPES[out.type.dtype], device)
            outputs.append(OutType(kind, -1 if all(out.row_dims) else out.shape[0]))
        if is_cell:
            groups = self.tools.extract_alone(lowered, Roles()).groups
            if any(group.cell.recurrent for group in groups):
                return None
        dims = Dims(traced.graph)
        inputs = [node for node in traced.graph if node.kind == "input"]
        positions = []
        for node in inputs:
            form = dims.row_dims(node.id)
            positions.append(len(form) > 1 and not form[0] and all(form[1:]))
        spec = None if spec == LEAF else spec
        moves = all(node.op in _MOVES for node in lowered.nodes)
        return Study(tuple(outputs), tuple(kept), spec, constant, tuple(positions), moves)

    def unfold(
        self,
        requests: Sequence[Wanted],
        steering: Steering,
        *,
        start: tuple[int, bool] | None = None,
    ) -> Unfolding:
        """Run new requests on stubs; what they did is in the recorder's segments. `start`: they
        begin, with so many guesses, plainly or not; those whose forwards do what is known need not
        run.

        Raises Steers where a number turned out to decide, CannotUnfold where tracing has to
        do it.
        """
        self.stand_ins.steering = steering
        stamping = start is not None and self._may_stamp()
        size = len(requests) if self.templates else min(SAMPLE, len(requests))
        for _ in range(ROUNDS):
            self.patterns.begin(self.epoch)
            known, others = self.patterns.choose(requests) if stamping else ([], None)
            left = requests if others is None else [requests[i] for i in others]
            if start is not None:
                left = [one._replace(guesses=start[0], plain=start[1]) for one in left]
            runs, stable = self._record(left[:size], stamping) if left else self._nothing()
            self.ran = len(runs)
            if stable and stamping:
                self.patterns.note(runs)
            if stable and size >= len(left):
                return Unfolding(left, runs, [self.patterns.write(k, requests) for k in known])
            if stable:
                size = len(requests)
        raise CannotUnfold("its structure looks different each time")

    def _may_stamp(self) -> bool:
        """Stand-ins for trees have other types, and write nothing in place."""
        return not (self.numbers_stay or self.plain or self.recorder.writing)

    def _nothing(self) -> tuple[list[Unfolded], bool]:
        """No request has to run."""
        self.recorder.reset()
        return [], True

    def _record(self, requests: Sequence[Wanted], stamping: bool) -> tuple[list[Unfolded], bool]:
        recorder = self.recorder
        recorder.reset()
        recorder.relearn = False
        if self.stand_ins.overflow():
            recorder.memos.clear()
        try:
            return self._recorded(requests, stamping)
        except RecursionError:
            recorder.reset()
            return self._with_room(lambda: self._recorded(requests, stamping))

    def _with_room(self, work: Callable[[], T]) -> T:
        """Work in a thread with a large stack: deep structures need one."""
        self._roomy = True
        limit, size = sys.getrecursionlimit(), threading.stack_size(ROOM)
        sys.setrecursionlimit(max(limit, DEPTH))
        try:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(work).result()
        finally:
            self._roomy = False
            threading.stack_size(size)
            sys.setrecursionlimit(limit)

    def _recorded(self, requests: Sequence[Wanted], stamping: bool) -> tuple[list[Unfolded], bool]:
        recorder = self.recorder
        self.stand_ins.begin()
        known = len(recorder.all_ops)
        runs = []
        for request in requests:
            try:
                runs.append(self.stand_ins.of(*request[:3]))
            except CannotUnfold as error:
                runs.append(Unfolded(request[0], reason=str(error)))
        with recorder.watching(self.modules):
            for run, wanted in zip(runs, requests, strict=True):
                run.base = recorder.next_row
                if run.reason is not None:
                    continue
                try:
                    self._run(run, wanted)
                    if stamping:
                        self.patterns.learn(run)
                except (Steers, RefusedCell):
                    raise
                except CannotUnfold as error:
                    run.reason = str(error)
                    log.info("plan", f"a request cannot be unfolded: {error}")
                except RecursionError:
                    if not self._roomy:
                        raise
                    run.over_deep = True
                    log.info("plan", "a request recurses too deep")
                except Exception as error:
                    run.error = error
                    log.info("plan", f"a request fails: {error!r}")
        recorder.expand()
        recorder.leaks()
        recorder.spans = []
        stable = not recorder.relearn
        if self.stand_ins.take_apart(known):
            stable = False
        self.epoch += not stable
        if not self.flow.learn(runs):
            self.patterns.forget()  # they hold segments of before
            stable = False
        return runs, stable

    # -- call graphs --

    def forest(self, runs: Sequence[Unfolded], stamped: Sequence[Stamped] = ()) -> Forest:
        """Calls of the recorded requests, and of those that were stamped."""
        recorder = self.recorder
        for _ in range(ROUNDS):  # what one template teaches may change another
            if not sum([self.templates.of(segment)[1] for segment in recorder.used]):
                break
        return make_forest(
            recorder,
            runs,
            lambda segment: self.templates.of(segment)[0],
            self.flow.type_of,
            stamped,
        )

    def explain(self) -> list[str]:
        """Segments that feed themselves though they are no call: lines to move into a method."""
        return sorted(
            {
                f"{op.origin}: {op.name}"
                for op in self.recorder.all_ops
                if op.component and not op.is_call
            }
        )


def _unsaid(asked: list[Asked]) -> bool:
    """Forget what followed the last answer that was guessed; False where none was."""
    at = next((i for i in range(len(asked) - 1, -1, -1) if asked[i].guessed), None)
    if at is None:
        return False
    del asked[at + 1 :]
    asked[at].answer, asked[at].guessed = OPEN, False
    return True
