"""What is served online: a model, its requests, and how a user of PyTorch runs many of them.

Duty: each `Workload` is a description that goes to another process and makes the same model, with
the same weights, and the same requests there. Used by `online` here and by `peer_process` there.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import GeneratorType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cellc import target
from cellc.bench.batch_server import Policy
from cellc.bench.decode import VOCABULARY as WORDS
from cellc.bench.decode import Translator
from cellc.bench.recurrent import Kind, LastState, Torch, make_requests
from cellc.request import as_call

TIMEOUTS_MS = (0.0, 1.0, 2.0, 5.0, 10.0)
BATCHED = (*(Policy(ms) for ms in TIMEOUTS_MS), Policy(0.0, width=None))
ALONE = (Policy(max_batch=1, width=None),)
STATED = Policy(10.0)  # is shown beside the best


@dataclass(frozen=True)
class Made:
    """`run_batch` gives the results of many requests, in order, padded to the longest."""

    model: Callable[..., Any]
    requests: Sequence[Any]
    run_batch: Callable[[Sequence[Any]], Sequence[Any]]
    length: Callable[[Any], int] | None = len

    def alone(self, request: Any) -> Any:
        args, kwargs = as_call(request)
        result = self.model(*args, **kwargs)
        return list(result) if isinstance(result, GeneratorType) else result


class Workload(Protocol):
    """Can be pickled. The best of `policies` are searched for; loads are shares of the peak of
    those that do not wait. `always`: shown in any case. `case`: among those of its name.
    """

    @property
    def case(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def peer(self) -> str: ...

    @property
    def policies(self) -> Sequence[Policy]: ...

    @property
    def always(self) -> Sequence[Policy]: ...

    def make(self) -> Made: ...

    def as_made(self, made: Made) -> Workload:
        """The description that makes the same as `made` in another process."""
        ...


@dataclass(frozen=True)
class _Batched:
    """Batches of one length, padded."""

    lengths: Sequence[int]

    case = ""
    peer = "PyTorch, padded"
    policies = BATCHED
    always = (STATED,)


@dataclass(frozen=True)
class RecurrentWorkload(_Batched):
    """The last state of an LSTM or GRU, of tokens [T] or of vectors [T, H]."""

    kind: Kind
    hidden: int
    tokens: bool

    @property
    def case(self) -> str:  # type: ignore[override]
        return "tokens" if self.tokens else "vectors"

    @property
    def title(self) -> str:
        return f"{self.kind.upper()}, {self.hidden} units, {self.case} in, requests as they come"

    def make(self) -> Made:
        torch.manual_seed(0)
        model = LastState(self.kind, self.hidden, self.tokens).eval().requires_grad_(False)
        ways = Torch(model)

        def run_batch(requests: Sequence[Tensor]) -> list[Tensor]:
            return ways.padded(requests, [range(len(requests))])

        return Made(model, make_requests(self.lengths, self.hidden, self.tokens), run_batch)

    def as_made(self, made: Made) -> RecurrentWorkload:
        return self


@dataclass(frozen=True)
class DecodeWorkload(_Batched):
    """Greedy decoding until the end token, by length of what is read."""

    hidden: int

    @property
    def title(self) -> str:
        return f"LSTM to LSTM, greedy, {self.hidden} units, requests as they come, paths seen"

    def make(self) -> Made:
        torch.manual_seed(0)
        model = Translator(self.hidden, bias=1.6).eval().requires_grad_(False)
        g = torch.Generator().manual_seed(0)
        requests = [torch.randint(WORDS, (n,), generator=g) for n in self.lengths]
        return Made(model, requests, model.padded)

    def as_made(self, made: Made) -> DecodeWorkload:
        return self


@dataclass(frozen=True)
class TargetWorkload:
    """A user's model with its example requests, of which nothing is known: PyTorch runs them one
    at a time, in the order of arrival.
    """

    text: str
    inputs: str | None = None
    state: bytes = b""  # of weights

    case = ""
    peer = "PyTorch"
    policies = ALONE
    always = ()

    @property
    def title(self) -> str:
        return f"{self.name}, requests as they come"

    @property
    def name(self) -> str:
        """The text without folders."""
        return self.text.rpartition(os.sep)[2]

    def make(self) -> Made:
        for _ in range(2):  # what it draws when it is imported must not shift what it draws later
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            loaded = target.load(self.text, self.inputs)
        model = loaded.model
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False)
            if self.state:
                model.load_state_dict(torch.load(io.BytesIO(self.state)))

        def run_batch(requests: Sequence[Any]) -> list[Any]:
            return [made.alone(request) for request in requests]

        made = Made(model, loaded.requests, run_batch, None)
        return made

    def as_made(self, made: Made) -> TargetWorkload:
        if not isinstance(made.model, nn.Module):
            return self
        file = io.BytesIO()
        torch.save(made.model.state_dict(), file)
        return replace(self, state=file.getvalue())
