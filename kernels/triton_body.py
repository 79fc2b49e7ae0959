"""Triton text of the values of a stage at the points of a tile.

Duty: names, addresses and expressions; no loops and no stages. Comes in: the instructions of one
stage of a `TileProgram`; goes out: lines of Triton, one a value. In a tile, axis 0 is rows (calls,
or calls with the kept coordinates of a reduction), axis 1 is the other coordinates; a value has
size 1 on an axis it does not depend on. f16 and bf16 are f32 in registers.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cellc import ops
from cellc.kernels.tile_ir import Body, Index, Instr, Ref, TileProgram

TYPES = {
    "f16": "float16", "bf16": "bfloat16", "f32": "float32", "u8": "uint8", "i8": "int8",
    "i16": "int16", "i32": "int32", "i64": "int64", "bool": "int1",
}  # fmt: skip
"""Dtypes that Triton kernels handle, and their names in `triton.language`."""

_BOTH = {
    "neg": "-{0}", "abs": "tl.abs({0})", "sign": "sign({0})", "isnan": "{0} != {0}",
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "where": "tl.where({0}, {1}, {2})",
    "fmod": "{0} % {1}", "remainder": "remainder({0}, {1})", "relu": "relu({0})",
    "bitwise_and": "{0} & {1}", "bitwise_or": "{0} | {1}", "bitwise_xor": "{0} ^ {1}",
    "logical_and": "{0} & {1}", "logical_or": "{0} | {1}", "logical_xor": "{0} ^ {1}",
    "logical_not": "{0} == 0",
}  # fmt: skip
_FLOAT = {
    **{name: f"tl.{name}({{0}})" for name in "exp log rsqrt sin cos erf floor ceil".split()},
    **{
        name: f"{name}({{0}})"
        for name in "expm1 log1p tan atan tanh sigmoid trunc silu gelu gelu_tanh softplus".split()
    },
    **{name: f"{name}({{0}}, {{1}})" for name in "maximum minimum floor_div atan2".split()},
    "sqrt": "tl.sqrt_rn({0})", "reciprocal": "1.0 / {0}", "round": "round_even({0})",
    "pow": "power({0}, {1})",
}  # fmt: skip
_INT = {
    **{name: "{0}" for name in "floor ceil round trunc".split()},
    "maximum": "tl.maximum({0}, {1})", "minimum": "tl.minimum({0}, {1})",
    "floor_div": "floor_div_int({0}, {1})", "pow": "power_int({0}, {1})", "bitwise_not": "~{0}",
}  # fmt: skip
_POWERS = {2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "tl.sqrt_rn({0})", -1: "1.0 / {0}"}

HELPERS = frozenset(
    "expm1 log1p tan atan tanh sigmoid trunc silu gelu gelu_tanh softplus maximum minimum "
    "floor_div atan2 relu sign remainder round_even dot power floor_div_int power_int "
    "report".split()
)
"""Functions of `cellc.kernels.triton_math` that a module may import."""
ROW_COORDINATES = tuple(f"i{d}" for d in range(16))
COL_COORDINATES = tuple(f"j{d}" for d in range(16))
RESERVED = frozenset(
    "tl triton tables bad_ptr start num_rows num_total row live unit cols inside k0 ks a w b BM BN "
    "BK q m n j p c0 begin s best best_at acc lengths first longest more none slot value mul "
    "float".split()
).union(ROW_COORDINATES, COL_COORDINATES, (f"acc_{n}" for n in range(64)))
"""Names that the printers themselves use in a kernel."""


@dataclass(frozen=True)
class Tile:
    """Names of the coordinates of a stage's space: those along rows, then those along columns."""

    along_rows: tuple[str, ...]
    along_cols: tuple[str, ...]
    mask: str = ""  # of columns, [1, BN]; empty where every column exists
    live: str = "live"  # of rows, [BM]; along vectors, of those that have this position
    call: str = "row"  # of rows, [BM]: the call of the launch


