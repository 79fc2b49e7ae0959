"""Drawing: random numbers of a generator that a request brings, while its forward runs on stubs.

Duty: what `torch.multinomial`, `torch.rand` and `torch.randn` with `generator=` mean: numbers that
are drawn when the request runs, in the order of its forward, are its data. Drawing of a
distribution without replacement takes the largest of probabilities over exponential noise, which is
how PyTorch does it, so that the same seed gives the same result. Used by `frontends.unfold`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cellc.frontends.stub import CannotUnfold, Stub, StubType


@dataclass(frozen=True)
class Draw:
    """Numbers to draw for row `row`: what kind, of which form, from which of the generators."""

    row: int
    kind: str  # "exponential", "uniform" or "normal"
    form: StubType
    generator: int

    @property
    def what(self) -> tuple[str, StubType, int]:
        """What is drawn, whatever its row."""
        return self.kind, self.form, self.generator

    def __call__(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        generator = generators[self.generator]
        made = torch.empty(self.form.shape, dtype=self.form.dtype, device=generator.device)
        if self.kind == "exponential":
            return made.exponential_(1, generator=generator)
        if self.kind == "uniform":
            return made.uniform_(0, 1, generator=generator)
        return made.normal_(0, 1, generator=generator)


class GeneratorStub:
    """Stands for a generator of the request."""

    def __init__(self, number: int) -> None:
        self.number = number

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Generator

    def __getattr__(self, name: str) -> Any:
        raise CannotUnfold(f"a generator's {name} is used in the forward")


class Draws:
    """The numbers that one request draws, made when they are first needed.

    A request may draw for answers that it expects, and then get others, after which its forward
    draws something else: numbers are made again from there.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._given = generators
        self._own = [g.clone_state() for g in generators]
        self._made: list[torch.Tensor] = []
        self._along: Sequence[Draw] = ()  # what those are

    def __call__(self, number: int, draws: Sequence[Draw]) -> torch.Tensor:
        """Draw `number` of the request's, which draws `draws`."""
        if draws is not self._along:
            self._turn_to(draws)
        while len(self._made) <= number:
            self._made.append(draws[len(self._made)](self._own))
        return self._made[number]

    def _turn_to(self, draws: Sequence[Draw]) -> None:
        made = [draw.what for draw in self._along[: len(self._made)]]
        same = 0
        for before, draw in zip(made, draws, strict=False):
            if before != draw.what:
                break
            same += 1
        self._along = draws
        if same < len(made):
            self._own = [g.clone_state() for g in self._given]
            self._made = [draw(self._own) for draw in draws[:same]]

    def end(self, draws: Sequence[Draw]) -> None:
        """The request drew these: its generators go on from there."""
        for draw in draws:
            draw(self._given)


def drawn(func: Any, args: Any, kwargs: Any, row_of: Callable[[str, StubType, int], Stub]) -> Any:
    """The result of a torch function with a generator of the request."""
    kwargs = dict(kwargs)
    number = kwargs.pop("generator").number
    name = getattr(func, "__name__", "")
    if name == "multinomial":
        return _multinomial(number, row_of, *args, **kwargs)
    if name in ("rand", "randn"):
        size = kwargs.pop("size", None)
        shape = tuple(size if size is not None else _size(args))
        dtype = kwargs.pop("dtype", None) or torch.get_default_dtype()
        if not set(kwargs) - {"device"}:
            kind = "uniform" if name == "rand" else "normal"
            return row_of(kind, StubType.of(shape, dtype), number)
    raise CannotUnfold(f"{name} with a generator")


def _size(args: Any) -> Any:
    return args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


def _multinomial(
    number: int, row_of: Any, probabilities: Any, num_samples: int, replacement: bool = False
) -> Any:
    if num_samples != 1 and replacement:
        raise CannotUnfold("multinomial of several samples with replacement")
    noise = row_of("exponential", probabilities.type, number)
    if num_samples == 1:
        return (probabilities / noise).argmax(-1, keepdim=True)
    return (probabilities / noise).topk(num_samples, -1).indices
