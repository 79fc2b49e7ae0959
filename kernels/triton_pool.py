"""Processes that compile Triton kernels, several at once.

Duty: compile kernels where Triton's interpreter is off, whatever this process was told, and where a
compiler that crashes takes nothing else with it. Comes in: `Job`s; goes out: a `Report` each, with
its `problem` where there is no kernel. A worker is `python -m cellc.kernels.triton_pool`.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cellc import env
from cellc.cells import Cell
from cellc.errors import BackendError
from cellc.kernels.tile_ir import TileProgram
from cellc.kernels.triton_backend import TritonOptions, print_cell
from cellc.kernels.triton_persistent import print_persistent
from cellc.kernels.triton_printer import Printed
from cellc.kernels.triton_targets import Report, compile_kernel, known

LIMIT = 600.0  # seconds that one kernel may take


@dataclass(frozen=True)
class Job:
    """Kernel `index` of a cell, for a target; `persistent`: its persistent kernel instead."""

    cell: Cell
    index: int
    target: str
    options: TritonOptions = TritonOptions()
    persistent: bool = False

    def known(self) -> Report | None:
        """From the cache."""
        return known(self._printed()[1], self.index, self.target)

    def run(self) -> Report:
        """Compile, in this process."""
        return compile_kernel(*self._printed(), self.index, self.target)

    def failed(self, problem: str) -> Report:
        name = self._printed()[1].kernels[self.index].name
        return Report(name, self.target, problem=problem)

    def _printed(self) -> tuple[TileProgram, Printed]:
        program, printed = print_cell(self.cell, self.options)
        if not self.persistent:
            return program, printed
        made = print_persistent(program, printed, self.options.input_precision)
        assert made is not None
        return program, made.printed


def compile_all(
    jobs: Sequence[Job], done: Callable[[], None] = lambda: None, workers: int | None = None
) -> list[Report]:
    """Compile side by side; reports in order. `done` is called after each."""
    reports: list[Report | None] = []
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i, job in enumerate(jobs):
        reports.append(job.known())
        if reports[i] is None:
            waiting.put(i)
        else:
            done()
    count = min(workers or os.cpu_count() or 1, waiting.qsize())
    if not count:
        return [r for r in reports if r is not None]
    pool = [_Worker() for _ in range(count)]
    threads = [
        threading.Thread(target=_serve, args=(w, jobs, waiting, reports, done), daemon=True)
        for w in pool
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # so that ctrl-c is heard
                thread.join(0.2)
    finally:
        for worker in pool:
            worker.close()
    assert all(r is not None for r in reports)
    return [r for r in reports if r is not None]


def _serve(
    worker: _Worker,
    jobs: Sequence[Job],
    waiting: queue.SimpleQueue[int],
    reports: list[Report | None],
    done: Callable[[], None],
) -> None:
    while True:
        try:
            i = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            reports[i] = worker.ask(jobs[i])
        except Exception as error:
            reports[i] = jobs[i].failed(f"{type(error).__name__}: {error}")
        done()


class _Worker:
    """One process, started again where it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def ask(self, job: Job) -> Report:
        """A report from the process."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        try:
            pickle.dump(job, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = process.wait()
            said = self._said()
            self.close()
            return job.failed(f"the compiler's process ended with {code}{said}")
        finally:
            timer.cancel()
        return answer if isinstance(answer, Report) else job.failed(str(answer))

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(env.__file__).resolve().parent.parent)  # the cellc that runs here
        environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        paths = [root, *filter(None, [environ.get("PYTHONPATH")])]
        environ["PYTHONPATH"] = os.pathsep.join(paths)
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cellc.kernels.triton_pool"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environ,
        )
        return self._process

    def _said(self) -> str:
        """The last line of what the process complained of."""
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what was never read
                        pipe.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None


def main() -> None:
    """A worker: jobs in, answers out, until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no answer
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: Any
        try:
            answer = job.run()
        except BackendError as error:
            answer = str(error)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # the jobs are of the module that is imported, not of this one that runs
    from cellc.kernels import triton_pool

    triton_pool.main()
