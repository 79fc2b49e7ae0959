"""Where the time of many LSTM requests at once goes, and what no way of running them could save.

The floor is the products that the results need, at the speed of the machine's matrix product in the
same round: no gather, no gate, no host. On vectors these are all products of the cell; on tokens,
whose input product is folded into a table, those of the state. PyTorch's buckets run the same
arithmetic, and pad. What they take, over the floor, is the most that any batching could gain here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from cellc.bench.case import Case
from cellc.bench.host import PEAK, product_speed
from cellc.bench.recurrent import LastState, Torch, buckets_of, make_requests
from cellc.entry import compile


def floor_case(hidden: int, lengths: Sequence[int], tokens: bool, backend: str = "auto") -> Case:
    """Milliseconds of one `map` of all requests, structures seen, and of parts of it."""
    torch.manual_seed(0)
    model = LastState("lstm", hidden, tokens).eval().requires_grad_(False)
    compiled, requests = compile(model, backend=backend), make_requests(lengths, hidden, tokens)  # type: ignore[arg-type]
    buckets, peer = buckets_of(requests), Torch(model)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in buckets)
    cell = 2 * 4 * hidden**2  # FLOPs of the state's product for one row

    def once() -> tuple[float, float, float]:
        before, start = compiled.stats(), time.perf_counter()
        compiled.map(requests)
        seconds, after = time.perf_counter() - start, compiled.stats()
        launches = after["kernel_seconds"] - before["kernel_seconds"]
        return seconds, launches, after["steps"] - before["steps"]

    def padding() -> float:
        start = time.perf_counter()
        peer.padded(requests, buckets)
        return time.perf_counter() - start

    def facts() -> dict[str, float]:
        for _ in range(2):
            compiled.map(requests)
        peak = product_speed()
        all_, launches, steps = sorted(once() for _ in range(3))[1]
        floor = sum(lengths) * cell * (1 if tokens else 2) / peak
        torch_ = sorted(padding() for _ in range(3))[1]
        parts = {
            "ms at once": all_,
            "ms of it in launches": launches,
            "ms of those beyond the floor: gathers, gates, small batches": launches - floor,
            "ms on the host that no launch hides": all_ - launches,
            "the floor, ms: products alone at the machine's speed": floor,
            "PyTorch, buckets, ms": torch_,
            "of those its products, ms at the machine's speed": padded * 2 * cell / peak,
        }
        return {
            PEAK: peak / 1e9,
            **{name: seconds * 1e3 for name, seconds in parts.items()},
            "steps launched": steps,
            "us a step": all_ / steps * 1e6,
            "us a step, the floor": floor / steps * 1e6,
            "times PyTorch, buckets": torch_ / all_,
            "times PyTorch, buckets, at the floor": torch_ / floor,
        }

    name = "tokens" if tokens else "vectors"
    title = f"LSTM, {hidden} units, {len(lengths)} requests at once, {name} in: where time goes"
    return Case(title, facts=facts, compiled=[compiled], name=name)
