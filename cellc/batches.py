"""Batches: calls whose tensors hold many requests in one dimension (`batch_dim`).

Duty: cut such a call into requests, and put their results together in the dimension that grows with
the batch. Used by `cellc.compiled`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cellc.compiler import Compiler
from cellc.errors import RequestError

MAX_FORMS = 1 << 10


class Batches:
    """Of one model, in dimension `dim` of its arguments."""

    def __init__(self, compiler: Compiler, dim: int) -> None:
        self._compiler, self._dim = compiler, dim
        self._outputs: dict[Any, list[int | None]] = {}  # the batch's dimension in each result

    def cut(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], Callable[[list[Any]], Any]]:
        """(the calls of a batch, each of size 1 there; what puts their results together)."""
        dim = self._dim
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.dim() > dim]
        sizes = {t.shape[dim] for t in tensors}
        if len(sizes) != 1:
            raise RequestError(
                argument=", ".join(self._compiler.arguments.names),
                got=f"sizes {sorted(sizes)} in dimension {dim}",
                expected="one batch size in all tensors (batch_dim)",
            )
        (size,) = sizes
        if size == 0:
            raise RequestError(argument="batch", got="size 0", expected="at least one request")

        def piece(i: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            cut = [
                t.narrow(dim, i, 1) if isinstance(t, torch.Tensor) and t.dim() > dim else t
                for t in leaves
            ]
            call: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(cut, spec)
            return call

        return [piece(i) for i in range(size)], lambda results: self._stack(results, leaves, spec)

    def _stack(self, results: list[Any], leaves: list[Any], spec: Any) -> Any:
        flat = [pytree.tree_flatten(r) for r in results]
        dims = self._output_dims(leaves, spec)
        out = []
        for k, dim in enumerate(dims):
            pieces = [f[0][k] for f in flat]
            if dim is not None and isinstance(pieces[0], torch.Tensor):
                out.append(torch.cat(pieces, dim))
            else:
                out.append(pieces[0])
        return pytree.tree_unflatten(out, flat[0][1])

    def _output_dims(self, leaves: list[Any], spec: Any) -> list[int | None]:
        """Which dimension of each result is the batch: the one that doubles when the batch does."""
        dim = self._dim
        key = (
            str(spec),
            tuple((t.dim(), t.dtype) if isinstance(t, torch.Tensor) else None for t in leaves),
        )
        known = self._outputs.get(key)
        if known is not None:
            return known
        shapes = [self._shapes(leaves, spec, dim, size) for size in (2, 3)]
        found: list[int | None] = []
        for two, three in zip(*shapes, strict=True):
            grown = [i for i, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
            found.append(grown[0] if grown else None)
        if len(self._outputs) >= MAX_FORMS:
            self._outputs.clear()
        self._outputs[key] = found
        return found

    def _shapes(self, leaves: list[Any], spec: Any, dim: int, size: int) -> list[tuple[int, ...]]:
        """Result shapes for a batch of `size`, from a trace on shapes alone."""
        wide = [
            t.narrow(dim, 0, 1).expand(*t.shape[:dim], size, *t.shape[dim + 1 :]).contiguous()
            if isinstance(t, torch.Tensor) and t.dim() > dim
            else t
            for t in leaves
        ]
        args, kwargs = pytree.tree_unflatten(wide, spec)
        args, kwargs = self._compiler.arguments.bind(args, kwargs)
        return self._compiler.output_shapes(args, kwargs)
