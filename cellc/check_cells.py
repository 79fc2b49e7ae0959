"""Kernels of cells against the same cells as plain torch calls.

Duty: launch one cell's kernel on its sample at several batch sizes, in its own or another dtype,
and compare every output row with the eager backend's. Used by `cellc.checking`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cellc import ops
from cellc.cells import Cell, CellOp
from cellc.comparing import SAME, Comparison, Tolerance, compare_tensors
from cellc.dtypes import TORCH_DTYPES
from cellc.errors import CellcError, UnsupportedError
from cellc.kernels.eager import EagerBackend, EagerKernel
from cellc.kernels.narrow import CLOSE, Narrowed, narrowed
from cellc.launch import Backend, Kernel
from cellc.samples import Sample, outputs

GENERATED: Mapping[str, tuple[str, ...]] = {
    "cpp": ("f32", "f64"),
    "triton": ("f32", "bf16", "f16"),
}
"""Float dtypes that a backend writes kernels for."""
MOST_OTHERS = (
    32  # cells that are checked in other dtypes than their own, unless those are asked for
)
_STEPWISE = frozenset(
    "argmax argmin floor ceil round trunc sign floor_div remainder fmod".split()
) | (ops.COMPARE - {"ne"})


@dataclass(frozen=True)
class CellCheck:
    """One cell by one backend in one dtype; `left`: it runs through torch, for these operations or
    as a whole. `weights`: those that its products read, where they are narrower than the model's.
    """

    cell: str
    backend: str
    dtype: str
    batch_sizes: Sequence[int]
    left: Sequence[str]
    found: Comparison
    weights: str = ""


def plan(
    samples: Sequence[Sample], backend: str, dtypes: Sequence[str] | None
) -> list[tuple[Sample, str]]:
    """Which cells are to be checked in which dtypes: each in its own, or in those asked for, if it
    has f32 values that may be replaced. Where none are asked for, the largest cells in all.
    """
    work = []
    costs = sorted((s.cell.flops_per_row for s in samples), reverse=True)
    least = costs[MOST_OTHERS - 1] if len(costs) > MOST_OTHERS else -1
    for sample in samples:
        own = own_dtype(sample.cell)
        large = sample.cell.flops_per_row > least or len(samples) <= MOST_OTHERS
        wanted = list(dtypes or (GENERATED[backend] if large else [own]))
        wanted = wanted if own == "f32" else [own]
        for dtype in wanted:
            if dtype == own or (dtype in GENERATED[backend] and may_change(sample.cell, dtype)):
                work.append((sample, dtype))
    return work


def own_dtype(cell: Cell) -> str:
    """What a cell computes in: f32 where any value is."""
    types = [i.type for i in cell.inputs] + [p.type for p in cell.params]
    found = {t.dtype for t in [*types, *(t for op in cell.ops for t in op.types)]}
    floats = [d for d in ("f32", "bf16", "f16", "f64") if d in found]
    return floats[0] if floats else "i64"


def may_change(cell: Cell, dtype: str) -> bool:
    """May its f32 be another dtype? Not what runs through torch; and in halves nothing that jumps
    where a float is that was computed: a rounding changes a whole result there.
    """
    if any(op.op.startswith("aten:") for op in cell.ops):
        return False
    return dtype not in ("bf16", "f16") or not any(_jumps(cell, op) for op in cell.ops)


def _jumps(cell: Cell, op: CellOp) -> bool:
    computed = [cell.type_of(x).dtype for x in op.operands if x.kind == "op"]
    return op.op in _STEPWISE and any(dtype in ops.FLOAT_DTYPES for dtype in computed)


def check_cell(
    sample: Sample,
    dtype: str,
    backend: Backend,
    batch_sizes: Sequence[int],
    tolerance: Tolerance,
    weights: str | None = None,
) -> CellCheck:
    """Compare one kernel with eager at every batch size, in one step and in two."""
    sample = _retyped(sample, dtype)
    cell, found = sample.cell, SAME
    narrow = narrowed(cell, weights)
    left = [op.op.removeprefix("aten:") for op in cell.ops if op.op.startswith("aten:")]
    try:
        kernel = backend.kernel(cell, sample.params)
        if isinstance(kernel, EagerKernel):
            left, narrow = left or ["all of it"], narrowed(cell, None)
        wanted = _references(sample, narrow, tolerance)
        for size in batch_sizes:
            for steps in (1, 2):
                for reference, allowed in wanted:
                    found &= _compared(kernel, reference, sample, size, steps, allowed)
    except UnsupportedError:
        left = left or ["all of it"]
    except (CellcError, RuntimeError) as error:
        found = Comparison(False, float("nan"), f"{type(error).__name__}: {error}"[:300])
    sizes, names = tuple(batch_sizes), tuple(dict.fromkeys(left))
    return CellCheck(cell.name, backend.name, dtype, sizes, names, found, narrow.kind)


def _references(
    sample: Sample, narrow: Narrowed, tolerance: Tolerance
) -> list[tuple[Kernel, Tolerance]]:
    """Torch calls that a kernel is compared with, and how. With narrower weights: with the same
    ones, which says whether the kernel is right; and with the model's, which says what they cost,
    but not where a rounding changes a whole result.
    """
    cell, eager = sample.cell, EagerBackend()
    exact = eager.kernel(cell, narrow.widened(sample.params)), replace(tolerance, norm=None)
    if not narrow.kind:
        return [exact]
    if any(_jumps(cell, op) for op in cell.ops):
        return [(exact[0], Tolerance())]
    own = tolerance.of(TORCH_DTYPES[own_dtype(cell)])[0]
    share = CLOSE[narrow.kind] + own if tolerance.rtol is None else tolerance.rtol
    far = eager.kernel(cell, sample.params), replace(tolerance, norm=share)
    return [(exact[0], Tolerance()), far]


def _compared(
    kernel: Kernel,
    reference: Kernel,
    sample: Sample,
    size: int,
    steps: int,
    tolerance: Tolerance,
) -> Comparison:
    launch, arenas = sample.launch(size, steps, seed=size)
    twin = {kind: arena.clone() for kind, arena in arenas.items()}
    bad, wrong = sorted(kernel(launch, arenas)), sorted(reference(launch, twin))
    if bad != wrong:
        return Comparison(False, float("nan"), f"rows {bad[:8]} are bad, not {wrong[:8]}")
    keep = torch.ones(launch.num_rows, dtype=torch.bool)
    keep[torch.tensor(wrong, dtype=torch.int64)] = False
    found = SAME
    for a, b in zip(outputs(sample, launch, arenas), outputs(sample, launch, twin), strict=True):
        there = keep.to(a.device)
        found &= compare_tensors(a[there], b[there], tolerance, scaled=True)
    return found


def _retyped(sample: Sample, dtype: str) -> Sample:
    """The sample with every f32 value replaced."""
    if dtype == own_dtype(sample.cell):
        return sample
    from cellc.kernels.triton_targets import retyped

    cell, target = retyped(sample.cell, dtype), TORCH_DTYPES[dtype]

    def change(t: Tensor) -> Tensor:
        return t.to(target) if t.dtype == torch.float32 else t

    params = {name: change(p).contiguous() for name, p in sample.params.items()}
    inputs = [[change(row) for row in rows] for rows in sample.inputs]
    return replace(sample, cell=cell, params=params, inputs=inputs)
