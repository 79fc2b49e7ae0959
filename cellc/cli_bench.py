"""The command line of `cellc bench`.

Duty: its arguments and its help. Used by `cellc.cli`; what it does is `cellc.bench.command`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cellc.cli_values import BACKENDS, add_trace, count, positive, shares

_BENCH = """\
Requests a second of workloads, cellc against what else a user would pick, on the same weights:
PyTorch one at a time, padded, in buckets, packed, by hand; onnxruntime, OpenVINO, TensorFlow, DyNet
and torchfold where they are installed. All ways are checked for equal results, then timed in
alternated rounds; rounds in which others used the machine are dropped, and a table that has too few
quiet ones is not quoted.

Workloads: lstm-256, lstm-1024, gru-256, bilstm-tagger, seq2seq-256, seq2seq-1024,
seq2seq-attention, treelstm-256, treelstm-1024, sessions; what cellc itself costs: host, saturation,
workers, startup, weights, memory; where its time goes, and what no batching could save: floor; how
its peers are tuned: variants. Without a name, all of them. A TARGET, path/to/file.py:name, is a
model of yours with its example_inputs() (see cellc inspect --help), against PyTorch one request at
a time.

--online serves requests as they come, in place of many at once: p50, p90 and p99 of latency from
the arrival that was drawn, not from when the request was sent, at shares of the peak of the peer, a
dynamic batcher of padded batches; of lstm-256, lstm-1024, gru-256, seq2seq-256, seq2seq-1024 and
TARGETs. Without a name, lstm-256 and seq2seq-256. The peer's two best configurations (buckets of 10
or one queue, timeouts of 0 to 10 ms) are searched for at each load, and measured beside buckets of
10 with a timeout of 10 ms. Without --online a TARGET is measured both ways.

--device cuda measures the batched workloads on a GPU, and steps: cellc's kernels alone beside
cuDNN's and torch.compile's, with the share of the roofline, and what a launch costs the host."""
_BENCH_EPILOG = """\
examples:
  cellc bench lstm-256
  cellc bench lstm-256 sessions --rounds 9 --json figures.json
  cellc bench gru-256 --lengths lengths.txt --requests 1024
  cellc bench treelstm-256 --trees parses.txt
  cellc bench lstm-256 --online --loads 0.3,0.7,0.95 --plot latency.png
  cellc bench lstm-256 --online --trace trace.txt
  cellc bench examples/tagger.py:model
  cellc bench lstm-256 steps --device cuda
  cellc bench --targets                                what cellc is built to, held or not
  cellc bench gru-256 --from figures.json --json figures.json        one more workload
  cellc bench --from figures.json --targets --paper --markdown benchmarks.md"""


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="throughput against what else there is",
        description=_BENCH,
        epilog=_BENCH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("workload", nargs="*", metavar="WORKLOAD", help="see above, or a TARGET")
    bench.add_argument(
        "--requests", type=count, default=512, metavar="N", help="at once (default 512)"
    )
    bench.add_argument("--rounds", type=count, default=5, metavar="N", help="kept (default 5)")
    bench.add_argument(
        "--seconds",
        type=positive,
        default=1.0,
        metavar="S",
        help="of each way, or load, in a round (default 1)",
    )
    bench.add_argument(
        "--patience",
        type=positive,
        default=60.0,
        metavar="S",
        help="for rounds in place of disturbed ones, a table (default 60)",
    )
    bench.add_argument(
        "--units", type=count, metavar="N", help="hidden units, in place of a workload's own"
    )
    bench.add_argument("--lengths", type=Path, metavar="FILE", help="of requests, one a line")
    bench.add_argument(
        "--trees",
        type=Path,
        metavar="FILE",
        help="in brackets, as treebanks have them: (S (NP a)...)",
    )
    bench.add_argument("--backend", choices=BACKENDS, default="auto", help="cellc's (default auto)")
    bench.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="of models and requests: cpu, or a GPU, as torch names it (default cpu)",
    )
    bench.add_argument("--noisy", action="store_true", help="quote disturbed figures as well")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    bench.add_argument("--input", metavar="FILE:NAME", help="requests of a TARGET")
    _add_online(bench)
    _add_reports(bench)


def _add_online(bench: argparse.ArgumentParser) -> None:
    """Requests as they come."""
    bench.add_argument("--online", action="store_true", help="latency against load")
    bench.add_argument(
        "--loads",
        type=shares,
        metavar="X,Y",
        help="shares of the peer's peak (default 0.3,0.7,0.95)",
    )
    add_trace(bench, "--loads")


def _add_reports(bench: argparse.ArgumentParser) -> None:
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
    bench.add_argument("--peers", action="store_true", help="peers beside another machine's")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="write all tables as a page")
    bench.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw them (.png, .svg or .pdf); with --online, latencies only",
    )
