"""C++ text of reductions over dimensions of a row.

Duty: values are reduced in lanes, in blocks, in an order that depends on the space alone. Comes in:
a `Reduce`; goes out: lines of C++, of `cellc.kernels.cpp_printer` and of `cpp_vectors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cellc.kernels.cpp_body import BodyPrinter, indented, loops, row_loop
from cellc.kernels.cpp_expr import stored
from cellc.kernels.tile import Index, Instr, Reduce

OPS = {
    "sum": "Sum",
    "mean": "Sum",
    "prod": "Prod",
    "amax": "Amax",
    "amin": "Amin",
    "any": "Any",
    "all": "All",
}


class ReducePrinter(BodyPrinter):
    """Prints reductions."""

    def _reduce(self, s: Reduce) -> list[str]:
        declared = [self._declare(ref, False) for ref in dict.fromkeys(r for r, _ in s.reads())]
        declared.append(self._declare(s.out, True))
        return row_loop([*declared, *self._reduction(s)])

    def _reduction(self, s: Reduce) -> list[str]:
        """Of one row, or at one position of a vector."""
        return self._by_columns(s) if _columns_first(s) else self._by_points(s)

    def _by_points(self, s: Reduce) -> list[str]:
        """For each kept point, blocks of values, reduced in lanes."""
        rank, kept = len(s.space), s.num_kept
        arg = s.op.startswith("arg")
        ctype = stored(s.body[s.value].dtype if arg else s.dtype)
        op = OPS[s.op.replace("arg", "a")]
        levels = self._body(s.body, rank)
        last, n = f"i{rank - 1}", s.space[-1]
        levels[rank].append(f"values[{last} - block] = {op}::from<{ctype}>(v{s.value});")
        blocks = [
            f"for (int64_t block = 0; block < {n}; block += VALUES) {{",
            f"    const int64_t count = {n} - block < VALUES ? {n} - block : VALUES;",
            *indented(loops((n,), [[], levels[rank]], ("block", "block + count"), rank - 1)),
            "    lanes.add(values, count);",
            "}",
        ]
        inside = [[], *levels[kept + 1 : rank]]
        inside[-1] = [*inside[-1], *blocks]
        middle = loops(s.space[kept:-1], inside, None, kept, pragma=False)
        flat = Index(0, tuple(math.prod(s.space[d + 1 : kept]) for d in range(kept)))
        at = flat.text([f"i{d}" for d in range(kept)])
        result = "lanes.at" if arg else "lanes.result()"
        if s.op == "mean":
            result += f" / {stored(s.dtype)}({math.prod(s.space[kept:])})"
        kind = f"{'Arg' if arg else 'Lanes'}<{op}, {ctype}>"
        lanes = [f"{kind} lanes;", f"{ctype} values[VALUES];"]
        point = [*levels[kept], *lanes, *middle, f"{self._name(s.out)}[{at}] = {result};"]
        return loops(s.space[:kept], [*levels[:kept], point], pragma=False)

    def _by_columns(self, s: Reduce) -> list[str]:
        """For all points of the last kept dimension at once, one reduced point after another."""
        kept, ctype, op = s.num_kept, stored(s.dtype), OPS[s.op]
        order = [*range(kept - 1), *range(kept, len(s.space)), kept - 1]
        body = [_reordered(x, order) for x in s.body]
        space = tuple(s.space[d] for d in order)
        names, n = [f"i{d}" for d in range(len(space))], space[-1]
        levels = self._body(body, len(space))
        flat = Index(0, tuple(math.prod(s.space[d + 1 : kept]) for d in range(kept - 1)))
        last = names[-1]
        value = f"{op}::from<{ctype}>(v{s.value})"
        levels[-1].append(f"acc[{last}] = {op}::join<{ctype}>(acc[{last}], {value});")
        each = f"for (int64_t {last} = 0; {last} < {n}; ++{last})"
        begin = [
            f"{ctype} *__restrict acc = {self._name(s.out)} + {flat.text(names)};",
            f"{each} acc[{last}] = {op}::first<{ctype}>();",
        ]
        inner = loops(space[kept - 1 :], [[], *levels[kept:]], first=kept - 1)
        count = math.prod(s.space[kept:])
        end = [f"{each} acc[{last}] = acc[{last}] / {ctype}({count});"] if s.op == "mean" else []
        point = [*levels[kept - 1], *begin, *inner, *end]
        return loops(space[: kept - 1], [*levels[: kept - 1], point], pragma=False)


def _columns_first(s: Reduce) -> bool:
    """Whether the values lie next to each other along the kept, not along the reduced dimension."""
    if s.num_kept == 0 or s.op.startswith("arg"):
        return False
    loads = [index.coefs for _, index in s.reads()]
    return any(c[-1] > 1 for c in loads) and all(c[s.num_kept - 1] in (0, 1) for c in loads)


def _reordered(instr: Instr, order: Sequence[int]) -> Instr:
    if instr.index is None:
        return instr
    index = Index(instr.index.const, tuple(instr.index.coefs[d] for d in order))
    return Instr(
        instr.op,
        instr.dtype,
        instr.args,
        instr.ref,
        index,
        instr.value,
        instr.limit,
        instr.scale,
        instr.source,
    )
