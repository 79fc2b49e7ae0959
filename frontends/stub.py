"""Stubs: what a forward runs on while its structure is unfolded.

Duty: objects that stand for a request's tensors and numbers, and know a shape and a dtype only. A
`Stub` is one row; a `Stack` is a tensor whose first dimension is a list of rows, so that indexing,
stacking and reversing it moves nothing; a `Number` is a Python number that is data as long as it
only becomes a tensor. All they do is told to the `Recorder` of `frontends.unfold`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from cellc.errors import UnsupportedError
from cellc.frontends.askers import asks_for_class

_CPU = torch.device("cpu")


class StubType:
    """Shape and dtype of a stub; one object each, so that identity is equality."""

    __slots__ = ("device", "dtype", "shape", "size")
    _made: dict[tuple[Any, ...], StubType] = {}

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.size = torch.Size(shape)

    @classmethod
    def of(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> StubType:
        place = device if device is not None else _CPU
        key = (tuple(shape), dtype, place)
        found = cls._made.get(key)
        if found is None:
            found = cls._made[key] = cls(tuple(shape), dtype, place)
        return found

    def __repr__(self) -> str:
        return f"{self.dtype}{list(self.shape)}".removeprefix("torch.")


class Target(Protocol):
    """Who is told what happens to stubs."""

    writing: bool  # are tensors written in place

    def copied(self, made: Any) -> Any: ...

    def function(self, func: Any, args: Any, kwargs: Any, frame: Any) -> Any: ...

    def read(self, name: str, x: Any, frame: Any) -> Any: ...

    def text(self, x: Any) -> str: ...

    def write(self, name: str, x: Any, args: Any, kwargs: Any, frame: Any) -> Any: ...

    def fold(self, structure: Any, node: Any, leaf: Any, nodes: Any, leaves: Any) -> Any: ...


class _State:
    target: Target | None = None  # who runs a forward on stubs now
    learning = False  # is an operation traced by itself now
    marked_calls = 0  # of functions marked `@cellc.cell`, ever
    ended: BaseException | None = None  # what ended the forward that runs, whoever catches it

    def end(self, error: BaseException) -> None:
        if self.target is not None and self.ended is None:
            self.ended = error


current = _State()


class NumberSteers(BaseException):
    """Python code used the number of row `row` as a value: numbers at its place are structure.

    No Exception, so that no handler in the forward hides it.
    """

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row
        current.end(self)


class CannotUnfold(BaseException):
    """The forward does what only operator-level tracing handles; `origin` says where."""

    def __init__(self, reason: str, origin: str = "") -> None:
        super().__init__(f"{reason} ({origin})" if origin else reason)
        current.end(self)


def _tell(func: Any, args: Any, kwargs: Any) -> Any:
    target = current.target
    if target is None:
        raise _outside()
    return target.function(func, args, kwargs, sys._getframe(2))


def _outside() -> BaseException:
    if current.learning:
        return CannotUnfold("a value of the request is used outside of its forward")
    return UnsupportedError(
        what="a value of an earlier request, kept by the model,",
        remedy="pass it in as an argument",
    )


class Stub:
    """One row of a request in flight: a whole tensor of known shape. `place`, where it is set, is
    how it shows memory (`frontends.memory`).
    """

    __slots__ = ("__weakref__", "id", "place", "type")
    place: Any

    def __init__(self, id: int, type: StubType) -> None:
        self.id, self.type = id, type

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asks = asks_for_class(sys._getframe(1))
        if asks is None:
            raise CannotUnfold(
                "isinstance is called with an expression; give it a name", _origin(sys._getframe(1))
            )
        return torch.Tensor if asks else type(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = current.target
        if target is None:
            raise _outside()
        return target.function(func, args, kwargs or {}, sys._getframe(1))

    # -- what it knows --

    @property
    def shape(self) -> torch.Size:
        return self.type.size

    @property
    def dtype(self) -> torch.dtype:
        return self.type.dtype

    @property
    def device(self) -> torch.device:
        return self.type.device

    @property
    def ndim(self) -> int:
        return len(self.type.shape)

    requires_grad = False
    is_cuda = property(lambda self: self.type.device.type == "cuda")
    is_sparse = is_quantized = is_nested = False
    grad = None
    layout = torch.strided

    def size(self, dim: int | None = None) -> Any:
        return self.type.size if dim is None else self.type.shape[dim]

    def dim(self) -> int:
        return len(self.type.shape)

    def numel(self) -> int:
        return self.type.size.numel()

    nelement, ndimension = numel, dim

    def is_floating_point(self) -> bool:
        return self.type.dtype.is_floating_point

    def detach(self) -> Stub:
        return self

    def contiguous(self, *args: Any, **kwargs: Any) -> Any:
        if current.target is None or not current.target.writing:
            return self
        return _tell(torch.Tensor.contiguous, (self, *args), kwargs)

    def _same(self) -> Stub:
        return self

    def _no_data(self, _: Any) -> None:
        raise CannotUnfold("assigning to .data; use copy_", _origin(sys._getframe(1)))

    data = property(_same, _no_data)
    __copy__ = _same

    def __len__(self) -> int:
        if not self.type.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.type.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return iter([_tell(torch.Tensor.__getitem__, (self, i), {}) for i in range(len(self))])

    def __hash__(self) -> int:
        return id(self)

    def __contains__(self, x: Any) -> bool:
        return bool((self == x).any())

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch.Tensor, name)  # AttributeError where tensors have none
        if name.endswith("_") and not name.endswith("__"):
            return lambda *args, **kwargs: _write(name, self, args, kwargs)
        if not callable(found):
            return _tell(found.__get__, (self,), {})

        def method(*args: Any, **kwargs: Any) -> Any:
            return _tell(found, (self, *args), kwargs)

        return method

    def __repr__(self) -> str:
        target = current.target
        if target is None or current.ended is not None:
            return f"<a tensor of the request: {self.type}>"
        return target.text(self)

    def __format__(self, spec: str) -> str:
        return format(str(self) if self.type.shape else self.item(), spec)


def _forwarding(name: str) -> Callable[..., Any]:
    function = getattr(torch.Tensor, name)

    def operator(self: Stub, *args: Any) -> Any:
        return _tell(function, (self, *args), {})

    return operator


for _name in (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod pow rpow matmul rmatmul "
    "neg pos abs invert and or xor rand ror rxor eq ne lt le gt ge getitem"
).split():
    if hasattr(torch.Tensor, f"__{_name}__"):
        setattr(Stub, f"__{_name}__", _forwarding(f"__{_name}__"))


def _reading(name: str) -> Callable[..., Any]:
    def read(self: Stub, *_: Any, **__: Any) -> Any:
        target = current.target
        if target is None:
            raise _outside()
        return target.read(name, self, sys._getframe(1))

    return read


for _name in "__bool__ __int__ __float__ __index__ item tolist numpy".split():
    setattr(Stub, _name, _reading(_name.strip("_")))


def _write(name: str, x: Stub, args: Any, kwargs: Any) -> Any:
    target = current.target
    if target is None:
        raise _outside()
    return target.write(name, x, args, kwargs, sys._getframe(2))


def _writing(name: str) -> Callable[..., Any]:
    def write(self: Stub, *args: Any) -> Any:
        return _write(name, self, args, {})

    return write


for _name in (
    "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift"
).split():
    setattr(Stub, f"__{_name}__", _writing(f"__{_name}__"))


class Stack(Stub):
    """A tensor whose rows along the first dimension are stubs of one type."""

    __slots__ = ("_items", "first", "inner")

    def __init__(self, items: Sequence[Stub], first: int | None = None) -> None:
        inner = items[0].type
        super().__init__(-1, StubType.of((len(items), *inner.shape), inner.dtype, inner.device))
        self._items: list[Stub] | None = list(items)
        self.first, self.inner = first, inner

    @classmethod
    def of_rows(cls, first: int, count: int, inner: StubType) -> Stack:
        """Of rows that lie side by side; their stubs are made when they are asked for."""
        made = cls.__new__(cls)
        made.id, made.type = -1, StubType.of((count, *inner.shape), inner.dtype, inner.device)
        made._items, made.first, made.inner = None, first, inner
        return made

    @property
    def items(self) -> list[Stub]:
        if self._items is None:
            assert self.first is not None
            rows = range(self.first, self.first + self.type.shape[0])
            self._items = [Stub(row, self.inner) for row in rows]
        return self._items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int:
            return self.items[index]
        if type(index) is slice and (chosen := self.items[index]):
            return Stack(chosen)
        if type(index) is tuple and index and type(index[0]) is int:
            rest = index[1:]
            inner: Any = self.items[index[0]]
            return inner[rest[0] if len(rest) == 1 else rest] if rest else inner
        return _tell(torch.Tensor.__getitem__, (self, index), {})

    def unbind(self, dim: int = 0) -> Any:
        if dim in (0, -self.ndim):
            return tuple(self.items)
        return _tell(torch.Tensor.unbind, (self, dim), {})

    def flip(self, *dims: Any) -> Any:
        target = current.target
        if dims in ((0,), ((0,),), ([0],)) and target is not None:
            return target.copied(Stack(self.items[::-1]))
        return _tell(torch.Tensor.flip, (self, *dims), {})


class Number:
    """A Python number of the request, which is row `row` as a tensor.

    It passes `isinstance` checks for its kind; any use of its value raises `NumberSteers`.
    """

    __slots__ = ("row",)
    kind: type = int
    type: StubType

    def __init__(self, row: int) -> None:
        self.row = row

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.kind

    @property
    def stub(self) -> Stub:
        return Stub(self.row, self.type)

    def __getattr__(self, name: str) -> Any:
        getattr(self.kind, name)  # AttributeError where such numbers have none
        raise NumberSteers(self.row)


def _steering(name: str) -> Callable[..., Any]:
    reflected = name in ("add", "sub", "mul", "truediv")

    def used(self: Number, *others: Any) -> Any:
        if reflected and type(others[0]) in (Stub, Stack):
            return NotImplemented  # the tensor's own operator takes it as data
        raise NumberSteers(self.row)

    return used


for _name in (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow neg pos abs "
    "and or xor rand ror rxor lshift rshift eq ne lt le gt ge bool int float index hash repr str "
    "format round invert divmod"
).split():
    setattr(Number, f"__{_name}__", _steering(_name))


class IntNumber(Number):
    """An int of the request."""

    __slots__ = ()
    type = StubType.of((), torch.int64)


class FloatNumber(Number):
    """A float of the request."""

    __slots__ = ()
    kind = float
    type = StubType.of((), torch.float64)


def _origin(frame: Any) -> str:
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
