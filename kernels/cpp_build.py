"""Compile C++ and keep the results on disk.

Duty: from source text to a loaded library. Comes in: C++ text; goes out: a `ctypes.CDLL`. The cache
is keyed by everything that the machine code depends on: text, headers, compiler, flags, processor.
Each file ends with a digest of itself, so that a damaged one is rebuilt; it is written under
another name and renamed, so that processes may build the same at once. Where the folder cannot be
written, a temporary one serves, and a warning says so.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from cellc import env
from cellc.errors import BackendError
from cellc.waiting import Future

HERE = Path(__file__).resolve().parent
FLAGS = (
    "-O3 -std=c++17 -pipe -shared -fPIC -pthread -fwrapv -fno-math-errno -fno-trapping-math "
    "-ffp-contract=fast"
).split()
DIGEST = 32
_loaded: dict[str, Future[ctypes.CDLL]] = {}  # by key; some are being built


def find_compiler() -> str | None:
    """Path of $CXX, else of g++ or clang++ or c++; None where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def require_compiler() -> str:
    compiler = find_compiler()
    if compiler is None:
        raise BackendError(
            "no C++ compiler was found; install g++ or clang++, or name one in CXX",
            backend="cpp",
        )
    return compiler


def load(source: str, name: str) -> ctypes.CDLL:
    """The library of `source`: from memory, from disk, or compiled now as name-key.so. Threads that
    want the same one wait for one build; others build side by side.
    """
    compiler = require_compiler()
    key = _key(source, compiler)
    mine: Future[ctypes.CDLL] = Future()
    try:
        future = _loaded.setdefault(key, mine)
        if future is mine:
            mine.set_result(_from_disk(source, f"{name}-{key[:32]}", compiler))
    except BaseException as error:
        if _loaded.get(key) is mine:
            del _loaded[key]  # the next one tries again
        if not mine.done():
            mine.set_exception(error)
        raise
    failure = future.exception()
    if failure is not None and not isinstance(failure, Exception):
        return load(source, name)  # who built it was interrupted
    return future.result()


def load_own(name: str) -> ctypes.CDLL:
    """The library of a file of this folder."""
    return load((HERE / f"{name}.cpp").read_text(), name)


def prepare_own(name: str) -> None:
    """Begin to load it; what fails, fails again where it is wanted, but the lack of a compiler."""
    require_compiler()

    def run() -> None:
        with suppress(Exception):
            load_own(name)

    threading.Thread(target=run, name=f"cellc-build-{name}").start()


def flags() -> list[str]:
    """What the compiler is called with on this machine."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return [*FLAGS, "-march=native", "-mprefer-vector-width=512"]
    return [*FLAGS, "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-O3"]


def _key(source: str, compiler: str) -> str:
    headers = [path.read_text() for path in sorted(HERE.glob("*.h"))]
    parts = [source, *headers, *flags(), _version(compiler), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@lru_cache
def _version(compiler: str) -> str:
    return subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout


@lru_cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "cpu family", "model\t", "stepping", "flags", "features", "cpu part")
    return "\n".join(dict.fromkeys(line for line in lines if line.lower().startswith(wanted)))


@lru_cache
def _temporary_dir() -> Path:
    path = Path(tempfile.mkdtemp(prefix="cellc-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _from_disk(source: str, name: str, compiler: str) -> ctypes.CDLL:
    path = env.cache() / f"{name}.so"
    if _intact(path):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            pass  # not for this machine after all: build it again
    elif path.exists():
        _warn_damaged(str(path.parent))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _build(source, path, compiler)
    except OSError as error:
        _warn_unwritable(str(path.parent), str(error))
        path = _temporary_dir() / path.name
        try:
            _build(source, path, compiler)
        except OSError as also:
            raise BackendError(
                f"compiled kernels can be kept neither in {env.cache()} ({error}) nor in "
                f"{path.parent} ({also}); free some space, or set CELLC_CACHE to another folder",
                backend="cpp",
            ) from also
    return ctypes.CDLL(str(path))


@lru_cache
def _warn_damaged(folder: str) -> None:
    warnings.warn(
        f"compiled kernels in {folder} are damaged; those that are needed are compiled again",
        stacklevel=5,
    )


@lru_cache
def _warn_unwritable(folder: str, error: str) -> None:
    warnings.warn(
        f"cellc cannot keep compiled kernels in {folder} ({error}); "
        "every process compiles them again. Set CELLC_CACHE to a folder that can be written",
        stacklevel=4,
    )


def _intact(path: Path) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) > DIGEST and hashlib.sha256(data[:-DIGEST]).digest() == data[-DIGEST:]


def _build(source: str, path: Path, compiler: str) -> None:
    """Compile to `path`; OSError where that folder cannot hold it, BackendError where g++ fails."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
        text, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        text.write_text(source)
        command = [compiler, *flags(), f"-I{HERE}", str(text), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            if "No space left" in done.stderr:
                raise OSError("no space left on device")
            raise BackendError(
                f"{' '.join(command)} failed:\n{done.stderr[-2000:]}\n"
                "use backend='eager', and please report it",
                backend="cpp",
            )
        data = library.read_bytes()
        library.write_bytes(data + hashlib.sha256(data).digest())
        os.replace(library, path)
