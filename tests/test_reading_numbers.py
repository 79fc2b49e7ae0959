"""Numbers read from tensors are Python's: what is computed with them, and what it raises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import cellc

INTS = [
    *([1, 2, 3], [5, -7, 2], [0, 0, 0], [-3, -4, 1], [9, 9, 9], [1, -2, 0], [7, 1, 4, 1]),
    *([2**40, 5, 1], [2**62, 2**62, 7], [-(2**63), 0, 0], [2**63 - 1, 1, 0]),
]
SMALL = [torch.tensor(x) for x in INTS[:7]]
LARGE = [torch.tensor(x) for x in INTS]
FLOATS = [
    torch.tensor(x)
    for x in (
        *([3.1, -0.6, -4.4], [2.5, 2.0, -7.0], [-3.0, 2.0, 0.5], [0.3, -1.2, 1.0], [0.0, 0.0, 0.0]),
        *([-0.0, 1.0, 0.0], [math.nan, 1.0, 2.0], [math.inf, -1.0, 2.0], [-8.5, 0.25, 3.0, 1.0]),
    )
]


def alike(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    if isinstance(want, dict):
        alike(list(got.items()), list(want.items()))
    elif isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            alike(a, b)
    elif isinstance(want, (Tensor, float)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    else:
        assert got == want


def outcome(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    try:
        return function(x.clone())
    except Exception as error:
        return error


def check(function: Callable[[Tensor], Any], requests: Sequence[Tensor]) -> None:
    """As eager does, in two orders, each twice."""
    want = [outcome(function, x) for x in requests]
    for step in (1, -1):
        with cellc.compile(function, backend="eager") as compiled:
            for _ in range(2):
                results = compiled.map(requests[::step], return_exceptions=True)
                for x, got, wanted in zip(requests[::step], results, want[::step], strict=True):
                    if isinstance(wanted, Exception):
                        assert type(got) is type(wanted), (x, got, wanted)
                        assert str(got).split("\nin request")[0] == str(wanted)
                    else:
                        alike(got, wanted)


# -- ints --


def remainder(x: Tensor) -> Any:
    return x.sum().item() % 3


def grows(x: Tensor) -> Any:
    h = 0
    for t in x:
        h = h * 31 + t.item()
    return h, h % 1000


def hashed(x: Tensor) -> Any:
    h = 7
    for t in x:
        h = (h * 1000003 + t.item()) % 1000000007
    return h


def powers(x: Tensor) -> Any:
    n, m = x[0].item(), x[1].item()
    return n * n, n * n * n, n * n > 100, n**2, 2 ** abs(m % 5), pow(n, 3, 7)


def arithmetic(x: Tensor) -> Any:
    n, m = x[0].item(), x[1].item()
    whole = n + m, n - m, n * m, -n, +n, abs(n), n + 1, 5 - n, n % 7, n % -7, n // 4, n // -4
    bits = n & 3, n | 8, n ^ m, n << 1, ~n
    return whole, bits, divmod(n, 3), round(n), round(n, -1), math.trunc(n), n / 4


def comparisons(x: Tensor) -> Any:
    n, m = x[0].item(), x[1].item()
    mixed = n < 2.5, n > -0.5, n == 2.0, n < 2**70, n <= math.inf, n == math.nan, 0 < n < 10
    return n < m, n == m, n >= m, mixed, n < 2**53 + 0.0, n == "a", n in (1, 5), not n


def divided(x: Tensor) -> Any:
    n, m = x[0].item(), x[1].item()
    return n // m, n % m, n / m, divmod(m, n)


def inverse(x: Tensor) -> Any:
    return 1 / x[0].item()


def parts_of_five(x: Tensor) -> Any:
    return 5 // x[0].item()


def rest_of_five(x: Tensor) -> Any:
    return 5 % x[0].item()


def by_a_bool(x: Tensor) -> Any:
    return 3 / (x > 0).any().item()


def bools(x: Tensor) -> Any:
    a, b = (x[0] > 0).item(), (x[1] > 0).item()
    made = a + b, a * 3, -a, a & b, a | b, a ^ b, ~a, a / 2, sum([a, b, a]), abs(a), +a, round(a)
    return made, a == b, a < b, a > 0.5, a + 1.5, not a


def collatz(x: Tensor) -> Any:
    n, count = abs(x.sum().item()) % 50, 0
    while n != 1 and count < 30:
        n, count = n // 2 if n % 2 == 0 else 3 * n + 1, count + 1
    return count, n


# -- floats --


def floats(x: Tensor) -> Any:
    a, b = x[0].item(), x[1].item()
    made = a + b, a - b, a * b, -a, abs(a), a + 1, 2 * a, 1 - a, min(a, b), max(a, b)
    return made, a < b, a == 2.5, a > 1, a < math.inf


def float_division(x: Tensor) -> Any:
    a, b = x[0].item(), x[1].item()
    return a // b, a % b, divmod(a, b), a / b, 1 % b, a // 2, -7 // b, a % 1.0


def rounded(x: Tensor) -> Any:
    a = x[0].item()
    return round(a), round(a, 1), int(a), math.floor(a), math.ceil(a), math.trunc(a)


def texts(x: Tensor) -> Any:
    a = x[0].item()
    return math.copysign(1, a), str(a), f"{a:.3f}", f"{a:8}", a.is_integer()


# -- as Python's own --


def places(x: Tensor) -> Any:
    n = int(abs(x[0].item())) % 4
    few = list(range(5))
    return [i for i in range(n)], x[:n], x[n:], "ab" * n, [0] * n, few[n], few[:n], few[-n - 1]


def lists(x: Tensor) -> Any:
    numbers = x.tolist()
    best = numbers.index(max(numbers))
    return (
        sorted(numbers),
        min(numbers),
        sum(numbers),
        best,
        numbers[::-1],
        list(enumerate(numbers)),
    )


def logic(x: Tensor) -> Any:
    a, b, c = x[:3].tolist()
    return a < b < c, a <= b <= c, not a, a and b, a or b, any(v > 2 for v in (a, b)), {a, b} == {c}


def errors(x: Tensor) -> Any:
    n = x[0].item()
    if n < 0:
        raise ValueError(f"bad {n}")
    assert n < 9, "too big"
    return {0: 1, 1: 2, 5: 3}[n]


def written_later(x: Tensor) -> Any:
    y, seen = torch.zeros((), dtype=torch.int64), []
    for _ in x:
        seen.append(y.item())
        y += 1
    z = x[0].clone()
    n = z.item()
    z += 5
    return seen, n, z, n + 1


def copied(x: Tensor) -> Any:
    return copy.deepcopy({"a": [x[0].item(), (x[1].item(),)]})


@pytest.mark.parametrize(
    "function",
    [
        *(remainder, grows, hashed, powers, arithmetic, comparisons, divided, inverse, bools),
        *(parts_of_five, rest_of_five, by_a_bool, written_later, copied),
    ],
)
def test_ints(function: Callable[[Tensor], Any]) -> None:
    check(function, LARGE)


@pytest.mark.parametrize(
    "function", [remainder, arithmetic, collatz, places, lists, logic, errors, divided]
)
def test_small_ints(function: Callable[[Tensor], Any]) -> None:
    check(function, SMALL)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_ints_of_few_bits(dtype: torch.dtype) -> None:
    requests = [x.to(dtype) for x in SMALL]
    check(arithmetic, requests)
    check(grows, requests)


@pytest.mark.parametrize(
    "function",
    [floats, float_division, inverse, rounded, texts, bools, lists, logic, written_later, copied],
)
def test_floats(function: Callable[[Tensor], Any]) -> None:
    check(function, FLOATS)


# -- what a forward catches --


def reads_in_try(x: Tensor) -> Any:
    try:
        n = x.sum().item()
    except Exception:
        return x * 0
    return x + n


def branches_in_try(x: Tensor) -> Any:
    try:
        if x.sum() > 0:
            return x + 1
    except Exception:
        return x * 0
    return x - 1


def catches_everything(x: Tensor) -> Any:
    try:
        n = int(x[1])
    except BaseException:
        n = 100
    try:
        values = x.tolist()
    except:  # noqa: E722
        return x * 0
    return x + n + len([v for v in values if v > 0])


def returns_at_last(x: Tensor) -> Any:
    n = 100
    try:
        n = int(x[1])
    finally:
        return x + n  # noqa: B012


def divides_in_try(x: Tensor) -> Any:
    for _ in range(3):
        try:
            x = x / (1 / x[1].item())
        except ZeroDivisionError:
            x = x + 1
    return x


@pytest.mark.parametrize(
    "function",
    [reads_in_try, branches_in_try, catches_everything, returns_at_last, divides_in_try],
)
def test_no_handler_hides_a_read(function: Callable[[Tensor], Any]) -> None:
    check(function, FLOATS)


def draws_in_try(x: Tensor) -> Tensor:
    try:
        return x + torch.rand(3)
    except Exception:
        return x


def test_no_handler_hides_what_is_refused() -> None:
    with cellc.compile(draws_in_try, backend="eager") as compiled:
        with pytest.raises(cellc.UnsupportedError, match=r"test_reading_numbers\.py"):
            compiled(torch.randn(3))
