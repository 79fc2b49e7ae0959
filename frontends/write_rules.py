"""Write rules: what a write in place computes, and how it is put back through views.

Duty: the functional form of operations that write, and the inverses of views. Used by
`frontends.traced_writes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cellc.errors import UnsupportedError

aten = torch.ops.aten
Tensor = torch.Tensor


def functional(name: str, overload: str) -> Callable[..., Any]:
    """The operation that computes what `name` (ending in `_`) writes in place."""
    if name == "copy_":
        return _copy
    if name == "fill_":
        return lambda x, value: x.new_zeros(x.shape) + torch.as_tensor(value).to(x.dtype)
    if name == "zero_":
        return lambda x: torch.full(x.shape, 0, dtype=x.dtype, device=x.device)
    packet = getattr(aten, name[:-1])
    op = getattr(packet, overload) if overload in packet.overloads() else packet
    if op is not packet and str(op._schema.arguments[0].type) != "Tensor":  # pow.Scalar: 2 ** x
        op = packet

    def compute(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = op(x, *args, **kwargs)
        if not torch.can_cast(out.dtype, x.dtype):
            raise RuntimeError(f"result type {out.dtype} can't be cast to {x.dtype}")
        return out.to(x.dtype)

    return compute


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    source = source.to(target.dtype)
    return source.expand(target.shape) if source.shape != target.shape else source.clone()


def inverse_view(
    func: Any, args: tuple[Any, ...], port: int, shape: tuple[int, ...], origin: str
) -> tuple[Any, tuple[Any, ...], bool]:
    """How to put a written view back into what it was taken of.

    Returns (operation, arguments after the written value, whether the operation takes the viewed
    value first). `shape` is the viewed shape. Raises UnsupportedError for views that have no simple
    inverse.
    """
    name = func._schema.name.removeprefix("aten::")
    if name == "select":
        return aten.select_scatter.default, args, True
    if name == "slice":
        return aten.slice_scatter.default, args, True
    if name == "view" and func._overloadname == "dtype":
        name = "view(dtype)"
    if name in ("view", "_unsafe_view", "unsqueeze", "squeeze", "reshape", "_reshape_alias"):
        return aten.view.default, (list(shape),), False
    if name == "t" and len(shape) < 2:
        return aten.view.default, (list(shape),), False
    if name in ("transpose", "t"):
        dims = args[:2] if name == "transpose" else (0, 1)
        return aten.transpose.int, tuple(dims), False
    if name == "permute":
        order = [d % len(shape) for d in args[0]]
        return aten.permute.default, (sorted(range(len(order)), key=order.__getitem__),), False
    if name in ("split", "split_with_sizes", "unbind"):
        return _inverse_pieces(name, args, port, shape)
    raise UnsupportedError(
        what=f"writing in place through torch.{name}",
        remedy="write to the tensor itself, or build the result with torch.stack or torch.cat",
        origin=origin,
    )


def _inverse_pieces(
    name: str, args: tuple[Any, ...], port: int, shape: tuple[int, ...]
) -> tuple[Any, tuple[Any, ...], bool]:
    if name == "unbind":
        return aten.select_scatter.default, (args[0] if args else 0, port), True
    dim = args[1] if len(args) > 1 else 0
    if name == "split":
        start = args[0] * port
        stop = min(start + args[0], shape[dim])
    else:
        start = sum(args[0][:port])
        stop = start + args[0][port]
    return aten.slice_scatter.default, (dim, start, stop), True
