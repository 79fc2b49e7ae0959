"""What BatchMaker's paper claims, beside what cellc measures.

Gao, Yu, Wu, Li: Low Latency RNN Inference with Cellular Batching, EuroSys 2018, doi
10.1145/3190508.3190541. Its claims, in its abstract: lower latency and higher throughput than
existing systems, on three applications. It ran on GPUs; here both sides run on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cellc.bench import decode, trees
from cellc.bench.found import SHARE, Found, Lacking
from cellc.bench.recurrent import BUCKETS, CELLC, TENSORFLOW
from cellc.bench.sheets import Sheet

WORKLOADS = ("lstm-1024", "seq2seq-1024", "treelstm-1024")
ONLINE = ("lstm-1024", "seq2seq-1024")


@dataclass(frozen=True)
class Claim:
    """More requests a second than `other`, by a way of cellc; or lower latency, as many times."""

    claim: str
    measured_as: str
    measured: Callable[[Found], float]


def _ratio(key: str, way: str, other: str) -> Callable[[Found], float]:
    return lambda found: found.ratio(key, way, other)


def _latency(key: str) -> Callable[[Found], float]:
    return lambda found: 1 / found.latency(key)


def _no_trees(found: Found) -> float:
    raise Lacking("trees are not served by cellc bench --online")


_LOAD = f"Poisson, {SHARE:.0%} of the padded server's peak"
_PADDED = "higher throughput than padding with bucketing"
CLAIMS: Sequence[Claim] = [
    Claim(
        f"LSTM: {_PADDED}",
        "cellc to PyTorch in buckets, tokens in",
        _ratio("lstm-1024 tokens", CELLC, BUCKETS),
    ),
    Claim(
        f"LSTM: {_PADDED}",
        "the same, vectors in, of which nothing can be folded",
        _ratio("lstm-1024 vectors", CELLC, BUCKETS),
    ),
    Claim(
        f"LSTM: {_PADDED}",
        "cellc to TensorFlow, vectors in",
        _ratio("lstm-1024 vectors", CELLC, TENSORFLOW),
    ),
    Claim(
        f"Seq2Seq: {_PADDED}",
        "cellc to PyTorch's padded batches, greedy, end token",
        _ratio("seq2seq-1024", decode.CELLC, decode.PADDED),
    ),
    Claim(
        "TreeLSTM: higher throughput than DyNet",
        "cellc on plain recursion, every tree new, to dynet38",
        _ratio("treelstm-1024", trees.NEW, trees.DYNET),
    ),
    Claim(
        "TreeLSTM: higher throughput than TensorFlow Fold",
        "the same to torchfold (Fold itself needs TensorFlow 1.0)",
        _ratio("treelstm-1024", trees.NEW, trees.TORCHFOLD),
    ),
    Claim(
        "LSTM: lower latency than padding with bucketing",
        f"p90 of padded PyTorch at its best to cellc's, {_LOAD}, tokens in",
        _latency("lstm-1024 tokens"),
    ),
    Claim(
        "LSTM: lower latency than padding with bucketing",
        "the same, vectors in",
        _latency("lstm-1024 vectors"),
    ),
    Claim(
        "Seq2Seq: lower latency than padding with bucketing",
        "the same, greedy, end token",
        _latency("seq2seq-1024"),
    ),
    Claim("TreeLSTM: lower latency than DyNet and Fold", f"p90, {_LOAD}", _no_trees),
]


def sheet(found: Found) -> Sheet:
    """One row a claim."""
    rows = []
    for claim in CLAIMS:
        try:
            ratio = claim.measured(found)
        except Lacking as why:
            rows.append([claim.claim, claim.measured_as, str(why), ""])
        else:
            held = "holds" if ratio > 1 else "does not hold"
            rows.append([claim.claim, claim.measured_as, f"{ratio:.2f}x", held])
    title = "BatchMaker's claims (EuroSys 2018), 1024 units, on this machine"
    return Sheet(title, ("claim", "measured as", "measured", "here"), rows, left=4)
