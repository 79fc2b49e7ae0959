"""Traced values: what the tensors of a trace stand for.

Duty: keep for every tensor that a traced forward holds the graph value that it stands for, with the
storage that it shows, and add operations to the graph. A tensor whose storage was written since
stands for another value: its views are taken again. The lowest layer of `frontends.tracer`.
"""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cellc.dtypes import DTYPE_NAMES, TORCH_DTYPES
from cellc.errors import UnsupportedError
from cellc.frontends.placeholder import Form, Placeholder, modes_off, row_major
from cellc.frontends.points import Points
from cellc.frontends.shapes import Results
from cellc.graph import Graph, Ref, Template

RESULTS = Results()
SMALL_CONSTANT = 4096  # elements; smaller captured tensors are named by content, larger by identity

# A view taken of a tensor: the operation, its other arguments, which of its results, and the viewed
# shape.
Step = tuple[Any, tuple[Any, ...], int, tuple[int, ...]]


@dataclass
class Storage:
    """A buffer that may be written in place: its current value, how often it was written, and the
    outermost call that took it apart as if its parts were copies, which may write them.
    """

    base: Ref
    version: int = 0
    apart_in: int | None = None


@dataclass
class Tracked:
    """What a live tensor stands for: a graph value, and how it views its storage (for writes in
    place).
    """

    value: Ref
    storage: Storage | None = None
    chain: tuple[Step, ...] = ()
    version: int = 0
    owner: object = None  # the trace that it belongs to
    is_view: bool = False  # of a tensor whose storage is not known, too


class Value(tuple):  # type: ignore[type-arg]
    """A graph value standing where a tensor would, in arguments of replayed operations."""


class TracedValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The tensors of a trace and the graph that it makes."""

    def __init__(self, params: dict[str, torch.Tensor], modules: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.points = Points(modules)
        self.captured: dict[str, torch.Tensor] = {}
        self.mark = object()
        self.made: list[weakref.ref[Placeholder]] = []
        self._params = {id(p): name for name, p in params.items()}
        self._tracked: dict[int, Tracked] = {}  # of tensors that are no placeholders, by id
        self._constants: dict[str, int] = {}
        self._keep: list[torch.Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # never under torch.compile; wrapping for it would import torch._dynamo

    # -- tensors --

    def new(self, form: Form, value: Ref) -> Placeholder:
        """A tensor that stands for a graph value."""
        made = Placeholder(form)
        made.tracked = Tracked(value, owner=self.mark)
        self.made.append(weakref.ref(made))
        return made

    def of(self, tensor: torch.Tensor) -> Tracked:
        """What a tensor stands for; weights and captured tensors are registered here."""
        if isinstance(tensor, Placeholder):
            tracked: Tracked = tensor.tracked
            if tracked.owner is not self.mark:
                raise UnsupportedError(
                    what="a tensor kept from an earlier call of the forward",
                    remedy="pass it as an argument and return it",
                    origin=self.points.origin(),
                )
            return tracked
        found = self._tracked.get(id(tensor))
        if found is None:
            self._keep.append(tensor)
            found = self._tracked[id(tensor)] = Tracked(self._outside(tensor), owner=self.mark)
        return found

    def value(self, tensor: torch.Tensor) -> Ref:
        """The graph value that a tensor stands for now."""
        tracked = self.of(tensor)
        storage = tracked.storage
        if storage is not None and tracked.version != storage.version:
            tracked.value = self.replay(storage.base, tracked.chain)
            tracked.version = storage.version
        return tracked.value

    def replay(self, value: Ref, chain: tuple[Step, ...]) -> Ref:
        """Take views again of a buffer that was written since."""
        for func, args, port, _ in chain:
            value = (self.emit(func, (Value(value), *args)), port)
        return value

    def _outside(self, tensor: torch.Tensor) -> Ref:
        name = self._params.get(id(tensor))
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        if name is not None:
            return self.graph.add_param(name, shape, dtype), 0
        if (
            tensor.numel() <= SMALL_CONSTANT
            and tensor.device.type == "cpu"
            and not tensor.is_sparse
        ):
            with modes_off():
                flat = tensor.detach().reshape(-1).contiguous()
                data = bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
            name = f"const_{hashlib.sha256(repr((shape, dtype)).encode() + data).hexdigest()[:8]}"
        else:
            name = f"captured_{id(tensor):x}"
        if name not in self.captured:
            with modes_off():
                self.captured[name] = tensor.detach()
            self._constants[name] = self.graph.add_const(name, shape, dtype)
        return self._constants[name], 0

    # -- operations --

    def emit(
        self, func: Any, args: Any, kwargs: Any = None, forms: tuple[Form, ...] | None = None
    ) -> int:
        operands: list[Ref] = []

        def template(a: Any) -> Template:
            if isinstance(a, (torch.Tensor, Value)):
                operands.append(a if isinstance(a, Value) else self.value(a))
                return ("t", len(operands) - 1)
            if isinstance(a, (list, tuple)):
                return ("l", tuple(template(x) for x in a))
            if isinstance(a, torch.dtype):
                return ("d", dtype_name(a))
            if isinstance(a, (torch.device, torch.layout, torch.memory_format, torch.Generator)):
                return ("v", None)
            return ("v", a)

        made = tuple(template(a) for a in args)
        named = tuple((k, template(v)) for k, v in (kwargs or {}).items())
        if forms is None:
            forms = self._replayed(func, args)
        shapes = tuple((f.shape, dtype_name(f.dtype)) for f in forms)
        node = self.graph.add_op(
            str(func), made, named, operands, shapes, self.points.origin(), self.points.point()
        )
        self.points.ordinal += 1
        return node

    def _replayed(self, func: Any, args: Any) -> tuple[Form, ...]:
        """Output forms of an operation replayed on graph values (after a write in place)."""

        def form(a: Any) -> Any:
            if not isinstance(a, Value):
                return a
            shape, dtype = self.graph.node(a[0]).outputs[a[1]]
            return row_major(shape, TORCH_DTYPES[dtype])

        return RESULTS.of(func, [form(a) for a in args], {}).forms


def dtype_name(dtype: torch.dtype) -> str:
    name = DTYPE_NAMES.get(dtype)
    if name is None:
        raise UnsupportedError(
            what=f"dtype {dtype}", remedy="use " + ", ".join(DTYPE_NAMES.values())
        )
    return name
