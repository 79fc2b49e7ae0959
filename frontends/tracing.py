"""Tracing: one request's forward, run on placeholders, recorded as a `Graph`.

Duty: run the user's forward on shapes and dtypes alone (no data, no copy of the weights) and say
what it returned. Every torch operation goes to `frontends.tracer`; recurrences of torch's library
run as loops over their cells (`frontends.library`). Comes in: a callable, its weights, one
request's arguments. Goes out: a `Trace`, to `frontends.lower`.
"""

from __future__ import annotations

import inspect
import os
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cellc.copier import Copier
from cellc.errors import (
    CellcError,
    ForwardError,
    GeneratorForward,
    UnsupportedError,
    ValueReadError,
)
from cellc.frontends import library
from cellc.frontends.branching import CodesSeen, look_away
from cellc.frontends.placeholder import Placeholder, modes_kept, row_major
from cellc.frontends.points import HERE, TORCH, where
from cellc.frontends.traced_values import dtype_name
from cellc.frontends.tracer import Tracer
from cellc.graph import Graph, Ref
from cellc.skeleton import holds_tensors

# Code that takes no other path at another size, or is known to be right when it does.
_TRUSTED = (
    *(f + os.sep for f in (TORCH, os.path.dirname(HERE), HERE, sysconfig.get_path("stdlib"))),
    "<frozen",
)
READING_METHODS = (
    "numpy", "__array__", "tolist", "__dlpack__", "data_ptr", "apply_", "map_", "map2_",
    "__repr__", "__format__",
)  # fmt: skip


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
    identity: bool = False,
) -> Trace:
    """Trace one request. `values`: what its forward will read (see `reading`); `identity`: tensors
    that are one are so in the trace.

    Every tensor in it is replaced by a placeholder of its shape and dtype; `names` gives their
    names, in walking order. Raises ForwardError, ValueReadError or UnsupportedError with the user's
    file:line.
    """
    tracer = Tracer(params, modules)
    tracer.values, tracer.reading = deque(values or ()), values is not None
    names = list(names)[::-1]
    made: dict[int, Placeholder] = {}  # of tensors, by id

    def placeholder(leaf: torch.Tensor, _: Any) -> Placeholder:
        node = tracer.graph.add_input(names.pop(), tuple(leaf.shape), dtype_name(leaf.dtype))
        if not identity or id(leaf) not in made:
            new = tracer.new(row_major(leaf.shape, leaf.dtype, leaf.device), (node, 0))
            made[id(leaf)] = new
        return made[id(leaf)]

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
    made.clear()
    del call_args, call_kwargs, out_leaves
    return Trace(
        tracer.graph,
        (kept, out_spec),
        tracer.captured,
        tracer.reads_weights,
        codes.may_branch(),
        any(one() is not None for one in tracer.made),
    )


class _Functions(TorchFunctionMode):
    """Marks outermost torch calls, and runs library recurrences as loops over their cells."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer = self.tracer
        if tracer.depth == 0:
            tracer.points.ordinal = 0
            tracer.calls += 1
        name = getattr(func, "__name__", "")
        if name in READING_METHODS and isinstance(args[0], Placeholder):
            if name == "tolist" and tracer.values:
                return tracer.values.popleft()
            raise tracer.refuse(
                ValueReadError(what=f"with .{name}()", origin=tracer.points.origin())
            )
        if name == "__deepcopy__":
            return args[0].clone()
        if name == "__set__" and func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise tracer.refuse(
                UnsupportedError(
                    what="assigning to .data", remedy="use copy_", origin=tracer.points.origin()
                )
            )
        if name == "_pack_padded_sequence":
            raise tracer.refuse(library.packed(tracer.points.origin()))
        loop = library.LOOPS.get(name)
        if loop is not None and tracer.depth == 0:
            with self:
                return loop(*args, **(kwargs or {}), scope=tracer.points.scope)
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


_tracing: list[Tracer] = []  # guarded by the compiler's lock on tracing


def replaying(tag: Hashable, origin: str) -> AbstractContextManager[None]:
    """See `Points.replaying`; for the trace that is being made, nothing outside of one."""
    return _tracing[-1].points.replaying(tag, origin) if _tracing else nullcontext()


def _run(tracer: Tracer, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    tracer.points.root = sys._getframe()
    _tracing.append(tracer)
    try:
        with modes_kept(), _Functions(tracer), tracer:
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
        raise ForwardError(str(error), kind=type(error).__name__, origin=where(error)) from error
    finally:
        tracer.points.root = None  # it holds the callers' frames
        _tracing.pop()
