"""The eager backend: a cell as plain torch calls on batched rows.

Duty: the reference that every other backend is tested against, and the fallback everywhere.
Comes in: a cell, its weights, launches; goes out: rows written into the arenas, positions of rows
with invalid data. Inside, every value has a leading dimension: N rows, or 1 for a weight; a scalar
is a 0-dimensional tensor, so that torch's promotion leaves the row's dtype alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cellc import ops
from cellc.cells import Cell, CellOp, Operand
from cellc.errors import ForwardError
from cellc.launch import Index, Invalid, Launch, Ragged
from cellc.ops import RowType

Tensor = torch.Tensor
Args = list[Tensor]

DTYPES: dict[str, torch.dtype] = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "bool": torch.bool,
    "c64": torch.complex64,
    "c128": torch.complex128,
}


class EagerBackend:
    """Runs any cell, on any device torch has."""

    name = "eager"

    def kernel(self, cell: Cell, params: Mapping[str, Tensor]) -> EagerKernel:
        return EagerKernel(cell, [params[p.name] for p in cell.params])


class EagerKernel:
    """One cell: gathers, computes its operations one by one, scatters."""

    backend = "eager"  # also where another backend could not generate the cell

    def __init__(self, cell: Cell, params: Sequence[Tensor]) -> None:
        self.cell = cell
        self.params = [p.unsqueeze(0) for p in params]
        self.source = source(cell)

    def __call__(self, launch: Launch, arenas: Mapping[RowType, Tensor]) -> Sequence[int]:
        bad: list[int] = []
        errors: dict[int, Exception] = {}
        with torch.inference_mode():
            for start, stop in zip(launch.steps[:-1], launch.steps[1:], strict=True):
                if stop > start:
                    step = _Step(self, launch, arenas, int(start), int(stop))
                    bad += (step.run() + int(start)).tolist()
                    errors.update({row + int(start): e for row, e in step.errors.items()})
        return Invalid(bad, errors) if errors else bad


class _Step:
    """One step of a launch: rows start:stop, all independent."""

    def __init__(
        self,
        kernel: EagerKernel,
        launch: Launch,
        arenas: Mapping[RowType, Tensor],
        start: int,
        stop: int,
    ) -> None:
        self.kernel, self.cell, self.launch, self.arenas = kernel, kernel.cell, launch, arenas
        self.start, self.stop, self.num_rows = start, stop, stop - start
        self.bad = np.zeros(self.num_rows, bool)
        self.errors: dict[int, Exception] = {}  # by row
        self.inputs: list[Tensor] = []
        self.lengths: dict[int, Tensor] = {}
        self.results: list[tuple[Tensor, ...]] = []

    def run(self) -> Index:
        for i, table in enumerate(self.launch.inputs):
            self.inputs.append(self._gather(i, table))
        for op, vector in zip(self.cell.ops, self.cell.vectors, strict=True):
            self.results.append(self._compute(op, vector))
        for table, operand in zip(self.launch.outputs, self.cell.outputs, strict=True):
            arena, value = self.arenas[self.cell.type_of(operand)], self._value(operand)
            slots = _index(table[self.start : self.stop], arena.device)
            arena.index_copy_(
                0, slots, value.expand(self.num_rows, *value.shape[1:]).to(arena.dtype)
            )
        return np.flatnonzero(self.bad).astype(np.int32)

    def _gather(self, i: int, table: Index | Ragged) -> Tensor:
        arena = self.arenas[self.cell.inputs[i].type]
        if isinstance(table, Ragged):
            offsets = table.offsets[self.start : self.stop + 1]
            self.lengths[i] = _index(np.diff(offsets), arena.device)
            slots = table.slots[offsets[0] : offsets[-1]]
        else:
            slots = table[self.start : self.stop]
        return arena.index_select(0, _index(slots, arena.device))

    def _value(self, operand: Operand) -> Tensor:
        if operand.kind == "scalar":
            kind = {bool: torch.bool, int: torch.int64}.get(type(operand.value), torch.float64)
            return torch.tensor(operand.value, dtype=kind)
        if operand.kind == "input":
            return self.inputs[operand.index]
        if operand.kind == "param":
            return self.kernel.params[operand.index]
        return self.results[operand.index][operand.port]

    def _along(self, vector: int, operand: Operand, value: Tensor) -> Tensor:
        """A row once for every position of its call's vector."""
        if operand.kind in ("scalar", "param") or self.cell.vector_of(operand) is not None:
            return value
        return value if value.shape[0] == 1 < self.num_rows else self._repeated(vector, value)

    def _repeated(self, vector: int, value: Tensor) -> Tensor:
        return value.expand(self.num_rows, *value.shape[1:]).repeat_interleave(
            self.lengths[vector], 0
        )

    def _compute(self, op: CellOp, vector: int | None) -> tuple[Tensor, ...]:
        args = [self._value(x) for x in op.operands]
        if vector is not None:
            args = [self._along(vector, x, a) for x, a in zip(op.operands, args, strict=True)]
        if op.op.startswith("aten:"):
            results = self._fallback(op, args, vector)
        elif op.op in ops.RAGGED:
            along = self.cell.vector_of(op.operands[0])
            assert along is not None
            lengths = self.lengths[along]
            if op.op in ("ragged_amax", "ragged_amin"):
                self.bad |= (lengths == 0).cpu().numpy()
            results = (ragged(op.op, args[0], lengths),)
        elif op.op == "embedding":
            results = (self._embedding(args[0], args[1], vector),)
        else:
            if op.op in ops.POINTWISE:
                args = _aligned(args)
            results = (FUNCTIONS[op.op](args, op.attributes, op),)
        return tuple(r.to(DTYPES[t.dtype]) for r, t in zip(results, op.types, strict=True))

    def _fallback(self, op: CellOp, args: Args, vector: int | None) -> tuple[Tensor, ...]:
        """Call an aten operator that has no row operation, once a row, and stack its results: of a
        row that it refuses, zeros.
        """
        rows = []
        for i in range(max((a.shape[0] for a in args if a.ndim), default=1)):
            try:
                rows.append(
                    fallback(op, [a[i if a.shape[0] > 1 else 0] if a.ndim else a for a in args])
                )
            except Exception as error:
                self._refused(op, i, vector, error)
                zeros = [torch.zeros(t.shape, dtype=DTYPES[t.dtype]) for t in op.types]
                device = args[0].device if args else None
                rows.append(tuple([z.to(device) for z in zeros]))
        return tuple(torch.stack(port) for port in zip(*rows, strict=True))

    def _refused(self, op: CellOp, row: int, vector: int | None, error: Exception) -> None:
        told = ForwardError(str(error), kind=type(error).__name__, origin=op.origin or None)
        told.__cause__ = error
        calls = np.arange(self.num_rows)
        if vector is not None:
            calls = np.repeat(calls, self.lengths[vector].cpu())
        for call in calls[row : row + 1].tolist() if len(calls) > 1 else calls.tolist():
            if not self.bad[call]:  # else it may be of what was invalid
                self.errors[call] = told
                self.bad[call] = True

    def _embedding(self, table: Tensor, index: Tensor, vector: int | None) -> Tensor:
        wrong = (index < 0) | (index >= table.shape[1])
        found = wrong.reshape(wrong.shape[0], -1).any(1).cpu().numpy()
        if vector is None or self.num_rows == 1:
            self.bad |= found.any() if vector is not None else found
        else:
            self.bad[np.repeat(np.arange(self.num_rows), self.lengths[vector].cpu())[found]] = True
        index = torch.where(wrong, 0, index).long()
        if table.shape[0] == 1:
            return table[0][index]
        rows = torch.arange(table.shape[0], device=table.device)
        return table[rows.reshape(-1, *[1] * (index.ndim - 1)), index]


