"""Small forwards that read values, as users write them: equal to eager, whatever the order."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import alike
from torch import Tensor, nn

import cellc

H, V = 8, 12


class Parts(nn.Module):
    """Cells, and one of the functions below as its forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(V, H), nn.Linear(H, V)
        self.read, self.say = nn.GRUCell(H, H), nn.GRUCell(H, H)
        self.merge, self.bound = nn.Linear(2 * H, H), nn.Parameter(torch.tensor(0.3))
        self.forward = function.__get__(self)


def log_probability(self: Any, tokens: Tensor) -> Any:
    h, score = torch.zeros(1, H), 0.0
    for token in tokens:
        h = self.read(self.embed(token[None]), h)
        score += self.out(h).log_softmax(-1)[0, token].item()
        if score < -20:
            break
    return score, f"{score:.1f}", math.exp(score)


def several_questions(self: Any, tokens: Tensor) -> Any:
    h, n, m = torch.zeros(1, H), 0, 0
    for token in tokens:
        h = self.read(self.embed(token[None]), h)
        if h[0, 0] > 0:
            n += 1
        if h[0, 1] > 0.1 and h[0, 2] < 0.2:
            m, h = m + 1, h * 0.5
    return h, n, m


def questions_of_data(self: Any, tokens: Tensor) -> Any:
    h = torch.zeros(1, H)
    for token in tokens:
        if token == 0:
            continue
        h = (self.say if token.item() > 8 else self.read)(self.embed(token[None]), h)
    return h


def dictionary(self: Any, tokens: Tensor) -> Any:
    counts: dict[int, int] = {}
    for token in tokens.tolist():
        counts[token] = counts.get(token, 0) + 1
    best = max(counts, key=lambda k: counts[k])
    return self.embed(torch.tensor(best)), sorted(counts)


def weights(self: Any, tokens: Tensor) -> Any:
    h = torch.zeros(1, H)
    for token in tokens:
        h = self.read(self.embed(token[None]), h) * (2 if self.bound > 0 else 1)
        if h.max() > self.bound.item() * 4:
            break
    return h


def flags(self: Any, tokens: Tensor) -> Any:
    done, out = torch.zeros(len(tokens), dtype=torch.bool), torch.zeros(len(tokens), H)
    h, total = torch.zeros(1, H), torch.zeros(1)
    for i, token in enumerate(tokens):
        h = self.read(self.embed(token[None]), h)
        out[i] = h[0]
        total += h.sum()
        if total > 0:
            done[i] = True
            total -= 1
        if done.sum() > 2:
            break
    return out, done, total


def recursion(self: Any, tokens: Tensor) -> Any:
    def go(h: Tensor, depth: int) -> Any:
        h = self.read(self.embed(tokens[depth % len(tokens)][None]), h)
        if h[0, 0].item() > 0.1 and depth < 5:
            return [go(h, depth + 1), go(-h, depth + 2)]
        return h.sum()

    return go(torch.zeros(1, H), 0)


def errors_caught(self: Any, tokens: Tensor) -> Any:
    h, found = torch.zeros(1, H), []
    for token in tokens:
        h = self.read(self.embed(token[None]), h)
        try:
            found.append([1, 2, 3][int(h[0, 0] * 5)])
        except IndexError:
            found.append(-1)
    return found, h


def beams(self: Any, tokens: Tensor) -> Any:
    h = torch.zeros(1, H)
    for token in tokens:
        h = self.read(self.embed(token[None]), h)
    h, last, scores = h.expand(3, H), torch.zeros(3, dtype=torch.int64), torch.full((3,), -1e9)
    scores[0] = 0
    said: list[list[int]] = [[], [], []]
    for _ in range(6):
        h = self.say(self.embed(last), h)
        ways = self.out(h).log_softmax(-1) + scores[:, None]
        scores, best = ways.view(-1).topk(3)
        parents, last = best // V, best % V
        h = h[parents]
        said = [said[p] + [t] for p, t in zip(parents.tolist(), last.tolist(), strict=True)]
        if last[0] == 3:
            break
    return said, scores


def generator(self: Any, tokens: Tensor) -> Any:
    h = torch.zeros(1, H)
    for token in tokens:
        h = self.read(self.embed(token[None]), h)
        if h[0, 0] > 0.2:
            yield h, token
        elif h[0, 1] > 0:
            yield "skipped"
    yield None


def by_value(self: Any, tokens: Tensor) -> Any:
    scored = [(self.out(self.embed(t)).max(), i) for i, t in enumerate(tokens)]
    scored.sort(key=lambda pair: pair[0].item())
    top = scored[-1][0].item()
    return [i for _, i in scored], round(top, 2), int(top * 3), abs(-top)


def masks(self: Any, tokens: Tensor) -> Any:
    x = self.embed(tokens)
    keep = x[:, 0] > 0
    return x[keep], tokens[keep], keep.sum(), keep.nonzero()


def stack(self: Any, tokens: Tensor) -> Any:
    held: list[Tensor] = []
    for token in tokens:
        held.append(self.embed(token))
        while len(held) > 1 and (held[-1] * held[-2]).sum() > 0:
            right, left = held.pop(), held.pop()
            held.append(torch.tanh(self.merge(torch.cat([left, right]))))
    return torch.stack(held)


def structure(self: Any, words: list[int]) -> Any:
    """The numbers decide only where a value said so."""
    h = torch.zeros(H)
    for word in words:
        h = self.read(self.embed(torch.tensor(word)), h)
        if h[0] > 0 and word > 5:
            h = h * 2
    return h


FUNCTIONS = [
    log_probability,
    several_questions,
    questions_of_data,
    dictionary,
    weights,
    flags,
    recursion,
    errors_caught,
    beams,
    generator,
    by_value,
    masks,
    stack,
    structure,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_equals_eager(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = Parts(function).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2.5)
    draw = random.Random(1)
    words = [[draw.randrange(V) for _ in range(draw.randint(1, 8))] for _ in range(24)]
    requests = words if function is structure else [torch.tensor(w) for w in words]

    def run(request: Any) -> Any:
        result = model(request)
        return list(result) if inspect.isgenerator(result) else result

    want = [run(request) for request in requests]
    with cellc.compile(model, backend="eager") as compiled:
        for part in (slice(0, 16), slice(8, 24), slice(None, None, -1)):
            alike(compiled.map([(x,) for x in requests[part]]), want[part], rtol=1e-4, atol=1e-4)
        for request, expected in zip(requests[:6], want, strict=False):
            got = compiled(request)
            alike(list(got) if function is generator else got, expected, rtol=1e-4, atol=1e-4)
        assert compiled.stats()["running"] == 0 and compiled._engine._arenas.idle()
