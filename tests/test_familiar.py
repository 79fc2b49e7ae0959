"""Requests of `map` whose forms are known: the same tickets and results as when each is bound,
flattened and keyed, whatever comes beside them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cellc
from cellc.familiar import familiar
from cellc.intake import Intake
from cellc.request import as_call
from tests.comparing import alike

H, V = 4, 7


class Reader(nn.Module):
    """Tokens [T] or vectors [T, H], a state that may be given, to the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(V, H), nn.RNNCell(H, H)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        h = torch.zeros(H) if h is None else h
        for row in x if x.dim() == 2 else self.table(x):
            h = self.cell(row, h)
        return h


class Pair(NamedTuple):
    x: Tensor
    h: Tensor


class Mine(dict[str, Tensor]):
    pass


def tokens(n: int) -> Tensor:
    return torch.arange(n) % V


def rows(n: int) -> Tensor:
    return torch.arange(n * H, dtype=torch.float32).reshape(n, H).sin()


STATE = torch.linspace(-1, 1, H)
FORMS: dict[str, Any] = {
    "tokens": tokens,
    "tokens of 32 bits": lambda n: tokens(n).int(),
    "vectors": rows,
    "a tuple": lambda n: (rows(n), STATE),
    "a tuple of one": lambda n: (tokens(n),),
    "keywords": lambda n: {"x": rows(n), "h": STATE},
    "keywords in another order": lambda n: {"h": STATE, "x": tokens(n)},
    "one keyword": lambda n: {"x": tokens(n)},
    "a value that is no tensor": lambda n: (tokens(n), None),
    "a gradient": lambda n: rows(n).requires_grad_(),
    "a parameter": lambda n: nn.Parameter(rows(n)),
    "columns": lambda n: rows(2 * n).reshape(n, 2 * H)[:, ::2],
    "backwards": lambda n: rows(n).T.contiguous().T,
    "an expanded row": lambda n: rows(1).expand(n, H),
    "a negative view": lambda n: torch._neg_view(rows(n)),
    "a dict of another class": lambda n: OrderedDict(x=tokens(n)),
    "a dict of a class of one's own": lambda n: Mine(x=tokens(n)),
}
TAKEN = {  # of which no binding is needed once they are known
    *("tokens", "tokens of 32 bits", "vectors", "a tuple", "a tuple of one", "keywords"),
    *("keywords in another order", "one keyword", "a gradient", "columns", "backwards"),
    *("an expanded row", "a negative view"),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Reader().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def compiled(model: nn.Module) -> Iterator[cellc.Compiled]:
    with cellc.compile(model, backend="eager") as made:
        yield made


def expected(model: nn.Module, request: Any) -> Tensor:
    args, kwargs = as_call(request)
    with torch.no_grad():
        return model(*args, **kwargs)


def checked(compiled: cellc.Compiled, model: nn.Module, requests: list[Any]) -> None:
    for got, request in zip(compiled.map(requests), requests, strict=True):
        alike(got, expected(model, request))


@pytest.mark.parametrize("form", FORMS)
def test_every_form(compiled: cellc.Compiled, model: nn.Module, form: str) -> None:
    requests = [FORMS[form](n) for n in (3, 1, 5, 3, *[2] * 20)]
    for _ in range(2):
        checked(compiled, model, requests)
    known = familiar(compiled._compiler, requests)
    assert (None not in known) == (form in TAKEN), form
    calls = [as_call(r) for r in requests]
    for one, other in zip(known, compiled._intake.tickets(calls), strict=True):
        if one is not None:
            assert one.entry is other.entry
            assert [id(x) for x in one.tensors] == [id(x) for x in other.tensors]


@given(
    st.lists(st.tuples(st.sampled_from(sorted(FORMS)), st.integers(1, 40)), min_size=1, max_size=40)
)
@settings(max_examples=40, deadline=None)
def test_mixed_maps(
    compiled: cellc.Compiled, model: nn.Module, given: list[tuple[str, int]]
) -> None:
    checked(compiled, model, [FORMS[form](n) for form, n in given])


def test_no_steps(compiled: cellc.Compiled, model: nn.Module) -> None:
    requests = [(rows(n % 3), STATE) for n in range(40)]
    for _ in range(2):
        checked(compiled, model, requests)


def test_long_vectors_of_many_layouts(compiled: cellc.Compiled, model: nn.Module) -> None:
    """So many and so large that they are copied by their addresses, where all can be."""
    layouts = "vectors", "a gradient", "a parameter", "columns", "backwards", "a negative view"
    for names in (["vectors"], ["vectors", "a gradient", "a parameter"], layouts):
        requests = [FORMS[names[i % len(names)]](300 + i % 3) for i in range(24)]
        checked(compiled, model, requests)


def test_hits_are_counted(compiled: cellc.Compiled) -> None:
    requests = [tokens(n) for n in (2, 3, 2)]
    compiled.map(requests)
    before = compiled.stats()["plan_hits"]
    compiled.map([*requests, (tokens(2), None)])
    assert compiled.stats()["plan_hits"] - before in (3, 4)  # the last one's plan may be new


def test_errors_name_their_requests(compiled: cellc.Compiled, model: nn.Module) -> None:
    """Alike or not, a wrong request fails alone."""
    requests: list[Any] = [FORMS[form](n) for form in sorted(TAKEN) for n in (1, 2, 4)]
    compiled.map(requests)
    wrong = torch.tensor([0, V]), {"x": torch.tensor([3, -1])}, {"y": tokens(2)}, "text", ()
    places = 2, 9, 17, 23, 30
    for place, one in zip(places, wrong, strict=True):
        requests.insert(place, one)
    results = compiled.map(requests, return_exceptions=True)
    for i, (got, request) in enumerate(zip(results, requests, strict=True)):
        if i in places:
            assert isinstance(got, cellc.CellcError), (i, got)
        else:
            alike(got, expected(model, request))
    assert f"{V} at position 1" in str(results[2]) and "-1 at position 1" in str(results[9])
    assert "unknown keyword" in str(results[17])
    with pytest.raises(cellc.RequestError) as error:
        compiled.map(requests)
    if hasattr(error.value, "__notes__"):  # of Python 3.11 and later
        assert error.value.__notes__ == [f"in request 2 of the {len(requests)} given at once"]


def test_plans_that_are_dropped_meanwhile(
    compiled: cellc.Compiled, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is learned from a new request may make other plans of those that were known."""
    requests = [tokens(3), (tokens(3), None), rows(2), tokens(3)]
    compiled.map(requests)
    plans, tickets = compiled._compiler.plans, Intake.tickets

    def forgetting(self: Intake, *args: Any) -> Any:
        if plans:
            plans.forget()
        return tickets(self, *args)

    monkeypatch.setattr(Intake, "tickets", forgetting)
    made = compiled._intake.mapped(requests)
    monkeypatch.undo()
    assert made[0].entry is made[3].entry and made[0].entry in plans.values()
    assert [id(t.tensors[0]) for t in made] == [
        id(r[0] if isinstance(r, tuple) else r) for r in requests
    ]
    checked(compiled, model, requests)


def test_identity_is_part_of_a_form() -> None:
    def same(x: Tensor, y: Tensor) -> Tensor:
        return x + 1 if x is y else x + y

    x, y = rows(2), rows(2) + 1
    with cellc.compile(same, backend="eager") as compiled:
        for _ in range(2):
            alike(compiled.map([(x, y), (x, x), (y, x)]), [x + y, x + 1, x + y])
        assert familiar(compiled._compiler, [(x, x), x]) == [None, None]


def test_dtypes_that_are_cast() -> None:
    layer = nn.Linear(H, H)
    with cellc.compile(layer, backend="eager", dtype=torch.float64) as compiled:
        requests = [rows(n) for n in (2, 3)]
        for _ in range(2):
            for got, x in zip(compiled.map(requests), requests, strict=True):
                assert got.dtype == torch.float64
                torch.testing.assert_close(got.float(), layer(x).detach())


def test_named_tuples_are_one_argument() -> None:
    def model(pair: Pair) -> Tensor:
        return pair.x + pair.h

    with cellc.compile(model, backend="eager") as compiled:
        requests = [(Pair(rows(n), STATE),) for n in (1, 2)] + [Pair(rows(3), STATE)]
        for _ in range(2):
            alike(compiled.map(requests), [rows(n) + STATE for n in (1, 2, 3)])


def test_positional_only_and_variable_arguments() -> None:
    def only(x: Tensor, /) -> Tensor:
        return x * 2

    def several(*xs: Tensor) -> Tensor:
        return xs[0] * len(xs)

    with cellc.compile(only, backend="eager") as compiled:
        alike(compiled.map([rows(1), (rows(2),)] * 2), [rows(1) * 2, rows(2) * 2] * 2)
        (error,) = compiled.map([{"x": rows(1)}], return_exceptions=True)
        assert isinstance(error, cellc.RequestError)
    with cellc.compile(several, backend="eager") as compiled:
        for _ in range(2):
            alike(compiled.map([rows(1), (rows(2), rows(1))]), [rows(1), rows(2) * 2])
