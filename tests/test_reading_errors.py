"""Errors that a forward raises with what it read: their callers get them as from PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import alike
from torch import Tensor, nn

import cellc

H, V = 8, 12


class Stopped(Exception):
    """Keeps what it is given."""

    def __init__(self, step: Any, at: Any) -> None:
        super().__init__("stopped", {"at": [at]})
        self.step = step


class Raises(nn.Module):
    def __init__(self, error: Callable[[int, Tensor], Exception]) -> None:
        super().__init__()
        self.embed, self.cell, self.out = nn.Embedding(V, H), nn.GRUCell(H, H), nn.Linear(H, V)
        self.error = error

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.zeros(1, H)
        for token in tokens:
            h = self.cell(self.embed(token[None]), h)
            best = self.out(h).argmax()
            if best > 7:
                raise self.error(best.item(), h)  # type: ignore[arg-type]
        return h


class Yields(Raises):
    def forward(self, tokens: Tensor) -> Any:
        yield tokens
        yield super().forward(tokens)


class Again(Raises):
    def forward(self, tokens: Tensor) -> Any:
        try:
            return super().forward(tokens)
        except ValueError as error:
            raise KeyError("again") from error


def value(best: int, h: Tensor) -> Exception:
    return ValueError(best)


def kept(best: int, h: Tensor) -> Exception:
    return Stopped(best * 2, h.argmax().item())


def end(best: int, h: Tensor) -> Exception:
    return StopIteration(best)


def of_tensors(best: int, h: Tensor) -> Exception:
    return Stopped(h.sign().to(torch.int64), h[0, 0] > 0)


def outcome(call: Callable[[], Any]) -> Any:
    try:
        result = call()
        return result if isinstance(result, Tensor) else list(result)
    except Exception as error:
        return told(error)


def told(error: BaseException | None) -> Any:
    """All that an error says, tensors included."""
    if error is None:
        return None
    own = {k: v for k, v in vars(error).items() if k != "__notes__"}
    return type(error), error.args, own, getattr(error, "value", None), told(error.__cause__)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Raises, value),
        (Raises, kept),
        (Raises, end),
        (Raises, of_tensors),
        (Yields, value),
        (Again, value),
    ],
)
def test_errors_hold_what_was_read(kind: type[Raises], error: Callable[..., Exception]) -> None:
    torch.manual_seed(0)
    model = kind(error).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2.5)
    draw = random.Random(1)
    words = [[draw.randrange(V) for _ in range(draw.randint(1, 7))] for _ in range(16)]
    requests = [torch.tensor(w) for w in words]
    want = [outcome(lambda x=x: model(x)) for x in requests]  # type: ignore[misc]
    assert 3 < sum(isinstance(w, tuple) for w in want) < len(want)
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            got = [outcome(lambda x=x: compiled(x)) for x in requests]  # type: ignore[misc]
            alike(got, want, rtol=1e-4, atol=1e-5)
        for result, expected in zip(
            compiled.map(requests, return_exceptions=True), want, strict=True
        ):
            if isinstance(result, Exception):
                alike(told(result), expected)
        assert compiled._engine._arenas.idle()


def test_a_large_tensor_in_an_error_is_refused_with_its_line() -> None:
    model = Raises(lambda best, h: ValueError(h.expand(16, H))).eval()
    model.out.bias.data.fill_(0)[9] = 100
    with (
        cellc.compile(model, backend="eager") as compiled,
        pytest.raises(cellc.CellcError, match=r"an exception holds a tensor.*test_reading_errors"),
    ):
        compiled(torch.tensor([1]))
    assert compiled._engine._arenas.idle()


class Refused(nn.Module):
    """What torch refuses comes after an answer."""

    def __init__(self, wrong: Callable[..., Any]) -> None:
        super().__init__()
        self.cell, self.out, self.wrong = nn.GRUCell(H, H), nn.Linear(H + 1, 2), wrong

    def forward(self, h: Tensor) -> Any:
        h = self.cell(h)
        if h.sum() < 100:
            return self.wrong(self, h)
        return h


class RefusedLater(Refused):
    def forward(self, h: Tensor) -> Any:
        yield h
        if h[0] < 100:
            yield self.wrong(self, h)


WRONG: list[Callable[..., Any]] = [
    lambda self, h: self.out(h),
    lambda self, h: h + torch.ones(3),
    lambda self, h: h.reshape(3, -1),
    lambda self, h: h[H],
    lambda self, h: self.cell(h, torch.zeros(5)),
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", [Refused, RefusedLater])
def test_what_torch_refuses_names_the_models_line(
    kind: type[Refused], wrong: Callable[..., Any]
) -> None:
    requests = [torch.randn(H) for _ in range(5)]
    with cellc.compile(kind(wrong).eval(), backend="eager") as compiled:
        for _ in range(2):
            errors = compiled.map(requests, return_exceptions=True)
            assert len({id(e) for e in errors}) == len(errors)
            for error in errors:
                assert isinstance(error, cellc.ForwardError)
                line = wrong.__code__.co_firstlineno
                assert error.origin == f"test_reading_errors.py:{line}" and error.origin in str(
                    error
                )
                frames, tb = [], error.__traceback__
                while tb is not None:
                    frames.append(tb.tb_frame.f_code)
                    tb = tb.tb_next
                assert wrong.__code__ in frames
                assert type(error.__cause__).__name__ == error.kind
        assert compiled._engine._arenas.idle()


def own(self: Any, h: Tensor) -> Any:
    raise RuntimeError("mine")


@pytest.mark.parametrize("kind", [Refused, RefusedLater])
def test_what_a_forward_raises_itself_comes_as_it_is(kind: type[Refused]) -> None:
    with cellc.compile(kind(own).eval(), backend="eager") as compiled:
        for error in compiled.map([torch.randn(H)] * 3, return_exceptions=True):
            assert type(error) is RuntimeError and error.args == ("mine",)
