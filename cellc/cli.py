"""The command line: `cellc`, also `python -m cellc`.

Duty: parse arguments, call the command, turn errors into a short message and an exit code: 0 good,
1 a check failed, 2 wrong use, 130 interrupted. Commands are imported when they are called.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellc import env, simulate_arguments
from cellc.cli_bench import add_bench
from cellc.cli_values import BACKENDS, add_weights, count, positive, tolerance
from cellc.errors import BackendError, CellcError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

FLOATS = ("f32", "f64", "bf16", "f16")
_EPILOG = """\
examples:
  cellc demo                                 the whole idea on real text, in about a minute
  cellc inspect model.py:model               which cells a model has
  cellc inspect model.py:model --code lstm   the kernel that was generated for one of them
  cellc check model.py:model                 results and kernels compared with PyTorch
  cellc kernels model.py:model               its Triton kernels, compiled for GPUs not here
  cellc tune model.py:model                  its cells measured here, for the scheduler
  cellc bench lstm-256                       throughput against PyTorch and onnxruntime
  cellc simulate lstm --device h100          the scheduler on a virtual clock

exit codes: 0 good, 1 a check failed, 2 wrong use, 130 interrupted."""
_DEMO = """\
Serve the sentences of Python's own documentation with an LSTM classifier, and compare with padded
batching in PyTorch: find the cells, prove that results are equal, measure the throughput of many
sentences at once, and the latency under Poisson load. Every number that is printed is measured here
and now. Exits with 1 if any result differs from PyTorch's."""
_INSPECT = """\
Trace a model's example requests and print the cells that were found: weights, calls, operations,
arithmetic and bytes of a row, kernels; how much of the arithmetic they cover; how a request of a
new structure becomes cell calls, and what that costs. Calls are those of the largest request: a
cell of other requests alone has 0. Kernels: `cpp` or `triton` were generated, `copy` moves rows
only, `eager` runs through torch, `tiered` too until it has cost a second."""
_TARGET = """\
TARGET is path/to/file.py:name or package.module:name. The name is an nn.Module, a function without
arguments that returns one, or a function of tensors, which is then the model itself. Requests come
from example_inputs() in that file: a list of requests (a tuple is positional arguments, a dict
keywords, anything else one argument); or from --input file.py:name, a list or a function that
returns one.
"""
_CHECK = """\
Compare with plain PyTorch. Every example request runs by each backend that can run here, together
with all others and alone; then the generated kernel of every cell is launched on rows that the cell
was given, at several batch sizes and dtypes, against the same cell as torch calls. Exits with 1 if
anything differs by more than atol + rtol * |value|: 1e-5 and 1e-4 in f32, 1e-9 and 1e-7 in f64,
2e-2 and 2e-2 in halves, nothing in whole numbers. Where a cell's largest value is above 1, its atol
is of that value. A request that PyTorch refuses counts as equal where cellc refuses it, too, and
the table says what was raised; where PyTorch refuses all of them nothing was compared: exit code 1.
With --weights a kernel is compared with torch calls that have the same weights, as above, and by
the norm of the difference with those that have the model's: at most 3e-3 of the norm with bf16,
6e-3 with int8, and results twice as much; --rtol is then in place of these. Whole numbers still
have to be equal, although one may turn where two choices are close."""
_CHECK_EPILOG = f"""{_TARGET}
examples:
  cellc check model.py:model
  cellc check model.py:model --backend cpp --dtype f32 --batch 1 --batch 512
  cellc check model.py:model --input requests.py:requests --rtol 1e-5 --atol 1e-6
  TRITON_INTERPRET=1 cellc check model.py:model --backend triton     without a GPU, slowly
  cellc check model.py:model --weights int8              as options={{"weights": "int8"}}
  cellc check model.py:model --json
"""
_KERNELS = """\
Compile the Triton kernels of a model's cells, truly, for GPUs that need not be here, and print what
came out: registers and spilled bytes a thread, shared memory of a program, an upper bound of
occupancy and what sets it, matrix instructions in the assembly, FLOPs and bytes a row, and the
least time that B rows take by the GPU's data sheet. Exits with 1 if a kernel does not compile or
fit. Kernels are compiled once: reports are kept in the cache.

Targets: cuda:80 (A100), cuda:90 (H100), cuda:100 (B200), hip:gfx942 (MI300X)."""
_KERNELS_EPILOG = f"""{_TARGET}
examples:
  cellc kernels model.py:model --target cuda:90
  cellc kernels model.py:model --target cuda:90 --target cuda:100 --dtype bf16 --batch 256
  cellc kernels model.py:model --json
  cellc kernels model.py:model --repro lstm_0_fused --output repro.py

A file that --repro writes needs torch and Triton alone: it runs on a GPU where there is one, in
Triton's interpreter with TRITON_INTERPRET=1, and else compiles for the first target.
"""
_TUNE = """\
Measure the kernel of every cell at many numbers of rows, on rows that the cell was given, and keep
the curves in the cache: the scheduler then knows what a launch costs before its first. On a GPU,
tiles of kernels with products are measured first, and the best are kept: later runs use them.
Curves hold for one cell, backend, device and number of threads."""
_TUNE_EPILOG = f"""{_TARGET}
examples:
  cellc tune model.py:model
  cellc tune model.py:model --backend cpp --batch 1 --batch 64 --batch 512
  cellc tune model.py:model --seconds 0.1 --json
"""
_INSPECT_EPILOG = f"""{_TARGET}
examples:
  cellc inspect model.py:model
  cellc inspect model.py:model --json
  cellc inspect model.py:model --ir passes
  cellc inspect model.py:model --code                    every kernel
  cellc inspect model.py:model --code lstm --backend triton
  cellc inspect model.py:model --graph cells.svg
  cellc inspect package.module:build --input requests.py:requests
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as end:  # argparse has printed help or what is wrong
        return int(end.code or 0)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UsageError, BackendError) as error:
        return _fail(error, 2)
    except CellcError as error:
        return _fail(error, 1)


def _fail(error: CellcError, code: int) -> int:
    print(f"cellc: {error}", file=sys.stderr)
    return code


_WRITTEN = ("json", "markdown", "plot", "output")  # options of bench and demo that name a file


def _check_folders(args: argparse.Namespace) -> None:
    """What is measured for minutes must have where to go."""
    for option in _WRITTEN:
        path = getattr(args, option, None)
        if isinstance(path, (str, Path)) and not Path(path).expanduser().parent.is_dir():
            raise UsageError(f"--{option} {path}: there is no folder {Path(path).parent}")


def _run(args: argparse.Namespace) -> int:
    env.check()
    if args.command in ("bench", "demo"):
        _check_folders(args)
    if args.command == "demo":
        from cellc import demo

        return demo.run(demo.config(args.seconds, args.output, quick=args.quick), _console())
    if args.command == "bench":
        from cellc.bench import command

        return command.run(args, _console())
    if args.command == "check":
        from cellc import check_command

        return check_command.run(args, _console())
    if args.command == "kernels":
        from cellc import kernels_command

        return kernels_command.run(args, _console())
    if args.command == "tune":
        from cellc import tune_command

        return tune_command.run(args, _console())
    if args.command == "simulate":
        from cellc.simulation import command as simulate_command

        return simulate_command.run(args, _console())
    from cellc import inspect

    return inspect.run(args, _console())


def _console() -> Console:
    """Rich output; wide enough for a table where nobody looks at the width."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cellc",
        description="Cellular batching for PyTorch models: batch cells, not requests.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_inspect(commands)
    _add_check(commands)
    _add_kernels(commands)
    _add_tune(commands)
    add_bench(commands)
    simulate_arguments.add(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="the main job, end to end on real text",
        description=_DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--seconds",
        type=positive,
        metavar="S",
        help="how long each server stands each load (default 2)",
    )
    demo.add_argument(
        "--output",
        default="cellc-demo.html",
        metavar="FILE",
        help="the report (default cellc-demo.html)",
    )
    demo.add_argument(
        "--quick", action="store_true", help="a small model and few sentences, to see that it runs"
    )


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="the cells of a model",
        description=_INSPECT,
        epilog=_INSPECT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("target", metavar="TARGET", help="file.py:name or package.module:name")
    inspect.add_argument("--input", metavar="FILE:NAME", help="requests, in place of the file's")
    inspect.add_argument(
        "--backend",
        choices=BACKENDS,
        help="kernels of this backend (default auto; --code: C++ and Triton)",
    )
    add_weights(inspect)
    what = inspect.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="one JSON object in place of tables")
    what.add_argument("--ir", metavar="STAGE", help="print graph, rows, extract, passes or plan")
    what.add_argument(
        "--code",
        nargs="?",
        const="",
        metavar="CELL",
        help="print the kernels, or one cell's, as C++ and as Triton",
    )
    what.add_argument("--graph", metavar="FILE", help="draw the cells into a .svg, .dot or .html")


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="compare results and kernels with PyTorch",
        description=_CHECK,
        epilog=_CHECK_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("target", metavar="TARGET", help="file.py:name or package.module:name")
    check.add_argument("--input", metavar="FILE:NAME", help="requests, in place of the file's")
    check.add_argument(
        "--backend",
        action="append",
        choices=BACKENDS[1:],
        help="may be given more than once (default: all that can run here)",
    )
    check.add_argument(
        "--dtype",
        action="append",
        choices=FLOATS,
        help="of cells, may be given more than once (default: the model's own, and of the 32 "
        "largest cells all that kernels are written for)",
    )
    check.add_argument(
        "--batch",
        action="append",
        type=count,
        metavar="B",
        help="rows a step of cells, may be given more than once (default 1, 3, 64)",
    )
    add_weights(check)
    check.add_argument("--rtol", type=tolerance, metavar="X", help="in place of each dtype's own")
    check.add_argument("--atol", type=tolerance, metavar="X", help="in place of each dtype's own")
    check.add_argument("--json", action="store_true", help="one JSON object in place of tables")


