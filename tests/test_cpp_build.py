"""Compiling and caching: no compiler, damaged entries, unwritable folders, many at once."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cellc import files
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
    cpp_build._warn_damaged.cache_clear()
    with pytest.warns(UserWarning, match="compiled again"):
        assert answer(cpp_build.load(source, "one")) == 42
    assert path.read_bytes() == data or len(path.read_bytes()) > 1000
    path.unlink()
    path.write_bytes(b"")
    monkeypatch.setattr(cpp_build, "_loaded", {})
    assert answer(cpp_build.load(source, "one")) == 42  # said once


FULL = """#!/bin/sh
# A compiler on a machine whose disk is full beyond the folders that hold $ROOM
case "$*" in *"$ROOM"*|*--version*) exec {compiler} "$@";; esac
echo "/usr/bin/ld: final link failed: No space left on device" >&2
exit 1
"""


@compiled
@pytest.mark.parametrize("room", ["cellc-", "nowhere"])
def test_full_disk_while_compiling(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    script = tmp_path / "compiler"
    script.write_text(FULL.format(compiler=cpp_build.find_compiler()))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("ROOM", f"{tempfile.gettempdir()}/{room}")
    cpp_build._warn_unwritable.cache_clear()
    cpp_build._temporary_dir.cache_clear()
    with pytest.warns(UserWarning, match="no space left on device.*Set CELLC_CACHE"):
        if room == "nowhere":
            with pytest.raises(BackendError, match="free some space"):
                cpp_build.load(SOURCE, "one")
        else:
            assert answer(cpp_build.load(SOURCE, "one")) == 42
    assert not list(cache.iterdir())


@compiled
def test_full_disk_while_keeping(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if cache in path.parents:
            write(path, data[:100])  # what still found room
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    cpp_build._warn_unwritable.cache_clear()
    with pytest.warns(UserWarning, match="No space left on device"):
        assert answer(cpp_build.load(SOURCE + "\n\n", "one")) == 42
    assert not list(cache.iterdir())


def test_files_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a" / "b.txt"
    files.write(path, "first")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(files.os, "replace", _full)
        files.write(path, "second")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "full")


@compiled
def test_threads_build_side_by_side_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """One build waits for another, which a single lock would not let begin."""
    begun, build = threading.Barrier(2, timeout=60), cpp_build._build
    built = []

    def slow(source: str, path: Path, compiler: str) -> None:
        built.append(source)
        begun.wait()
        build(source, path, compiler)

    monkeypatch.setattr(cpp_build, "_build", slow)
    sources = [SOURCE + "// a\n", SOURCE + "// b\n"] * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda source: cpp_build.load(source, "one"), sources))
    assert found[0] is found[2] and found[1] is found[3] and len(built) == 2
    assert [answer(library) for library in found] == [42] * 4


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