@dataclass
class Kernel:
    """A kernel being printed: its lines, and what of the launch they use."""

    program: TileProgram
    names: Mapping[Ref, str]
    lines: list[str] = field(default_factory=list)
    refs: list[Ref] = field(default_factory=list)  # pointer arguments
    reports: bool = False  # may find a bad row
    taken: set[str] = field(default_factory=set)
    along: dict[Ref, str] = field(default_factory=dict)  # addresses at the positions of a vector

    def add(self, line: str, depth: int = 1, origin: str = "") -> None:
        self.lines.append("    " * depth + line + (f"  # {origin}" if origin else ""))

    def origin(self, source: int) -> str:
        return self.program.cell.ops[source].origin

    def cast(self, ref: Ref, dtype: str) -> str:
        """The conversion of an element of `ref` to what a product multiplies, if any."""
        return "" if self.program.type_of(ref).dtype == dtype else f".to(tl.{TYPES[dtype]})"

    def pointer(self, ref: Ref) -> str:
        if ref not in self.refs:
            self.refs.append(ref)
        return f"{self.names[ref]}_ptr"

    def address(self, ref: Ref) -> str:
        """Name of the element offset of each row, [rows]; '' for a parameter, the same for all."""
        self.pointer(ref)
        if ref in self.along:
            return self.along[ref]
        return "" if ref.kind == "param" else f"{self.names[ref]}_at"

    def fresh(self, name: str) -> str:
        """A name that no other value of this kernel has."""
        count, base = 1, name
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name

    def row_lines(self, mult: int = 1, name: str = "") -> list[str]:
        """Lines that say which rows a program has: `row` a call, the name given the rest."""
        if not name:
            lines = ["row = tl.program_id(0) * BM + tl.arange(0, BM)", "live = row < num_rows"]
        else:
            lines = ["q = tl.program_id(0) * BM + tl.arange(0, BM)"]
            lines += [f"live = q < num_rows * {mult}", f"row = q // {mult}"]
            lines.append(f"{name} = q % {mult}")
        return [f"    {line}" for line in [*lines, "row = tl.where(live, row, 0)"]]

    def addresses(self) -> list[str]:
        """Lines that load the addresses of all rows used; to be put after the row numbers."""
        lines = []
        for ref in self.refs:
            numel, name = self.program.type_of(ref).numel, self.names[ref]
            wide = "row.to(tl.int64)" if ref.kind == "buffer" else f"{self._slot(ref)}.to(tl.int64)"
            if ref.kind != "param" and self.program.vector_of(ref) is None:
                lines.append(f"    {name}_at = {wide}" + (f" * {numel}" if numel != 1 else ""))
        return lines

    def _slot(self, ref: Ref) -> str:
        """Index tables are rows of `tables`: the cell's inputs, then its outputs."""
        table = ref.index + (ref.kind == "output") * len(self.program.cell.inputs)
        skip = (" + num_total" if table == 1 else f" + {table} * num_total") if table else ""
        return f"tl.load(tables + start + row{skip})"


def literal(value: bool | int | float, dtype: str) -> str:
    if dtype in ops.FLOAT_DTYPES:
        number = float(value)
        return repr(number) if math.isfinite(number) else f'float("{number}")'
    return repr(bool(value)) if dtype == "bool" else repr(int(value))


def register_type(dtype: str) -> str:
    return "tl.float32" if dtype in ops.FLOAT_DTYPES else f"tl.{TYPES[dtype]}"


def affine(const: int, coefs: Sequence[int], names: Sequence[str]) -> str:
    terms = [n if c == 1 else f"{c} * {n}" for c, n in zip(coefs, names, strict=True) if c]
    return " + ".join(terms + [str(const)] * (const != 0 or not terms))


def coordinates(names: Sequence[str], sizes: Sequence[int], flat: str) -> list[str]:
    """Lines that split a flat coordinate; for one dimension the name must be `flat` itself."""
    lines = []
    for d, name in enumerate(names if len(names) > 1 else ()):
        stride = math.prod(sizes[d + 1 :])
        part = flat if stride == 1 else f"{flat} // {stride}"
        lines.append(f"{name} = {part}" + (f" % {sizes[d]}" if d else ""))
    return lines


def pointer_at(kernel: Kernel, ref: Ref, index: Index, tile: Tile) -> tuple[str, bool]:
    """The address of ref[index] over the tile, and whether it varies along columns."""
    split = len(tile.along_rows)
    across = any(index.coefs[split:])
    along = any(index.coefs[:split])
    parts = [kernel.pointer(ref)]
    at = kernel.address(ref)
    if at:
        parts.append(f"{at}[:, None]")
    if along:
        rows = affine(0 if across else index.const, index.coefs[:split], tile.along_rows)
        parts.append(f"({rows})[:, None]")
    if across:
        cols = affine(index.const, index.coefs[split:], tile.along_cols)
        parts.append(f"({cols})[None, :]" if " " in cols else f"{cols}[None, :]")
    elif index.const and not along:
        parts.append(str(index.const))
    return " + ".join(parts), across