def _index(index: Index, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(index).astype(np.int64)).to(device)


def _aligned(args: Args) -> Args:
    """Give every row the same rank: 1-sized dimensions after the leading one; scalars stay."""
    rank = max(a.ndim for a in args)
    return [
        a if a.ndim in (0, rank) else a.reshape(a.shape[0], *[1] * (rank - a.ndim), *a.shape[1:])
        for a in args
    ]


def _dims(attrs: Mapping[str, Hashable]) -> tuple[int, ...]:
    dims = attrs["dims"]
    assert isinstance(dims, tuple)
    return tuple(d + 1 for d in dims)


def _reduce(name: str) -> Callable[[Args, Mapping[str, Any], CellOp], Tensor]:
    """Reduce the dimensions `dims`, moved last and flattened in order."""

    def run(args: Args, attrs: Mapping[str, Any], op: CellOp) -> Tensor:
        x, dims = args[0], _dims(attrs)
        kept = [d for d in range(x.ndim) if d not in dims]
        x = x.permute(*kept, *dims).reshape(*[x.shape[d] for d in kept], -1)
        if name in ("sum", "mean", "prod"):
            result = getattr(torch, name)(x, -1, dtype=DTYPES[op.type.dtype])
        else:
            result = getattr(torch, name)(x, -1)
        assert isinstance(result, Tensor)
        return result

    return run


def _linear(args: Args, attrs: Mapping[str, Any], op: CellOp) -> Tensor:
    x, weight, *bias = args
    if weight.shape[0] == 1:
        return torch.nn.functional.linear(x, weight[0].t(), bias[0][0] if bias else None)
    y = torch.matmul(x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2), weight)
    y = y.reshape(y.shape[0], *op.type.shape)
    return torch.add(*_aligned([y, bias[0]])) if bias else y


def _slice(args: Args, attrs: Mapping[str, Any], op: CellOp) -> Tensor:
    index = [slice(None)] * (attrs["dim"] + 1) + [
        slice(attrs["start"], attrs["stop"], attrs["step"])
    ]
    return args[0][tuple(index)]


