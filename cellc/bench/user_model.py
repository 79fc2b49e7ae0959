"""A user's model as a case: `cellc bench path/to/file.py:model`.

Of a model that nothing is known of, only one comparison is honest: PyTorch runs its requests one at
a time. Latency against load: `online`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cellc.bench.case import Case, Way
from cellc.bench.online_workloads import TargetWorkload
from cellc.bench.place import HERE, Place
from cellc.bench.recurrent import ALONE, CELLC

SAMPLE = 64


def is_target(name: str) -> bool:
    return ":" in name


def target_case(name: str, inputs: str | None, count: int, place: Place = HERE) -> Case:
    """`count` requests, the example requests in turn."""
    workload = TargetWorkload(name, inputs)
    made = workload.make()
    if isinstance(made.model, nn.Module):
        place.ready(made.model)
    there = [place.moved_tree(x) for x in made.requests]
    requests = [there[i % len(there)] for i in range(count)]
    sample = min(SAMPLE, count)
    compiled = place.compiled(made.model)
    ways = [
        Way(ALONE, lambda: [_tensor(made.alone(x)) for x in requests[:sample]], sample),
        Way(CELLC, lambda: [_tensor(y) for y in compiled.map(requests)]),
    ]
    title = f"{workload.name}, {count} requests at once"
    return Case(title, count, ways, ALONE, compiled=[compiled])


def _tensor(result: Any) -> Tensor:
    """A result as one tensor: as it is, or its numbers joined."""
    if isinstance(result, Tensor):
        return result
    leaves: Sequence[Any] = pytree.tree_leaves(result)
    numbers = [x for x in leaves if isinstance(x, (Tensor, int, float))]
    flat = [torch.as_tensor(x).reshape(-1).double() for x in numbers]
    return torch.cat(flat) if flat else torch.empty(0)
