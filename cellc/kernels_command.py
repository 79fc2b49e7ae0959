"""`cellc kernels`: the Triton kernels of a model, truly compiled for GPUs that need not be here.

Duty: find a model's cells, compile their kernels for each target, print what came out: registers,
spills, shared memory, occupancy, matrix instructions, and the least time that data sheets allow.
Comes in: parsed arguments; goes out: text on the console, an exit code.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellc import target
from cellc.cells import Cell
from cellc.demo_steps import Steps
from cellc.entry import compile
from cellc.errors import UnsupportedError, UsageError
from cellc.kernels import triton_repro
from cellc.kernels.narrow import narrowed
from cellc.kernels.triton_backend import TritonOptions, print_cell
from cellc.kernels.triton_devices import DEVICES, Device, roofline
from cellc.kernels.triton_persistent import print_persistent
from cellc.kernels.triton_pool import Job, compile_all
from cellc.kernels.triton_targets import Report, check_target, retyped
from cellc.survey import leftovers, survey

PACKAGES = {"cuda": "nvidia", "hip": "amd"}  # of Triton's backends


@dataclass
class CellKernels:
    """One cell and what its kernels became; `left`: what keeps it from having some."""

    cell: Cell
    left: str = ""
    reports: list[Report] = field(default_factory=list)


def run(args: argparse.Namespace, console: Console) -> int:
    """The command; returns its exit code."""
    targets = _targets(args.target_gpu)
    options = TritonOptions("tf32" if args.tf32 else "ieee", args.weights)
    steps = Steps(Console(stderr=True, highlight=False))
    loaded = target.load(args.target, args.input)
    with steps.step("cells"), compile(loaded.model, backend="eager") as compiled:
        found = survey(compiled, loaded.requests)
        cells = [compiled.cells[report.name].cell for report in found.cells]
    chosen = [_prepared(cell, args.dtype, options) for cell in cells]
    if args.repro:
        return _repro(chosen, args, targets[0], options, console)
    jobs = [(one, job) for one in chosen if not one.left for job in _jobs(one, targets, options)]
    with steps.step(f"{len(jobs)} kernels for {', '.join(targets)}", len(jobs)) as done:
        for (one, _), report in zip(jobs, compile_all([j for _, j in jobs], done), strict=True):
            one.reports.append(report)
    if args.json:
        made = _as_json(found.model, chosen, targets, args.batch, options)
        console.out(json.dumps(made, indent=2), highlight=False)
    else:
        title = f"{found.model} ({args.target})"
        _print(title, chosen, targets, args.batch, options, console)
    return 0 if all(r.good for one in chosen for r in one.reports) else 1


def _targets(asked: Sequence[str] | None) -> list[str]:
    """Those asked for, else all that this Triton compiles for."""
    for name in asked or ():
        check_target(name)
    names = list(dict.fromkeys(asked or DEVICES))
    having = [n for n in names if _supported(DEVICES[n])]
    if asked and having != names:
        missing = next(n for n in names if n not in having)
        raise UsageError(f"this Triton has no backend for {missing}; pip install -U triton")
    if not having:
        raise UsageError("Triton is not installed: pip install triton")
    return having


def _supported(device: Device) -> bool:
    try:
        return importlib.util.find_spec(f"triton.backends.{PACKAGES[device.backend]}") is not None
    except ModuleNotFoundError:
        return False


def _prepared(cell: Cell, dtype: str | None, options: TritonOptions) -> CellKernels:
    """A cell in the dtype asked for, and what Triton is not written for in it."""
    names = leftovers(cell)
    if names:
        return CellKernels(cell, f"left to torch: {', '.join(names)}")
    cell = narrowed(retyped(cell, dtype) if dtype else cell, options.weights).cell
    try:
        print_cell(cell, options)
    except UnsupportedError as error:
        reason = str(error).split(": ", 2)[-1].split(" is not supported")[0]
        return CellKernels(cell, f"left to torch: {reason}")
    return CellKernels(cell)


def _jobs(one: CellKernels, targets: Sequence[str], options: TritonOptions) -> Iterator[Job]:
    """All kernels of a cell; its persistent one for GPUs that have room for the weights."""
    program, printed = print_cell(one.cell, options)
    for i in range(len(printed.kernels)):
        for name in targets:
            yield Job(one.cell, i, name, options)
    persistent = print_persistent(program, printed, options.input_precision)
    for name in targets:
        if persistent is not None and persistent.fits(DEVICES[name].shared_limit):
            yield Job(one.cell, 0, name, options, persistent=True)


# -- a standalone file -----------------------------------------------------------------------------


def _repro(
    chosen: Sequence[CellKernels],
    args: argparse.Namespace,
    gpu: str,
    options: TritonOptions,
    console: Console,
) -> int:
    places = {}
    for one in chosen:
        if not one.left:
            program, printed = print_cell(one.cell, options)
            for i, kernel in enumerate(printed.kernels):
                places[kernel.name] = (program, printed, i)
            persistent = print_persistent(program, printed, options.input_precision)
            if persistent is not None:
                places[persistent.kernel.name] = (program, persistent.printed, 0)
    if not places:
        raise UsageError("no cell of this model has a Triton kernel")
    if args.repro not in places:
        near = difflib.get_close_matches(args.repro, places, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(places)}"
        raise UsageError(f"there is no kernel {args.repro!r}; {hint}")
    path = Path(args.output or f"{args.repro}_repro.py")
    try:
        triton_repro.write(path, triton_repro.repro(*places[args.repro], gpu, args.batch))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    console.out(f"wrote {path}", highlight=False)
    return 0


# -- tables ----------------------------------------------------------------------------------------


def _print(
    title: str,
    chosen: Sequence[CellKernels],
    targets: Sequence[str],
    num_rows: int,
    options: TritonOptions,
    console: Console,
) -> None:
    for name in targets:
        device = DEVICES[name]
        table = _table(f"{title}: {name}, {device.name}")
        for one in chosen:
            for row in _rows(one, name, num_rows, options):
                table.add_row(*row)
        console.print(table)
        console.print(
            f"roofline: {num_rows} rows, {_figures(device)} ({device.source})", markup=False
        )
    for text in _remarks(chosen):
        console.print(text, markup=False)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("cell, kernel", overflow="fold")
    for name in ("FLOPs a row", "bytes a row", "registers", "spilled", "shared", "occupancy"):
        table.add_column(name, justify="right")
    table.add_column("matrix instructions")
    table.add_column("roofline", justify="right")
    return table


def _rows(one: CellKernels, gpu: str, num_rows: int, options: TritonOptions) -> list[Sequence[str]]:
    """The cell, then its kernels."""
    bound = roofline(one.cell, DEVICES[gpu], num_rows, options.input_precision)
    flops, moved = f"{one.cell.flops_per_row:,}", f"{one.cell.bytes_per_row:,}"
    left = "left to torch" if one.left else ""
    least = f"{bound.seconds * 1e6:.2f} us, {bound.bound}"
    rows: list[Sequence[str]] = [
        (f"[bold]{escape(one.cell.name)}[/]", flops, moved, "", "", "", "", left, least)
    ]
    return rows + [_kernel_row(r) for r in one.reports if r.target == gpu]


def _kernel_row(r: Report) -> Sequence[str]:
    name = f"  {r.kernel}"
    if r.problem:
        return name, "", "", "", "", "", "", f"[red]FAILED: {escape(r.problem[:200])}[/]", ""
    matrix = ", ".join(f"{k} x{n}" for k, n in r.matrix_instructions.items()) or "none"
    shared = f"{r.shared_bytes / 1024:.1f} KiB"
    bound = r.occupancy
    return (
        name, "", "",
        "?" if r.registers is None else str(r.registers),
        _bytes(r.spill_bytes),
        shared if r.fits else f"[red]{shared} of {r.shared_limit / 1024:.0f}[/]",
        f"{bound.share:.0%} ({bound.limit})", matrix, "",
    )  # fmt: skip


def _bytes(spilled: int | None) -> str:
    return "?" if spilled is None else f"[red]{spilled} B[/]" if spilled else "0"


def _figures(device: Device) -> str:
    peaks = ", ".join(f"{k} {v:,g}" for k, v in device.matrix.items() if k != "f16")
    return f"{peaks}, f32 without matrix instructions {device.vector:g} TFLOP/s, " + (
        f"{device.bandwidth:g} TB/s"
    )


def _remarks(chosen: Sequence[CellKernels]) -> list[str]:
    """What is to be said of all targets together."""
    reports = [r for one in chosen for r in one.reports]
    failed = sum(not r.good for r in reports)
    lines = [
        f"{r.kernel}, {r.target}: {r.spill_bytes} bytes a thread are spilled: {spill_reason(r)}"
        for r in reports
        if r.spill_bytes
    ]
    lines += [
        f"{r.kernel}, {r.target}: needs {r.shared_bytes} bytes of shared memory, there are "
        f"{r.shared_limit}"
        for r in reports
        if not r.fits
    ]
    lines += [f"{one.left} in {one.cell.name}" for one in chosen if one.left]
    lines += [f"weights of {one.cell.name}: {_weights(one.cell)}" for one in chosen if not one.left]
    spilling = sum(bool(r.spill_bytes) for r in reports)
    lines.append(
        f"{len(reports)} kernels compiled, {failed} failed, {spilling} spill; "
        f"{sum(bool(one.left) for one in chosen)} of {len(chosen)} cells left to torch"
    )
    return lines


def _weights(cell: Cell) -> str:
    """Bytes by dtype."""
    sizes: dict[str, int] = {}
    for param in cell.params:
        sizes[param.type.dtype] = sizes.get(param.type.dtype, 0) + param.type.nbytes
    return ", ".join(f"{n:,} bytes of {dtype}" for dtype, n in sizes.items()) or "none"


def fills_device(r: Report) -> bool:
    """Is there no lack of registers, but more warps with fewer of them? With a few more than it
    took, the assembler spills nothing, and the device holds fewer warps.
    """
    return r.registers is not None and r.occupancy.share == 1


def spill_reason(r: Report) -> str:
    """What keeps so many values at once, or why they are not kept."""
    if fills_device(r):
        return f"by the assembler, so that {r.registers} registers fill the device with warps"
    size = r.tiles.get("BM", 1) * r.tiles.get("BN", 1)
    each = max(1, size // (r.num_warps * r.device.warp_size))
    return (
        f"a tile of {r.tiles.get('BM', 1)} x {r.tiles.get('BN', 1)} is {each} lanes of every value "
        f"a thread, beside {r.registers} registers"
    )


# -- JSON ------------------------------------------------------------------------------------------


def _as_json(
    model: str,
    chosen: Sequence[CellKernels],
    targets: Sequence[str],
    num_rows: int,
    options: TritonOptions,
) -> dict[str, Any]:
    return {
        "model": model,
        "rows": num_rows,
        "targets": {name: _device_json(DEVICES[name]) for name in targets},
        "cells": [
            {
                "name": one.cell.name,
                "recurrent": one.cell.recurrent,
                "flops_per_row": one.cell.flops_per_row,
                "bytes_per_row": one.cell.bytes_per_row,
                "weight_bytes": one.cell.weight_bytes,
                "left_to_torch": one.left.removeprefix("left to torch: "),
                "roofline": {
                    name: {"seconds": bound.seconds, "bound": bound.bound}
                    for name in targets
                    for bound in [
                        roofline(one.cell, DEVICES[name], num_rows, options.input_precision)
                    ]
                },
                "kernels": [_report_json(r) for r in one.reports],
            }
            for one in chosen
        ],
    }


def _device_json(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "tflops": {**device.matrix, "f32 vector": device.vector},
        "terabytes_per_second": device.bandwidth,
        "source": device.source,
    }


def _report_json(r: Report) -> dict[str, Any]:
    bound = None if r.problem else r.occupancy
    return {
        "kernel": r.kernel,
        "target": r.target,
        "registers": r.registers,
        "spill_bytes": r.spill_bytes,
        "spill_reason": spill_reason(r) if r.spill_bytes else "",
        "shared_bytes": r.shared_bytes,
        "shared_limit": r.shared_limit,
        "occupancy": bound.share if bound else None,
        "occupancy_limit": bound.limit if bound else None,
        "matrix_instructions": dict(r.matrix_instructions),
        "binary_bytes": r.binary_bytes,
        "num_warps": r.num_warps,
        "num_stages": r.num_stages,
        "tiles": dict(r.tiles),
        "problem": r.problem,
    }
