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

from cellc import env
from cellc.errors import BackendError, CellcError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

BACKENDS = ("auto", "triton", "cpp", "eager")
_EPILOG = """\
examples:
  cellc demo                                 the whole idea on real text, in about a minute
  cellc inspect model.py:model               which cells a model has
  cellc inspect model.py:model --code lstm   the kernel that was generated for one of them
  cellc bench lstm-256                       throughput against PyTorch and onnxruntime

exit codes: 0 good, 1 a check failed, 2 wrong use."""
_DEMO = """\
Serve the sentences of Python's own documentation with an LSTM classifier, and compare with padded
batching in PyTorch: find the cells, prove that results are equal, measure the throughput of many
sentences at once, and the latency under Poisson load. Every number that is printed is measured here
and now. Exits with 1 if any result differs from PyTorch's."""
_INSPECT = """\
Trace a model's example requests and print the cells that were found: weights, calls, operations,
arithmetic and bytes of a row, kernels; how much of the arithmetic they cover; how a request of a
new structure becomes cell calls, and what that costs."""
_BENCH = """\
Requests a second of workloads, cellc against what else a user would pick, on the same weights:
PyTorch one at a time, padded, in buckets, packed, by hand; onnxruntime, OpenVINO, TensorFlow, DyNet
and torchfold where they are installed. All ways are checked for equal results, then timed in
alternated rounds; rounds in which others used the machine are dropped, and a table that has too few
quiet ones is not quoted.

Workloads: lstm-256, lstm-1024, gru-256, bilstm-tagger, seq2seq-256, seq2seq-1024,
seq2seq-attention, treelstm-256, treelstm-1024, sessions; what cellc itself costs: host, saturation,
startup, memory. Without a name, all of them. A TARGET, path/to/file.py:name, is a model of yours
with its example_inputs() (see cellc inspect --help), against PyTorch one request at a time.

--online serves requests as they come, in place of many at once: p50, p90 and p99 of latency from
the arrival that was drawn, not from when the request was sent, at shares of the peak of the peer, a
dynamic batcher of padded batches; of lstm-256, lstm-1024, gru-256, seq2seq-256, seq2seq-1024 and
TARGETs. Without a name, lstm-256 and seq2seq-256. The peer's two best configurations (buckets of 10
or one queue, timeouts of 0 to 10 ms) are searched for at each load, and measured beside buckets of
10 with a timeout of 10 ms. Without --online a TARGET is measured both ways."""
_BENCH_EPILOG = """\
examples:
  cellc bench lstm-256
  cellc bench lstm-256 sessions --rounds 9 --json figures.json
  cellc bench gru-256 --lengths lengths.txt --requests 1024
  cellc bench treelstm-256 --trees parses.txt
  cellc bench lstm-256 --online --loads 0.3,0.7,0.95 --plot latency.png
  cellc bench lstm-256 --online --trace trace.txt
  cellc bench examples/tagger.py:model
  cellc bench --targets                                what cellc is built to, held or not
  cellc bench gru-256 --from figures.json --json figures.json        one more workload
  cellc bench --from figures.json --targets --paper --markdown benchmarks.md"""
_TARGET = """\
TARGET is path/to/file.py:name or package.module:name. The name is an nn.Module, a function without
arguments that returns one, or a function of tensors, which is then the model itself. Requests come
from example_inputs() in that file: a list of requests (a tuple is positional arguments, a dict
keywords, anything else one argument); or from --input file.py:name, a list or a function that
returns one.
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


def _run(args: argparse.Namespace) -> int:
    env.check()
    if args.command == "demo":
        from cellc import demo

        return demo.run(demo.config(args.seconds, args.output, quick=args.quick), _console())
    if args.command == "bench":
        from cellc.bench import command

        return command.run(args, _console())
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
    _add_bench(commands)
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
        type=_positive,
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
        "--backend", choices=BACKENDS, help="kernels of this backend (default auto)"
    )
    what = inspect.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="one JSON object in place of tables")
    what.add_argument("--ir", metavar="STAGE", help="print graph, rows, extract, passes or plan")
    what.add_argument(
        "--code", nargs="?", const="", metavar="CELL", help="print the kernels, or one cell's"
    )
    what.add_argument("--graph", metavar="FILE", help="draw the cells into a .svg, .dot or .html")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="throughput against what else there is",
        description=_BENCH,
        epilog=_BENCH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("workload", nargs="*", metavar="WORKLOAD", help="see above, or a TARGET")
    bench.add_argument(
        "--requests", type=_count, default=512, metavar="N", help="at once (default 512)"
    )
    bench.add_argument("--rounds", type=_count, default=5, metavar="N", help="kept (default 5)")
    bench.add_argument(
        "--seconds",
        type=_positive,
        default=1.0,
        metavar="S",
        help="of each way, or load, in a round (default 1)",
    )
    bench.add_argument(
        "--patience",
        type=_positive,
        default=60.0,
        metavar="S",
        help="for rounds in place of disturbed ones, a table (default 60)",
    )
    bench.add_argument(
        "--units", type=_count, metavar="N", help="hidden units, in place of a workload's own"
    )
    bench.add_argument("--lengths", type=Path, metavar="FILE", help="of requests, one a line")
    bench.add_argument(
        "--trees",
        type=Path,
        metavar="FILE",
        help="in brackets, as treebanks have them: (S (NP a)...)",
    )
    bench.add_argument("--backend", choices=BACKENDS, default="auto", help="cellc's (default auto)")
    bench.add_argument("--noisy", action="store_true", help="quote disturbed figures as well")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    bench.add_argument("--input", metavar="FILE:NAME", help="requests of a TARGET")
    _add_bench_online(bench)
    _add_bench_reports(bench)


def _add_bench_online(bench: argparse.ArgumentParser) -> None:
    """Requests as they come."""
    bench.add_argument("--online", action="store_true", help="latency against load")
    bench.add_argument(
        "--loads",
        type=_shares,
        metavar="X,Y",
        help="shares of the peer's peak (default 0.3,0.7,0.95)",
    )
    bench.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help='arrivals, one a line: "seconds length", or JSON with these names; at its own rate, '
        "or stretched to give --loads",
    )


def _add_bench_reports(bench: argparse.ArgumentParser) -> None:
    """What is made of the figures."""
    bench.add_argument(
        "--from",
        dest="given",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="start from figures that --json wrote; only workloads that are named are measured",
    )
    bench.add_argument("--targets", action="store_true", help="what cellc is built to, held or not")
    bench.add_argument("--paper", action="store_true", help="BatchMaker's claims, measured here")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="write all tables as a page")
    bench.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw them (.png, .svg or .pdf); with --online, latencies only",
    )


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(_positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} is not as 0.3,0.7: shares above 0") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
