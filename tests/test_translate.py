"""The translator of examples/translate.py: its ways to decode agree, in eager and through cellc."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cellc

HERE = Path(__file__).parent
PLACES = [HERE / "translate.py", HERE.parent / "examples" / "translate.py"]
PATH = next(path for path in PLACES if path.exists())


def load() -> Any:
    spec = importlib.util.spec_from_file_location("translate", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load()
REQUESTS: list[Tensor] = [
    example.to_words(said)
    for said, _ in itertools.islice(example.random_pairs(3, held_out=True), 150)
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """With more, operations this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["trained a little", "untrained"])
def net(request: pytest.FixtureRequest) -> Any:
    if request.param == "untrained":
        return example.model
    torch.manual_seed(0)
    net = example.Translator()
    example.train(net, 60)
    return net


def log_probability(net: Any, words: Tensor, tokens: Tensor) -> Tensor:
    """Of these tokens, each given those before it."""
    h, c, memory, keys = net.encode(words)
    before, total = torch.tensor(example.END), torch.tensor(0.0)
    for token in tokens:
        scores, h, c = net.step(before, h, c, memory, keys)
        total = total + scores.log_softmax(-1)[token]
        before = token
    return total


def value(said: str) -> int:
    """The number, read by a hand-written rule."""
    total = group = 0
    for word in re.findall(r"\w+", said):
        if word in example.UNITS:
            group += example.UNITS.index(word)
        elif word in example.TENS:
            group += 10 * example.TENS.index(word) + 20
        elif word == "hundred":
            group *= 100
        elif word in example.SIZES:
            total, group = total + group * example.SIZES[word], 0
        else:
            group += word == "a"
    return total + group


def test_what_is_said_is_what_is_written() -> None:
    pairs = list(itertools.islice(example.random_pairs(0, held_out=False), 3000))
    assert all(str(value(said)) == written for said, written in pairs)
    assert {len(written) for _, written in pairs} == set(range(1, 13))
    held_out = {w for _, w in itertools.islice(example.random_pairs(0, held_out=True), 3000)}
    assert not held_out & {written for _, written in pairs}
    with pytest.raises(ValueError, match="'1 hundred' is not made of these words: zero one two"):
        example.to_words("1 hundred")


@torch.no_grad()
def test_padded_batches_equal_one_at_a_time(net: Any) -> None:
    want = [net(words) for words in REQUESTS]
    got = example.translate_padded(net, REQUESTS)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert len({len(tokens) for tokens in want}) > 3  # of varied lengths
    for tokens in want:
        assert (tokens[:-1] != example.END).all()
        assert tokens[-1] == example.END or len(tokens) == net.limit


@torch.no_grad()
def test_a_stream_equals_greedy(net: Any) -> None:
    streaming = example.Streaming(net)
    for words in REQUESTS[:50]:
        assert torch.equal(torch.stack(list(streaming(words))), net(words))


@torch.no_grad()
def test_one_beam_equals_greedy(net: Any) -> None:
    beam = example.Beam(net, width=1)
    for words in REQUESTS[:50]:
        tokens, score = beam(words)
        assert torch.equal(tokens, net(words))
        torch.testing.assert_close(score, log_probability(net, words, tokens))


@torch.no_grad()
@pytest.mark.parametrize("width", [2, 4, 20])
def test_the_score_of_a_beam_is_its_log_probability(net: Any, width: int) -> None:
    beam, differ = example.Beam(net, width), 0
    for words in REQUESTS[:50]:
        tokens, score = beam(words)
        torch.testing.assert_close(score, log_probability(net, words, tokens), rtol=1e-4, atol=1e-4)
        assert (tokens[:-1] != example.END).all()
        assert tokens[-1] == example.END or len(tokens) == net.limit
        differ += not torch.equal(tokens, net(words))
    assert differ  # from greedy: these nets are unsure


@torch.no_grad()
def test_a_beam_wide_enough_finds_the_likeliest(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "limit", 2)
    size = len(example.WRITTEN)
    others = set(range(size)) - {example.END}
    every = [[example.END], *([a, b] for a in others for b in range(size))]
    for words in REQUESTS[:8]:
        tokens, score = example.Beam(net, width=size)(words)
        scores = torch.stack([log_probability(net, words, torch.tensor(t)) for t in every])
        assert tokens.tolist() == every[int(scores.argmax())]
        torch.testing.assert_close(score, scores.max(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_through_cellc(net: Any) -> None:
    want = [net(words) for words in REQUESTS]
    with cellc.compile(net) as compiled:
        torch.testing.assert_close(compiled.map(REQUESTS), want, rtol=0, atol=0)
        assert torch.equal(compiled(REQUESTS[0]), want[0])


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 4])
def test_beams_through_cellc(net: Any, width: int) -> None:
    beam = example.Beam(net, width)
    with cellc.compile(beam) as compiled:
        for words, (tokens, score) in zip(REQUESTS, compiled.map(REQUESTS), strict=True):
            want, its_score = beam(words)
            assert torch.equal(tokens, want)
            torch.testing.assert_close(score, its_score, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_stream_through_cellc(net: Any) -> None:
    with cellc.compile(example.Streaming(net)) as compiled:
        for words in REQUESTS[:20]:
            assert torch.equal(torch.stack(list(compiled.stream(words))), net(words))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [os.path.abspath(path) for path in sys.path if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(PATH), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_as_a_script_with_texts(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    for said in ("training, step 20 of 20", "five hundred: "):  # the second time it is loaded
        done = run("--steps", "20", "--weights", str(weights), "five hundred")
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    assert "training" not in done.stdout and weights.exists()
    assert "is not made of these words" in run("1 hundred").stderr
    assert "at least 1" in run("--width", "0").stderr
    assert "no folder" in run("--weights", str(tmp_path / "none" / "weights.pt")).stderr


def test_as_a_script(tmp_path: Path) -> None:
    done = run("--steps", "20", "--count", "40")
    assert done.returncode == 0, done.stderr
    assert "all tokens equal to eager's" in done.stdout
