"""Clocks of the GPU benchmark: a card's own, and one that stands in for it on a CPU.

Duty: all that the benchmark asks of CUDA: times on the device, graphs, ceilings. On a CPU the same
calls run the same work once or twice, so that everything else can be tested; its figures say
nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cellc.kernels.triton_graphs import captured

Run = Callable[[], object]


class Clock:
    """Of one device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.real = self.device.type == "cuda"
        self.times = 20 if self.real else 1

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.real else "a CPU, for testing only"

    @property
    def shared_bytes(self) -> int:
        """Of shared memory that a program may have."""
        if not self.real:
            return 232448
        properties: Any = torch.cuda.get_device_properties(self.device)
        return int(properties.shared_memory_per_block_optin)

    def seconds(self, run: Run) -> float:
        """Median time on the device of a call, which may be a graph's replay."""
        found = []
        for _ in range(self.times):
            if self.real:
                start, end = (torch.cuda.Event(True) for _ in "ab")  # type: ignore[no-untyped-call]
                start.record()
                run()
                end.record()
                end.synchronize()
                found.append(start.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                run()
                found.append(time.perf_counter() - begin)
        return float(statistics.median(found))

    def host_seconds(self, run: Run) -> tuple[float, float]:
        """Median times of a call on an idle device: until it returns, until the device is done."""
        submitted, done = [], []
        for _ in range(self.times):
            self.synchronize()
            begin = time.perf_counter()
            run()
            submitted.append(time.perf_counter() - begin)
            self.synchronize()
            done.append(time.perf_counter() - begin)
        return statistics.median(submitted), statistics.median(done)

    def graphed(self, run: Run) -> Run:
        """A call as a CUDA graph, where it can be captured."""
        if not self.real:
            run()
            return run
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()

        def replay(memory: Run = run) -> None:  # which the graph reads: what `run` holds must stay
            graph.replay()

        return replay

    def capture(self, nodes: Sequence[Run]) -> Run:
        """For `triton_graphs`."""
        return captured(nodes) if self.real else lambda: [node() for node in nodes]

    def synchronize(self) -> None:
        if self.real:
            torch.cuda.synchronize()

    def ceilings(self) -> dict[str, float]:
        """What the card gives: a large product in each dtype, and a copy."""
        found, size, length = {}, 4096 if self.real else 64, 1 << (28 if self.real else 12)
        for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32), ("tf32", None)):
            torch.backends.cuda.matmul.allow_tf32 = dtype is None
            a = torch.randn(size, size, device=self.device, dtype=dtype or torch.float32)
            run = self.graphed(partial(torch.mm, a, a))
            found[f"{name}_tflops"] = 2 * size**3 / self.seconds(run) / 1e12
        torch.backends.cuda.matmul.allow_tf32 = False
        x = torch.empty(length, device=self.device)
        y = torch.empty_like(x)
        found["copy_gb_s"] = 2 * x.numel() * 4 / self.seconds(lambda: y.copy_(x)) / 1e9
        return found
