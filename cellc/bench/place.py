"""Where a benchmark runs: cellc's backend, and the device of models and requests.

Duty: put models and requests where they are asked for, wait for what a device still does, and name
the machine. Peers of other libraries run on processors only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cellc.bench.measure import machine_name
from cellc.compiled import Compiled
from cellc.entry import compile
from cellc.errors import UsageError
from cellc.options import BackendName

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
PROCESSORS_ONLY = "runs on processors only"


@dataclass(frozen=True)
class Place:
    """`device`: cpu, or a GPU as torch names it (cuda, cuda:1)."""

    backend: BackendName = "auto"
    device: str = "cpu"

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @property
    def machine(self) -> str:
        """The card's name, or the processor's."""
        return machine_name() if self.on_cpu else torch.cuda.get_device_name(self.device)

    def check(self) -> None:
        """Raises UsageError where there is no such device. On a GPU, products of f32 are in f32."""
        if self.on_cpu:
            return
        try:
            torch.cuda.set_device(self.device)
            torch.zeros(1, device=self.device)
        except Exception as error:  # in torch's or the driver's words
            raise UsageError(f"--device {self.device}: {str(error).splitlines()[0]}") from error
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def ready(self, model: M) -> M:
        """The model there, for inference."""
        return model.eval().requires_grad_(False).to(self.device)

    def moved(self, requests: Sequence[Tensor]) -> list[Tensor]:
        return [x.to(self.device) for x in requests]

    def moved_tree(self, request: T) -> T:
        """All tensors of a request."""
        moved: T = pytree.tree_map_only(Tensor, lambda x: x.to(self.device), request)
        return moved

    def compiled(
        self, model: Callable[..., Any], carry: Mapping[str, str] | None = None
    ) -> Compiled:
        given: Any = {"carry": carry} if carry else {}
        compiled: Compiled = compile(model, backend=self.backend, **given)
        return compiled


HERE = Place()


def settle() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
