"""examples/g2p.py against g2p-en's own code."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cellc

EXAMPLE = Path(__file__).parent.parent / "examples" / "g2p.py"
ODD = [
    "a",
    "x",
    "don't",
    "naïve",
    "co-op",
    "zzzzzzzz",
    "internationalization",
    "buttondownreliefactiondecorative",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, operations this small only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def g2p() -> Any:
    try:
        return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))
    except ModuleNotFoundError as error:
        if error.name != "g2p_en":
            raise
        pytest.skip(str(error))


def words_of(g2p: Any, count: int | None) -> list[str]:
    words: list[str] = g2p.words_of_text()
    assert len(set(words)) == len(words) >= 5000
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    return ODD + words[:count]


counts = pytest.mark.parametrize(
    "count", [400, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"]
)


def test_the_reference_is_the_package(g2p: Any) -> None:
    said = g2p.package_code().predict("activationist")
    assert said == "AE2 K T IH0 V EY1 SH AH0 N IH0 S T".split()  # as the package's page says


@counts
def test_eager_says_what_the_package_says(g2p: Any, count: int | None) -> None:
    package = g2p.package_code()
    with torch.no_grad():
        for word in words_of(g2p, count):
            assert g2p.model(g2p.encode(word)).tolist() == g2p.pronounce(package, word), word


@counts
@pytest.mark.parametrize("way", ["masked", "dropping"])
def test_padded_batches_say_what_the_package_says(g2p: Any, way: str, count: int | None) -> None:
    words, package = words_of(g2p, count), g2p.package_code()
    with torch.no_grad():
        spoken = g2p.padded(g2p.model, [g2p.encode(word) for word in words], vars(g2p)[way])
    assert [x.tolist() for x in spoken] == [g2p.pronounce(package, word) for word in words]


def test_a_word_without_an_end_is_cut(g2p: Any) -> None:
    word = ODD[-1]
    assert len(g2p.model(g2p.encode(word))) == g2p.LONGEST
    assert len(g2p.package_code().predict(word)) == g2p.LONGEST


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match="--no-deps g2p-en"):
        runpy.run_path(str(EXAMPLE))
    with pytest.raises(SystemExit, match="--no-deps g2p-en"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


# -- with cellc ------------------------------------------------------------------------------------


@counts
def test_cellc_says_what_the_package_says(g2p: Any, count: int | None) -> None:
    words, package = words_of(g2p, count), g2p.package_code()
    requests = [(g2p.encode(word),) for word in words]
    expected = [g2p.pronounce(package, word) for word in words]
    with cellc.compile(g2p.model) as compiled:
        for _ in range(2):  # words never seen, then seen
            assert [x.tolist() for x in compiled.map(requests)] == expected
        assert compiled(*requests[0]).tolist() == expected[0]


def test_the_script_finds_all_equal(g2p: Any) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--words", "300", "--rounds", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "all phonemes equal" in " ".join(done.stdout.split())
