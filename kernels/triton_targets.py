"""True compilation of Triton kernels for GPUs that need not be here.

Duty: prove that what `triton_printer` writes compiles, and say what comes out. Comes in: a cell and
a target's name; goes out: one `Report` a kernel: sizes, registers, spills, matrix instructions.
Needs a process in which TRITON_INTERPRET is unset (`triton_pool` makes some). Reports are kept in
the cache folder, by all that they depend on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from cellc import env, files
from cellc.cells import Cell, CellInput, CellOp, Param
from cellc.errors import BackendError, UsageError
from cellc.kernels.tile_ir import TileProgram
from cellc.kernels.triton_backend import TritonOptions, interpreting, load, print_cell
from cellc.kernels.triton_devices import DEVICES, Device, Occupancy, occupancy
from cellc.kernels.triton_printer import Printed
from cellc.kernels.triton_tiles import PrintedKernel, compile_options
from cellc.ops import RowType

POINTERS = {
    "f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "u8": "*u8", "i8": "*i8",
    "i16": "*i16", "i32": "*i32", "i64": "*i64", "bool": "*i1",
}  # fmt: skip
MATRIX = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")
HELPERS = Path(__file__).with_name("triton_math.py")


@dataclass(frozen=True)
class Report:
    """What one kernel became; `registers` and spill bytes are None where no tool told them.
    `problem`: why it did not compile.
    """

    kernel: str
    target: str
    binary_bytes: int = 0
    shared_bytes: int = 0
    num_warps: int = 4
    num_stages: int = 3
    registers: int | None = None
    spill_bytes: int | None = None
    tmem_columns: int = 0
    matrix_instructions: Mapping[str, int] = field(default_factory=dict)
    tiles: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""

    @property
    def device(self) -> Device:
        return DEVICES[self.target]

    @property
    def shared_limit(self) -> int:
        return self.device.shared_limit

    @property
    def fits(self) -> bool:
        """Whether the device's shared memory suffices."""
        return self.shared_bytes <= self.shared_limit

    @property
    def good(self) -> bool:
        """Does it compile to what can be launched?"""
        return not self.problem and self.fits

    @property
    def occupancy(self) -> Occupancy:
        """An upper bound of warps that a multiprocessor holds."""
        registers = self.registers or 1
        return occupancy(
            self.device, self.num_warps, registers, self.shared_bytes, self.tmem_columns
        )


def compile_for(
    cell: Cell, target: str, dtype: str | None = None, options: TritonOptions | None = None
) -> list[Report]:
    """Compile every kernel of a cell, its f32 rows and weights replaced by `dtype` if given.

    Raises UsageError for an unknown target, BackendError in a process that interprets kernels or
    where Triton's compiler fails, UnsupportedError for a cell without Triton kernels.
    """
    check_target(target)
    if interpreting():
        raise BackendError("compiling needs TRITON_INTERPRET unset", backend="triton")
    program, printed = print_cell(retyped(cell, dtype) if dtype else cell, options)
    return [compile_kernel(program, printed, i, target) for i in range(len(printed.kernels))]


def check_target(target: str) -> None:
    """Raises UsageError for a target that is not known."""
    if target not in DEVICES:
        raise UsageError(f"target {target!r} is not known; there are {', '.join(DEVICES)}")


def compile_kernel(program: TileProgram, printed: Printed, index: int, target: str) -> Report:
    """One kernel of a module, from the cache if it was compiled before."""
    kernel = printed.kernels[index]
    found = known(printed, index, target)
    if found is None:
        module = load(program.cell.name, printed.source)
        found = _compile(program, kernel, getattr(module, kernel.name), target)
        _keep(printed, index, found)
    return found


def retyped(cell: Cell, dtype: str) -> Cell:
    """The cell with every f32 replaced."""

    def change(t: RowType) -> RowType:
        return RowType(t.shape, dtype if t.dtype == "f32" else t.dtype)

    def op(o: CellOp) -> CellOp:
        return replace(o, types=tuple(map(change, o.types)))

    inputs = tuple(CellInput(i.name, change(i.type), i.ragged) for i in cell.inputs)
    params = tuple(Param(p.name, change(p.type)) for p in cell.params)
    return replace(cell, inputs=inputs, params=params, ops=tuple(map(op, cell.ops)))


# -- the cache -------------------------------------------------------------------------------------


def known(printed: Printed, index: int, target: str) -> Report | None:
    """What an earlier compilation gave."""
    try:
        return Report(**json.loads(_file(printed, index, target).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _keep(printed: Printed, index: int, report: Report) -> None:
    with suppress(OSError):  # it is compiled again, then
        files.write(_file(printed, index, report.target), json.dumps(asdict(report)))


def _file(printed: Printed, index: int, target: str) -> Path:
    kernel = printed.kernels[index]
    form = (kernel.name, kernel.constants, compile_options(kernel), target)
    parts = [printed.source, repr(form), _tools()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return env.cache() / "reports" / f"{digest}.json"


@lru_cache
def _tools() -> str:
    """What else a report depends on: the compiler, functions that kernels call, this file."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # under another name
        import triton

        version = triton.__version__
    return "\0".join([version, HELPERS.read_text(), Path(__file__).read_text()])


# -- the compiler ----------------------------------------------------------------------------------


def _compile(program: TileProgram, kernel: PrintedKernel, function: Any, target: str) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = DEVICES[target]
    types = signature(program, kernel)
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] == "*"}
    source = ASTSource(function, types, dict(kernel.constants), aligned)
    where = GPUTarget(device.backend, device.arch, device.warp_size)
    try:
        built = triton.compile(source, target=where, options=compile_options(kernel))
    except Exception as error:
        message = f"{kernel.name} does not compile for {target}: {error}"
        raise BackendError(message, backend="triton") from error
    cuda = device.backend == "cuda"
    text, binary = built.asm["ptx" if cuda else "amdgcn"], built.asm["cubin" if cuda else "hsaco"]
    registers, spills = (_ptxas if cuda else _amdgcn)(text)
    return Report(
        kernel=kernel.name,
        target=target,
        binary_bytes=len(binary),
        shared_bytes=built.metadata.shared,
        num_warps=kernel.num_warps,
        num_stages=kernel.num_stages,
        registers=registers,
        spill_bytes=spills,
        tmem_columns=getattr(built.metadata, "tmem_size", 0) or 0,
        matrix_instructions={name: text.count(name) for name in MATRIX if name in text},
        tiles=dict(kernel.constants),
    )


def signature(program: TileProgram, kernel: PrintedKernel) -> dict[str, str]:
    """Triton's type of every argument, in order."""
    pointers = [POINTERS[program.type_of(ref).dtype] for ref in kernel.refs]
    types = ["*i32", *pointers, *["*i32"] * kernel.reports]
    types += ["*i32" if name == "head" else "i32" for name in kernel.args[len(types) :]]
    return dict(zip(kernel.args, types, strict=True)) | dict.fromkeys(kernel.constants, "constexpr")


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
