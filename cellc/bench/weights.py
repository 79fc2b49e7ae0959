"""What weights in fewer bits bring to a request alone, and to many: milliseconds, megabytes of the
kernels' copy of the weights, and how far results are from those with the model's own.
"""

from __future__ import annotations

import time

import torch

from cellc.bench.case import Case
from cellc.bench.recurrent import LastState, make_requests
from cellc.compiled import Compiled
from cellc.entry import compile
from cellc.kernels.narrow import WEIGHTS

OWN = "f32"
MANY = 64
TIMED = "ms of {}, {} weights"
COPY = "MB of packed weights, {} weights"
OFF = "difference from f32 to its norm, {} weights"
_TIMES = 5  # of which the best counts


def weights_case(hidden: int, length: int, backend: str = "auto") -> Case:
    """Facts of an LSTM on vectors: one request of `length` steps, and 64 at once."""
    torch.manual_seed(0)
    model = LastState("lstm", hidden, False).eval().requires_grad_(False)
    work = {
        f"one request of {length} vectors": make_requests([length], hidden, False),
        f"{MANY} such requests at once": make_requests([length] * MANY, hidden, False),
    }
    made: dict[str, Compiled] = {
        kind: compile(
            model,
            backend=backend,  # type: ignore[arg-type]
            options={"weights": None if kind == OWN else kind},
        )
        for kind in (OWN, *WEIGHTS)
    }

    def facts() -> dict[str, float]:
        found: dict[str, float] = {}
        for what, requests in work.items():
            for _ in range(_TIMES):
                for kind, compiled in made.items():
                    name, taken = TIMED.format(what, kind), _milliseconds(compiled, requests)
                    found[name] = min(found.get(name, taken), taken)
        wanted = torch.stack(made[OWN].map(next(iter(work.values()))))
        for kind, compiled in made.items():
            found[COPY.format(kind)] = _packed_bytes(compiled) / 2**20
            if kind != OWN:
                got = torch.stack(compiled.map(next(iter(work.values()))))
                found[OFF.format(kind)] = float((got - wanted).norm() / wanted.norm())
        return found

    return Case(
        f"LSTM, {hidden} units, vectors in: weights in fewer bits",
        facts=facts,
        compiled=list(made.values()),
    )


def _milliseconds(compiled: Compiled, requests: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    if len(requests) == 1:
        compiled(requests[0])
    else:
        compiled.map(requests)
    return (time.perf_counter() - start) * 1e3


def _packed_bytes(compiled: Compiled) -> int:
    kernels = [k for view in compiled.cells.values() for k in view.kernels.values()]
    return sum(getattr(kernel, "packed_bytes", 0) for kernel in kernels)
