"""GPUs that kernels are compiled for, whether they are here or not.

Duty: numbers of data sheets and programming guides, in one table, and the two bounds that follow:
how many warps of a kernel a multiprocessor can hold, and the least time that a cell's arithmetic
and bytes take. Comes in: a kernel's resources, a cell; goes out: `Occupancy`, `Roofline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cellc import ops
from cellc.cells import Cell


@dataclass(frozen=True)
class Device:
    """One GPU. Peaks are dense, in TFLOP/s; memory in TB/s; the rest is of one multiprocessor (a
    compute unit at AMD), whose `warps` each hold `registers` at most.
    """

    name: str
    source: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes that one program may have
    shared: int  # bytes that all programs share
    warps: int
    programs: int
    registers: int  # 32-bit, of all warps
    granule: int  # registers that a warp is given at a time
    units: int
    tmem_columns: int
    matrix: Mapping[str, float]  # dtype of products
    vector: float  # f32, without matrix instructions
    bandwidth: float

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in a dtype."""
        return 1e12 * self.matrix.get(dtype, self.vector)


_NVIDIA = dict(
    backend="cuda", warp_size=32, warps=64, programs=32, registers=65536, granule=256
)  # fmt: skip
DEVICES: Mapping[str, Device] = {
    "cuda:80": Device(
        name="NVIDIA A100 SXM 80 GB",
        source="NVIDIA A100 Tensor Core GPU data sheet; CUDA C++ Programming Guide, 8.0",
        arch=80, shared_limit=166912, shared=167936, units=108, tmem_columns=0,
        matrix={"bf16": 312, "f16": 312, "tf32": 156}, vector=19.5, bandwidth=2.039,
        **_NVIDIA,  # type: ignore[arg-type]
    ),
    "cuda:90": Device(
        name="NVIDIA H100 SXM",
        source="NVIDIA H100 Tensor Core GPU data sheet; CUDA C++ Programming Guide, 9.0",
        arch=90, shared_limit=232448, shared=233472, units=132, tmem_columns=0,
        matrix={"bf16": 989.4, "f16": 989.4, "tf32": 494.7}, vector=66.9, bandwidth=3.35,
        **_NVIDIA,  # type: ignore[arg-type]
    ),
    "cuda:100": Device(
        name="NVIDIA B200",
        source="NVIDIA Blackwell data sheet (HGX B200, a GPU); CUDA C++ Programming Guide, 10.0",
        arch=100, shared_limit=232448, shared=233472, units=148, tmem_columns=512,
        matrix={"bf16": 2250, "f16": 2250, "tf32": 1100}, vector=80, bandwidth=8.0,
        **_NVIDIA,  # type: ignore[arg-type]
    ),
    "hip:gfx942": Device(
        name="AMD Instinct MI300X",
        source="AMD Instinct MI300X data sheet; AMD CDNA 3 instruction set architecture",
        backend="hip", arch="gfx942", warp_size=64, shared_limit=65536, shared=65536, warps=32,
        programs=32, registers=4 * 512 * 64, granule=8 * 64, units=304, tmem_columns=0,
        matrix={"bf16": 1307.4, "f16": 1307.4, "f32": 163.4, "tf32": 653.7}, vector=163.4,
        bandwidth=5.325,
    ),
}  # fmt: skip
"""By target. H200, which compiles as cuda:90, has an H100's arithmetic and 4.8 TB/s."""
V100 = Device(
    name="NVIDIA V100 SXM2",
    source="NVIDIA V100 Tensor Core GPU data sheet; CUDA C++ Programming Guide, 7.0",
    arch=70, shared_limit=98304, shared=98304, units=80, tmem_columns=0,
    matrix={"f16": 125}, vector=15.7, bandwidth=0.9,
    **_NVIDIA,  # type: ignore[arg-type]
)  # fmt: skip
"""What BatchMaker was measured on; for `cellc simulate` only, not compiled for."""


SUBUNITS = 4  # of a multiprocessor, each with a quarter of its registers and warps


@dataclass(frozen=True)
class Occupancy:
    """Warps that a multiprocessor can hold of those it could, and what allows no more."""

    warps: int
    of: int
    limit: str

    @property
    def share(self) -> float:
        return self.warps / self.of


def occupancy(
    device: Device, num_warps: int, registers: int, shared_bytes: int, tmem_columns: int = 0
) -> Occupancy:
    """An upper bound, from resources alone: a launch may have too few programs to reach it."""
    a_warp = max(1, registers) * device.warp_size
    a_warp = -(-a_warp // device.granule) * device.granule
    bounds = {
        "warps": device.warps // num_warps,
        "programs": device.programs,
        "registers": SUBUNITS * (device.registers // SUBUNITS // a_warp) // num_warps,
    }
    if shared_bytes:  # CUDA keeps 1 KiB of each program to itself
        kept = shared_bytes + 1024 * (device.backend == "cuda")
        bounds["shared memory"] = device.shared // kept
    if tmem_columns and device.tmem_columns:
        bounds["tensor memory"] = device.tmem_columns // tmem_columns
    limit = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[limit] * num_warps, device.warps, limit)


@dataclass(frozen=True)
class Roofline:
    """The least seconds that a launch of B rows takes, and whether arithmetic or memory says so."""

    seconds: float
    bound: str


def roofline(cell: Cell, device: Device, num_rows: int, precision: str = "ieee") -> Roofline:
    """Every row read and written once, every weight read once, all units busy."""
    seconds = 0.0
    for op in cell.ops:
        count = ops.flops(op.op, [cell.shape_of(x) for x in op.operands], op.type.shape)
        peak, dtype = 1e12 * device.vector, op.type.dtype
        if op.op in ("linear", "matmul"):
            peak = device.peak("tf32" if dtype == "f32" and precision != "ieee" else dtype)
        seconds += num_rows * count / peak
    memory = launch_bytes(cell, num_rows) / (1e12 * device.bandwidth)
    if memory >= seconds:
        return Roofline(memory, "memory")
    return Roofline(seconds, "arithmetic")


def launch_bytes(cell: Cell, num_rows: int) -> int:
    """Of rows and weights; of a table that is only looked up, no more than is read."""
    total = num_rows * cell.bytes_per_row
    for index, param in enumerate(cell.params):
        looked_up = elsewhere = 0
        for i, operand in cell.uses():
            if operand.kind == "param" and operand.index == index:
                op = cell.ops[i] if i < len(cell.ops) else None
                if op is not None and op.op == "embedding" and op.operands[0] == operand:
                    looked_up += num_rows * op.type.nbytes
                else:
                    elsewhere += 1
        total += param.type.nbytes if elsewhere else min(param.type.nbytes, looked_up)
    return total
