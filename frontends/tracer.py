"""The tracer: records the operations on placeholders.

Duty: say of every operation that a traced forward runs what becomes of it: nothing (an identity), a
value that is known, other operations, a write, or a node of the `Graph` with its program point; or
why it is refused. Operations in the graph are functional. Used by `frontends.tracing`; over
`traced_writes`, `traced_values` and `points`.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cellc.errors import CellcError, UnsupportedError, ValueReadError
from cellc.frontends import decompose
from cellc.frontends.placeholder import Placeholder, form_of, modes_off
from cellc.frontends.shapes import Result
from cellc.frontends.traced_values import RESULTS, Storage, Tracked
from cellc.frontends.traced_writes import TracedWrites

aten = torch.ops.aten
IDENTITY = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift.default,
}
FRESH = {aten.lift_fresh.default, aten.lift.default}  # a tensor made of Python numbers
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}


class Tracer(TracedWrites):  # type: ignore[no-untyped-call]
    """Records operations on placeholders. Use `tracing.trace`."""

    def __init__(self, params: dict[str, torch.Tensor], modules: dict[int, str]) -> None:
        super().__init__(params, modules)
        self.depth = 0  # of torch calls in torch calls
        self.reads_weights = False
        self.values: deque[Any] = deque()  # what will be read, in order
        self.reading = False  # values are given: the forward may read, and yield
        self.refused: CellcError | None = None  # the first operation refused, whoever catches it

    def refuse(self, error: CellcError) -> CellcError:
        """An error that ends the trace, whatever the forward does with it."""
        self.refused = self.refused or error
        return error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._dispatch(func, args, kwargs or {})
        except CellcError as error:
            raise self.refuse(error) from error.__cause__

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in READS:
            return self._read(func, args)
        name = func._schema.name.removeprefix("aten::")
        if _draws(func, args):
            raise UnsupportedError(
                what=f"drawing random numbers (torch.{name})",
                remedy="pass a torch.Generator in the request to torch.rand, torch.randn or "
                "torch.multinomial(p, 1), or draw before the call and pass what was drawn",
                origin=self.points.origin(),
            )
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if func is aten.contiguous.default:  # met in inference mode
            (form,) = self._infer(func, args, kwargs).forms
            func = aten.alias.default if form == form_of(args[0]) else aten.clone.default
            args, kwargs = args[:1], {}
        if func in IDENTITY:
            return self._identity(func, args, kwargs)
        replacement = decompose.find(func)
        if replacement is not None:
            with self:
                made = replacement(*args, **kwargs)
                shared = isinstance(made, Placeholder) and self.shares(made, args)
                return made.clone() if shared else made
        if func is aten.as_strided.default:
            self.check_strided(args[0])
        if func is aten.view.dtype:
            raise UnsupportedError(
                what="viewing a tensor as another dtype",
                remedy="compute it outside the model and pass it as an argument",
                origin=self.points.origin(),
            )
        if func._schema.is_mutable:
            return self.write(func, args, kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        return self._record(func, args, kwargs, self._infer(func, args, kwargs))

    def _infer(self, func: Any, args: Any, kwargs: Any) -> Result:
        """Forms of an operation's results."""
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.data_dependent_output in func.tags:
            raise ValueReadError(what=f"torch.{name}", origin=self.points.origin())
        if _selects_by_mask(func, args):
            raise ValueReadError(
                what=f"torch.{name} gives as many results as the data says",
                origin=self.points.origin(),
            )
        try:
            return RESULTS.of(func, args, kwargs)
        except NotImplementedError:
            raise UnsupportedError(
                what=f"torch.{name} on shapes alone",
                remedy="compute it outside the model and pass it as an argument",
                origin=self.points.origin(),
            ) from None

    def _record(self, func: Any, args: Any, kwargs: Any, result: Result) -> Any:
        node = self.emit(func, args, kwargs, result.forms)
        tensors = [self.new(form, (node, port)) for port, form in enumerate(result.forms)]
        source = next((a for a in pytree.tree_leaves(args) if isinstance(a, torch.Tensor)), None)
        for port, tensor in enumerate(tensors):
            self.track_views(func, args, source, tensor, port, result.views[port])
        return result.build(tensors)

    def _identity(self, func: Any, args: Any, kwargs: Any) -> Any:
        value, source = self.value(args[0]), self.of(args[0])
        (form,) = self._infer(func, args, kwargs).forms
        out = self.new(form, value)
        out.tracked = Tracked(
            value, source.storage, source.chain, source.version, self.mark, source.is_view
        )
        if func in FRESH and not isinstance(args[0], Placeholder):
            out.constant, out.tracked.storage = args[0], Storage(value)
        return out

    def _read(self, func: Any, args: Any) -> Any:
        tensor = args[0]
        if isinstance(tensor, Placeholder):
            tensor = tensor.constant if self._unwritten(tensor) else None
        else:
            self.reads_weights = True
        if tensor is None and self.values:
            return self.values.popleft()
        if tensor is None:
            raise ValueReadError(
                what="with .item(), bool(), int() or the like", origin=self.points.origin()
            )
        with modes_off():
            return func(tensor, *args[1:])

    def _unwritten(self, tensor: Placeholder) -> bool:
        storage = self.of(tensor).storage
        return storage is not None and storage.version == 0


def _draws(func: Any, args: Any) -> bool:
    """Does this call draw random numbers?"""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    name = func._schema.name.removeprefix("aten::")
    if name == "native_dropout":
        return bool(args[2]) and args[1] > 0
    return "scaled_dot_product" not in name  # tagged for its dropout, which is off in eval mode


def _selects_by_mask(func: Any, args: Any) -> bool:
    """Does the number of results depend on values?"""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func._schema.name != "aten::index":
        return True
    masks = (torch.bool, torch.uint8)
    return any(isinstance(i, torch.Tensor) and i.dtype in masks for i in args[1])


@functools.cache
def _is_composite(func: Any) -> bool:
    """Made of other operations: met here where our own decompositions call it."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
