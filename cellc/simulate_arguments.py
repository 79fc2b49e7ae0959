"""Arguments of `cellc simulate`.

Duty: its parser, and what its help teaches. Read by `cellc.cli`; nothing is imported that takes
long.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from cellc.cli_values import add_trace

DEVICES = ("v100", "h100", "cpu")
APPLICATIONS = ("lstm", "seq2seq", "treelstm")
_ABOUT = """\
Run the scheduler itself on a virtual clock: requests come, it decides launches, and each launch
takes what a curve of its cell says. Compared with batches of whole requests, simulated alike, with
the same cells at the same costs: padded in the order of arrival, in buckets of about one length,
and merged into one graph that runs to its end (as Fold and DyNet do). `cellular`, `fifo` and
`deadline` are the policies of cellc.compile(options={"policy": ...}); --policy is one of your own.

Costs of v100 and h100 follow from their data sheets: bytes and arithmetic of each cell at a share
of the roofline, plus what it takes to start a kernel; the host's part is that of docs/gpu.md. Costs
of cpu are measured here first: curves as by cellc tune, and the host's part by serving requests.

Loads are shares of the peak of the best batching of whole requests, unless --rate gives requests a
second. The same seed gives the same figures, except for cpu, whose costs are measured anew.

--validate serves requests on this machine, simulates the same arrivals, prints both, and exits with
1 where throughput is off by more than 15%, or p90 by more than 25%; its loads are shares of what
the engine answers when more come than it can answer, and one that is too much."""
_EPILOG = """\
examples:
  cellc simulate lstm --device v100
  cellc simulate seq2seq --device h100 --loads 0.2,0.4,0.6,0.8,0.95 --plot seq2seq.png
  cellc simulate treelstm --device h100 --devices 4 --rate 40000
  cellc simulate lstm --device h100 --rate 15000 --requests 1000000 --cellular-only
  cellc simulate lstm --device v100 --host-turn-us 5 --host-request-us 5     a faster host
  cellc simulate lstm --device cpu --lengths lengths.txt --json
  cellc simulate lstm --device h100 --variation 3                            bursts
  cellc simulate lstm --device v100 --deadline-ms 12 --loads 0.9,1.2            who ends in time
  cellc simulate seq2seq --device v100 --policy examples/policy.py:Oldest
  cellc simulate lstm --device cpu --validate"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand."""
    simulate = commands.add_parser(
        "simulate",
        help="the scheduler on a virtual clock: capacity, latency, many devices",
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    simulate.add_argument("application", choices=APPLICATIONS)
    simulate.add_argument("--device", choices=DEVICES, default="cpu", help="(default cpu)")
    simulate.add_argument("--devices", type=_whole, default=1, metavar="D", help="(default 1)")
    simulate.add_argument(
        "--hidden", type=_whole, metavar="H", help="units (default 1024, cpu 256)"
    )
    _add_load(simulate)
    _add_policy(simulate)
    _add_costs(simulate)
    simulate.add_argument("--seed", type=_natural, default=0, metavar="S", help="(default 0)")
    simulate.add_argument("--json", action="store_true", help="one JSON object in place of a table")
    simulate.add_argument("--plot", type=Path, metavar="FILE", help="latency against load, drawn")
    simulate.add_argument(
        "--cellular-only", action="store_true", help="leave all other batching out; needs --rate"
    )
    simulate.add_argument("--validate", action="store_true", help="against a real run; see above")
    simulate.add_argument(
        "--rounds",
        type=_whole,
        metavar="N",
        help="of --validate (default: what a minute is enough for, 5 to 11)",
    )


def _add_load(simulate: argparse.ArgumentParser) -> None:
    simulate.add_argument("--requests", type=_whole, metavar="N", help="a load (default 100,000)")
    simulate.add_argument("--rate", type=_several, metavar="R,S", help="requests a second")
    simulate.add_argument(
        "--loads", type=_several, metavar="X,Y", help="shares, see above (default 0.3,0.7,0.95)"
    )
    simulate.add_argument(
        "--variation",
        type=_number,
        default=1.0,
        metavar="V",
        help="of gaps between requests: 0 is none, 1 Poisson (default), more is bursts",
    )
    simulate.add_argument("--lengths", type=Path, metavar="FILE", help="of requests, one a line")
    add_trace(simulate, "--rate or --loads")


def _add_policy(simulate: argparse.ArgumentParser) -> None:
    simulate.add_argument(
        "--deadline-ms",
        type=_positive,
        metavar="T",
        help="of each request: simulates the policy `deadline`, too, and prints who is in time",
    )
    simulate.add_argument(
        "--policy", metavar="FILE.py:NAME", help="a policy of your own, as options take it"
    )


def _add_costs(simulate: argparse.ArgumentParser) -> None:
    simulate.add_argument(
        "--max-batch", type=_whole, default=512, metavar="B", help="rows, requests (default 512)"
    )
    simulate.add_argument(
        "--timeout-ms",
        type=_number,
        default=0.0,
        metavar="T",
        help="that padded batches wait for more requests (default 0)",
    )
    simulate.add_argument(
        "--width", type=_whole, default=10, metavar="W", help="of buckets (default 10)"
    )
    simulate.add_argument(
        "--efficiency",
        type=_share,
        default=0.6,
        metavar="X",
        help="share of the roofline of v100 and h100 (default 0.6, as cellc reaches in f32)",
    )
    for name, what in (("turn", "launch"), ("request", "request")):
        simulate.add_argument(
            f"--host-{name}-us", type=_number, metavar="T", help=f"the host's part of a {what}"
        )


def _checked(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value


def _number(text: str) -> float:
    return _checked(text, lambda x: x >= 0, "a number of at least 0")


def _positive(text: str) -> float:
    return _checked(text, lambda x: x > 0, "a number above 0")


def _share(text: str) -> float:
    return _checked(text, lambda x: 0 < x <= 1, "a number above 0 and up to 1")


def _several(text: str) -> tuple[float, ...]:
    what = "a number above 0, or some of them as 0.3,0.7"
    return tuple(_checked(part, lambda x: x > 0, what) for part in text.split(","))


def _whole(text: str) -> int:
    return int(_checked(text, lambda x: x >= 1 and x == int(x), "a whole number of at least 1"))


def _natural(text: str) -> int:
    return int(_checked(text, lambda x: x >= 0 and x == int(x), "a whole number of at least 0"))
