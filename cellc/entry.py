"""`cellc.compile`: options checked, a device and a backend chosen, a `Compiled` made.

Duty: everything that is decided before the first request.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cellc import env
from cellc.compiled import Compiled
from cellc.errors import BackendError, UnsupportedError
from cellc.garbage import put_off
from cellc.launch import Backend
from cellc.modules import named_tensors
from cellc.options import BackendName, Options, check_counts, make_options


def compile(
    model: nn.Module | Callable[..., Any],
    *,
    backend: BackendName = "auto",
    device: torch.device | str | Sequence[torch.device | str] | None = None,
    dtype: torch.dtype | None = None,
    batch_dim: int | None = None,
    carry: Mapping[str, str] | None = None,
    max_batch: int | None = None,
    max_queue: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a model: its cells are found, fused, and batched across all requests in flight.

    model: any nn.Module, or a function of tensors and Python structures. Nothing is traced until
    the first request. backend: "triton" (GPU), "cpp" (CPU), "eager" (plain torch calls), or "auto".
    device, dtype: where and in what the cells compute; by default the model's own. Others copy the
    weights. A list of devices is one worker each: ["cuda:0", "cuda:1"], or ["cpu", "cpu"], which
    share the cores; so do those of options={"workers": 2}. batch_dim: a call whose tensors have B
    in that dimension is B requests. max_batch: most rows of one cell in a step (512, or 2048 where
    nobody can join). max_queue: most waiting requests; past it `Overloaded`.
    carry: for sessions, which argument of a step is which output of the step before:
    {"state": "1"}, or a path as "1.0" or "state.h".
    options: see `Options`.

    >>> import torch, cellc
    >>> model = torch.nn.GRU(4, 8)
    >>> compiled = cellc.compile(model, backend="eager")
    >>> y, h = compiled(torch.randn(5, 1, 4))
    >>> y.shape, h.shape
    (torch.Size([5, 1, 8]), torch.Size([1, 1, 8]))
    >>> compiled.close()
    """
    if isinstance(model, type):
        raise UnsupportedError(
            what=f"the class {model.__name__}", remedy=f"pass an instance: {model.__name__}(...)"
        )
    if batch_dim is not None and (type(batch_dim) is not int or batch_dim < 0):
        raise UnsupportedError(what=f"batch_dim={batch_dim!r}", remedy="use 0 or another dimension")
    if not callable(model):
        raise UnsupportedError(
            what=f"a {type(model).__name__}", remedy="pass an nn.Module or a function"
        )
    _check(model, dtype, carry)
    env.check()
    chosen = make_options(options)
    check_counts(max_batch=max_batch, max_queue=max_queue)
    source = model
    places = _places(model, device, chosen.workers)
    place = places[0]
    if dtype is not None or _moves(model, place):
        model = _copied(model, dtype, place)
    return put_off(
        lambda: Compiled(
            model,
            _backends(backend, places, chosen),
            places,
            chosen,
            batch_dim=batch_dim,
            max_batch=max_batch,
            max_queue=max_queue,
            dtype=dtype,
            source=source,
            carry=carry,
        )
    )


def _check(model: Any, dtype: Any, carry: Any) -> None:
    """Arguments of kinds that nothing can be made of."""
    if isinstance(model, Compiled):
        raise UnsupportedError(
            what="compiling a compiled model", remedy="use it as it is, or pass the model itself"
        )
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise UnsupportedError(
            what="a TorchScript model", remedy="pass the nn.Module that it was scripted from"
        )
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise UnsupportedError(
            what=f"dtype={dtype!r}", remedy="give one of torch's, as torch.bfloat16"
        )
    if carry is not None and not isinstance(carry, Mapping):
        raise UnsupportedError(
            what=f"carry={carry!r}",
            remedy="name the argument and the output that it is: {'state': '1'}",
        )


def _places(
    model: Any,
    device: torch.device | str | Sequence[torch.device | str] | None,
    workers: int | None,
) -> list[torch.device]:
    """The device of each worker."""
    if device is None or isinstance(device, (str, torch.device)):
        return [_device(model, device)] * (workers or 1)
    places = [_named(one) for one in device]
    if not places or len({p.type for p in places}) > 1:
        raise UnsupportedError(
            what=f"device={device!r}", remedy="give one device a worker, all CPUs or all GPUs"
        )
    if workers is not None and workers != len(places):
        raise UnsupportedError(
            what=f"{workers} workers on {len(places)} devices",
            remedy="leave options={'workers': ..} out: each device in the list is a worker",
        )
    return places


def _backends(name: BackendName, places: Sequence[torch.device], options: Options) -> list[Backend]:
    """One a worker; CPU workers share theirs, whose kernels hold nothing of a launch."""
    first = make_backend(name, places[0], options)
    shared = first.name != "triton"
    return [first, *(first if shared else make_backend(name, p, options) for p in places[1:])]


def _device(model: Any, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return _named(device)
    first = next(iter(named_tensors(model).values()), None)
    return first.device if first is not None else torch.device("cpu")


def _named(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UnsupportedError(
            what=f"device={device!r}", remedy="use 'cpu', 'cuda' or 'cuda:0'"
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            what=f"device={str(device)!r} where torch finds no GPU", remedy="use device='cpu'"
        )
    return found


def _moves(model: Any, device: torch.device) -> bool:
    return any(t.device.type != device.type for t in named_tensors(model).values())


def _copied(model: Any, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UnsupportedError(
            what="dtype or device for a function",
            remedy="convert its modules yourself: module.to(...)",
        )
    return copy.deepcopy(model).to(device=device, dtype=dtype)


_warned: set[str] = set()


def make_backend(name: BackendName, device: torch.device, options: Options) -> Backend:
    """A backend by name; "auto" takes what the device and the machine offer."""
    if name == "auto":
        if device.type == "cuda":
            return make_backend("triton", device, options)
        try:
            return make_backend("cpp", device, options)
        except BackendError as error:
            if "cpp" not in _warned:
                _warned.add("cpp")
                warnings.warn(f"cellc runs its slow eager backend: {error}", stacklevel=3)
            return make_backend("eager", device, options)
    if name == "eager":
        from cellc.kernels.eager import EagerBackend

        if options.weights:
            raise UnsupportedError(
                what=f"weights={options.weights!r} on the eager backend",
                remedy="use backend='cpp' or 'triton', or weights=None",
            )
        return EagerBackend()
    if name == "cpp":
        from cellc.kernels.cpp import CppBackend

        if device.type != "cpu":
            raise BackendError("runs on CPUs; pass device='cpu' or backend='triton'", backend="cpp")
        return CppBackend(options.weights)
    if name == "triton":
        from cellc.kernels.triton_backend import TritonBackend

        precision = "tf32" if options.tf32 else "ieee"
        return TritonBackend(device, {"input_precision": precision, "weights": options.weights})
    raise UnsupportedError(what=f"backend {name!r}", remedy="use auto, triton, cpp or eager")
