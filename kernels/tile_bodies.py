"""Bodies of stages under construction.

Duty: instructions at the points of a space, each distinct one once, and the finished stages, their
dimensions merged. Used by `cellc.kernels.tile`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cellc.kernels.tile_index import merge_groups, regrouped
from cellc.kernels.tile_ir import Body, Index, Instr, Map, Reduce, Ref, Target
from cellc.ops import Shape


@dataclass
class StageBody:
    """Instructions of one stage, each distinct one once."""

    space: Shape
    over: int | None = None
    instrs: list[Instr] = field(default_factory=list)
    known: dict[Instr, int] = field(default_factory=dict)
    here: dict[Ref, int] = field(default_factory=dict)  # rows this map writes, at this very point

    def add(self, instr: Instr) -> int:
        if instr not in self.known:
            self.known[instr] = len(self.instrs)
            self.instrs.append(instr)
        return self.known[instr]

    def coordinates(self) -> tuple[Index, ...]:
        rank = len(self.space)
        sizes = self.space
        return tuple(
            Index(0, tuple(int(d == e and sizes[d] > 1) for e in range(rank))) for d in range(rank)
        )

    @property
    def zero(self) -> Index:
        return Index(0, (0,) * len(self.space))


@dataclass
class MapBody(StageBody):
    """A map that may still get targets."""

    targets: list[Target] = field(default_factory=list)


def closed(body: MapBody) -> Map:
    """The finished map, its dimensions merged."""
    space, groups = merged_space(
        body, [range(len(body.space))], [target.index for target in body.targets]
    )
    targets = tuple(Target(t.ref, regrouped(t.index, groups), t.value) for t in body.targets)
    return Map(space, merged(body, groups), targets, body.over)


def reduced(
    op: str, body: StageBody, kept: int, value: int, out: Ref, dtype: str, source: int
) -> Reduce:
    """A reduction over the dimensions from `kept` on, both parts merged."""
    outer, _ = merged_space(body, [range(kept)])
    space, groups = merged_space(body, [range(kept), range(kept, len(body.space))])
    if len(outer) == len(space):  # over nothing but dimensions of size 1
        space, groups = (*space, 1), [*groups, []]
    instrs = merged(body, groups)
    return Reduce(op, space, len(outer), instrs, value, out, dtype, source, body.over)


def merged_space(
    body: StageBody, parts: Sequence[Sequence[int]], indices: Sequence[Index] = ()
) -> tuple[Shape, list[list[int]]]:
    """The sizes of the merged dimensions of a space, part by part, and which they are made of."""
    indices = [*(x.index for x in body.instrs if x.index is not None), *indices]
    groups = [group for part in parts for group in merge_groups(body.space, part, indices)]
    return tuple(math.prod(body.space[d] for d in group) for group in groups), groups


def merged(body: StageBody, groups: Sequence[Sequence[int]]) -> Body:
    return tuple(
        replace(x, index=regrouped(x.index, groups)) if x.index is not None else x
        for x in body.instrs
    )
