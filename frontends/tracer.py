"""Tracing: one request's forward, run on placeholders, recorded as a `Graph`.

Duty: run the user's forward on shapes and dtypes alone (no data, no copy of the weights) and record
every torch operation with its program point. Comes in: a callable, its weights, one request's
arguments. Goes out: a `Graph` whose operations are functional (writes in place are rewritten as new
values), to `frontends.lower`.

The program point (method: design by roles, see ARCHITECTURE.md) is the chain of Python frames from
the operation outwards, recursion collapsed to the innermost frame of each function and module, with
each frame's instruction offset, and the ordinal of the operation within its outermost torch call:
one Python call makes several operations.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
import sysconfig
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cellc.dtypes import DTYPE_NAMES, TORCH_DTYPES
from cellc.errors import (
    CellcError,
    ForwardError,
    GeneratorForward,
    UnsupportedError,
    ValueReadError,
)
from cellc.frontends import decompose, library
from cellc.frontends.branching import CodesSeen, look_away
from cellc.frontends.placeholder import Form, Placeholder, form_of, modes_off, row_major
from cellc.frontends.shapes import Result, Results
from cellc.graph import Graph, Ref, Template
from cellc.skeleton import Copier, holds_tensors

aten = torch.ops.aten
_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(os.path.abspath(__file__))
_MACHINERY = (
    os.path.join(_TORCH, "_ops.py"),
    os.path.join(_TORCH, "overrides.py"),
    os.path.join(_TORCH, "_tensor.py"),
    os.path.join(_TORCH, "utils", "_python_dispatch.py"),
    os.path.join(_TORCH, "utils", "_stats.py"),
    os.path.join(_HERE, "placeholder.py"),
    os.path.join(_HERE, "shapes.py"),
    os.path.abspath(__file__),
)
# Code that takes no other path at another size, or is known to be right when it does.
_TRUSTED = (
    *(f + os.sep for f in (_TORCH, os.path.dirname(_HERE), _HERE, sysconfig.get_path("stdlib"))),
    "<frozen",
)
IDENTITY = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift.default,
}
FRESH = {aten.lift_fresh.default, aten.lift.default}  # a tensor made of Python numbers
READING_METHODS = (
    "numpy", "__array__", "tolist", "__dlpack__", "data_ptr", "apply_", "map_", "map2_",
    "__repr__", "__format__",
)  # fmt: skip
_RESULTS = Results()
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SMALL_CONSTANT = 4096  # elements; smaller captured tensors are named by content, larger by identity


# A view taken of a tensor: the operation, its other arguments, which of its results, and the viewed
# shape.
_Step = tuple[Any, tuple[Any, ...], int, tuple[int, ...]]


@dataclass
class _Storage:
    """A buffer that may be written in place: its current value, how often it was written, and the
    outermost call that took it apart as if its parts were copies, which may write them.
    """

    base: Ref
    version: int = 0
    apart_in: int | None = None


@dataclass
class _Tracked:
    """What a live tensor stands for: a graph value, and how it views its storage (for writes in
    place).
    """

    value: Ref
    storage: _Storage | None = None
    chain: tuple[_Step, ...] = ()
    version: int = 0
    owner: object = None  # the trace that it belongs to
    is_view: bool = False  # of a tensor whose storage is not known, too


class _Functions(TorchFunctionMode):
    """Marks outermost torch calls, and runs library recurrences as loops over their cells."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer = self.tracer
        if tracer.depth == 0:
            tracer.ordinal = 0
            tracer.calls += 1
        name = getattr(func, "__name__", "")
        if name in READING_METHODS and isinstance(args[0], Placeholder):
            if name == "tolist" and tracer.values:
                return tracer.values.popleft()
            raise tracer.refuse(ValueReadError(what=f"with .{name}()", origin=tracer.origin()))
        if name == "__deepcopy__":
            return args[0].clone()
        if name == "__set__" and func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise tracer.refuse(
                UnsupportedError(
                    what="assigning to .data", remedy="use copy_", origin=tracer.origin()
                )
            )
        loop = library.LOOPS.get(name)
        if loop is not None and tracer.depth == 0:
            with self:
                return loop(*args, **(kwargs or {}), scope=tracer.scope)
        watcher = look_away()
        tracer.depth += 1
        try:
            return func(*args, **(kwargs or {}))
        except CellcError as error:
            raise tracer.refuse(error) from error.__cause__
        finally:
            tracer.depth -= 1
            if watcher is not None:
                sys.setprofile(watcher)


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations on placeholders. Use `trace`."""

    def __init__(self, params: dict[str, torch.Tensor], modules: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.captured: dict[str, torch.Tensor] = {}
        self.reads_weights = False
        self.ordinal = self.depth = self.calls = 0
        self.root: FrameType | None = None
        self.mark = object()
        self._params = {id(p): name for name, p in params.items()}
        self._modules = modules
        self._tracked: dict[int, _Tracked] = {}  # of tensors that are no placeholders, by id
        self._constants: dict[str, int] = {}
        self._scopes: list[Hashable] = []
        self._origin = ""  # of operations that no frame of the user's is behind
        self._keep: list[torch.Tensor] = []
        self.made: list[weakref.ref[Placeholder]] = []
        self.values: deque[Any] = deque()  # what will be read, in order
        self.reading = False  # values are given: the forward may read, and yield
        self.refused: CellcError | None = None  # the first operation refused, whoever catches it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # never under torch.compile; wrapping for it would import torch._dynamo

    # -- values
    # ---------------------------------------------------------------------------------------------

    def new(self, form: Form, value: Ref) -> Placeholder:
        """A tensor that stands for a graph value."""
        made = Placeholder(form)
        made.tracked = _Tracked(value, owner=self.mark)
        self.made.append(weakref.ref(made))
        return made

    def _of(self, tensor: torch.Tensor) -> _Tracked:
        """What a tensor stands for; weights and captured tensors are registered here."""
        if isinstance(tensor, Placeholder):
            tracked: _Tracked = tensor.tracked
            if tracked.owner is not self.mark:
                raise UnsupportedError(
                    what="a tensor kept from an earlier call of the forward",
                    remedy="pass it as an argument and return it",
                    origin=self.origin(),
                )
            return tracked
        found = self._tracked.get(id(tensor))
        if found is None:
            self._keep.append(tensor)
            found = self._tracked[id(tensor)] = _Tracked(self._outside(tensor), owner=self.mark)
        return found

    def value(self, tensor: torch.Tensor) -> Ref:
        """The graph value that a tensor stands for now."""
        tracked = self._of(tensor)
        storage = tracked.storage
        if storage is not None and tracked.version != storage.version:
            tracked.value = self._replay(storage.base, tracked.chain)
            tracked.version = storage.version
        return tracked.value

    def _replay(self, value: Ref, chain: tuple[_Step, ...]) -> Ref:
        """Take views again of a buffer that was written since."""
        for func, args, port, _ in chain:
            value = (self._emit(func, (_Value(value), *args)), port)
        return value

    def _outside(self, tensor: torch.Tensor) -> Ref:
        name = self._params.get(id(tensor))
        shape, dtype = tuple(tensor.shape), _dtype_name(tensor.dtype)
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

    # -- program points
    # -------------------------------------------------------------------------------------

    def _frames(self) -> Iterator[FrameType]:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.root:
            if frame.f_code.co_filename not in _MACHINERY:
                yield frame
            frame = frame.f_back

    def point(self) -> tuple[Hashable, ...]:
        chain: list[Hashable] = []
        seen = set()
        for frame in self._frames():
            code = frame.f_code
            module = None
            if code.co_varnames[:1] == ("self",):
                module = self._modules.get(id(frame.f_locals.get("self")))
            key = (id(code), module)
            if key not in seen:
                seen.add(key)
                chain.append((code.co_name, code.co_firstlineno, module, frame.f_lasti))
        return (*chain, *self._scopes, self.ordinal)

    @contextmanager
    def scope(self, tag: Hashable) -> Iterator[None]:
        """Operations traced inside belong to program points of their own."""
        self._scopes.append(tag)
        try:
            yield
        finally:
            self._scopes.pop()

    @contextmanager
    def replaying(self, tag: Hashable, origin: str) -> Iterator[None]:
        """Operations inside stand at another place of the user's code."""
        before, self._origin = self._origin, origin
        try:
            with self.scope(tag):
                yield
        finally:
            self._origin = before

    def origin(self) -> str:
        """file:line of the innermost frame that is neither torch's nor ours."""
        last = ""
        for frame in self._frames():
            path = frame.f_code.co_filename
            if not path.startswith(_TORCH):
                last = last or f"{os.path.basename(path)}:{frame.f_lineno}"
                if not path.startswith(_HERE):
                    return f"{os.path.basename(path)}:{frame.f_lineno}"
        return self._origin or last

    # -- operations
    # -----------------------------------------------------------------------------------------

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
                remedy="pass a torch.Generator in the request and give it as generator=, or draw "
                "them before the call and pass them as an argument",
                origin=self.origin(),
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
                shared = isinstance(made, Placeholder) and self._shares(made, args)
                return made.clone() if shared else made
        if func is aten.as_strided.default:
            self._check_strided(args[0])
        if func is aten.view.dtype:
            raise UnsupportedError(
                what="viewing a tensor as another dtype",
                remedy="compute it outside the model and pass it as an argument",
                origin=self.origin(),
            )
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        return self._record(func, args, kwargs, self._infer(func, args, kwargs))

    def _shares(self, made: Placeholder, args: Any) -> bool:
        """Does a result that torch makes anew show what an argument shows?"""
        storage = made.tracked.storage
        for x in pytree.tree_leaves(args):
            if isinstance(x, torch.Tensor):
                if x is made or (storage is not None and self._of(x).storage is storage):
                    return True
        return storage is None

    def _check_strided(self, x: torch.Tensor) -> None:
        """Strides count in the memory of a tensor that is all of it."""
        tracked, form = self._of(x), form_of(x)
        whole = form == row_major(form.shape, form.dtype, form.device)
        if not whole or tracked.is_view or tracked.storage is None:
            raise UnsupportedError(
                what="as_strided of a view, an argument or a weight",
                remedy="give it a clone()",
                origin=self.origin(),
            )

    def _infer(self, func: Any, args: Any, kwargs: Any) -> Result:
        """Forms of an operation's results."""
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.data_dependent_output in func.tags:
            raise ValueReadError(what=f"torch.{name}", origin=self.origin())
        if _selects_by_mask(func, args):
            raise ValueReadError(
                what=f"torch.{name} gives as many results as the data says", origin=self.origin()
            )
        try:
            return _RESULTS.of(func, args, kwargs)
        except NotImplementedError:
            raise UnsupportedError(
                what=f"torch.{name} on shapes alone",
                remedy="compute it outside the model and pass it as an argument",
                origin=self.origin(),
            ) from None

    def _record(self, func: Any, args: Any, kwargs: Any, result: Result) -> Any:
        node = self._emit(func, args, kwargs, result.forms)
        tensors = [self.new(form, (node, port)) for port, form in enumerate(result.forms)]
        source = next((a for a in pytree.tree_leaves(args) if isinstance(a, torch.Tensor)), None)
        for port, tensor in enumerate(tensors):
            self._track_views(func, args, source, tensor, port, result.views[port])
        return result.build(tensors)

    def _track_views(
        self,
        func: Any,
        args: Any,
        source: torch.Tensor | None,
        out: Placeholder,
        port: int,
        view: bool,
    ) -> None:
        """Note how `out` views its storage, so that a write through either is seen by both."""
        tracked: _Tracked = out.tracked
        tracked.is_view = view
        unsafe = func._schema.name.startswith("aten::unsafe_")  # as good as copies
        if view and not unsafe:
            assert source is not None
            parent = self._of(source)
            if parent.storage is not None:
                step = (func, tuple(args[1:]), port, tuple(source.shape))
                tracked.storage, tracked.version = parent.storage, parent.storage.version
                tracked.chain = (*parent.chain, step)
        elif not view or id(source) not in self._params:
            tracked.storage = _Storage(tracked.value)
        if view and unsafe:
            assert source is not None
            for storage in (tracked.storage, self._of(source).storage):
                if storage is not None:
                    storage.apart_in = self.calls

    def _emit(
        self, func: Any, args: Any, kwargs: Any = None, forms: tuple[Form, ...] | None = None
    ) -> int:
        operands: list[Ref] = []

        def template(a: Any) -> Template:
            if isinstance(a, (torch.Tensor, _Value)):
                operands.append(a if isinstance(a, _Value) else self.value(a))
                return ("t", len(operands) - 1)
            if isinstance(a, (list, tuple)):
                return ("l", tuple(template(x) for x in a))
            if isinstance(a, torch.dtype):
                return ("d", _dtype_name(a))
            if isinstance(a, (torch.device, torch.layout, torch.memory_format, torch.Generator)):
                return ("v", None)
            return ("v", a)

        made = tuple(template(a) for a in args)
        named = tuple((k, template(v)) for k, v in (kwargs or {}).items())
        if forms is None:
            forms = self._replayed(func, args)
        shapes = tuple((f.shape, _dtype_name(f.dtype)) for f in forms)
        node = self.graph.add_op(
            str(func), made, named, operands, shapes, self.origin(), self.point()
        )
        self.ordinal += 1
        return node

    def _replayed(self, func: Any, args: Any) -> tuple[Form, ...]:
        """Output forms of an operation replayed on graph values (after a write in place)."""

        def form(a: Any) -> Any:
            if not isinstance(a, _Value):
                return a
            shape, dtype = self.graph.node(a[0]).outputs[a[1]]
            return row_major(shape, TORCH_DTYPES[dtype])

        return _RESULTS.of(func, [form(a) for a in args], {}).forms

    def _identity(self, func: Any, args: Any, kwargs: Any) -> Any:
        value, source = self.value(args[0]), self._of(args[0])
        (form,) = self._infer(func, args, kwargs).forms
        out = self.new(form, value)
        out.tracked = _Tracked(
            value, source.storage, source.chain, source.version, self.mark, source.is_view
        )
        if func in FRESH and not isinstance(args[0], Placeholder):
            out.constant, out.tracked.storage = args[0], _Storage(value)
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
                what="with .item(), bool(), int() or the like", origin=self.origin()
            )
        with modes_off():
            return func(tensor, *args[1:])

    def _unwritten(self, tensor: Placeholder) -> bool:
        storage = self._of(tensor).storage
        return storage is not None and storage.version == 0

    # -- writes in place
    # ------------------------------------------------------------------------------------

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
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
                origin=self.origin(),
            )
        self.value(target)
        tracked = self._of(target)
        if tracked.storage is None:
            raise UnsupportedError(
                what=f"changing an argument or a weight in place (torch.{base})",
                remedy="write to a copy: x = x.clone()",
                origin=self.origin(),
            )
        if tracked.storage.apart_in not in (None, self.calls):
            raise UnsupportedError(
                what="writing a tensor that unsafe_split or unsafe_chunk took apart",
                remedy="use split or chunk",
                origin=self.origin(),
            )
        if len(args) > 1 or kwargs:
            self._check_overlap(base, tracked, (args[1:], kwargs))
        with self:
            new = decompose.functional(base, overload)(*args, **kwargs)
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
            inverse, inverse_args, needs_parent = decompose.inverse_view(
                step_func, step_args, port, shape, self.origin()
            )
            head = [_Value(self._replay(storage.base, chain[:depth]))] if needs_parent else []
            value = (self._emit(inverse, (*head, _Value(value), *inverse_args)), 0)
        storage.base, storage.version = value, storage.version + 1
        return target

    def _check_overlap(self, name: str, target: _Tracked, given: Any) -> None:
        """What is read must be all of what is written, or none."""
        for x in pytree.tree_leaves(given):
            if not isinstance(x, torch.Tensor):
                continue
            other = self._of(x)
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
                origin=self.origin(),
            )


