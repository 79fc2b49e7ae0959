"""cellc: cellular batching for PyTorch models.

`cellc.compile(model)` finds a model's weight-shared cells, generates a fused kernel for each, and
batches cells, not requests, across everything in flight. See README.md; ARCHITECTURE.md is the map.

What compiles and runs models is imported when it is first asked for, so that `import cellc` costs
little more than `import torch`.
"""

import gc
from importlib import import_module
from typing import TYPE_CHECKING

from cellc.errors import (
    BackendError,
    CallsError,
    CellcError,
    ClosedError,
    DeadlineError,
    ForwardError,
    Overloaded,
    PolicyError,
    RequestError,
    RequestTimeout,
    SessionBusy,
    SessionClosed,
    StepsError,
    TooLarge,
    UnsupportedError,
    ValueReadError,
    WorkerError,
)

if TYPE_CHECKING:
    from cellc.checking import CheckReport, check
    from cellc.compiled import Compiled
    from cellc.entry import compile
    from cellc.marks import cell
    from cellc.options import Options
    from cellc.policies import Policy
    from cellc.trees import Dag, Tree
    from cellc.views import CellView

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "CallsError",
    "CellView",
    "CellcError",
    "CheckReport",
    "ClosedError",
    "Compiled",
    "Dag",
    "DeadlineError",
    "ForwardError",
    "Options",
    "Overloaded",
    "Policy",
    "PolicyError",
    "RequestError",
    "RequestTimeout",
    "SessionBusy",
    "SessionClosed",
    "StepsError",
    "TooLarge",
    "Tree",
    "UnsupportedError",
    "ValueReadError",
    "WorkerError",
    "__version__",
    "cell",
    "check",
    "compile",
]
_HOMES = {
    "CellView": "cellc.views",
    "CheckReport": "cellc.checking",
    "Compiled": "cellc.compiled",
    "Dag": "cellc.trees",
    "Options": "cellc.options",
    "Policy": "cellc.policies",
    "Tree": "cellc.trees",
    "cell": "cellc.marks",
    "check": "cellc.checking",
    "compile": "cellc.entry",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cellc' has no attribute {name!r}")
    collecting = gc.isenabled()
    gc.disable()  # of what is imported nothing is garbage; to look through torch's takes as long
    try:
        value: object = getattr(import_module(_HOMES[name]), name)
    finally:
        if collecting:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