def _cat(args: Args, attrs: Mapping[str, Any], op: CellOp) -> Tensor:
    n = max(a.shape[0] for a in args)
    return torch.cat([a.expand(n, *a.shape[1:]) for a in args], attrs["dim"] + 1)


def _simple(function: Callable[..., Tensor]) -> Callable[[Args, Mapping[str, Any], CellOp], Tensor]:
    return lambda args, attrs, op: function(*args)


def _window(args: Args, attrs: Mapping[str, Any], op: CellOp) -> Tensor:
    size, spread = attrs["size"], attrs["spread"]
    reach = (size - 1) * spread + 1
    return args[0].unfold(1 + attrs["dim"], reach, attrs["step"])[..., ::spread]


_F = torch.nn.functional
_TORCH = (
    "neg exp log log1p expm1 sqrt rsqrt abs sin cos tan atan tanh sigmoid relu erf reciprocal sign "
    "floor ceil round trunc logical_not bitwise_not isnan eq ne lt le gt ge add sub mul pow "
    "maximum minimum fmod remainder atan2 logical_and logical_or logical_xor bitwise_and "
    "bitwise_or bitwise_xor where"
)
FUNCTIONS: dict[str, Callable[[Args, Mapping[str, Any], CellOp], Tensor]] = {
    **{name: _simple(getattr(torch, name)) for name in _TORCH.split()},
    **{name: _reduce(name) for name in ops.REDUCE},
    "div": _simple(torch.div),
    "floor_div": _simple(torch.floor_divide),
    "silu": _simple(_F.silu),
    "gelu": _simple(_F.gelu),
    "gelu_tanh": lambda args, attrs, op: _F.gelu(args[0], approximate="tanh"),
    "softplus": _simple(_F.softplus),
    "cast": lambda args, attrs, op: args[0],
    "reshape": lambda args, attrs, op: args[0].reshape(args[0].shape[0], *attrs["shape"]),
    "expand": lambda args, attrs, op: args[0].expand(args[0].shape[0], *attrs["shape"]),
    "permute": lambda args, attrs, op: args[0].permute(0, *_dims(attrs)),
    "flip": lambda args, attrs, op: args[0].flip(_dims(attrs)),
    "slice": _slice,
    "window": _window,
    "cat": _cat,
    "linear": _linear,
    "matmul": lambda args, attrs, op: torch.matmul(*_aligned(args)),
}


def ragged(name: str, rows: Tensor, lengths: Tensor) -> Tensor:
    """Reduce each call's vector of rows; an empty one has sum 0, product 1, mean nan."""
    parts = torch.split(rows, lengths.tolist())
    if name in ("ragged_amax", "ragged_amin"):
        empty = torch.zeros(rows.shape[1:], dtype=rows.dtype, device=rows.device)
        function = torch.amax if name == "ragged_amax" else torch.amin
        return torch.stack([function(p, 0) if len(p) else empty for p in parts])
    function = getattr(torch, name.removeprefix("ragged_"))
    return torch.stack([function(p, 0) for p in parts])


def fallback(op: CellOp, row: Args) -> tuple[Tensor, ...]:
    """Call an aten operator that has no row operation on one row."""
    name, _, overload = op.op.removeprefix("aten:").partition(".")
    function = getattr(getattr(torch.ops.aten, name), overload or "default")
    template: Any = op.attributes["args"]
    keywords: Any = op.attributes.get("kwargs", ())
    result = function(*_fill(template, row), **{k: _fill(v, row) for k, v in keywords})
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _fill(template: Any, row: Args) -> Any:
    """The argument a template stands for: t operand, v constant, d dtype, l list, else several."""
    kind, *rest = template if template else ((),)
    if kind == "t":
        return row[rest[0]]
    if kind == "v":
        return rest[0]
    if kind == "d":
        return DTYPES[rest[0]]
    if kind == "l":
        return [_fill(item, row) for item in rest[0]]
    return [_fill(item, row) for item in template]


def source(cell: Cell) -> str:
    """The cell as readable torch-like Python."""
    names = [op.name or f"v{i}" for i, op in enumerate(cell.ops)]
    names = [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]

    def text(x: Operand) -> str:
        if x.kind == "scalar":
            return repr(x.value)
        if x.kind == "input":
            return cell.inputs[x.index].name
        if x.kind == "param":
            return f"@{cell.params[x.index].name}"
        return names[x.index] + (f"[{x.port}]" if len(cell.ops[x.index].types) > 1 else "")

    inputs = ", ".join(f"{i.name}: {'*' * i.ragged}{i.type}" for i in cell.inputs)
    lines = [f"def {cell.name}({inputs}):  # eager, one row"]
    for name, op in zip(names, cell.ops, strict=True):
        args = [text(x) for x in op.operands] + [f"{k}={v}" for k, v in op.attrs]
        where = f"  # {op.origin}" if op.origin else ""
        types = ", ".join(map(str, op.types))
        lines.append(f"    {name}: {types} = {op.op}({', '.join(args)}){where}")
    lines.append(f"    return {', '.join(map(text, cell.outputs))}")
    return "\n".join(lines) + "\n"
