"""Peers, beside what they were found to do on another machine.

Duty: state the rates that others measured of the same peers, by programs of their own, and say how
far ours are from them: a peer that is tuned badly here would flatter cellc. A processor of another
speed gives other rates, so theirs are scaled by what a matrix product reaches here and there.

Theirs: two virtual cores of a Xeon (Emerald Rapids, AVX-512), 2026-11-24, f32, two threads, PyTorch
2.13.0, onnxruntime 1.31.0, OpenVINO 2026.4.1, TensorFlow 2.21.0, dynet38 2.2, torchfold 0.1.0; 512
requests of vectors of the lengths drawn here, and 512 random binary trees of 18.7 leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cellc.bench import host, trees
from cellc.bench.found import REQUESTS, Found, Lacking
from cellc.bench.recurrent import (
    ALONE,
    BUCKETS,
    DYNET,
    ONNX_ALONE,
    ONNX_BUCKETS,
    OPENVINO,
    PACKED,
    PADDED,
    STEPS,
    TENSORFLOW,
)
from cellc.bench.sheets import Sheet

THEIR_PRODUCT = 291.0  # GFLOP/s of a 2048^3 product there, a median
LEAST = 0.9  # of theirs, scaled
_LSTM = (
    ALONE,
    BUCKETS,
    PADDED,
    PACKED,
    STEPS,
    ONNX_BUCKETS,
    ONNX_ALONE,
    OPENVINO,
    TENSORFLOW,
    DYNET,
)
_TREES = (trees.LEVELS_PACKED, trees.TORCHFOLD, trees.DYNET)
THEIRS: Mapping[str, Mapping[str, float]] = {
    "lstm-256 vectors": dict(
        zip(_LSTM, (1758, 7300, 2629, 3629, 6347, 8495, 3608, 7262, 2349, 1813), strict=True)
    ),
    "lstm-1024 vectors": dict(
        zip(_LSTM, (100, 470, 180, 458, 582, 545, 142, 497, 271, 130), strict=True)
    ),
    "treelstm-256": dict(zip((trees.EAGER, *_TREES), (557, 3706, 1721, 1178), strict=True)),
    "treelstm-1024": dict(zip((trees.EAGER_PACKED, *_TREES), (46, 389, 319, 122), strict=True)),
}
WORKLOADS = ("saturation", *dict.fromkeys(key.split()[0] for key in THEIRS))


@dataclass(frozen=True)
class Peer:
    """Requests a second: `theirs` there, `here`; `share`: of theirs at this machine's speed, None
    where `why` says why not.
    """

    workload: str
    way: str
    theirs: float
    here: float | None = None
    share: float | None = None
    why: str = ""

    @property
    def holds(self) -> bool | None:
        return None if self.share is None else self.share >= LEAST


def compare(found: Found) -> list[Peer]:
    """Every peer."""
    peers = []
    for key, rates in THEIRS.items():
        for way, theirs in rates.items():
            here = None
            try:
                here = _rate(found, key, way)
                scale = found.fact("saturation", host.PEAK) / THEIR_PRODUCT
            except Lacking as why:
                peers.append(Peer(key, way, theirs, here, why=str(why)))
            else:
                peers.append(Peer(key, way, theirs, here, here / (theirs * scale)))
    return peers


def _rate(found: Found, key: str, way: str) -> float:
    outcome = found.outcome(key)
    rate = outcome.rate(way)
    if rate is None:
        raise Lacking(outcome.missing.get(way, "was not measured"))
    return rate


def sheet(found: Found) -> Sheet:
    """One row a peer."""
    rows: list[Sequence[str]] = []
    for peer in compare(found):
        there = f"{peer.theirs:,.0f}"
        if peer.here is None or peer.share is None:
            rate = "" if peer.here is None else f"{peer.here:,.0f}"
            rows.append([peer.workload, peer.way, peer.why, there, rate, ""])
        else:
            holds = "" if peer.holds else f"below {LEAST:g}"
            rows.append(
                [peer.workload, peer.way, holds, there, f"{peer.here:,.0f}", f"{peer.share:.2f}"]
            )
    try:
        product = found.fact("saturation", host.PEAK)
    except Lacking as why:
        notes = f"speed of this machine: {why}"
    else:
        notes = (
            f"a {host.SIZE}^3 product: {product:.0f} GFLOP/s here, {THEIR_PRODUCT:.0f} there; at "
            f"least {LEAST:g} of theirs is meant"
        )
    if unlike := found.unlike(WORKLOADS):
        notes += f"; theirs are of {REQUESTS} requests, but {unlike}"
    columns = ("workload", "peer", "", "there, requests/s", "here", "of theirs at this speed")
    return Sheet("Peers, beside another machine's", columns, rows, notes, left=3)
