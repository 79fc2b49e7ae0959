"""Decompositions: composite operations rewritten as the few that rows know, while tracing.

Duty: a table from torch operations to plain Python made of simpler torch operations, run under the
tracer so that every piece keeps the program point. What is not in it is recorded as it is:
`frontends.lower` runs it through torch, always right, only slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cellc.errors import UnsupportedError

aten = torch.ops.aten
Tensor = torch.Tensor
Dims = list[int]


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    dims = list(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(dims, keepdim=True)
    centered = x - mean
    scale = torch.rsqrt((centered * centered).mean(dims, keepdim=True) + eps)
    out = centered * scale
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out, mean, scale


def _group_norm(
    x: Tensor, weight: Any, bias: Any, n: int, channels: int, rest: int, groups: int, eps: float
) -> Any:
    grouped = x.reshape(n, groups, channels // groups * rest)
    mean = grouped.mean([2], keepdim=True)
    centered = grouped - mean
    scale = torch.rsqrt((centered * centered).mean([2], keepdim=True) + eps)
    out = (centered * scale).reshape(x.shape)
    shape = [1, channels] + [1] * (x.dim() - 2)
    if weight is not None:
        out = out * weight.reshape(shape)
    if bias is not None:
        out = out + bias.reshape(shape)
    return out, mean.reshape(n, groups), scale.reshape(n, groups)


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> Any:
    shape = [1, -1] + [1] * (x.dim() - 2)
    out = (x - mean.reshape(shape)) * torch.rsqrt(var.reshape(shape) + eps)
    if weight is not None:
        out = out * weight.reshape(shape)
    if bias is not None:
        out = out + bias.reshape(shape)
    return out, mean, var


def _any_batch_norm(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    if training:
        raise UnsupportedError(what="batch norm in training mode", remedy="call model.eval()")
    return _batch_norm(x, weight, bias, mean, var, momentum, eps)


def _softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    x = x.float() if half_to_float else x
    if x.numel() == 0:  # of which there is no maximum
        return x.clone()
    e = torch.exp(x - x.amax([dim], keepdim=True)) if x.dim() else torch.exp(x - x)
    return e / e.sum([dim], keepdim=True) if x.dim() else e


def _safe_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """Of `scaled_dot_product_attention`: a row that sees nothing gives zeros."""
    x = x if dtype is None else x.to(dtype)
    nothing = (x == -math.inf).all(dim, keepdim=True)
    return torch.where(nothing, 0.0, torch.softmax(x, dim))


def _log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    x = x.float() if half_to_float else x
    if x.numel() == 0:
        return x.clone()
    shifted = x - x.amax([dim], keepdim=True)
    return shifted - torch.exp(shifted).sum([dim], keepdim=True).log()


def _logsumexp(x: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    if x.numel() == 0:
        return torch.exp(x).sum(dim, keepdim=keepdim).log()
    top = x.amax(dim, keepdim=True)
    top = torch.where(top.abs() == float("inf"), _like(x, 0), top)
    out = torch.exp(x - top).sum(dim, keepdim=True).log() + top
    if keepdim:
        return out
    for d in sorted((d % x.dim() for d in dim), reverse=True):
        out = out.squeeze(d)
    return out


def _var(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    dims = list(range(x.dim())) if dim is None or len(dim) == 0 else [d % x.dim() for d in dim]
    n = 1
    for d in dims:
        n *= x.shape[d]
    centered = x - x.mean(dims, keepdim=True)
    left = max(n - (1 if correction is None else correction), 0)
    return (centered * centered).sum(dims, keepdim=keepdim) / left


def _std(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return torch.sqrt(_var(x, dim, correction=correction, keepdim=keepdim))


def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    dims = list(range(x.dim())) if dim is None else list(dim)
    return _var(x, dim, correction=correction, keepdim=keepdim), x.mean(dims, keepdim=keepdim)


def _norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    x = x if dtype is None else x.to(dtype)
    if dim is None:
        dim = list(range(x.dim()))
    if ord == 0:
        return (x != 0).to(x.dtype).sum(dim, keepdim=keepdim)
    if ord == -float("inf"):
        return x.abs().amin(dim, keepdim=keepdim)
    if ord == 2:
        return torch.sqrt((x * x).sum(dim, keepdim=keepdim))
    if ord == 1:
        return x.abs().sum(dim, keepdim=keepdim)
    if ord == float("inf"):
        return x.abs().amax(dim, keepdim=keepdim)
    return (x.abs() ** ord).sum(dim, keepdim=keepdim) ** (1.0 / ord)


def _clamp(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    if low is not None:
        x = aten.clamp_min(x, low)
    return x if high is None else aten.clamp_max(x, high)


def _like(x: Tensor, value: Any) -> Tensor:
    return torch.full((), value, dtype=x.dtype, device=x.device)


def _pad(x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    for i in range(len(pad) // 2):
        dim = x.dim() - 1 - i
        low, high = pad[2 * i], pad[2 * i + 1]
        if low < 0 or high < 0:
            x = x.narrow(dim, max(-low, 0), x.shape[dim] - max(-low, 0) - max(-high, 0))
        pieces = [x]
        for size, front in ((low, True), (high, False)):
            if size > 0:
                shape = [*x.shape[:dim], size, *x.shape[dim + 1 :]]
                fill = torch.full(shape, value, dtype=x.dtype, device=x.device)
                pieces = [fill, *pieces] if front else [*pieces, fill]
        x = torch.cat(pieces, dim) if len(pieces) > 1 else x
    return x


def _roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        return _roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        cut = x.shape[dim] - shift % max(x.shape[dim], 1)
        if 0 < cut < x.shape[dim]:
            x = torch.cat([x.narrow(dim, cut, x.shape[dim] - cut), x.narrow(dim, 0, cut)], dim)
    return x


def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    x = x.reshape([1] * (len(repeats) - x.dim()) + list(x.shape))
    for dim, times in enumerate(repeats):
        if times != 1:
            x = torch.cat([x] * times, dim)
    return x


def _max_dim(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    return x.amax([dim], keepdim=keepdim), x.argmax(dim, keepdim=keepdim)


def _min_dim(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    return x.amin([dim], keepdim=keepdim), x.argmin(dim, keepdim=keepdim)


def _elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return torch.where(x > 0, x * scale, torch.expm1(x * input_scale) * (alpha * scale))


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    scaled = x * beta
    return torch.where(
        scaled > threshold, x, torch.log1p(torch.exp(torch.clamp(scaled, max=threshold))) / beta
    )


def _hardsigmoid(x: Tensor) -> Tensor:
    return _clamp(x + 3, 0, 6) / 6


def _hardshrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    return torch.where(x.abs() <= lambd, _like(x, 0), x)


def _log_sigmoid(x: Tensor) -> Any:
    low = torch.minimum(x, _like(x, 0))
    return low - torch.log1p(torch.exp(-x.abs())), low


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)
    out = out if alpha == 1 else out * alpha
    if beta == 0:
        return out
    return out + (bias if beta == 1 else bias * beta)


def _addmv(bias: Tensor, a: Tensor, x: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = torch.mv(a, x)
    out = out if alpha == 1 else out * alpha
    if beta == 0:
        return out
    return out + (bias if beta == 1 else bias * beta)


def _isinf(x: Tensor) -> Tensor:
    infinite: Tensor = torch.eq(x.abs(), float("inf"))
    return infinite


def _lerp(a: Tensor, b: Tensor, weight: Any) -> Tensor:
    out: Tensor = a + weight * (b - a)
    return out


def _masked_fill(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    fill = value.to(x.dtype) if isinstance(value, Tensor) else _like(x, value)
    return torch.where(mask, fill, x)


def _leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, x, x * slope)


def _square(x: Tensor) -> Tensor:
    return x * x


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * weight)


def _full_like(x: Tensor, value: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return torch.full(x.shape, value, dtype=dtype or x.dtype, device=device or x.device)


def _filled_like(value: int) -> Callable[..., Tensor]:
    return lambda x, **options: _full_like(x, value, **options)


def _new_filled(value: int) -> Callable[..., Tensor]:
    def new(
        x: Tensor, size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any
    ) -> Tensor:
        return torch.full(size, value, dtype=dtype or x.dtype, device=device or x.device)

    return new


def _new_full(
    x: Tensor, size: Sequence[int], value: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> Any:
    return torch.full(size, value, dtype=dtype or x.dtype, device=device or x.device)


def _filled(value: int) -> Callable[..., Tensor]:
    def make(
        size: Sequence[int], *_: Any, dtype: Any = None, device: Any = None, **__: Any
    ) -> Tensor:
        return torch.full(size, value, dtype=dtype or torch.get_default_dtype(), device=device)

    return make


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Of `scaled_dot_product_attention`, fused on CPUs: its result, and the logsumexp of scores."""
    scores = torch.matmul(q * (q.shape[-1] ** -0.5 if scale is None else scale), k.mT)
    if is_causal:
        rows, columns = map(torch.arange, scores.shape[-2:])
        attn_mask = rows[:, None] >= columns
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, -1) if attn_mask is None else _safe_softmax(scores, -1)
    return torch.matmul(weights, v), torch.logsumexp(scores, -1)


