"""Traced writes: writes in place as new values.

Duty: note which tensors of a trace show the same storage, and rewrite an operation that writes one
of them as its functional form, put back through the views that the tensor was taken by, so that all
that show the storage stand for what was written. The middle layer of `frontends.tracer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from cellc.errors import UnsupportedError
from cellc.frontends.placeholder import Placeholder, form_of, modes_off, row_major
from cellc.frontends.traced_values import Step, Storage, TracedValues, Tracked, Value
from cellc.frontends.write_rules import functional, inverse_view

_OF_ITSELF = ("add_", "sub_", "mul_", "div_", "copy_")  # element by element


class TracedWrites(TracedValues):  # type: ignore[no-untyped-call]
    """Tensors that may show the same storage."""

    def __init__(self, params: dict[str, torch.Tensor], modules: dict[int, str]) -> None:
        super().__init__(params, modules)
        self.calls = 0  # outermost torch calls so far

    # -- who shares --

    def shares(self, made: Placeholder, args: Any) -> bool:
        """Does a result that torch makes anew show what an argument shows?"""
        storage = made.tracked.storage
        for x in pytree.tree_leaves(args):
            if isinstance(x, torch.Tensor):
                if x is made or (storage is not None and self.of(x).storage is storage):
                    return True
        return storage is None

    def check_strided(self, x: torch.Tensor) -> None:
        """Strides count in the memory of a tensor that is all of it."""
        tracked, form = self.of(x), form_of(x)
        whole = form == row_major(form.shape, form.dtype, form.device)
        if not whole or tracked.is_view or tracked.storage is None:
            raise UnsupportedError(
                what="as_strided of a view, an argument or a weight",
                remedy="give it a clone()",
                origin=self.points.origin(),
            )

    def track_views(
        self,
        func: Any,
        args: Any,
        source: torch.Tensor | None,
        out: Placeholder,
        port: int,
        view: bool,
    ) -> None:
        """Note how `out` views its storage, so that a write through either is seen by both."""
        tracked: Tracked = out.tracked
        tracked.is_view = view
        unsafe = func._schema.name.startswith("aten::unsafe_")  # as good as copies
        if view and not unsafe:
            assert source is not None
            parent = self.of(source)
            if parent.storage is not None:
                step = (func, tuple(args[1:]), port, tuple(source.shape))
                tracked.storage, tracked.version = parent.storage, parent.storage.version
                tracked.chain = (*parent.chain, step)
        elif not view or id(source) not in self._params:
            tracked.storage = Storage(tracked.value)
        if view and unsafe:
            assert source is not None
            for storage in (tracked.storage, self.of(source).storage):
                if storage is not None:
                    storage.apart_in = self.calls

    # -- writes --

    def write(self, func: Any, args: Any, kwargs: Any) -> Any:
        target = args[0] if args else None
        base, overload = func._schema.name.removeprefix("aten::"), func._overloadname
        if (
            not isinstance(target, torch.Tensor)
            or not base.endswith("_")
            or kwargs.get("out") is not None
            or base in ("resize_", "resize_as_", "set_")
        ):
            raise UnsupportedError(
                what=f"writing with torch.{base}.{overload}",
                remedy="assign its result to a new name",
                origin=self.points.origin(),
            )
        self.value(target)
        tracked = self.of(target)
        if tracked.storage is None:
            raise UnsupportedError(
                what=f"changing an argument or a weight in place (torch.{base})",
                remedy="write to a copy: x = x.clone()",
                origin=self.points.origin(),
            )
        if tracked.storage.apart_in not in (None, self.calls):
            raise UnsupportedError(
                what="writing a tensor that unsafe_split or unsafe_chunk took apart",
                remedy="use split or chunk",
                origin=self.points.origin(),
            )
        if len(args) > 1 or kwargs:
            self._check_overlap(base, tracked, (args[1:], kwargs))
        with self:
            new = functional(base, overload)(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            assert isinstance(target, Placeholder)
            target.change(func, args[1:], new.form)
            target.tracked = new.tracked
            return target
        if new.shape != target.shape:
            raise RuntimeError(
                f"output with shape {list(target.shape)} doesn't match the broadcast shape "
                f"{list(new.shape)}"
            )
        value = self.value(new)
        storage, chain = tracked.storage, tracked.chain
        for depth in range(len(chain) - 1, -1, -1):
            step_func, step_args, port, shape = chain[depth]
            inverse, inverse_args, needs_parent = inverse_view(
                step_func, step_args, port, shape, self.points.origin()
            )
            head = [Value(self.replay(storage.base, chain[:depth]))] if needs_parent else []
            value = (self.emit(inverse, (*head, Value(value), *inverse_args)), 0)
        storage.base, storage.version = value, storage.version + 1
        return target

    def _check_overlap(self, name: str, target: Tracked, given: Any) -> None:
        """What is read must be all of what is written, or none."""
        for x in pytree.tree_leaves(given):
            if not isinstance(x, torch.Tensor):
                continue
            other = self.of(x)
            if other.storage is not target.storage:
                continue
            if other.chain == target.chain and name in _OF_ITSELF:
                continue
            shape = next((step[3] for t in (other, target) for step in t.chain[:1]), None)
            if shape is not None:
                ours, theirs = (_elements(shape, t.chain) for t in (target, other))
                if ours == theirs and name in _OF_ITSELF or set(ours).isdisjoint(theirs):
                    continue
            raise UnsupportedError(
                what=f"writing a tensor with what shares memory with it (torch.{name})",
                remedy="write a clone() of that",
                origin=self.points.origin(),
            )


def _elements(shape: tuple[int, ...], chain: tuple[Step, ...]) -> list[int]:
    """Which elements of a tensor of this shape a view shows."""
    with modes_off():
        x = torch.arange(torch.Size(shape).numel()).reshape(shape)
        for func, args, port, _ in chain:
            made = func(x, *args)
            x = made[port] if isinstance(made, (list, tuple)) else made
        found: list[int] = x.reshape(-1).tolist()
    return found


def was_written(x: Any) -> bool:
    """Was a tensor of a trace written in place?"""
    storage = x.tracked.storage if isinstance(x, Placeholder) else None
    return storage is not None and storage.version > 0
