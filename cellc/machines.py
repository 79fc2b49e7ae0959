"""Machines: the name of the device that kernels run on.

Duty: say where measurements hold (`cellc.costs.Place`), from torch and the operating system.
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

import torch

from cellc.costs import Place


def place(backend: str, device: torch.device, most_threads: int | None = None) -> Place:
    """Where a backend's kernels run in this process; on a GPU threads do not matter."""
    threads = 1
    if device.type == "cpu":
        threads = num_threads(most_threads)
    return Place(backend, device_name(device), threads)


def num_threads(most: int | None = None) -> int:
    """Threads of a launch on this machine's CPU: as torch was told, where `most` says nothing."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(most or torch.get_num_threads(), cores)


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor()


@lru_cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
