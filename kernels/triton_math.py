"""Scalar functions of the generated Triton kernels.

Duty: every operation of `cellc.ops.POINTWISE` that Triton's language lacks, as formulas that run in
the interpreter and compile for NVIDIA and AMD alike. Comes in: float registers are f32 (f16 and
bf16 are widened by the printer); goes out: the same type. Imported by generated modules
only, never before a kernel is made, since it imports Triton.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, precision: tl.constexpr):
    """The interpreter would multiply bf16 as bit patterns: widen there, which is exact."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=precision)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) loses digits near 0: a series there."""
    s = x * x
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    near = 1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
    return tl.where(s < 0.0625, x * near, far)


@triton.jit
def expm1(x):
    near = 1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8 * (1.0 + x / 9))))
    near = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * near)))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """Kahan's correction of the rounding of 1 + x."""
    u = 1.0 + x
    exact = (u == 1.0) | (u == float("inf"))
    d = tl.where(exact, 1.0, u - 1.0)
    return tl.where(exact, x, tl.log(u) * (x / d))


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, log1p(tl.exp(x)))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def relu(x):
    """Of nan it is nan."""
    return tl.where(x < 0, 0, x).to(x.dtype)


@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def tan(x):
    return tl.sin(x) / tl.cos(x)


@triton.jit
def _atan_unit(t):
    """atan on [0, 1]: above tan(pi / 8) by atan(t) = pi / 4 + atan((t - 1) / (t + 1))."""
    upper = t > 0.4142135623730950
    u = tl.where(upper, (t - 1.0) / (t + 1.0), t)
    s = u * u
    p = 1.0 / 17 - s * (1.0 / 19 - s * (1.0 / 21))
    p = 1.0 / 9 - s * (1.0 / 11 - s * (1.0 / 13 - s * (1.0 / 15 - s * p)))
    p = u - u * s * (1.0 / 3 - s * (1.0 / 5 - s * (1.0 / 7 - s * p)))
    return tl.where(upper, 0.7853981633974483 + p, p)


@triton.jit
def atan(x):
    a = tl.abs(x)
    large = a > 1.0
    r = _atan_unit(tl.where(large, 1.0 / a, a))
    r = tl.where(large, 1.5707963267948966 - r, r)
    return tl.where(x < 0, -r, r)


@triton.jit
def atan2(y, x):
    a, b = tl.abs(y), tl.abs(x)
    high, low = maximum(a, b), minimum(a, b)
    t = tl.where(a == b, tl.where(a == 0, 0.0, 1.0), low / tl.where(high == 0, 1.0, high))
    r = _atan_unit(tl.where(a != a, a, tl.where(b != b, b, t)))
    r = tl.where(a > b, 1.5707963267948966 - r, r)
    r = tl.where(negative(x), 3.141592653589793 - r, r)
    return tl.where(negative(y), -r, r)


@triton.jit
def negative(x):
    """The sign bit, that of -0 included."""
    return (x < 0) | ((x == 0) & (1.0 / x < 0))


@triton.jit
def maximum(a, b):
    """A nan on either side is the result."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def minimum(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def trunc(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_even(x):
    low = tl.floor(x)
    rest = x - low
    odd = low - 2.0 * tl.floor(low * 0.5)
    up = (rest > 0.5) | ((rest == 0.5) & (odd == 1.0))
    return tl.where(up, low + 1.0, low)


@triton.jit
def fmod(a, b):
    return a % b


@triton.jit
def remainder(a, b):
    """The sign is the divisor's."""
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def floor_div(a, b):
    """torch's: (a - remainder) / b, rounded to the nearest integer."""
    q = (a - remainder(a, b)) / b
    low = tl.floor(q)
    return tl.where(b == 0, a / b, tl.where(q - low > 0.5, low + 1.0, low))


@triton.jit
def floor_div_int(a, b):
    q = a // b
    r = a - q * b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1, q)


@triton.jit
def power(x, y):
    """exp(y log|x|); for a negative x the exponent must be whole, and its parity gives the sign."""
    a = tl.abs(x)
    r = tl.exp(y * tl.log(tl.where(a == 0, 1.0, a)))
    r = tl.where(a == 0, tl.where(y > 0, 0.0, float("inf")), tl.where(a == 1.0, 1.0, r))
    r = tl.where((a == float("inf")) & (y < 0), 0.0, r)
    odd = y - 2.0 * tl.floor(y * 0.5) == 1.0
    r = tl.where((x < 0) & (tl.floor(y) != y), float("nan"), r)
    r = tl.where(odd & negative(x), -r, r)
    r = tl.where((x != x) | (y != y), x + y, tl.where(y == 1.0, x, r))
    return tl.where((y == 0) | (x == 1.0), 1.0, r)


@triton.jit
def power_int(x, y):
    """By squaring, bit after bit; of a negative exponent only +1 and -1 leave something."""
    r, base, e = tl.full(x.shape, 1, x.dtype) + 0 * y, x + 0 * y, tl.where(y < 0, -y, y) + 0 * x
    for _ in range(0, 63):
        r = tl.where(e % 2 == 1, r * base, r)
        base, e = base * base, e // 2
    return tl.where((y < 0) & (x != 1) & (x != -1), 0, r).to(x.dtype)


@triton.jit
def mul(a, b):
    """The combination of a product reduction."""
    return a * b


@triton.jit
def report(bad_ptr, wrong):
    """Mark the rows that are wrong at some column; `wrong` is [rows, columns]."""
    tl.store(bad_ptr, 1, mask=tl.max(wrong.to(tl.int32), 1) > 0)
