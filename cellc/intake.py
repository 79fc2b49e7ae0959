"""Intake: calls to tickets.

Duty: bind and flatten calls, find or make the plan of each, the new ones of `map` together. Where
requests are unfolded, compare the first results with the model's own. Comes in from
`cellc.compiled`, goes to the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cellc.carry import Late
from cellc.compiler import Compiler
from cellc.errors import (
    CallbackWait,
    CellcError,
    GeneratorForward,
    UnsupportedError,
    ValueReadError,
)
from cellc.familiar import familiar
from cellc.frontends.drawing import Draws
from cellc.legs import Entry, Leg
from cellc.owning import owned
from cellc.pipeline import check_outside
from cellc.request import Request, Structure, as_call
from cellc.ticket import Ticket
from cellc.unfolded import Wanted

Begin = Callable[[Sequence[Ticket]], None]
TOGETHER = 96  # requests that are unfolded while those before them run
MANY = 384  # likewise, at most, where no forward has to run for that


class Intake:
    """Of one model; `run` runs tickets to their ends. dtype: of floating-point tensors, None: as
    they come.
    """

    def __init__(
        self,
        compiler: Compiler,
        dtype: torch.dtype | None,
        run: Callable[[Sequence[Ticket]], None],
    ) -> None:
        self._compiler, self._dtype, self._run = compiler, dtype, run

    def ticket(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ticket:
        check_outside()
        compiler = self._compiler
        if not kwargs and self._dtype is None:
            known = compiler.known(args)
            if known is not None:
                return Ticket(known, list(args))
        bound = self._bind(args, kwargs)
        request = compiler.arguments.flatten(*bound)
        entry = compiler.cached(request.key)
        if entry is None:
            (found,) = self._planned([bound])
            if isinstance(found, Exception):
                raise found
            return found
        return _new_ticket(entry, request, bound)

    def again(self, tensors: Late) -> Ticket | None:
        """A step of a session that has a form; None where its plan may be another by now."""
        check_outside()
        form = tensors.form
        if self._compiler.arguments.identity:
            return None
        entry, plans = form.entry(), self._compiler.plans
        if entry is None or plans.dropped != form.dropped:
            return None
        self._compiler.counts["plan_hits"] += 1
        plans.used(entry)
        return Ticket(entry, tensors)

    def _bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self._compiler.arguments.bind(args, kwargs)
        return call if self._dtype is None else self._cast(call)

    def mapped(self, requests: Sequence[Any], begin: Begin | None = None) -> list[Ticket]:
        """`tickets` of what `map` is given."""
        check_outside()
        compiler, count = self._compiler, len(requests)
        dropped = compiler.plans.dropped
        found: list[Ticket | None] = [None] * count
        if self._dtype is None:
            found = familiar(compiler, requests)
        others = [i for i, ticket in enumerate(found) if ticket is None]
        if others:
            made = self.tickets([as_call(requests[i]) for i in others], begin)
            if len(others) < count and compiler.plans.dropped != dropped:
                # with what was learned of the model, familiar ones may have other plans
                others += [i for i, ticket in enumerate(found) if ticket is not None]
                made += self.tickets([as_call(requests[i]) for i in others[len(made) :]])
            for i, ticket in zip(others, made, strict=True):
                found[i] = ticket
        return found  # type: ignore[return-value]

    def tickets(
        self,
        calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
        begin: Begin | None = None,
    ) -> list[Ticket]:
        """Tickets in order, those of requests that cannot be planned already failed. Of sizes never
        seen, the extremes are planned first: those between need no tracing. `begin` is given some
        tickets while others are still to be unfolded or, where forwards need not run for that, even
        to be bound.
        """
        check_outside()
        unfolder = self._compiler.unfolder
        found: list[Ticket | Exception] = []
        count = TOGETHER
        while begin is not None and unfolder.to_check <= 0 and len(unfolder.patterns):
            if len(calls) - len(found) <= TOGETHER:
                break
            some = self._planned(self._bound(calls[len(found) :][:count]), begin)
            begin([t for t in some if isinstance(t, Ticket) and not t.arrived])
            found += some
            count = min(2 * count, MANY)
        found += self._planned(self._bound(calls[len(found) :]), begin)
        return [Ticket.failed(one) if isinstance(one, Exception) else one for one in found]

    def _bound(self, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """Calls, or what is wrong with them."""
        bound: list[Any] = []
        for call in calls:
            try:
                bound.append(self._bind(*call))
            except CellcError as error:
                bound.append(error)
        return bound

    def _planned(
        self, bound: Sequence[Any], begin: Begin | None = None
    ) -> list[Ticket | Exception]:
        """Tickets of bound calls (or of errors, which are passed on)."""
        compiler = self._compiler
        begun: dict[int, Ticket] = {}  # by position
        while True:
            flat = [self._flattened(call) for call in bound]
            firsts: dict[Any, Request] = {}  # one a key: keys take long to hash
            leaders: list[Request | Exception] = []
            new: list[Wanted] = []
            for request, call in zip(flat, bound, strict=True):
                if isinstance(request, Exception):
                    leaders.append(request)
                    continue
                request.entry = compiler.cached(request.key)
                known = request.entry is not None
                leaders.append(request if known else firsts.setdefault(request.key, request))
                if not known and leaders[-1] is request:
                    new.append(Wanted(request, *call))
            any(compiler.unfolds(one.request) for one in new)  # one may decide for all
            chosen = [one for one in new if compiler.unfolds(one.request)]
            checked = compiler.unfolder.to_check <= 0 and not compiler.arguments.identity
            if begin is not None and checked:
                chosen = self._begin(begin, chosen, bound, flat, leaders, begun)
            if not chosen or (compiler.unfold(chosen) and self._agrees(chosen)):
                tickets = self._traced(bound, flat, leaders, begun)
                if tickets is not None:
                    return tickets

    def _begin(
        self,
        begin: Begin,
        new: list[Wanted],
        bound: Sequence[Any],
        flat: Sequence[Any],
        leaders: Sequence[Any],
        begun: dict[int, Ticket],
    ) -> list[Wanted]:
        """Unfold some, `begin` with them, go on with others. Returns those that are left, `begun`
        has those that have begun, by position.
        """
        followers: dict[int, list[int]] = {}
        for i, leader in enumerate(leaders):
            followers.setdefault(id(leader), []).append(i)
        count = TOGETHER
        while len(new) > TOGETHER and self._compiler.unfold(new[:count]):
            requests, new = [one.request for one in new[:count]], new[count:]
            count = TOGETHER if self._compiler.unfolder.ran else min(2 * count, MANY)
            unfolded = [request for request in requests if request.entry is not None]
            some = {
                i: _new_ticket(leader.entry, flat[i], bound[i])
                for leader in unfolded
                for i in followers[id(leader)]
            }
            begun.update(some)
            begin(list(some.values()))
        return new

    def _flattened(self, call: Any) -> Request | Exception:
        if isinstance(call, Exception):
            return call
        try:
            return self._compiler.arguments.flatten(*call)
        except CellcError as error:
            return error

    def _traced(
        self,
        bound: Sequence[Any],
        flat: Sequence[Request | Exception],
        leaders: Sequence[Any],
        begun: Mapping[int, Ticket],
    ) -> list[Ticket | Exception] | None:
        """Tickets, requests without an entry planned one by one. Of sizes never seen, the extremes
        are planned first: those between need no tracing. None where the forward turned out to read
        values: it is unfolded.
        """
        compiler = self._compiler
        out: list[Ticket | Exception | None] = [None] * len(flat)
        left: list[tuple[int, Structure, Any, Request]] = []
        for i, (request, call) in enumerate(zip(flat, bound, strict=True)):
            if i in begun:
                out[i] = begun[i]
            elif isinstance(request, Exception):
                out[i] = request
            elif (entry := leaders[i].entry) is not None:
                out[i] = _new_ticket(entry, request, call)
            else:  # traced: Python numbers become part of it
                exact = compiler.arguments.flatten(*call, exact=True)
                left.append((i, exact.structure, call, exact))
        families: dict[Any, dict[tuple[int, ...], tuple[Structure, Any]]] = {}
        for _, structure, call, _ in left:
            families.setdefault(structure.family, {})[structure.sizes] = (structure, call)
        made: dict[Any, Entry | Exception] = {}
        requests = {structure.key: exact for _, structure, _, exact in left}
        keys = {structure.key: flat[i].key for i, structure, _, _ in left}  # type: ignore[union-attr]
        for members in families.values():
            for sizes in _extremes_first(list(members)):
                structure, call = members[sizes]
                made[structure.key] = self._compared(structure, call, requests[structure.key])
                reads = isinstance(made[structure.key], (ValueReadError, GeneratorForward))
                if reads and compiler.steer(keys[structure.key]):
                    return None
                if reads:
                    made[structure.key] = compiler.explained(
                        made[structure.key], keys[structure.key]
                    )
        for members in families.values():  # a later trace may have changed what earlier plans hold
            for structure, call in members.values():
                if not isinstance(made[structure.key], Exception):
                    made[structure.key] = self._entry(structure, call)
        for i, structure, _, exact in left:
            entry_or_error = made[structure.key]
            if not isinstance(entry_or_error, Exception):
                compiler.traced_instead(flat[i])  # type: ignore[arg-type]
            out[i] = (
                entry_or_error
                if isinstance(entry_or_error, Exception)
                else Ticket(entry_or_error, exact.tensors)
            )
        return out  # type: ignore[return-value]

    def _entry(self, structure: Structure, bound: Any) -> Entry | Exception:
        try:
            return self._compiler.entry(structure, *bound)
        except CellcError as error:
            return error

    def _compared(self, structure: Structure, call: Any, request: Request) -> Entry | Exception:
        """`_entry`; of a model that may tell placeholders from tensors, what was traced now gives
        what the model gives.
        """
        compiler = self._compiler
        before = compiler.counts["plans_traced"]
        entry = self._entry(structure, call)
        traced = compiler.counts["plans_traced"] != before
        if compiler.asks.any is None or not traced or isinstance(entry, Exception):
            return entry
        ticket = owned(Ticket(entry, request.tensors, trial=True))
        try:
            self._run([ticket])
            if ticket.error is not None or _alike(ticket.result, compiler.own_result(*call)):
                return entry
        except Exception:  # there is nothing to compare with
            return entry
        compiler.plans.refuse(structure)
        return UnsupportedError(
            what="a forward that asks for the type of a tensor itself, or whether two tensors are "
            "one, and by that gives another result than in PyTorch",
            remedy="write isinstance(x, torch.Tensor) for type(x) is torch.Tensor, and pass an "
            "argument that says which are one",
            origin=compiler.asks.any,
        )

    def _agrees(self, requests: Sequence[Wanted]) -> bool:
        """Do the first unfolded requests give what the model gives? If not, requests are traced."""
        compiler = self._compiler
        for request, args, kwargs, *_ in requests:
            if compiler.unfolder.to_check <= 0 and not request.aliased:
                continue
            if (entry := request.entry) is None:
                continue
            ticket = owned(_new_ticket(entry, request, (args, kwargs), trial=True))
            try:
                self._run([ticket])
            except CallbackWait:
                break  # those that come later are compared
            if ticket.error is not None:
                continue  # the request's own fault
            compiler.unfolder.to_check -= 1
            try:
                alike = _alike(ticket.result, compiler.own_result(args, kwargs))
            except Exception:
                continue  # the model refuses what can be planned: nothing to compare with
            if not alike and compiler.read_plainly():
                return False
            if not alike:
                compiler.distrust("a request run on stubs gave another result than the model")
                return False
        return True

    def _cast(self, call: Any) -> Any:
        def cast(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                return leaf.to(self._dtype)
            return leaf

        return pytree.tree_map(cast, call)


def _alike(got: Any, want: Any) -> bool:
    """Equal but for rounding."""
    a, a_spec = pytree.tree_flatten(got)
    b, b_spec = pytree.tree_flatten(want)
    if a_spec != b_spec:
        return False
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, torch.Tensor):
            floats = isinstance(x, float) and isinstance(y, float)
            both_nan = floats and x != x and y != y
            close = both_nan or (floats and math.isclose(x, y, rel_tol=1e-2, abs_tol=1e-3))
            if type(x) is not type(y) or not (x == y or close):
                return False
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        y = y.to(x.device)
        exact = not y.dtype.is_floating_point
        loose = 5.0 if y.dtype in (torch.float16, torch.bfloat16) else 1.0
        bounds = 1e-2 * loose, 1e-3 * loose
        if not (torch.equal(x, y) if exact else torch.allclose(x, y, *bounds, equal_nan=True)):
            return False
    return True


def _new_ticket(entry: Entry, request: Request, call: Any, *, trial: bool = False) -> Ticket:
    """A ticket; one on `trial` leaves the request's generators as they are."""
    ticket = Ticket(entry, request.tensors, trial=trial)
    if request.nested and isinstance(entry, Leg):
        ticket.call = call
    if request.generators:
        given = [g.clone_state() for g in request.generators] if trial else request.generators
        ticket.draws = Draws(given)
    return ticket


def _extremes_first(sizes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Order in which sizes are planned: largest, smallest, middle, next to smallest, the rest."""
    if len(sizes) <= 4:
        return sizes
    order = sorted(sizes, key=lambda s: (sum(s), s))
    picks = [order[-1], order[0], order[len(order) // 2], order[1]]
    return list(dict.fromkeys([*picks, *order]))
