"""Shapes: what an operation on placeholders gives, from shapes and dtypes alone.

Duty: the forms (shape, strides, dtype, device) of an operation's results. Used by
`frontends.tracer`. An operation is run once on torch's own meta tensors for each combination of its
arguments' forms, and what came out is kept, so that the steps of a loop cost a look-up each. Many
of torch's meta kernels are Python that imports sympy or torch._dynamo, which takes a second or
three: the commonest operations have rules of their own here, others that are named here run on
zeros in memory while those are few.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from cellc.frontends.placeholder import Form, form_of, modes_off, row_major

MAX_RESULTS = 1 << 16  # kept; those made first are dropped
_ANY_STRIDES = ("mm", "bmm", "mv", "embedding")
_TENSOR = object()
# Whose results' shapes do not depend on data, and which zeros suit.
_ON_ZEROS = {
    *("argmax", "argmin", "topk", "sort", "cumsum", "cumprod", "_softmax", "_log_softmax"),
    *("native_layer_norm", "native_group_norm", "sum", "prod", "amax", "amin", "any", "all", "max"),
    *("min", "var", "std", "logsumexp", "linalg_vector_norm", "gather", "scatter", "scatter_add"),
    *("index_add", "flip", "roll", "tril", "triu", "dot", "repeat", "glu", "addmm", "baddbmm"),
    *("select_scatter", "slice_scatter", "convolution", "avg_pool2d", "max_pool2d_with_indices"),
    *("index", "index_put"),  # but not by masks
}
_MAX_ZEROS, _MASKS = 1 << 18, (torch.bool, torch.uint8)


@dataclass(frozen=True, slots=True)
class Result:
    """What an operation gives: its tensors' forms, and which are views of its first tensor."""

    forms: tuple[Form, ...]
    views: tuple[bool, ...]
    leaves: tuple[Any, ...]  # the results flattened, _TENSOR where a tensor stands
    spec: Any  # torch pytree of the results, None for one bare tensor

    def build(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The operation's results with `tensors` in them."""
        if self.spec is None:
            return tensors[0]
        left = iter(tensors)
        leaves = [next(left) if leaf is _TENSOR else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


class Results:
    """What operations give, by operation and forms of the arguments."""

    def __init__(self) -> None:
        self._known: OrderedDict[Any, Result] = OrderedDict()

    def of(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Result:
        """Raises what torch raises for such shapes; NotImplementedError where they do not tell.

        A `Form` may stand for a tensor.
        """
        named = _key(tuple(kwargs.items())) if kwargs else None
        key = (func, torch.get_default_dtype(), _key(args), named)
        try:
            found = self._known.get(key)
        except TypeError:  # an argument that is no key: a generator
            return _result(func, args, kwargs)
        if found is None:
            found = self._known[key] = _result(func, args, kwargs)
            if len(self._known) > MAX_RESULTS:
                self._known.popitem(last=False)
        return found


def _key(a: Any) -> Any:
    if isinstance(a, (torch.Tensor, Form)):
        return form_of(a)
    if isinstance(a, (list, tuple)):
        return tuple(map(_key, a))
    if isinstance(a, (bool, int, float)):
        return type(a), a
    return a


def _result(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Result:
    form = _ruled(func, args, kwargs)
    if form is not None:
        return Result((form,), (False,), (_TENSOR,), None)
    return _run(func, args, kwargs)


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Result:
    """Run an operation on meta tensors, or on zeros."""
    place = "cpu" if _suits_zeros(func, args, kwargs) else "meta"
    metas: list[torch.Tensor] = []
    forms: list[Form] = []
    asked: list[torch.device] = []

    def meta(a: Any) -> Any:
        if isinstance(a, (torch.Tensor, Form)):
            form = form_of(a)
            forms.append(form)
            metas.append(_stand_in(form, place))
            return metas[-1]
        if isinstance(a, (list, tuple)):
            return type(a)(map(meta, a))
        if isinstance(a, torch.device):
            asked.append(a)
            return torch.device(place)
        return a

    with modes_off(), torch.no_grad():
        given = [meta(a) for a in args]
        named = {k: meta(v) for k, v in kwargs.items()}
        device = asked[0] if asked else _device(forms)
        if not forms and any(a.name == "device" for a in func._schema.arguments):
            named["device"] = torch.device(place)
        out = func(*given, **named)
    leaves, spec = pytree.tree_flatten(out)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    first = metas[0].untyped_storage()._cdata if metas else None
    return Result(
        tuple(form_of(t)._replace(device=device) for t in tensors),
        tuple(t.untyped_storage()._cdata == first for t in tensors),
        tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
        None if isinstance(out, torch.Tensor) else spec,
    )


def _stand_in(form: Form, place: str) -> torch.Tensor:
    if place == "meta":
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=place)
    last = sum((n - 1) * step for n, step in zip(form.shape, form.stride, strict=True))
    return torch.zeros(max(last, 0) + 1, dtype=form.dtype).as_strided(form.shape, form.stride)


def _suits_zeros(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    name = func._schema.name.removeprefix("aten::")
    if name not in _ON_ZEROS or func._schema.is_mutable:
        return False
    forms = [form_of(a) for a in pytree.tree_leaves((args, kwargs)) if _is_tensor(a)]
    masks = name.startswith("index") and any(f.dtype in _MASKS for f in forms[1:])
    return not masks and sum(math.prod(form.shape) for form in forms) <= _MAX_ZEROS


def _device(forms: Sequence[Form]) -> torch.device:
    """Where the results are.

    A compiled model computes on one device: what its forward makes without naming one, as by
    `torch.zeros`, counts as being there.
    """
    rows = [form for form in forms if form.shape] or list(forms)
    return next((f.device for f in rows if f.device.type != "cpu"), torch.device("cpu"))


# -- rules: None says that torch is asked all the same --


Rule: TypeAlias = "Callable[..., tuple[int, ...] | None]"


def _ruled(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Form | None:
    """The one result of a common operation on tensors of one device, which is row-major."""
    name = func._schema.name.removeprefix("aten::")
    rule = _broadcast if torch.Tag.pointwise in func.tags else _RULES.get(name)
    if rule is None or func._schema.is_mutable or len(func._schema.returns) != 1:
        return None
    tensors = [form_of(a) for a in pytree.tree_leaves((args, kwargs)) if _is_tensor(a)]
    if not tensors or any(f.device != tensors[0].device for f in tensors):
        return None
    if name not in _ANY_STRIDES and not all(map(_ordered, tensors)):
        return None
    if rule is not _broadcast and not _dtypes_fit(name, [f.dtype for f in tensors]):
        return None
    shape = rule(*(_shapes(a) for a in args))
    if shape is None:
        return None
    return row_major(shape, _dtype(func, name, args, kwargs, tensors), tensors[0].device)


def _dtypes_fit(name: str, dtypes: Sequence[torch.dtype]) -> bool:
    if name == "embedding":
        if dtypes[1] not in (torch.int64, torch.int32):  # torch 2.11's meta kernel lets it pass
            raise RuntimeError(
                "Expected tensor for argument #1 'indices' to have one of the following scalar "
                f"types: Long, Int; but got {dtypes[1]} instead"
            )
        return True
    same = len(set(dtypes)) == 1
    if name in ("mm", "bmm", "mv") and not same:  # torch's meta kernels let it pass
        first, second = (str(d).removeprefix("torch.") for d in dtypes[:2])
        raise RuntimeError(f"expected both to have the same dtype, but got: {first} != {second}")
    return same


def _is_tensor(a: Any) -> bool:
    return isinstance(a, (torch.Tensor, Form))


def _ordered(form: Form) -> bool:
    """Do its dimensions lie in row-major order in memory, gaps and repeats aside?"""
    steps = [step for n, step in zip(form.shape, form.stride, strict=True) if n > 1 and step]
    return steps == sorted(steps, reverse=True)


def _shapes(a: Any) -> Any:
    if _is_tensor(a):
        return form_of(a).shape
    return [_shapes(x) for x in a] if isinstance(a, (list, tuple)) else a


def _dtype(
    func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Form]
) -> torch.dtype:
    """Pointwise: that of the operation run on one element. Others keep the first tensor's."""
    if torch.Tag.pointwise not in func.tags and name != "mean":
        return tensors[0].dtype

    def one(a: Any) -> Any:
        if not _is_tensor(a):
            return a
        form = form_of(a)
        return torch.ones((1,) * len(form.shape), dtype=form.dtype)

    with modes_off(), torch.no_grad():
        made: torch.Tensor = func(*map(one, args), **{k: one(v) for k, v in kwargs.items()})
    return made.dtype


def _broadcast(*args: Any) -> tuple[int, ...] | None:
    shape: list[int] = []
    for sizes in (a for a in args if isinstance(a, tuple)):
        shape = [1] * (len(sizes) - len(shape)) + shape
        for i in range(1, len(sizes) + 1):
            if sizes[-i] != 1 and shape[-i] not in (1, sizes[-i]):
                return None
            shape[-i] = shape[-i] if sizes[-i] == 1 else sizes[-i]
    return tuple(shape)


def _product(rank: int) -> Rule:
    def rule(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
        fits = len(a) == len(b) == rank and a[:-2] == b[:-2] and a[-1] == b[-2]
        return (*a[:-1], b[-1]) if fits else None

    return rule


def _mv(a: tuple[int, ...], x: tuple[int, ...]) -> tuple[int, ...] | None:
    return a[:1] if len(a) == 2 and a[1:] == x else None


def _embedding(weight: tuple[int, ...], index: tuple[int, ...], *_: Any) -> tuple[int, ...]:
    return (*index, *weight[1:])


def _cat(parts: Sequence[tuple[int, ...]], dim: int = 0) -> tuple[int, ...] | None:
    rank = len(parts[0])
    if not -rank <= dim < rank or any(len(p) != rank for p in parts):
        return None
    dim %= rank
    if any(p[:dim] + p[dim + 1 :] != parts[0][:dim] + parts[0][dim + 1 :] for p in parts):
        return None
    return (*parts[0][:dim], sum(p[dim] for p in parts), *parts[0][dim + 1 :])


def _stack(parts: Sequence[tuple[int, ...]], dim: int = 0) -> tuple[int, ...] | None:
    rank = len(parts[0]) + 1
    if not -rank <= dim < rank or any(p != parts[0] for p in parts):
        return None
    dim %= rank
    return (*parts[0][:dim], len(parts), *parts[0][dim:])


def _reduce(x: tuple[int, ...], dims: Any = None, keep: bool = False) -> tuple[int, ...] | None:
    rank = len(x)
    every = dims is None or dims == []
    chosen = range(rank) if every else [dims] if isinstance(dims, int) else dims
    if any(not -rank <= d < rank for d in chosen):
        return None
    gone = {d % rank for d in chosen}
    return tuple(1 if d in gone else n for d, n in enumerate(x) if keep or d not in gone)


_RULES: dict[str, Rule] = {
    "mm": _product(2),
    "bmm": _product(3),
    "mv": _mv,
    "embedding": _embedding,
    "cat": _cat,
    "stack": _stack,
    "mean": _reduce,
}
