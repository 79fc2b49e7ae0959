"""Which operations of a cell get memory, and which cells tile programs cannot express.

Duty: the choices that `cellc.kernels.tile` starts from. Comes in: a cell; goes out: the set of
operations whose results are materialised, or the reason why the cell must run on the eager backend.
"""

from __future__ import annotations

from collections.abc import Collection

from cellc import ops
from cellc.cells import Cell, CellOp, Operand

MAX_DEPTH = 48  # lazy operations nested in one value
MAX_COPIES = 24  # size of a cheap value that is computed again in every stage that reads it
STAGES = frozenset({"linear", "matmul", "cat"}) | ops.REDUCE | ops.RAGGED
INLINE = ops.POINTWISE | ops.VIEWS | {"embedding"}


def unsupported(cell: Cell, dtypes: Collection[str] | None = None) -> str | None:
    """Why a tile program cannot express `cell`, or None; `dtypes` are what the caller can print."""
    for type_ in [
        *(i.type for i in cell.inputs),
        *(p.type for p in cell.params),
        *(t for o in cell.ops for t in o.types),
    ]:
        if type_.dtype.startswith("c") or (dtypes is not None and type_.dtype not in dtypes):
            return f"dtype {type_.dtype}"
        if 0 in type_.shape:
            return f"an empty row {type_}"
    for op in cell.ops:
        reason = _unsupported_op(cell, op)
        if reason:
            return reason
    ragged = any(cell.vector_of(o) is not None for o in cell.outputs)
    return "an output along a vector" if ragged else None


def _unsupported_op(cell: Cell, op: CellOp) -> str | None:
    if op.op not in STAGES | INLINE or len(op.types) != 1:
        return f"operation {op.op}"
    along = [x.kind != "scalar" and cell.vector_of(x) is not None for x in op.operands]
    if op.op in ops.RAGGED and not along[0]:
        return f"operation {op.op} on what is not a vector of rows"
    if op.op == "embedding" and along[0]:
        return "a table of every position of a vector"
    if op.op not in ops.POINTWISE and any(x.kind == "scalar" for x in op.operands):
        return f"operation {op.op} on a scalar"
    if op.op in ("linear", "matmul"):
        return _unsupported_product(cell, op, any(along))
    return None


def _unsupported_product(cell: Cell, op: CellOp, along: bool) -> str | None:
    if op.operands[0].kind == "param" and not along:
        return f"operation {op.op} of parameters alone"
    if op.type.dtype not in ops.FLOAT_DTYPES:
        return f"operation {op.op} in {op.type.dtype}"
    if op.op == "linear" and len(op.operands) > 2 and not along:
        weight, bias = op.operands[1:]
        if (weight.kind, bias.kind) != ("param", "param") or cell.shape_of(bias) != op.type.shape[
            -1:
        ]:
            return "a bias that is a row"
    return None


def choose_roots(cell: Cell) -> frozenset[int]:
    """Operations whose results get memory, as far as that can be told before indices are known."""
    roots = {o.index for o in cell.outputs if o.kind == "op"}
    for i, op in enumerate(cell.ops):
        if op.op in STAGES:
            roots.add(i)
        if cell.vectors[i] is not None:
            roots |= {r for x in _operands(op) if (r := _row_read(cell, x)) is not None}
        elif op.op in ("linear", "matmul"):
            products = [x.index for x in op.operands if x.kind == "op"]
            roots |= {x for x in products if cell.ops[x].op not in ops.VIEWS}
    roots |= _deep(cell, roots)
    return frozenset(roots | _shared(cell, roots))


def _row_read(cell: Cell, i: int) -> int | None:
    """The operation whose row an operation along a vector reads, by views: computed once, not at
    every position.
    """
    while cell.vectors[i] is None and cell.ops[i].op in ops.VIEWS:
        operand = cell.ops[i].operands[0]
        if operand.kind != "op":
            return None
        i = operand.index
    return i if cell.vectors[i] is None else None


def _deep(cell: Cell, roots: Collection[int]) -> set[int]:
    """Cut long chains of lazy operations."""
    depths: list[int] = []
    cut = set()
    for i, op in enumerate(cell.ops):
        depth = 0 if i in roots else 1 + max((depths[x] for x in _operands(op)), default=0)
        if depth == MAX_DEPTH:
            cut.add(i)
            depth = 0
        depths.append(depth)
    return cut


def _operands(op: CellOp) -> list[int]:
    return [x.index for x in op.operands if x.kind == "op"]


def _levels(cell: Cell) -> list[int]:
    """How many stages that are no maps precede each; maps of a shape and level can be one stage."""
    levels: list[int] = []
    for op in cell.ops:
        own = op.op in STAGES and op.op != "cat"
        levels.append(own + max((levels[x] for x in _operands(op)), default=0))
    return levels


def _weights(cell: Cell, roots: Collection[int]) -> tuple[list[bool], list[int]]:
    """Of each operation's lazy tree, whether it holds an expensive function, and its size."""
    costly: list[bool] = []
    sizes: list[int] = []
    for op in cell.ops:
        lazy = [x for x in _operands(op) if x not in roots]
        costly.append(op.op in ops.TRANSCENDENTAL or any(costly[x] for x in lazy))
        sizes.append(min(10**6, 1 + sum(sizes[x] for x in lazy)))
    return costly, sizes


def _shared(cell: Cell, roots: Collection[int]) -> set[int]:
    """Lazy values that would be computed several times: by several stages, or in a larger space."""
    costly, sizes = _weights(cell, roots)
    levels = _levels(cell)
    readers: list[set[tuple[object, ...]]] = [set() for _ in cell.ops]
    spaces = [1] * len(cell.ops)
    shared = set()
    for i in reversed(range(len(cell.ops))):
        op, numel = cell.ops[i], cell.ops[i].type.numel
        wider = 1 < numel < spaces[i] and costly[i]
        again = len(readers[i]) > 1 and (costly[i] or sizes[i] > MAX_COPIES)
        if i not in roots and op.op not in ops.VIEWS and (wider or again):
            shared.add(i)
        root = i in roots or i in shared
        stage: tuple[object, ...] = (i,)
        if op.op not in STAGES:
            stage = ("map", op.type.shape, levels[i], cell.vectors[i])
        for x in _operands(op):
            readers[x] |= {stage} if root else readers[i]
            spaces[x] = max(spaces[x], _space(cell, op) if root else max(spaces[i], numel))
    return shared


def _space(cell: Cell, op: CellOp) -> int:
    """Points at which a stage reads its lazy operands."""
    operand: Operand = op.operands[0]
    if op.op in ops.REDUCE and operand.kind != "scalar":
        return cell.type_of(operand).numel
    if op.op in ("linear", "matmul"):  # along a vector; other products read rows
        return op.type.numel * cell.shape_of(operand)[-1]
    return 1 if op.op == "cat" else op.type.numel
