"""Values of the command line.

Duty: text to numbers, with argparse's errors, and arguments that several commands have. Used by
`cellc.cli`, `cellc.cli_bench` and `cellc.simulate_arguments`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

BACKENDS = ("auto", "triton", "cpp", "eager")
WEIGHTS = ("bf16", "int8")


def shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} is not as 0.3,0.7: shares above 0") from None


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="weights that products read, in place of f32, as options={'weights': ..}",
    )


def add_trace(command: argparse.ArgumentParser, rates: str) -> None:
    """`--trace`; `rates` are the arguments that say how fast requests come."""
    command.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help='arrivals, one a line: "seconds length", or JSON with these names; at its own rate, '
        f"or stretched to give {rates}",
    )
