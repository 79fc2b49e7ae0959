"""True compilation of Triton kernels for GPUs that need not be here.

Duty: prove that what `triton_printer` writes compiles, and say what comes out. Comes in: a cell and
a target's name; goes out: one `Report` a kernel: sizes, registers, spills, matrix instructions.
Needs a process in which TRITON_INTERPRET is unset.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cellc.cells import Cell, CellInput, CellOp, Param
from cellc.errors import BackendError, UsageError
from cellc.kernels.tile_ir import TileProgram
from cellc.kernels.triton_backend import (
    TritonOptions,
    compile_options,
    interpreting,
    load,
    print_cell,
)
from cellc.kernels.triton_tiles import PrintedKernel
from cellc.ops import RowType

TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "cuda:80": ("cuda", 80, 32, 166912),
    "cuda:90": ("cuda", 90, 32, 232448),
    "cuda:100": ("cuda", 100, 32, 232448),
    "hip:gfx942": ("hip", "gfx942", 64, 65536),
}
"""Backend, architecture, threads a warp, bytes of shared memory a program may have."""
POINTERS = {
    "f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "u8": "*u8", "i8": "*i8",
    "i16": "*i16", "i32": "*i32", "i64": "*i64", "bool": "*i1",
}  # fmt: skip
MATRIX = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")


@dataclass(frozen=True)
class Report:
    """What one kernel became; `registers` and spill bytes are None where no tool told them."""

    kernel: str
    target: str
    binary_bytes: int
    shared_bytes: int
    shared_limit: int
    num_warps: int
    registers: int | None
    spill_bytes: int | None
    matrix_instructions: Mapping[str, int]

    @property
    def fits(self) -> bool:
        """Whether the device's shared memory suffices."""
        return self.shared_bytes <= self.shared_limit


def compile_for(
    cell: Cell, target: str, dtype: str | None = None, options: TritonOptions | None = None
) -> list[Report]:
    """Compile every kernel of a cell, its f32 rows and weights replaced by `dtype` if given.

    Raises UsageError for an unknown target, BackendError in a process that interprets kernels or
    where Triton's compiler fails, UnsupportedError for a cell without Triton kernels.
    """
    if target not in TARGETS:
        raise UsageError(f"target {target!r} is not known; there are {', '.join(TARGETS)}")
    if interpreting():
        raise BackendError("compiling needs TRITON_INTERPRET unset", backend="triton")
    program, printed = print_cell(retyped(cell, dtype) if dtype else cell, options)
    module = load(cell.name, printed.source)
    return [
        _compile(program, kernel, getattr(module, kernel.name), target)
        for kernel in printed.kernels
    ]


def retyped(cell: Cell, dtype: str) -> Cell:
    """The cell with every f32 replaced."""

    def change(t: RowType) -> RowType:
        return RowType(t.shape, dtype if t.dtype == "f32" else t.dtype)

    def op(o: CellOp) -> CellOp:
        return replace(o, types=tuple(map(change, o.types)))

    inputs = tuple(CellInput(i.name, change(i.type), i.ragged) for i in cell.inputs)
    params = tuple(Param(p.name, change(p.type)) for p in cell.params)
    return replace(cell, inputs=inputs, params=params, ops=tuple(map(op, cell.ops)))


def _compile(program: TileProgram, kernel: PrintedKernel, function: Any, target: str) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp, limit = TARGETS[target]
    signature = _signature(program, kernel)
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t[0] == "*"
    }
    source = ASTSource(function, signature, dict(kernel.constants), aligned)
    options = compile_options(kernel)
    try:
        built = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    except Exception as error:
        message = f"{kernel.name} does not compile for {target}: {error}"
        raise BackendError(message, backend="triton") from error
    text = built.asm["ptx" if backend == "cuda" else "amdgcn"]
    registers, spills = (_ptxas if backend == "cuda" else _amdgcn)(text)
    binary = built.asm["cubin" if backend == "cuda" else "hsaco"]
    matrix = {name: text.count(name) for name in MATRIX if name in text}
    return Report(
        kernel.name, target, len(binary), built.metadata.shared, limit, kernel.num_warps,
        registers, spills, matrix,
    )  # fmt: skip


def _signature(program: TileProgram, kernel: PrintedKernel) -> dict[str, str]:
    """Triton's type of every argument, in order."""
    pointers = [POINTERS[program.type_of(ref).dtype] for ref in kernel.refs]
    pointers = ["*i32", *pointers, *["*i32"] * kernel.reports]
    types = pointers + ["i32"] * (len(kernel.args) - len(pointers))
    signature = dict(zip(kernel.args, types, strict=True))
    return signature | dict.fromkeys(kernel.constants, "constexpr")


def _ptxas(ptx: str) -> tuple[int | None, int | None]:
    """Registers and spill bytes, by the assembler that Triton brings."""
    arch = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    tool = _assembler(arch.group(1) if arch else "")
    if arch is None or tool is None:
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(tool), "-v", f"-arch={arch.group(1)}", str(file), "-o", f"{folder}/cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill", said)
    return _number(registers), sum(map(int, spills)) if spills else None


def _assembler(arch: str) -> Path | None:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newer = [folder / "ptxas-blackwell"] if arch.startswith(("sm_10", "sm_12")) else []
    return next((t for t in [*newer, folder / "ptxas"] if t.exists()), None)


def _amdgcn(text: str) -> tuple[int | None, int | None]:
    """Vector registers and spill bytes (4 a register and lane), from the kernel's metadata."""
    registers = _number(re.search(r"\.vgpr_count:\s+(\d+)", text))
    spills = _number(re.search(r"\.vgpr_spill_count:\s+(\d+)", text))
    return registers, None if spills is None else spills * 4


def _number(match: re.Match[str] | None) -> int | None:
    return int(match.group(1)) if match else None
