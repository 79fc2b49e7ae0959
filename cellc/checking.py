"""`cellc.check`: a model's results, and its cells' kernels, against plain PyTorch.

Duty: run requests by every backend that can run here, together and one at a time, and compare with
the model itself; then launch every cell's kernel on rows that the cell was given, at several batch
sizes and dtypes, and compare with the same cell as plain torch calls. Comes in: a model or a cell;
goes out: a `CheckReport`, plain data, which `cellc.check_command` prints.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import isnan
from typing import Any

import torch

from cellc import check_cells
from cellc.cells import Cell
from cellc.check_cells import CellCheck
from cellc.comparing import Comparison, Tolerance, compare, described
from cellc.compiled import Compiled
from cellc.dtypes import DTYPE_NAMES
from cellc.entry import compile, make_backend
from cellc.errors import BackendError, UnsupportedError, UsageError
from cellc.kernels.narrow import CLOSE, check_weights
from cellc.modules import evaluating, named_tensors
from cellc.options import BackendName, Options
from cellc.samples import Sample, collect, copied, drawn
from cellc.streams import Stream
from cellc.survey import model_name
from cellc.views import CellView

BATCH_SIZES = (1, 3, 64)
NOTHING = "nothing was compared: PyTorch raises for every request"
Step = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


def silent(text: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    """No progress."""
    return nullcontext(lambda: None)


@dataclass(frozen=True)
class RequestCheck:
    """One request by one backend, together with all others and alone: the worse of the two."""

    request: int
    backend: str
    outputs: Sequence[str]
    found: Comparison
    raises: str = ""  # what PyTorch does in place of a result


@dataclass
class CheckReport:
    """What was compared; true where all of it is equal, and something was. `skipped`: backends, and
    why. With narrower `weights` differences of floats are shares of their norms.
    """

    model: str
    weights: str | None = None
    requests: list[RequestCheck] = field(default_factory=list)
    cells: list[CellCheck] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return all(found.equal for found in self._found) and not self.all_raise

    @property
    def all_raise(self) -> bool:
        """No request has a result, in PyTorch either: nothing was compared."""
        return bool(self.requests) and all(r.raises for r in self.requests)

    @property
    def _found(self) -> list[Comparison]:
        return [*(r.found for r in self.requests), *(c.found for c in self.cells)]

    def __bool__(self) -> bool:
        return self.equal

    @property
    def failures(self) -> list[str]:
        """A line for each comparison that failed."""
        wrong = [(f"request {r.request}, {r.backend}", r.found) for r in self.requests]
        wrong += [(f"cell {c.cell}, {c.backend}, {c.dtype}", c.found) for c in self.cells]
        return [NOTHING] * self.all_raise + [
            f"{where}: {found.problem or f'differs by {found.difference:.2g}'}"
            for where, found in wrong
            if not found.equal
        ]

    def __str__(self) -> str:
        results = sum(not r.raises for r in self.requests)
        count = f"{results} results and {len(self.cells)} kernels compared"
        return "\n".join([f"{self.model}: {count}, {'all equal' if self else 'not all equal'}",
                          *self.failures])  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """What `cellc check --json` prints."""
        return {
            "model": self.model,
            "equal": self.equal,
            "weights": self.weights,
            "requests": [
                {
                    "request": r.request,
                    "backend": r.backend,
                    "outputs": list(r.outputs),
                    "raises": r.raises or None,
                    **comparison_json(r.found),
                }
                for r in self.requests
            ],
            "cells": [
                {
                    "cell": c.cell,
                    "backend": c.backend,
                    "dtype": c.dtype,
                    "batch_sizes": list(c.batch_sizes),
                    "left_to_torch": list(c.left),
                    **comparison_json(c.found),
                }
                for c in self.cells
            ],
            "skipped": self.skipped,
        }


def comparison_json(found: Comparison) -> dict[str, Any]:
    return {
        "difference": None if isnan(found.difference) else found.difference,
        "equal": found.equal,
        "problem": found.problem,
    }


def check(
    model_or_cell: Any,
    example: Any = None,
    *,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rtol: float | None = None,
    atol: float | None = None,
    weights: str | None = None,
    step: Step = silent,
) -> CheckReport:
    """Compare a compiled model, and the kernels of its cells, with plain PyTorch.

    example: one request as `Compiled.map` takes it, or a list of them. A cell (out of
    `compiled.cells`) needs none: it runs on random rows. backends: all that can run here (Triton's
    interpreter only where it is asked for). dtypes: of cells, out of f32, f64, bf16, f16; by
    default the model's own, and of the 32 largest cells each other that a backend generates. rtol,
    atol: in place of each dtype's own (f32: 1e-4, 1e-5). weights: check with options={"weights":
    ..}: kernels against torch calls with the same weights as above, and against the model's own
    weights by norm, as `Options` says (cells: 3e-3 with "bf16", 6e-3 with "int8"; results: twice
    that; rtol and atol are then of norms). Requests that PyTorch refuses are equal where cellc
    refuses them, too; not where there are no others.

    >>> import torch, cellc
    >>> report = cellc.check(torch.nn.GRU(4, 8), torch.randn(5, 4), backends=["eager"])
    >>> print(report)
    GRU: 1 results and 0 kernels compared, all equal
    """
    check_weights(weights)
    options = Options(weights=weights)
    tolerance = Tolerance(rtol, atol)
    if isinstance(model_or_cell, (Cell, CellView)):
        cell = model_or_cell if isinstance(model_or_cell, Cell) else model_or_cell.cell
        report = CheckReport(cell.name, weights)
        chosen = _backends(backends, torch.device("cpu"), options, report)
        _check_cells(report, [drawn(cell)], chosen, dtypes, batch_sizes, tolerance, step)
        return report
    if example is None:
        raise UsageError("cellc.check of a model needs an example request, or a list of them")
    model, requests = model_or_cell, example if isinstance(example, list) else [example]
    device = next((t.device for t in named_tensors(model).values()), torch.device("cpu"))
    report = CheckReport(model_name(model), weights)
    chosen = _backends(backends, device, options, report)
    with step("PyTorch", len(requests)) as done:
        expected = [_expected(model, r, done) for r in requests]
    for name in chosen:
        with step(f"requests by {name}", 2 * len(requests)) as done:
            with compile(model, backend=name, options={"weights": weights}) as compiled:
                report.requests += _requests(
                    compiled, requests, expected, name, _of_results(tolerance, weights), done
                )
    if [name for name in chosen if name != "eager"]:
        with step("rows of cells", 1) as done:
            samples = collect(model, requests)
        _check_cells(report, samples, chosen, dtypes, batch_sizes, tolerance, step)
    return report


# -- backends --------------------------------------------------------------------------------------


def _backends(
    asked: Sequence[str] | None, device: torch.device, options: Options, report: CheckReport
) -> list[BackendName]:
    """Those asked for, else all that can run here; the report says why others cannot."""
    names: tuple[BackendName, ...] = ("eager", "cpp", "triton")
    if asked is not None:
        unknown = [name for name in asked if name not in names]
        if unknown:
            raise UsageError(f"backend {unknown[0]!r} is not known; there are {', '.join(names)}")
        chosen = [name for name in names if name in asked]
        for name in chosen:
            _close(make_backend(name, device, options))  # raises where it cannot run
        return chosen
    chosen = []
    for name in names:
        try:
            _close(made := make_backend(name, device, options))
        except (BackendError, UnsupportedError) as error:
            report.skipped[name] = str(error)
            continue
        if getattr(made, "interpreted", False):
            report.skipped[name] = "Triton's interpreter runs only where it is asked for"
            continue
        chosen.append(name)
    return chosen


def _close(backend: Any) -> None:
    if hasattr(backend, "close"):
        backend.close()


# -- requests --------------------------------------------------------------------------------------


def _expected(model: Any, request: Any, done: Callable[[], None]) -> Any:
    """The model's own result, or the error that it raises."""
    given = copied(request)
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    try:
        with warnings.catch_warnings(), torch.no_grad(), evaluating(model):
            warnings.simplefilter("ignore")
            result = model(*args, **kwargs)
            return list(result) if inspect.isgenerator(result) else result
    except Exception as error:
        return error
    finally:
        done()