_OF_ITSELF = ("add_", "sub_", "mul_", "div_", "copy_")  # element by element


def _elements(shape: tuple[int, ...], chain: tuple[_Step, ...]) -> list[int]:
    """Which elements of a tensor of this shape a view shows."""
    with modes_off():
        x = torch.arange(torch.Size(shape).numel()).reshape(shape)
        for func, args, port, _ in chain:
            made = func(x, *args)
            x = made[port] if isinstance(made, (list, tuple)) else made
        found: list[int] = x.reshape(-1).tolist()
    return found


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


class _Value(tuple):  # type: ignore[type-arg]
    """A graph value standing where a tensor would, in arguments of replayed operations."""


def _dtype_name(dtype: torch.dtype) -> str:
    name = DTYPE_NAMES.get(dtype)
    if name is None:
        raise UnsupportedError(
            what=f"dtype {dtype}", remedy="use " + ", ".join(DTYPE_NAMES.values())
        )
    return name


@dataclass(frozen=True)
class Trace:
    """A traced request: its graph, its tensor inputs' node ids, and what the forward returned.

    `outputs` is the returned pytree with ("t", i) for the i-th graph output and ("v", value)
    elsewhere.
    """

    graph: Graph
    outputs: pytree.PyTree
    captured: dict[str, torch.Tensor]
    reads_weights: bool
    may_branch: bool  # may the forward take another path at another size?
    escaped: bool  # does something outside still hold a tensor that was made in it?


