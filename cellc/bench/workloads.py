"""Workloads by name: what `cellc bench` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cellc.bench.attention import attention_case
from cellc.bench.case import Case
from cellc.bench.decode import decode_case
from cellc.bench.floor import floor_case
from cellc.bench.host import host_case, saturation_case
from cellc.bench.others import sessions_case, tagger_case
from cellc.bench.place import HERE, Place
from cellc.bench.recurrent import alone_case, recurrent_case
from cellc.bench.startup import startup_case
from cellc.bench.trees import tree_case
from cellc.bench.variants import variants_case
from cellc.bench.weights import weights_case
from cellc.bench.workers import LONG, workers_case

ALONE = 24  # steps of a request alone


@dataclass(frozen=True)
class Settings:
    """What all workloads share. `units` stands in place of the number in a workload's name;
    `inputs` says where the requests of a user's model are.
    """

    lengths: Sequence[int]
    place: Place = HERE
    units: int | None = None
    trees: Path | None = None
    inputs: str | None = None

    @property
    def count(self) -> int:
        return len(self.lengths)


Make = Callable[[], Case]


def _recurrent(kind: Any, hidden: int, s: Settings) -> Iterator[Make]:
    yield partial(recurrent_case, kind, hidden, True, s.lengths, s.place)
    yield partial(recurrent_case, kind, hidden, False, s.lengths, s.place)
    yield partial(alone_case, kind, hidden, ALONE, s.place)


def _workers(hidden: int, s: Settings) -> Iterator[Make]:
    for name, units, times in (
        ("tokens", hidden, 1),
        ("long", hidden, LONG),
        ("half", hidden // 2, 1),
        ("half-long", hidden // 2, LONG),
    ):
        yield partial(workers_case, units, s.lengths, name, times, s.place.backend)


def _floor(hidden: int, s: Settings) -> Iterator[Make]:
    for tokens in (True, False):
        yield partial(floor_case, hidden, s.lengths, tokens, s.place.backend)


def _one(case: Callable[..., Case]) -> Callable[[int, Settings], Iterator[Make]]:
    def makes(hidden: int, s: Settings) -> Iterator[Make]:
        yield partial(case, hidden, s)

    return makes


_seq2seq = _one(lambda hidden, s: decode_case(hidden, s.count, s.place))
_trees = _one(lambda hidden, s: tree_case(hidden, s.count, s.trees, s.place))

_WORKLOADS: dict[str, tuple[int, Callable[[int, Settings], Iterator[Make]]]] = {
    "lstm-256": (256, partial(_recurrent, "lstm")),
    "lstm-1024": (1024, partial(_recurrent, "lstm")),
    "gru-256": (256, partial(_recurrent, "gru")),
    "bilstm-tagger": (256, _one(lambda hidden, s: tagger_case(hidden, s.lengths, s.place))),
    "seq2seq-256": (256, _seq2seq),
    "seq2seq-1024": (1024, _seq2seq),
    "seq2seq-attention": (
        256,
        _one(lambda hidden, s: attention_case(hidden, s.count, s.place)),
    ),
    "treelstm-256": (256, _trees),
    "treelstm-1024": (1024, _trees),
    "sessions": (256, _one(lambda hidden, s: sessions_case(hidden, s.count, s.place))),
    "host": (256, _one(lambda hidden, s: host_case(hidden, s.place))),
    "saturation": (
        1024,
        _one(lambda hidden, s: saturation_case(hidden, s.lengths, s.place)),
    ),
    "floor": (256, _floor),
    "variants": (256, _one(lambda hidden, s: variants_case(hidden, s.lengths))),
    "workers": (128, _workers),
    "startup": (256, _one(lambda hidden, s: startup_case(hidden, s.place.backend))),
    "weights": (1024, _one(lambda hidden, s: weights_case(hidden, ALONE, s.place.backend))),
}
MEMORY = "memory"  # of all that batch requests: `cellc.bench.memory`
NAMES = (*_WORKLOADS, MEMORY)
STEPS = "steps"  # of kernels alone, on a GPU: `cellc.bench.gpu`
BATCHED = tuple(
    name
    for name in _WORKLOADS
    if name not in ("host", "saturation", "floor", "variants", "workers", "startup", "weights")
)
ON_DEVICES = (*BATCHED, STEPS)


def cases_of(name: str, settings: Settings) -> list[Make]:
    """The cases of a workload, each made when it is called."""
    hidden, makes = _WORKLOADS[name]
    return list(makes(settings.units or hidden, settings))