def _add_kernels(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    kernels = commands.add_parser(
        "kernels",
        help="Triton kernels, compiled for GPUs that need not be here",
        description=_KERNELS,
        epilog=_KERNELS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kernels.add_argument("target", metavar="TARGET", help="file.py:name or package.module:name")
    kernels.add_argument("--input", metavar="FILE:NAME", help="requests, in place of the file's")
    kernels.add_argument(
        "--target",
        dest="target_gpu",
        action="append",
        metavar="GPU",
        help="see above; may be given more than once (default: all of them)",
    )
    kernels.add_argument(
        "--dtype", choices=("f32", "bf16", "f16"), help="in place of f32 (default: the model's own)"
    )
    add_weights(kernels)
    kernels.add_argument(
        "--tf32", action="store_true", help="f32 products may use tf32, as options={'tf32': True}"
    )
    kernels.add_argument(
        "--batch",
        type=count,
        default=64,
        metavar="B",
        help="rows of the roofline and of --repro (default 64); tiles do not depend on it",
    )
    what = kernels.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="one JSON object in place of tables")
    what.add_argument("--repro", metavar="KERNEL", help="write a standalone file of one kernel")
    kernels.add_argument("--output", metavar="FILE", help="of --repro (default KERNEL_repro.py)")


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tune = commands.add_parser(
        "tune",
        help="measure cells here, and keep it for the scheduler",
        description=_TUNE,
        epilog=_TUNE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune.add_argument("target", metavar="TARGET", help="file.py:name or package.module:name")
    tune.add_argument("--input", metavar="FILE:NAME", help="requests, in place of the file's")
    tune.add_argument("--backend", choices=BACKENDS, default="auto", help="(default auto)")
    tune.add_argument(
        "--batch",
        action="append",
        type=count,
        metavar="B",
        help="rows of a step, may be given more than once (default 1, 2, 4 to 512)",
    )
    tune.add_argument(
        "--seconds",
        type=positive,
        default=0.02,
        metavar="S",
        help="of each launch in a round (default 0.02)",
    )
    tune.add_argument("--no-tiles", action="store_true", help="on a GPU, leave tiles as they are")
    tune.add_argument("--json", action="store_true", help="one JSON object in place of tables")


if __name__ == "__main__":
    sys.exit(main())