def trace(
    forward: Callable[..., Any],
    params: dict[str, torch.Tensor],
    modules: dict[int, str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: list[str],
    values: Iterable[Any] | None = None,
) -> Trace:
    """Trace one request. `values`: what its forward will read (see `reading`).

    Every tensor in it is replaced by a placeholder of its shape and dtype; `names` gives their
    names, in walking order. Raises ForwardError, ValueReadError or UnsupportedError with the user's
    file:line.
    """
    tracer = Tracer(params, modules)
    tracer.values, tracer.reading = deque(values or ()), values is not None
    names = list(names)[::-1]

    def placeholder(leaf: torch.Tensor, _: Any) -> Placeholder:
        node = tracer.graph.add_input(names.pop(), tuple(leaf.shape), _dtype_name(leaf.dtype))
        return tracer.new(row_major(leaf.shape, leaf.dtype, leaf.device), (node, 0))

    call_args, call_kwargs = Copier(placeholder).call(args, kwargs)
    codes = CodesSeen(_TRUSTED)
    with torch.no_grad(), codes.watching():
        result = _run(tracer, forward, call_args, call_kwargs)
    out_leaves, out_spec = pytree.tree_flatten(result)
    outputs: list[Ref] = []
    kept: list[Any] = []
    for leaf in out_leaves:
        if isinstance(leaf, torch.Tensor):
            outputs.append(tracer.value(leaf))
            kept.append(("t", len(outputs) - 1))
        elif holds_tensors(leaf):
            raise UnsupportedError(
                what=f"returning an object of {type(leaf).__name__} that holds tensors",
                remedy="return tensors in tuples, lists or dicts, or register the class with "
                "torch.utils._pytree.register_pytree_node",
            )
        else:
            kept.append(("v", leaf))
    tracer.graph.outputs = outputs
    leaf = result = None
    del call_args, call_kwargs, out_leaves
    return Trace(
        tracer.graph,
        (kept, out_spec),
        tracer.captured,
        tracer.reads_weights,
        codes.may_branch(),
        any(made() is not None for made in tracer.made),
    )


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, values: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values = values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._local_scalar_dense.default:
            self._values.append(result)
        return result


class _Lists(TorchFunctionMode):
    def __init__(self, values: list[Any]) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "tolist":
            self._values.append(result)
        return result


@contextmanager
def reading() -> Iterator[list[Any]]:
    """Inside, values that are read of true tensors are listed, in order."""
    values: list[Any] = []
    with _Reads(values), _Lists(values):
        yield values


def was_written(x: Any) -> bool:
    """Was a tensor of a trace written in place?"""
    storage = x.tracked.storage if isinstance(x, Placeholder) else None
    return storage is not None and storage.version > 0


_tracing: list[Tracer] = []  # guarded by the compiler's lock on tracing


def replaying(tag: Hashable, origin: str) -> AbstractContextManager[None]:
    """See `Tracer.replaying`; for the trace that is being made, nothing outside of one."""
    return _tracing[-1].replaying(tag, origin) if _tracing else nullcontext()


def _run(tracer: Tracer, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    tracer.root = sys._getframe()
    _tracing.append(tracer)
    try:
        with _Functions(tracer), tracer:
            result = forward(*args, **kwargs)
            if inspect.isgenerator(result) and tracer.reading:
                result = list(result)
            if tracer.refused is not None:
                raise tracer.refused
            if inspect.isgenerator(result) or inspect.iscoroutine(result):
                kind = GeneratorForward if inspect.isgenerator(result) else UnsupportedError
                raise kind(
                    what="a forward that is a generator or a coroutine",
                    remedy="return the whole result",
                    origin=f"{os.path.basename(forward.__code__.co_filename)}"
                    f":{forward.__code__.co_firstlineno}",
                )
            return result
    except CellcError:
        raise
    except Exception as error:
        if tracer.refused is not None:
            raise tracer.refused from error
        raise ForwardError(str(error), kind=type(error).__name__, origin=_where(error)) from error
    finally:
        tracer.root = None  # it holds the callers' frames
        _tracing.pop()


def _where(error: BaseException) -> str:
    """file:line of the user's innermost frame in a traceback."""
    found, tb = "", error.__traceback__
    while tb is not None:
        path = tb.tb_frame.f_code.co_filename
        if not path.startswith((_TORCH, _HERE, "<string>")):
            found = f"{os.path.basename(path)}:{tb.tb_lineno}"
        tb = tb.tb_next
    return found
