"""What is simulated: the three applications of BatchMaker, as cellc compiles them.

Duty: make a model, and of a pool of requests the plans, by the compiler itself. Comes in: a name,
lengths; goes out: an `Application`, whose plans go to `cellc.simulation.servers`, and whose model
and requests can be run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellc.bench.recurrent import LastState
from cellc.bench.recurrent import make_requests as vectors
from cellc.bench.tree_data import draw_tree
from cellc.bench.tree_models import ArrayTreeLSTM, TreeLSTM, as_arrays
from cellc.cells import Cell
from cellc.compiled import Compiled
from cellc.entry import compile
from cellc.plan import CELL, CHAIN, EDGES, MISSING, NUM_SUCCESSORS, SUCCESSOR, Plan
from cellc.request import as_call
from cellc.simulation.clock import I64
from cellc.trees import Tree

VOCABULARY = 10_000  # words that Seq2Seq may say
RATIO = 0.25  # sigma of the log-normal ratio of target to source lengths, whose median is 1


@dataclass(frozen=True)
class Application:
    """`plans`, `lengths` (of what is read: steps or leaves) and `requests`: of the pool, in order.
    `padded`: requests can run as one padded batch.
    """

    title: str
    model: Callable[..., Any]
    requests: Sequence[Any]
    cells: Sequence[Cell]
    priority: dict[int, int]
    plans: Sequence[Plan]
    lengths: I64
    padded: bool

    @property
    def num_calls(self) -> I64:
        """Of each request of the pool."""
        return np.array([plan.num_calls for plan in self.plans])


class Seq2Seq(nn.Module):
    """An LSTM reads `tokens`, another says as many words as `target` has, greedily."""

    def __init__(self, hidden: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.encoder, self.decoder = nn.LSTMCell(hidden, hidden), nn.LSTMCell(hidden, hidden)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        h = c = torch.zeros(self.hidden)
        for token in tokens:
            h, c = self.encoder(self.embedding(token), (h, c))
        token, said = torch.tensor(0), []
        for _ in target:
            h, c = self.decoder(self.embedding(token), (h, c))
            token = self.head(h).argmax(-1)
            said.append(token)
        return torch.stack(said)


def make(name: str, lengths: Sequence[int], hidden: int, seed: int = 0) -> Application:
    """One of APPLICATIONS, with a pool of one request a length."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return APPLICATIONS[name](lengths, hidden, seed)


def _lstm(lengths: Sequence[int], hidden: int, seed: int) -> Application:
    model = LastState("lstm", hidden, tokens=False)
    requests = vectors(sorted(set(lengths)), hidden, tokens=False, seed=seed)
    compiled, plans = _compiled(model, requests)
    where = {len(x): i for i, x in enumerate(requests)}
    pool = [where[n] for n in lengths]
    title = f"LSTM, {hidden} units, vectors in"
    return _application(title, compiled, model, [requests[i] for i in pool],
                        [plans[i] for i in pool], lengths)  # fmt: skip


def _seq2seq(lengths: Sequence[int], hidden: int, seed: int) -> Application:
    model = Seq2Seq(hidden)
    ratios = np.random.default_rng(seed).lognormal(0.0, RATIO, len(lengths))
    targets = np.clip(np.round(lengths * ratios), 1, max(lengths)).astype(int).tolist()
    sizes = list(zip(lengths, targets, strict=True))
    compiled, (traced,) = _compiled(model, [_sentence(3, 2)])
    plans = {size: two_chains(traced, *size) for size in set(sizes)}
    title = f"Seq2Seq, {hidden} units, {VOCABULARY:,} words"
    return _application(title, compiled, model, [_sentence(*size) for size in sizes],
                        [plans[size] for size in sizes], lengths)  # fmt: skip


def _treelstm(lengths: Sequence[int], hidden: int, seed: int) -> Application:
    model = ArrayTreeLSTM(TreeLSTM(hidden))
    draw, requests = random.Random(seed), []
    for leaves in lengths:
        children, tokens = as_arrays(draw_tree(draw, leaves))
        requests.append((Tree(children), torch.tensor(tokens)))
    compiled, plans = _compiled(model, requests)
    title = f"TreeLSTM, {hidden} units, binary"
    return _application(title, compiled, model, requests, plans, lengths, padded=False)


APPLICATIONS: dict[str, Callable[[Sequence[int], int, int], Application]] = {
    "lstm": _lstm,
    "seq2seq": _seq2seq,
    "treelstm": _treelstm,
}


def _compiled(model: nn.Module, requests: Sequence[Any]) -> tuple[Compiled, list[Plan]]:
    """A compiled model, which nothing is run on, and the plans of requests."""
    model.eval().requires_grad_(False)
    compiled = compile(model, backend="eager")
    tickets = compiled._tickets([as_call(r) for r in requests])
    for ticket in tickets:
        if ticket.error is not None:
            raise ticket.error
    return compiled, [ticket.entry.plan for ticket in tickets]


def _application(
    title: str,
    compiled: Compiled,
    model: nn.Module,
    requests: Sequence[Any],
    plans: Sequence[Plan],
    lengths: Sequence[int],
    *,
    padded: bool = True,
) -> Application:
    compiler = compiled._compiler
    cells = [compiler.by_number[k] for k in range(len(compiler.by_number))]
    bare = {id(plan): without_slots(plan) for plan in plans}
    kept = [bare[id(plan)] for plan in plans]
    priority = dict(compiler.priority)
    for plan in plans:
        for cell, depth in zip(plan.cells, plan.priority, strict=True):
            priority[cell] = max(priority.get(cell, 0), depth)
    return Application(title, model, requests, cells, priority, kept, np.array(lengths), padded)


def without_slots(plan: Plan) -> Plan:
    """For launches that no kernel runs: a plan is its calls, and who waits for whom."""
    nothing = np.zeros(0, np.int32)
    return replace(plan, records=nothing, record_base=nothing)


def two_chains(traced: Plan, first: int, second: int) -> Plan:
    """The plan of a chain of `first` calls, whose end a chain of `second` calls reads, without
    slots: its columns are those of a traced one of (3, 2), since families hold one varying size.
    """
    calls = np.zeros((first + second, traced.calls.shape[1]), np.int32)
    reader, said = np.arange(first), np.arange(second)
    calls[:first, CELL], calls[first:, CELL] = traced.calls[0, CELL], traced.calls[3, CELL]
    calls[:first, CHAIN], calls[first:, CHAIN] = first - reader, second - said
    for column in (MISSING, EDGES):
        calls[1:first, column], calls[first + 1 :, column] = traced.calls[[1, 4], column]
    calls[first, [MISSING, EDGES]] = traced.calls[3, [MISSING, EDGES]]
    told = traced.calls[2, NUM_SUCCESSORS]
    calls[first - 1, NUM_SUCCESSORS] = told
    calls[first:, SUCCESSOR] = told
    assert traced.successors.tolist() == [3] * told
    successors = np.full(told, first, np.int32)
    priority = {c: p for c, p in zip(traced.cells, traced.priority, strict=True)}
    depths = {traced.calls[0, CELL]: first - 1, traced.calls[3, CELL]: first + second - 1}
    return without_slots(
        replace(
            traced,
            calls=calls,
            successors=successors,
            priority=tuple(depths.get(c, priority[c]) for c in traced.cells),
        )
    )


def _sentence(source: int, target: int) -> tuple[Tensor, Tensor]:
    return torch.arange(source) % VOCABULARY, torch.zeros(target, dtype=torch.int64)