_TABLE: dict[str, Callable[..., Any]] = {
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "native_batch_norm": _any_batch_norm,
    "_softmax": _softmax,
    "_safe_softmax": _safe_softmax,
    "_log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "var": _var,
    "std": _std,
    "var_mean": _var_mean,
    "linalg_vector_norm": _norm,
    "clamp": _clamp,
    "hardtanh": lambda x, low=-1, high=1: _clamp(x, low, high),
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda x: x * _hardsigmoid(x),
    "hardshrink": _hardshrink,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
    "mish": lambda x: x * torch.tanh(_softplus(x)),
    "log_sigmoid_forward": _log_sigmoid,
    "_prelu_kernel": _prelu,
    "glu": _glu,
    "square": _square,
    "isinf": _isinf,
    "lerp": _lerp,
    "addcmul": lambda x, a, b, value=1: x + (a * b if value == 1 else a * b * value),
    "addcdiv": lambda x, a, b, value=1: x + (a / b if value == 1 else a / b * value),
    "masked_fill": _masked_fill,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addmv": _addmv,
    "dot": lambda a, b: (a * b).sum(),
    "vdot": lambda a, b: (a * b).sum(),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "native_dropout": lambda x, p, train: (x, torch.ones_like(x, dtype=torch.bool)),
    "constant_pad_nd": _pad,
    "roll": _roll,
    "repeat": _repeat,
    "full_like": _full_like,
    "zeros_like": _filled_like(0),
    "ones_like": _filled_like(1),
    "empty_like": _filled_like(0),
    "new_zeros": _new_filled(0),
    "new_ones": _new_filled(1),
    "new_empty": _new_filled(0),
    "new_full": _new_full,
    "zeros": _filled(0),
    "ones": _filled(1),
    "empty": _filled(0),
    "empty.memory_format": _filled(0),
}
_OVERLOADS: dict[str, Callable[..., Any]] = {"max.dim": _max_dim, "min.dim": _min_dim}


def find(func: Any) -> Callable[..., Any] | None:
    """The decomposition of a torch operation, or None where it is recorded as it is."""
    if func._overloadname in ("out", "names"):
        return None
    name = func._schema.name.removeprefix("aten::")
    return _OVERLOADS.get(f"{name}.{func._overloadname}") or _TABLE.get(name)
