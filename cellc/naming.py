"""Naming: what cells are called.

Duty: a readable name for a cell, from its weights or from what it computes. Used by
`cellc.cell_store`, which keeps names apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cellc import ops
from cellc.cells import Cell


def suggest_name(cell: Cell, base: Sequence[str]) -> str:
    """A readable name: the module that owns the cell's largest weight, else what it computes."""
    best, size = "", -1
    for param in cell.params:
        owner = next((b for b in base if _mentions(param.name, b)), None)
        weight = param.type.numel + (1 << 40 if "weight_hh" in param.name else 0)
        if owner is not None and weight > size:
            best, size = owner, weight
    if not best:
        names = [op.op for op in cell.ops if op.op not in ops.VIEWS and op.op != "cast"]
        return (
            "_".join(dict.fromkeys(names[:2])).replace("ragged_", "").replace("aten:", "") or "copy"
        )
    module, _, attribute = best.rpartition(".")
    suffix = re.search(r"_(l\d+(?:_reverse)?)$", attribute)
    return (module or attribute) + (f".{suffix.group(1)}" if suffix else "")


def _mentions(expression: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", expression) is not None
