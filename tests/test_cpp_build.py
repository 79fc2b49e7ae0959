"""Compiling and caching: no compiler, damaged entries, unwritable folders, many at once."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cellc.errors import BackendError
from cellc.kernels import cpp_build
from cellc.kernels.cpp import CppBackend, _runtime

compiled = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="no C++ compiler")
SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp_build, "_loaded", {})
    return tmp_path / "cache"


def answer(library: ctypes.CDLL) -> int:
    return int(library.answer())


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cpp_build.find_compiler() is None
    _runtime.cache_clear()
    with pytest.raises(BackendError, match="install g"):
        CppBackend()


@compiled
def test_built_once_and_loaded_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(cpp_build.load(SOURCE, "one")) == 42
    assert cpp_build.load(SOURCE, "one") is cpp_build.load(SOURCE, "one")
    monkeypatch.setattr(cpp_build, "_loaded", {})
    monkeypatch.setattr(cpp_build, "_build", None)
    assert answer(cpp_build.load(SOURCE, "one")) == 42
    assert [p.name.split("-")[0] for p in cache.iterdir()] == ["one"]


@compiled
@pytest.mark.parametrize("damage", [b"", b"\x7fELF garbage", None])
def test_damaged_entry_is_rebuilt(
    cache: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    source = SOURCE + f"// {damage!r}\n"
    cpp_build.load(source, "one")
    (path,) = cache.iterdir()
    data = path.read_bytes()
    path.unlink()  # it is mapped: write another file
    path.write_bytes(data[: len(data) // 2] if damage is None else damage)
    monkeypatch.setattr(cpp_build, "_loaded", {})
    assert answer(cpp_build.load(source, "one")) == 42
    assert path.read_bytes() == data or len(path.read_bytes()) > 1000


@compiled
def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="Set CELLC_CACHE"):
        assert answer(cpp_build.load(SOURCE, "one")) == 42
    assert answer(cpp_build.load(SOURCE + "\n", "two")) == 42  # warned once


@compiled
def test_compiler_that_fails() -> None:
    with pytest.raises(BackendError, match="(?s)error.*report it"):
        cpp_build.load("this is no C++", "broken")


@compiled
def test_processes_at_once(cache: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "from cellc.kernels import cpp_build\n"
        f"assert cpp_build.load({SOURCE!r}, 'one').answer() == 42"
    )
    many = [subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ)) for _ in range(3)]
    assert [p.wait(60) for p in many] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1