class BodyPrinter:
    """Prints a body's values; `given` are values that are known already, by position."""

    def __init__(
        self, kernel: Kernel, body: Body, tile: Tile, depth: int, given: Mapping[int, str]
    ) -> None:
        self.kernel, self.body, self.tile, self.depth = kernel, body, tile, depth
        self.texts: dict[int, str] = dict(given)

    def run(self, wanted: Sequence[int]) -> list[str]:
        """Print what `wanted` needs; returns their names."""
        for i in sorted(self._needed(wanted)):
            if self.body[i].op != "const":
                self._print(i, self.body[i])
        return [self._operand(i, False) for i in wanted]

    def _needed(self, wanted: Sequence[int]) -> set[int]:
        needed: set[int] = set()
        stack = [i for i in wanted if i not in self.texts]
        while stack:
            i = stack.pop()
            if i not in needed:
                needed.add(i)
                stack += [a for a in self.body[i].args if a not in self.texts]
        return needed

    def _print(self, i: int, instr: Instr) -> None:
        source = self.kernel.program.cell.ops[instr.source] if instr.source >= 0 else None
        default = f"v{i}"
        if instr.op == "load" and instr.ref is not None:
            default = self.kernel.names[instr.ref]
        name = self.kernel.fresh(identifier(source.name if source else "") or default)
        if instr.op == "load":
            text = self._load(instr)
        elif instr.op == "gather":
            text = self._gather(instr, name)
        else:
            text = self._apply(instr)
        self.texts[i] = name
        self.kernel.add(f"{name} = {text}", self.depth, source.origin if source else "")

    def _load(self, instr: Instr) -> str:
        assert instr.ref is not None and instr.index is not None
        pointer, across = pointer_at(self.kernel, instr.ref, instr.index, self.tile)
        return self._loaded(pointer, across, instr.dtype)

    def _loaded(self, pointer: str, across: bool, dtype: str) -> str:
        mask = f", mask={self.tile.mask}, other=0" if across and self.tile.mask else ""
        wide = ".to(tl.float32)" if dtype in ("f16", "bf16") else ""
        return f"tl.load({pointer}{mask}){wide}"

    def _gather(self, instr: Instr, name: str) -> str:
        """A row of a table; an index outside of it is reported, and row 0 is read instead."""
        assert instr.ref is not None and instr.index is not None
        index, kernel = self._operand(instr.args[0], False), self.kernel
        outside = f"({index} < 0) | ({index} >= {instr.limit})"
        wrong = f"({outside}) & {self.tile.live}[:, None]"
        wrong += f" & {self.tile.mask}" * bool(self.tile.mask)
        kernel.reports = True
        kernel.add(f"report(bad_ptr + start + {self.tile.call}, {wrong})", self.depth)
        kernel.add(f"{name}_row = tl.where({outside}, 0, {index}).to(tl.int64)", self.depth)
        pointer, across = pointer_at(kernel, instr.ref, instr.index, self.tile)
        return self._loaded(f"{pointer} + {name}_row * {instr.scale}", across, instr.dtype)

    def _operand(self, i: int, inline: bool) -> str:
        instr = self.body[i]
        if i in self.texts or instr.op != "const":
            return self.texts[i]
        text = literal(instr.value, instr.dtype)
        return text if inline else f"tl.full((1, 1), {text}, {register_type(instr.dtype)})"

    def _apply(self, instr: Instr) -> str:
        kinds = [self.body[a] for a in instr.args]
        values = kinds[1:] if instr.op == "where" else kinds
        inline = any(k.op != "const" for k in values) and instr.dtype != "bool"
        inline |= instr.op in ops.COMPARE and any(k.op != "const" for k in values)
        args = [
            self._operand(a, inline and not (instr.op == "where" and n == 0))
            for n, a in enumerate(instr.args)
        ]
        if instr.op == "cast":
            return _cast(args[0], kinds[0].dtype, instr.dtype)
        if instr.op.startswith("logical"):
            args = [
                a if k.dtype == "bool" else f"({a} != 0)" for a, k in zip(args, kinds, strict=True)
            ]
        if instr.op == "bitwise_not" and instr.dtype == "bool":
            return f"{args[0]} == 0"
        return self._pattern(instr, kinds).format(*map(_closed, args))

    def _pattern(self, instr: Instr, kinds: Sequence[Instr]) -> str:
        real = instr.dtype in ops.FLOAT_DTYPES
        if instr.op == "pow" and kinds[1].op == "const":
            power = kinds[1].value
            if power in _POWERS and (real or power in (2, 3)):
                return _POWERS[power]
        return _BOTH.get(instr.op) or (_FLOAT if real else _INT)[instr.op]


def _closed(text: str) -> str:
    """A negative literal in brackets, so that it may follow an operator."""
    return f"({text})" if text.startswith("-") else text


def _cast(text: str, source: str, target: str) -> str:
    if target == "bool":
        return text if source == "bool" else f"{text} != 0"
    narrow = f".to(tl.{TYPES[target]})"
    return f"{text}{narrow}.to(tl.float32)" if target in ("f16", "bf16") else f"{text}{narrow}"


def identifier(name: str) -> str:
    text = "".join(c if c.isalnum() and c.isascii() else "_" for c in name).strip("_")
    text = f"n{text}" if text[:1].isdigit() else text
    return f"{text}_" if keyword.iskeyword(text) else text
