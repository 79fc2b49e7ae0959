"""Numbers read from tensors are Python's: what is computed with them, and what it raises."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from comparing import alike
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


# -- tensors that PyTorch reads --


def scalars(x: Tensor) -> Any:
    made = torch.remainder(x.sum(), 3), torch.remainder(10, x.abs() + 1), torch.where(x > 0, x, 1)
    clamped = torch.clamp(x, min=x.sum()), torch.maximum(x, x[0]), torch.pow(2, x.abs() % 5)
    return made, clamped, torch.full((2,), x.sum()), torch.add(x, x, alpha=x[0])


def numbers_in_calls(x: Tensor) -> Any:
    n, k = x[0].item(), x.abs().argmax().item()
    sizes = torch.zeros(k + 1), torch.full((k + 1,), n), torch.eye(k + 1), x.new_zeros(k + 1, 2)
    moved = x.roll(k), x.repeat(k + 1), x.narrow(0, k, 1), x[k:], x.topk(1 + k % 2).values
    mixed = (
        (x > 0) * n,
        x * n,
        n - x,
        x == n,
        (x > n).sum(),
        x.clamp(min=n),
        torch.add(x, x, alpha=n),
    )
    return sizes, moved, mixed, torch.tensor([n, 1]), torch.tensor(n) * 2


def sizes_first(x: Tensor) -> Tensor:
    return torch.ones(x.argmax().item() + 1, 2)


def by_bits(x: Tensor) -> Any:
    return (
        torch.bitwise_and(x, 3),
        torch.bitwise_and(x.sum(), 3),
        torch.bitwise_left_shift(1, x % 4),
    )


def masks(x: Tensor) -> Any:
    y = torch.stack([x, x * 2, -x])
    chosen = y[y > 0], torch.masked_select(y, y > 1), y[y[:, 0] > 0], y[:, x > 0], y[0, x > 0]
    places = torch.where(x > 0), x.nonzero(), torch.nonzero(y), y[torch.where(y > 1)]
    both = (x > 0).nonzero(), torch.nonzero(x < 0), torch.nonzero(y, as_tuple=True)
    return chosen, places, both, [i.item() for i in torch.where(x > 0)[0]]


def written(x: Tensor) -> Any:
    y, z, w = x.clone(), torch.zeros(4, 3), torch.zeros(5, 2)
    y[x.argmax()] = 7
    z[x.argmax()] = 1.0
    z[x.abs().argmax() % 3, 1] = 2
    z[:, x.argmin() % 3] = 3.0
    w[x.argmax() :] = 1
    return y, z, w


def texts_of_tensors(x: Tensor) -> Any:
    return f"{x.sum()}", str(x[:2]), repr(x > 0), f"{x[0].float():.2f}"


def counted(x: Tensor) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for value in x.tolist():
        counts[value] = counts.get(value, 0) + 1
    return counts


@pytest.mark.parametrize(
    "function",
    [scalars, numbers_in_calls, sizes_first, by_bits, masks, written, texts_of_tensors, counted],
)
def test_tensors_that_are_read(function: Callable[[Tensor], Any]) -> None:
    check(function, [x[:3] for x in SMALL])
    if function is not by_bits:
        check(function, [x[:3] for x in FLOATS if torch.isfinite(x).all()])


# -- numbers that have to be Python's own --


def is_true(x: Tensor) -> int:
    return 1 if (x[0] > 0).item() is True else 0


def of_type(x: Tensor) -> int:
    return 1 if type(x[0].item()) is int else 2


def written_as_json(x: Tensor) -> str:
    n = x[0].item()
    if n > 0:
        for i in range(3):
            if x[i] > 2:
                return json.dumps([x[1].item(), n, i])
    return ""


def kinds(x: Tensor) -> Any:
    n = x[0].item()
    known = isinstance(n, int), isinstance(n, float), isinstance(x, Tensor), torch.is_tensor(n)
    return known, isinstance(x if n > 0 else n, Tensor), hasattr(n, "item"), n.real


@pytest.mark.parametrize("function", [is_true, of_type, written_as_json, kinds])
def test_what_only_pythons_numbers_can(function: Callable[[Tensor], Any]) -> None:
    check(function, SMALL)
    check(function, FLOATS)


def in_range(x: Tensor) -> int:
    n = 0
    while True:
        try:
            if x[n].item() > 2:
                return n
        except IndexError:
            return -1
        n += 1


def test_errors_of_operations_are_pytorchs() -> None:
    check(in_range, SMALL)
    check(in_range, FLOATS)


def test_streams_begin_again_with_pythons_numbers() -> None:
    def forward(x: Tensor) -> Any:
        for i in range(3):
            yield x * i
            if x[i] < 0:
                yield torch.full((2,), float(json.dumps(x[1].item())))

    requests = SMALL * 2
    with cellc.compile(forward, backend="eager") as compiled:
        futures = [compiled.submit(x) for x in requests]
        for x, future in zip(requests, futures, strict=True):
            alike(list(future.result(60)), list(forward(x)))
            alike(list(compiled.stream(x)), list(forward(x)))


def products(x: Tensor) -> Any:
    a, b = x[0].item(), x[1].item()
    equal = a * a - b * b == 0, a * b - b * a == 0, a * a - a * a == 0
    return equal, a * b + b, a * a - b * b, a * 0.1 + b * 0.3


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_floats_are_rounded_as_pythons(backend: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    requests = [torch.randn(2, generator=generator, dtype=torch.float64) for _ in range(20)]
    with cellc.compile(products, backend=backend) as compiled:
        for x, got in zip(requests, compiled.map(requests), strict=True):
            assert got == products(x)


# -- the number that stands for no answer --


def named(x: Tensor) -> Any:
    """Each number is asked for, as one and as the negative of another."""
    names = {1 << 31: 2.0, -(1 << 31): 3.0, (1 << 31) - 1: 5.0}
    made = x[:1] * 0.5
    for y in x:
        made = made + names.get(y.item(), 1.0) + names.get(int(y), 0.25)
    return made


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_every_number_may_be_an_answer(dtype: torch.dtype) -> None:
    edge = 1 << 31
    given = [[edge], [-edge, edge], [1, edge, 4], [edge - 1, 1 - edge, edge], [7, 8, -edge]]
    check(named, [torch.tensor(x, dtype=dtype) for x in given])
