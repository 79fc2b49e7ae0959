"""Loading: requests' tensors into their regions.

Duty: of requests that begin together, find the tensors that are laid out alike, whatever their
sizes, and have the arenas copy each such column at once; say which requests hold what cannot be
copied. Used by `cellc.flight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cellc.arithmetic import Arithmetic
from cellc.carry import Late
from cellc.plan import I64, DataRows, Plan
from cellc.state import Arenas
from cellc.ticket import Ticket, out_of_range
from cellc.unfolded import DRAWN
from cellc.writing import Writer

FEW = 8  # requests that begin together, whose data is copied one by one


@dataclass(slots=True)
class Column:
    """Tensors of several requests that are copied alike; `rows`: those of one of them."""

    rows: DataRows
    members: Sequence[int]  # positions of the requests
    starts: I64  # first slots
    counts: I64  # rows
    tensors: list[torch.Tensor]


class Loader:
    """Into some arenas; `arithmetic` copies memory."""

    def __init__(self, arenas: Arenas, arithmetic: Arithmetic) -> None:
        self._arenas, self.writer = arenas, Writer(arenas, arithmetic)

    def load(self, tickets: Sequence[Ticket], bases: I64) -> dict[int, BaseException]:
        """Copy requests' tensors into their regions; those that failed, by position."""
        errors: dict[int, BaseException] = {}
        few = len(tickets) <= FEW and self._arenas.in_numpy
        if few and len(tickets) > 1:
            few = not any([type(ticket.tensors) is Late for ticket in tickets])
        columns = self._one_by_one if few or len(tickets) == 1 else self._columns
        for column in columns(tickets, bases):
            self._copy(column, errors)
        return errors

    def _one_by_one(self, tickets: Sequence[Ticket], bases: I64) -> Iterator[Column]:
        """What of a few requests is not copied yet."""
        write = self.writer.write_one
        for position, (ticket, base) in enumerate(zip(tickets, bases.tolist(), strict=True)):
            for rows in ticket.entry.plan.data:
                if rows.leaf < 0:
                    continue
                tensor, start = ticket.tensor(rows.leaf), base[rows.type] + rows.start
                try:
                    written = write(rows, start, tensor)
                except Exception:
                    written = False
                if not written:
                    starts, counts = np.array([start]), np.array([rows.count])
                    yield Column(rows, (position,), starts, counts, [tensor])

    def _columns(self, tickets: Sequence[Ticket], bases: I64) -> Iterator[Column]:
        plans = [ticket.entry.plan for ticket in tickets]
        numbers = {plan: i for i, plan in enumerate(dict.fromkeys(plans))}
        everyone: Sequence[int] = range(len(tickets))
        if len(numbers) == 1:
            (plan,) = numbers
            written, others = self._write_carried(tickets, plan, bases)
            for rows in plan.data:
                members = others if rows in written else everyone
                if rows.leaf >= 0 and members:
                    starts = bases[:, rows.type] + rows.start
                    starts = starts if members is everyone else starts[members]
                    counts = np.full(len(members), rows.count)
                    yield Column(rows, members, starts, counts, _tensors(tickets, members, rows))
            return
        which = np.array([numbers[plan] for plan in plans])
        for kind in _kinds(list(numbers)):
            rows = next(iter(kind.values()))
            places = np.full((2, len(numbers)), -1)
            for number, one in kind.items():
                places[:, number] = one.start, one.count
            starts, counts = places[:, which]
            having, members = starts >= 0, everyone
            starts = starts + bases[:, rows.type]
            if len(kind) < len(numbers):
                starts, counts = starts[having], counts[having]
                members = np.flatnonzero(having).tolist()
            yield Column(rows, members, starts, counts, _tensors(tickets, members, rows))

    def _write_carried(
        self, tickets: Sequence[Ticket], plan: Plan, bases: I64
    ) -> tuple[Sequence[DataRows], list[int]]:
        """Copy what steps of one form have in blocks: what of the plan's data that was, and the
        positions of tickets of which it is still to be copied.
        """
        late = {i: t.tensors for i, t in enumerate(tickets) if isinstance(t.tensors, Late)}
        form = next((x.form for x in late.values()), None)
        alike = {i: x for i, x in late.items() if x.form is form}
        written: list[DataRows] = []
        if form is None:
            return written, []
        numbers, members = [x.row for x in alike.values()], list(alike)
        given = len(form.order) - len(next(iter(alike.values())).blocks)
        for rows in plan.data:
            place = form.order[rows.leaf] - given if rows.leaf >= 0 else -1
            if place >= 0:
                starts = bases[members, rows.type] + rows.start
                blocks = [x.blocks[place] for x in alike.values()]
                if self.writer.write_rows(rows, starts, blocks, numbers):
                    written.append(rows)
        return written, [i for i in range(len(tickets)) if i not in alike]

    def _copy(self, column: Column, errors: dict[int, BaseException]) -> None:
        rows, members, starts, counts, tensors = (
            *(column.rows, column.members, column.starts),
            *(column.counts, column.tensors),
        )
        try:
            wrong = self.writer.write(rows, starts, counts, tensors)
        except Exception:  # one of them is a kind of tensor that cannot be copied so
            wrong = []
            for k, member in enumerate(members):
                alone = slice(k, k + 1)
                try:
                    tensors[k] = tensors[k].resolve_conj().resolve_neg()
                    if self.writer.write(rows, starts[alone], counts[alone], tensors[alone]):
                        wrong.append(k)
                except Exception as error:
                    errors[member] = error
        for k in wrong:
            errors[members[k]] = out_of_range(rows.name, rows.bound, tensors[k])


def _kinds(plans: Sequence[Plan]) -> Sequence[Mapping[int, DataRows]]:
    """Data of plans that is copied alike: of each kind, that of each plan by the plan's number."""
    found: dict[Any, dict[int, DataRows]] = {}
    for number, plan in enumerate(plans):
        for rows in plan.data:
            if rows.leaf < 0:
                continue  # carried from the leg before
            key: Any = rows.kind
            while number in (members := found.setdefault(key, {})):
                key = key, 1  # twice in one plan
            members[number] = rows
    return list(found.values())


def _tensors(
    tickets: Sequence[Ticket], members: Sequence[int], rows: DataRows
) -> list[torch.Tensor]:
    leaf = rows.leaf
    given = tickets if len(members) == len(tickets) else [tickets[i] for i in members]
    if leaf >= DRAWN:
        return [ticket.tensor(leaf) for ticket in given]
    return [ticket.tensors[leaf] for ticket in given]
