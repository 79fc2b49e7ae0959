"""Parameters: the model's weights, and expressions of weights alone, under printable names.

Duty: give kernels the tensor behind a name. An expression (`rnn.weight_hh_l0.T`, a folded embedding
table) is computed when it is first asked for, on the real weights; `refresh` drops what was
computed. Comes in from `frontends.lower` and `cellc.passes` (definitions); goes to kernels
(tensors).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cellc.dtypes import TORCH_DTYPES
from cellc.graph import Template

MAX_NAME = 96


class Params(Mapping[str, torch.Tensor]):
    """Name to tensor. `base` holds live tensors: their values are read when a name is first asked
    for.
    """

    def __init__(
        self, base: Mapping[str, torch.Tensor], device: torch.device | None = None
    ) -> None:
        self.base: dict[str, torch.Tensor] = dict(base)
        self._device = device
        self._expressions: dict[str, tuple[str, Any, Any, tuple[str, ...], int]] = {}
        self._computed: dict[str, torch.Tensor] = {}

    def define(
        self,
        op: str,
        args: Sequence[Template],
        kwargs: Sequence[tuple[str, Template]],
        operands: Sequence[str],
        port: int = 0,
    ) -> str:
        """Name of the result of a torch operation (`aten.t.default`) on named parameters."""
        name = _render(op, args, kwargs, operands, port)
        self._expressions.setdefault(name, (op, tuple(args), tuple(kwargs), tuple(operands), port))
        return name

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._computed:
            self._computed[name] = self._compute(name)
        return self._computed[name]

    def __iter__(self) -> Any:
        return iter({**self.base, **self._expressions})

    def __len__(self) -> int:
        return len(self.base) + len(self._expressions)

    def refresh(self) -> None:
        """The weights changed: compute everything again when it is asked for."""
        self._computed.clear()

    def release(self, keep: set[str]) -> None:
        """Drop computed tensors that no kernel asks for any more (they were steps of an
        expression).
        """
        for name in set(self._computed) - keep:
            del self._computed[name]

    def _compute(self, name: str) -> torch.Tensor:
        with torch.no_grad():
            if name in self.base:
                value = self.base[name].detach()
                return value.to(self._device) if self._device is not None else value
            op, args, kwargs, operands, port = self._expressions[name]
            tensors = [self[o] for o in operands]
            _, base, overload = op.split(".")
            if base in ("view", "_unsafe_view"):  # strides may not be those that were traced
                base, overload = "reshape", "default"
            function = getattr(getattr(torch.ops.aten, base), overload)
            call = [_fill(a, tensors) for a in args]
            result: Any = function(*call, **{k: _fill(v, tensors) for k, v in kwargs})
            made: torch.Tensor = result[port] if isinstance(result, (tuple, list)) else result
            return made


def _fill(template: Template, tensors: Sequence[torch.Tensor]) -> Any:
    kind, value = template
    if kind == "t":
        return tensors[value]
    if kind == "l":
        return [_fill(x, tensors) for x in value]
    return TORCH_DTYPES[value] if kind == "d" else value


def _render(op: str, args: Any, kwargs: Any, operands: Sequence[str], port: int) -> str:
    base = op.split(".")[1]
    if base == "t" or (base == "transpose" and [a[1] for a in args[1:]] in ([0, 1], [1, 0])):
        text = f"{operands[0]}.T"
    else:
        parts = [_text(a, operands) for a in args] + [
            f"{k}={_text(v, operands)}" for k, v in kwargs if v[1] is not None
        ]
        text = f"{base}({', '.join(parts)})" + (f"[{port}]" if port else "")
    if len(text) > MAX_NAME:
        text = f"{text[: MAX_NAME - 10]}..{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def _text(template: Template, operands: Sequence[str]) -> str:
    kind, value = template
    if kind == "t":
        return operands[value]
    if kind == "l":
        return f"[{', '.join(_text(x, operands) for x in value)}]"
    return str(value)
