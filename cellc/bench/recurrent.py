"""LSTM and GRU over sequences: the ways that PyTorch and other libraries batch them, and cellc.

Every way computes the last state of each sequence from the same weights. Requests are vectors
[T, H], of which nothing can be folded, or tokens [T] behind an embedding, of which cellc folds the
embedding and the input product into one table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence

from cellc.bench.batch_server import MAX_BATCH as BATCH
from cellc.bench.batch_server import WIDTH, make_buckets
from cellc.bench.case import Case, Way
from cellc.bench.dynet_peer import DynetLSTM
from cellc.bench.onnx_peer import RecurrentSession
from cellc.bench.openvino_peer import OpenvinoLSTM
from cellc.bench.peers import Array, by_length, in_batches, why_not
from cellc.bench.place import HERE, PROCESSORS_ONLY, Place
from cellc.bench.shrinking import BATCH as SHRINKING
from cellc.bench.shrinking import Shrinking, linear, packed
from cellc.bench.tensorflow_peer import TensorflowLSTM

Kind = Literal["lstm", "gru"]
VOCABULARY, SAMPLE = 1000, 64
BUCKETS = f"PyTorch, buckets of {WIDTH}"
ALONE = "PyTorch, one at a time"
ONNX, ONNX_ALONE = "onnxruntime", "onnxruntime, one at a time"
ONNX_BUCKETS = f"onnxruntime, buckets of {WIDTH}"
PACKING = 256  # sequences at once: more do not fit into the cache
PADDED, PACKED = (
    f"PyTorch, padded {BATCH} in arrival order",
    f"PyTorch, packed, {PACKING} of like lengths",
)
STEPS = f"PyTorch, steps by hand, {SHRINKING} that shrink"
OPENVINO = f"OpenVINO, buckets of {WIDTH}"
TENSORFLOW = f"TensorFlow, Keras masked, {BATCH} of like lengths"
DYNET = "DyNet autobatching, all at once"
CELLC = "cellc"


class LastState(nn.Module):
    """[T, H] or [T] to [H]: the state after the last step."""

    def __init__(self, kind: Kind, hidden: int, tokens: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden) if tokens else nn.Identity()
        self.rnn: nn.RNNBase = nn.LSTM(hidden, hidden) if kind == "lstm" else nn.GRU(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(self.embedding(x))
        last: Tensor = states[-1]
        return last


def make_requests(lengths: Sequence[int], hidden: int, tokens: bool, seed: int = 0) -> list[Tensor]:
    """One request a length."""
    g = torch.Generator().manual_seed(seed)
    if tokens:
        return [torch.randint(VOCABULARY, (n,), generator=g) for n in lengths]
    return [torch.randn(n, hidden, generator=g) for n in lengths]


def buckets_of(requests: Sequence[Tensor]) -> list[list[int]]:
    """Positions by length, in buckets of WIDTH."""
    return make_buckets([len(x) for x in requests])


def portions(count: int, size: int = BATCH) -> list[list[int]]:
    """In the order of arrival."""
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


class Torch:
    """The ways of PyTorch."""

    def __init__(self, model: LastState) -> None:
        self.model = model

    def padded(self, requests: Sequence[Tensor], batches: Sequence[Sequence[int]]) -> list[Tensor]:
        """Batch by batch, padded to its longest."""
        results: list[Any] = [None] * len(requests)
        for batch in batches:
            chosen = [requests[i] for i in batch]
            states, _ = self.model.rnn(self.model.embedding(pad_sequence(chosen)))
            last, each = torch.tensor([[len(x) - 1 for x in chosen], [*range(len(chosen))]])
            rows = states[last.to(states.device), each.to(states.device)]
            for i, row in zip(batch, rows.unbind(), strict=True):
                results[i] = row
        return results

    def packed(self, requests: Sequence[Tensor], size: int) -> list[Tensor]:
        """Packed, so many of like lengths at once."""
        results: list[Any] = [None] * len(requests)
        for batch in by_length(requests, size):
            longest_first = batch[::-1]
            packed = pack_sequence([requests[i] for i in longest_first])
            _, state = self.model.rnn(packed._replace(data=self.model.embedding(packed.data)))
            last: Tensor = state[0] if isinstance(state, tuple) else state
            for i, row in zip(longest_first, last[0].unbind(), strict=True):
                results[i] = row
        return results


class Others:
    """The ways of other libraries on one module, each built when it first runs; and what lacks."""

    def __init__(
        self, rnn: nn.RNNBase, rows: Callable[[], Sequence[Array]], on_cpu: bool = True
    ) -> None:
        self._rnn, self._rows, self._on_cpu = rnn, cache(rows), on_cpu
        self.ways: list[Way] = []
        self.missing: dict[str, str] = {}

    def add(
        self,
        name: str,
        modules: Sequence[str],
        peer: Callable[[], Callable[[Sequence[Array]], Array]],
        batches: Callable[[Sequence[Array]], list[list[int]]],
        sample: int = 0,
    ) -> None:
        if why := why_not(*modules) if self._on_cpu else PROCESSORS_ONLY:
            self.missing[name] = why
            return

        def run() -> list[Tensor]:
            return in_batches(peer(), self._rows(), batches(self._rows()))

        self.ways.append(Way(name, run, sample))

    def add_onnx(self, bucketed: str, alone: str, sample: int) -> None:
        session = cache(lambda: RecurrentSession(self._rnn))
        modules = ("onnx", "onnxruntime")
        if bucketed:
            self.add(bucketed, modules, session, small_buckets)
        self.add(alone, modules, session, lambda rows: [[i] for i in range(sample)], sample)

    def add_lstms(self) -> None:
        rnn = self._rnn
        if not isinstance(rnn, nn.LSTM):
            return
        self.add(OPENVINO, ["openvino"], cache(lambda: OpenvinoLSTM(rnn)), small_buckets)
        tensorflow, dynet = cache(lambda: TensorflowLSTM(rnn)), cache(lambda: DynetLSTM(rnn))
        self.add(TENSORFLOW, ["tensorflow"], tensorflow, lambda rows: by_length(rows, BATCH))
        self.add(DYNET, ["dynet"], dynet, lambda rows: by_length(rows, len(rows)))


def small_buckets(rows: Sequence[Sized]) -> list[list[int]]:
    """Buckets of WIDTH, in batches of at most BATCH: the states of larger ones leave the cache."""
    buckets = make_buckets([len(r) for r in rows])
    return [b[at : at + BATCH] for b in buckets for at in range(0, len(b), BATCH)]


def recurrent_case(
    kind: Kind, hidden: int, tokens: bool, lengths: Sequence[int], place: Place = HERE
) -> Case:
    """Every way that runs here."""
    torch.manual_seed(0)
    model = place.ready(LastState(kind, hidden, tokens))
    requests = place.moved(make_requests(lengths, hidden, tokens))
    count, sample = len(requests), min(SAMPLE, len(requests))
    torch_ways, compiled = Torch(model), place.compiled(model)
    product = packed if place.on_cpu else linear
    by_hand = cache(lambda: Shrinking(model.rnn, model.embedding, product=product))
    others = Others(
        model.rnn,
        lambda: [np.ascontiguousarray(model.embedding(x).numpy()) for x in requests],
        place.on_cpu,
    )
    others.add_onnx(ONNX_BUCKETS, ONNX_ALONE, sample)
    others.add_lstms()
    ways = [
        Way(ALONE, lambda: [model(x) for x in requests[:sample]], sample),
        Way(BUCKETS, lambda: torch_ways.padded(requests, buckets_of(requests))),
        Way(PADDED, lambda: torch_ways.padded(requests, portions(count))),
        Way(PACKED, lambda: torch_ways.packed(requests, PACKING)),
        Way(STEPS, lambda: by_hand()(requests)),
        *others.ways,
        Way(CELLC, lambda: compiled.map(requests)),
    ]
    name = "tokens" if tokens else "vectors"
    return Case(
        f"{kind.upper()}, {hidden} units, {count} requests at once, {name} in",
        count,
        ways,
        BUCKETS,
        missing=others.missing,
        compiled=[compiled],
        name=name,
        against=[way.name for way in others.ways if way.name == ONNX_BUCKETS],
    )


def alone_case(kind: Kind, hidden: int, length: int, place: Place = HERE) -> Case:
    """One request of `length` steps, and nothing else."""
    torch.manual_seed(0)
    model = place.ready(LastState(kind, hidden, False))
    (x,) = place.moved(make_requests([length], hidden, False))
    compiled = place.compiled(model)
    others = Others(model.rnn, lambda: [np.ascontiguousarray(x.numpy())], place.on_cpu)
    others.add_onnx("", ONNX, 1)
    ways = [
        Way("PyTorch", lambda: [model(x)]),
        *others.ways,
        Way(CELLC, lambda: [compiled(x)]),
    ]
    return Case(
        f"{kind.upper()}, {hidden} units, one request of {length} vectors alone",
        1,
        ways,
        ways[-2].name,
        missing=others.missing,
        compiled=[compiled],
        name="alone",
    )
