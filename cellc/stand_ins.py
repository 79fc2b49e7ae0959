"""Stand-ins: new requests as stubs, with their rows.

Duty: give every tensor and number of a request its rows and the stub that stands for it, and know
which tensors are lists of rows because operations take them apart. Used by `cellc.unfolder`; the
copying itself is done by `frontends.stubbing`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from cellc.copier import Copier
from cellc.dtypes import DTYPE_NAMES
from cellc.frontends.stub import CannotUnfold, FloatNumber, IntNumber, Stack, Stub, StubType
from cellc.frontends.stubbing import MAX_SHAPES, Shapes, Stubber
from cellc.frontends.unfold import Recorder
from cellc.request import Request
from cellc.skeleton import Steering
from cellc.unfolded import Unfolded


class StandIns:
    """Requests of one model as stubs. `names`: of its arguments."""

    def __init__(self, names: list[str], recorder: Recorder) -> None:
        self.names, self.recorder = names, recorder
        self.steering = Steering()
        self._shapes = Shapes({})
        self._stacks: set[Hashable] = set()  # places of tensors that are taken apart
        self._whole: dict[int, Hashable] = {}  # places of those that are not, by row

    def begin(self) -> None:
        """Requests are run from the first row on."""
        self._whole = {}

    def overflow(self) -> bool:
        """Forget shapes where there are too many; True if so."""
        if len(self._shapes.numbers) <= MAX_SHAPES:
            return False
        self._shapes.numbers.clear()
        return True

    def of(self, request: Request, args: Any, kwargs: Any) -> Unfolded:
        """A request as stubs; its rows are taken."""
        recorder = self.recorder
        out = Unfolded(request)
        at = request.given
        starts = []
        inside = ", ".join(self.names)
        for present, form in ((request.ints, IntNumber), (request.floats, FloatNumber)):
            starts.append(recorder.next_row)
            if present:
                count = len(request.tensors[at])
                out.data.append((at, recorder.next_row, form.type, count, f"a number in {inside}"))
                recorder.next_row += count
                at += 1
        starts.append(recorder.next_row)
        leaf = 0

        def tensor(value: torch.Tensor, place: Hashable, row: int) -> Any:
            nonlocal leaf
            leaf += 1
            return self._data(out, leaf - 1, value, place, row)

        stubber = Stubber(self._shapes, self.steering, (starts[0], starts[1], starts[2]), tensor)
        out.call, out.parts = stubber.call(args, kwargs), stubber.parts
        out.shells = stubber.shells
        recorder.next_row = stubber.tensors
        out.rows = (starts[0], starts[1], starts[2], stubber.tensors)
        return out

    def _data(
        self, out: Unfolded, leaf: int, value: torch.Tensor, place: Hashable, row: int
    ) -> Any:
        if value.dtype not in DTYPE_NAMES:
            raise CannotUnfold(f"a tensor of {value.dtype}")
        device = self.recorder.device
        shape = tuple(value.shape)
        if 0 in shape:
            raise CannotUnfold("an empty tensor")
        if self.is_list(value, place):
            inner = StubType.of(shape[1:], value.dtype, device)
            out.data.append((leaf, row, inner, shape[0], self._name(place)))
            return Stack.of_rows(row, shape[0], inner)
        kind = StubType.of(shape, value.dtype, device)
        out.data.append((leaf, row, kind, -1, self._name(place)))
        if len(shape) > 0:
            self._whole[row] = place
        return Stub(row, kind)

    def is_list(self, value: torch.Tensor, place: Hashable) -> bool:
        """Is a tensor a list of rows?"""
        if not value.dim():
            return False
        kind = value.dtype
        return place in self._stacks or not (kind.is_floating_point or kind is torch.bool)

    def _name(self, place: Any) -> str:
        """A tensor's name in error messages."""
        if type(place) is tuple and place[0] == "argument":
            k = place[1]
            return self.names[k] if isinstance(k, int) and k < len(self.names) else str(k)
        return f"a tensor in {', '.join(self.names)}"

    def place_of(self, row: int, out: Unfolded, args: Any, kwargs: Any) -> Hashable:
        """Place of the number that is row `row`."""
        places: dict[type, list[Hashable]] = {int: [], float: []}

        def number(value: Any, place: Hashable) -> Any:
            if place not in self.steering:
                places[type(value)].append(place)
            return value

        Copier(lambda leaf, _: leaf, number).call(args, kwargs)
        for _, first, form, count, _ in out.data:
            if first <= row < first + count:
                return places[int if form is IntNumber.type else float][row - first]
        raise AssertionError(row)

    def take_apart(self, known: int) -> bool:
        """Were tensors met whole that tracing takes apart along their first dimension?"""
        found = False
        for row in self.recorder.take_apart:
            if (place := self._whole.get(row)) is not None and place not in self._stacks:
                self._stacks.add(place)
                found = True
        self.recorder.take_apart.clear()
        for segment in self.recorder.used:
            reads = None
            for op, wiring in zip(segment.ops, segment.wirings, strict=True):
                if op.number < known and not any(op.study.positions):
                    continue
                for apart, w in zip(op.study.positions, wiring, strict=True):
                    if not apart or w >= 0:
                        continue
                    if reads is None:
                        reads, _ = segment.instances()
                    for row in reads[:, ~w].tolist():
                        place = self._whole.get(row)
                        if place is not None and place not in self._stacks:
                            self._stacks.add(place)
                            found = True
        return found
