"""C++ text of the values of a stage at the points of its space.

Duty: names, declarations, statements and loops; no stages. Comes in: the instructions of one stage
of a `TileProgram`; goes out: lines of C++. Used by the printers of stages, `cellc.kernels.cpp_*`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cellc.kernels.cpp_expr import C_TYPES, expression, stored
from cellc.kernels.tile import Instr, Ref, TileProgram

KEYWORDS = frozenset(
    "alignas alignof and asm auto bool break case catch char class const continue default delete "
    "do double else enum explicit export extern false float for friend goto if inline int long "
    "mutable namespace new noexcept not or operator private protected public register return "
    "short signed sizeof static struct switch template this throw true try typedef typename union "
    "unsigned using virtual void volatile while xor "
    "part parts share vector rows lanes values acc block count cellc".split()
)


@dataclass(frozen=True)
class Want:
    """A parameter that a kernel reads: packed for products (a matrix), or as it is."""

    param: int
    packed: bool


class BodyPrinter:
    """Prints what stages have in common, and keeps which parameters a kernel reads."""

    def __init__(self, program: TileProgram) -> None:
        self.program, self.cell = program, program.cell
        self.wants: list[Want] = []
        self.names: dict[Ref, str] = {}
        self._taken: dict[str, int] = {}  # names, and the last number given to one

    # References

    def _operand(self, ref: Ref) -> int:
        """Position of a row in Tile::at."""
        before = {"input": 0, "output": len(self.cell.inputs)}
        both = len(self.cell.inputs) + len(self.cell.outputs)
        assert ref.kind != "param"
        return before.get(ref.kind, both) + ref.index

    def _want(self, param: int, packed: bool = False) -> int:
        want = Want(param, packed)
        if want not in self.wants:
            self.wants.append(want)
        return self.wants.index(want)

    def _name(self, ref: Ref) -> str:
        """A C++ identifier, distinct from those of the other rows."""
        if ref not in self.names:
            name = re.sub(r"\W", "_", self.program.name_of(ref).lstrip("@"))
            bad = (
                name in KEYWORDS
                or name.isupper()
                or re.fullmatch(r"\d.*|([iv]|row)\d+|[jrt]|.*_rows", name)
            )
            name = f"{name}_" if bad else name
            unique, count = name, self._taken.get(name, 1)
            while unique in self._taken:
                count += 1
                unique = f"{name}_{count}"
            self._taken[name] = count
            self._taken.setdefault(unique, 1)
            self.names[ref] = unique
        return self.names[ref]

    def _declare(self, ref: Ref, writes: bool) -> str:
        ctype, name = stored(self.program.type_of(ref).dtype), self._name(ref)
        if ref.kind == "param":
            return f"const {ctype} *__restrict {name} = t.param<{ctype}>({self._want(ref.index)});"
        const = "" if writes else "const "
        return (
            f"{const}{ctype} *__restrict {name} = t.row<{const}{ctype}>({self._operand(ref)}, r);"
        )

    def _body(self, body: Sequence[Instr], rank: int) -> list[list[str]]:
        """Statements by the number of loops that they stand in."""
        depths: list[int] = []
        levels: list[list[str]] = [[] for _ in range(rank + 1)]
        names = [f"i{d}" for d in range(rank)]
        checked: dict[tuple[int, int, int], str] = {}
        for i, x in enumerate(body):
            own = [d + 1 for d, c in enumerate(x.index.coefs) if c] if x.index else []
            depths.append(max([0, *own, *(depths[a] for a in x.args)]))
            place = x.index.text(names) if x.index else ""
            if x.op == "gather":
                row = checked.setdefault((x.args[0], x.limit, x.scale), f"row{i}")
                place = f"{row} + {place}"
                if row == f"row{i}":
                    check = f"cellc::checked(v{x.args[0]}, {x.limit}, &t.bad[r]) * {x.scale}"
                    levels[depths[x.args[0]]].append(f"const int64_t {row} = {check};")
            element = f"{self._name(x.ref)}[{place}]" if x.ref else ""
            text = expression(x, [body[a].dtype for a in x.args], element, body)
            origin = self.cell.ops[x.source].origin if x.source >= 0 else ""
            comment = f"  // {origin}" * bool(origin)
            levels[depths[-1]].append(f"const {C_TYPES[x.dtype]} v{i} = {text};{comment}")
        return levels


def indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def row_loop(lines: list[str], rows: str = "") -> list[str]:
    head = [] if rows else ["const Range rows = split(t.rows, part, parts);"]
    rows = rows or "rows"
    return [
        *head,
        f"for (int64_t r = {rows}.begin; r < {rows}.end; ++r) {{",
        *indented(lines),
        "}",
    ]


def loops(
    space: Sequence[int],
    levels: Sequence[list[str]],
    bounds: tuple[str, str] | None = None,
    first: int = 0,
    pragma: bool = True,
) -> list[str]:
    """A nest over `space`; levels[d] are the statements in d loops, `bounds` the first one's."""
    if not space:
        return list(levels[0])
    i = f"i{first}"
    begin, end = bounds or ("0", str(space[0]))
    inner = loops(space[1:], levels[1:], None, first + 1, pragma)
    head = ["#pragma GCC ivdep"] if pragma and len(space) == 1 else []
    return [
        *levels[0],
        *head,
        f"for (int64_t {i} = {begin}; {i} < {end}; ++{i}) {{",
        *indented(inner),
        "}",
    ]
