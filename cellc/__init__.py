"""cellc: cellular batching for PyTorch models.

`cellc.compile(model)` finds a model's weight-shared cells, generates a fused kernel for each, and
batches cells, not requests, across everything in flight. See README.md; ARCHITECTURE.md is the map.
"""

from cellc import env
from cellc.compiled import Compiled
from cellc.entry import compile
from cellc.errors import (
    BackendError,
    CellcError,
    ClosedError,
    ForwardError,
    Overloaded,
    RequestError,
    UnsupportedError,
    ValueReadError,
)
from cellc.options import Options
from cellc.views import CellView

env.check()

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "CellView",
    "CellcError",
    "ClosedError",
    "Compiled",
    "ForwardError",
    "Options",
    "Overloaded",
    "RequestError",
    "UnsupportedError",
    "ValueReadError",
    "__version__",
    "compile",
]