def _of_results(tolerance: Tolerance, weights: str | None) -> Tolerance:
    """Of many steps with narrower weights: twice a step's."""
    if weights is None:
        return tolerance
    share = 2 * CLOSE[weights] if tolerance.rtol is None else tolerance.rtol
    return replace(tolerance, norm=share)


def _requests(
    compiled: Compiled,
    requests: Sequence[Any],
    expected: Sequence[Any],
    backend: BackendName,
    tolerance: Tolerance,
    done: Callable[[], None],
) -> list[RequestCheck]:
    together = compiled.map([copied(r) for r in requests], return_exceptions=True)
    for _ in requests:
        done()
    alone = [_alone(compiled, r, done) for r in requests]
    found = []
    for i, (want, *got) in enumerate(zip(expected, together, alone, strict=True)):
        worst = _compared(got[0], want, tolerance) & _compared(got[1], want, tolerance)
        failed = isinstance(want, Exception)
        outputs, raises = ([], _text(want)) if failed else (described(want), "")
        found.append(RequestCheck(i, backend, outputs, worst, raises))
    return found


def _alone(compiled: Compiled, request: Any, done: Callable[[], None]) -> Any:
    given = copied(request)
    try:
        result = compiled(**given) if isinstance(given, dict) else compiled(*given)
        return list(result) if isinstance(result, Stream) else result
    except Exception as error:
        return error
    finally:
        done()


def _compared(got: Any, want: Any, tolerance: Tolerance) -> Comparison:
    if isinstance(want, Exception) and isinstance(got, Exception):
        return Comparison(True, 0.0, f"PyTorch raises, too: {_text(want)}")
    if isinstance(want, Exception) or isinstance(got, Exception):
        who, error = ("PyTorch", want) if isinstance(want, Exception) else ("cellc", got)
        return Comparison(False, float("nan"), f"{who} raises {_text(error)}")
    return compare(got, want, tolerance)


def _text(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


# -- cells -----------------------------------------------------------------------------------------


def _check_cells(
    report: CheckReport,
    samples: Sequence[Sample],
    backends: Sequence[BackendName],
    dtypes: Sequence[str] | None,
    batch_sizes: Sequence[int],
    tolerance: Tolerance,
    step: Step,
) -> None:
    known: Mapping[str, torch.dtype] = {v: k for k, v in DTYPE_NAMES.items()}
    for name in dtypes or ():
        if name not in known or not known[name].is_floating_point:
            raise UsageError(f"dtype {name!r} is not known; there are f32, f64, bf16, f16")
    for backend in backends:
        if backend == "eager":
            continue  # what the others are compared with
        work = check_cells.plan(samples, backend, dtypes)
        if not work:
            continue
        device = next((p.device for s in samples for p in s.params.values()), torch.device("cpu"))
        maker = make_backend(backend, device, Options(weights=report.weights))
        try:
            with step(f"cells by {backend}", len(work)) as done:
                for sample, dtype in work:
                    report.cells.append(
                        check_cells.check_cell(
                            sample, dtype, maker, batch_sizes, tolerance, report.weights
                        )
                    )
                    done()
        finally:
            _close(maker)
