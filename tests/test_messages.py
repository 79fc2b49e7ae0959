"""What is said of mistakes: the cause once, and what to do."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellc
from cellc.cli import main
from cellc.errors import ForwardError, RequestError, SessionClosed, UnsupportedError
from cellc.request import LONGEST, describe


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, state)
        return h, h


def _numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() + 1)


def _unique(x: Tensor) -> Tensor:
    return torch.unique(x)


def _reads_and_unique(x: Tensor) -> Tensor:
    return torch.unique(x) if x.sum().item() > 0 else x


@pytest.mark.parametrize(
    ("forward", "cause", "remedy"),
    [
        (_numpy, "numpy", "item() or tolist()"),
        (_unique, "unique", "before the call"),
        (_reads_and_unique, "unique", "before the call"),
    ],
)
def test_the_remedy_is_of_the_cause(
    forward: Callable[[Tensor], Tensor], cause: str, remedy: str
) -> None:
    with (
        cellc.compile(forward, backend="eager") as compiled,
        pytest.raises(UnsupportedError, match=cause) as raised,
    ):
        compiled(torch.ones(3))
    assert remedy in str(raised.value) and str(raised.value).count("test_messages.py") == 1
    assert "changing old ones" not in str(raised.value)


def test_a_session_without_an_initial_state() -> None:
    with cellc.compile(Step(), carry={"state": "1"}, backend="eager") as compiled:
        with pytest.raises(
            RequestError, match=r"'state': got no initial value.*session\(\{'state'"
        ):
            compiled.session()
        with pytest.raises(RequestError, match="'stat': got an initial value"):
            compiled.session({"stat": torch.zeros(4)})
        with compiled.session({"state": torch.zeros(4)}) as session:
            session.step(torch.ones(4))


def test_a_step_after_its_model_was_closed() -> None:
    with cellc.compile(Step(), carry={"state": "1"}, backend="eager") as compiled:
        first, second = (compiled.session({"state": torch.zeros(4)}) for _ in range(2))
        first.close()
        with pytest.raises(SessionClosed, match=r"close\(\) was called.*open another"):
            first.step(torch.ones(4))
    with pytest.raises(SessionClosed, match=r"its model was closed.*call cellc.compile again"):
        second.step(torch.ones(4))


@dataclass
class Pair:
    a: Tensor
    b: int


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(3, 4), "f32[3, 4]"),
        ({"a": [torch.zeros(2), 3]}, "{'a': [f32[2], 3]}"),
        ((torch.zeros(()),), "(f32[],)"),
        (Pair(torch.zeros(5), 2), "Pair(a=f32[5], b=2)"),
        (Pair, "<class 'test_messages.Pair'>"),
        ("text", "'text'"),
        ([[[[[[1]]]]]], "[[[[[a list]]]]]"),
    ],
)
def test_values_are_said_by_their_shapes(value: Any, text: str) -> None:
    assert describe(value) == text


def test_long_and_circular_values() -> None:
    assert len(describe(list(range(10**6)))) == LONGEST
    circle: list[Any] = []
    circle.append(circle)
    assert describe(circle) == "[[[[[a list]]]]]"


def test_an_error_of_the_forward_has_one_cause() -> None:
    def forward(parts: list[Tensor]) -> Tensor:
        return parts[0] @ parts[1]

    with (
        cellc.compile(forward, backend="eager") as compiled,
        pytest.raises(
            ForwardError, match=r"called with parts: \[f32\[3, 5\], f32\[3, 5\]\]"
        ) as raised,
    ):
        compiled([torch.ones(3, 5), torch.ones(3, 5)])
    assert type(raised.value.__cause__) is RuntimeError
    text = "".join(traceback.format_exception(raised.value))
    assert text.count("another exception") == 0 and text.count("direct cause") == 1


def test_did_you_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match=r"no option 'polcy'; did you mean policy\?"):
        cellc.compile(Step(), options={"polcy": "fifo"})
    with pytest.raises(TypeError, match=r"no option 'abc' \(nor 'xyz'\); there are fold_bytes"):
        cellc.compile(Step(), options={"xyz": 1, "abc": 1})
    with pytest.raises(UnsupportedError, match=r"'fiffo' is not supported; did you mean fifo\?"):
        cellc.compile(Step(), options={"policy": "fiffo"})
    assert main(["bench", "lstm256"]) == 2
    assert "did you mean lstm-256" in capsys.readouterr().err
    assert main(["bench", "gru256", "--online"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_dict_that_was_meant_as_one_argument() -> None:
    def forward(thread: Any) -> torch.Tensor:
        return thread["x"] + 1  # type: ignore[no-any-return]

    with cellc.compile(forward, backend="eager") as compiled:
        with pytest.raises(cellc.RequestError, match=r"a dict is keywords, and \({...},\) one"):
            compiled.map([{"x": torch.ones(2)}])
        assert compiled.map([({"x": torch.ones(2)},)])[0].sum() == 4
