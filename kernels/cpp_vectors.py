"""C++ text of stages along the vectors of ragged inputs.

Duty: for every row a loop over the positions of its vector, one stage after another while what the
row reads is in cache. Comes in: consecutive stages that are done along vectors or reduce them; goes
out: lines of C++, of `cellc.kernels.cpp_printer`. Positions are reduced in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cellc.kernels.cpp_body import indented, loops, row_loop
from cellc.kernels.cpp_expr import stored
from cellc.kernels.cpp_reduce import OPS, ReducePrinter
from cellc.kernels.tile import Index, Map, RaggedReduce, Reduce, Ref, Stage, written


def is_along(stage: Stage) -> bool:
    """Is it done at the positions of vectors?"""
    return isinstance(stage, Map | Reduce | RaggedReduce) and stage.over is not None


class VectorPrinter(ReducePrinter):
    """Prints stages along vectors."""

    def _along(self, stages: Sequence[Stage]) -> list[str]:
        lines = []
        for stage in stages:
            if isinstance(stage, RaggedReduce) and self._is_plain(stage):
                lines.append(self._plain(stage))
            else:
                lines += ["{", *indented(self._stage_along(stage)), "}"]
        return row_loop(lines)

    def _is_plain(self, s: RaggedReduce) -> bool:
        """It reduces the very rows of an input."""
        (load, *more), flat = s.body, Index(0, (1,) * (s.size > 1))
        return (
            not more and load.op == "load" and load.ref == self._rows_of(s) and load.index == flat
        )

    def _rows_of(self, s: RaggedReduce) -> Ref | None:
        ref = s.body[0].ref
        return ref if ref is not None and ref.kind == "input" else None

    def _plain(self, s: RaggedReduce) -> str:
        ref = s.body[0].ref
        assert ref is not None
        given = stored(self.program.type_of(ref).dtype)
        flags = [str(s.op == "mean").lower(), str(s.op in ("amax", "amin")).lower()]
        place = f"{ref.index}, {s.size}, {self._operand(s.out)}"
        types = f"{OPS[s.op]}, {given}, {stored(s.dtype)}"
        return f"ragged<{types}>(t, {place}, {', '.join(flags)}, {{r, r + 1}});"

    def _stage_along(self, s: Stage) -> list[str]:
        assert isinstance(s, Map | Reduce | RaggedReduce)
        outside, inside = [f"const Vector vector = t.vector({s.over}, r);"], list[str]()
        made = written(s)
        refs = dict.fromkeys([*(ref for ref, _ in s.reads()), *made])
        for ref in refs:
            if self.program.vector_of(ref) is None:
                outside.append(self._declare(ref, ref in made))
            else:
                before, at = self._declare_along(ref, ref in made)
                outside.append(before)
                inside.append(at)
        if isinstance(s, RaggedReduce):
            begin, step, end = self._reduce_positions(s)
        else:
            step = self._reduction(s) if isinstance(s, Reduce) else self._map_position(s)
            begin = end = []
        scalars = isinstance(s, Map) and not s.space
        head = ["#pragma GCC ivdep"] * scalars
        head.append("for (int64_t j = 0; j < vector.size; ++j) {")
        return [*outside, *begin, *head, *indented([*inside, *step]), "}", *end]

    def _declare_along(self, ref: Ref, writes: bool) -> tuple[str, str]:
        """Where the rows of a vector are, and the one at position j."""
        type_, name = self.program.type_of(ref), self._name(ref)
        const = "" if writes else "const "
        ctype = f"{const}{stored(type_.dtype)}"
        pointer = f"{ctype} *__restrict {name}"
        if ref.kind == "input":
            before = f"const Vector {name}_rows = t.vector({ref.index}, r);"
            return before, f"{pointer} = {name}_rows.row<{ctype}>({type_.numel}, j);"
        before = f"{pointer}_rows = t.row<{ctype}>({self._operand(ref)}, r);"
        return before, f"{pointer} = {name}_rows + {type_.numel} * j;"

    def _map_position(self, s: Map) -> list[str]:
        rank = len(s.space)
        levels = self._body(s.body, rank)
        for target in s.targets:
            at = target.index.text([f"i{d}" for d in range(rank)])
            levels[-1].append(f"{self._name(target.ref)}[{at}] = v{target.value};")
        return loops(s.space, levels)

    def _reduce_positions(self, s: RaggedReduce) -> tuple[list[str], list[str], list[str]]:
        """Lines before, at, and after the positions."""
        rank, op, ctype, size = len(s.space), OPS[s.op], stored(s.dtype), s.size
        flat = Index(0, tuple(math.prod(s.space[d + 1 :]) for d in range(rank)))
        at = flat.text([f"i{d}" for d in range(rank)])
        levels = self._body(s.body, rank)
        value = f"{op}::from<{ctype}>(v{s.value})"
        levels[-1].append(f"acc[{at}] = {op}::join<{ctype}>(acc[{at}], {value});")
        each = f"for (int64_t i = 0; i < {size}; ++i)"
        out, first = self._name(s.out), f"{op}::first<{ctype}>()"
        begin = [f"{ctype} *__restrict acc = {out};"] if rank else [f"{ctype} acc[1];"]
        if s.op in ("amax", "amin"):
            begin.append("if (vector.size == 0) t.bad[r] = 1;")
            first = f"vector.size == 0 ? {ctype}(0) : {first}"
        begin.append(f"{each} acc[i] = {first};")
        end = [f"{each} acc[i] = acc[i] / {ctype}(vector.size);"] if s.op == "mean" else []
        end += [] if rank else [f"{out}[0] = acc[0];"]
        return begin, loops(s.space, levels), end
