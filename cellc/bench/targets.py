"""The targets that cellc is built to, each beside what was measured.

Duty: state every target once (its text, its bound, which figures decide it), and judge it by what
was found. A target whose figures lack says why. Adding one is adding a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from cellc.bench import decode, host, memory, startup, trees, workers
from cellc.bench.found import SHARE, Found, Lacking
from cellc.bench.online_workloads import STATED
from cellc.bench.recurrent import BUCKETS, CELLC, ONNX, ONNX_BUCKETS
from cellc.bench.sheets import Sheet, number

Measure = Callable[[Found], float]


@dataclass(frozen=True)
class Target:
    """`what` is to be at least or at most `bound`; `unit` stands after numbers."""

    what: str
    bound: float
    unit: str
    workload: str  # what has to be measured for it, requests at once or as they come
    measured: Measure
    at_least: bool = True
    online: bool = False

    @property
    def text(self) -> str:
        return f"{'>=' if self.at_least else '<='} {number(self.bound)}{self.unit}"

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Verdict:
    """A target judged; `held` is None where `why` says why not."""

    what: str
    target: str
    measured: float | None
    held: bool | None
    why: str = ""


def _ratio(key: str, way: str, other: str) -> Measure:
    return lambda found: found.ratio(key, way, other)


def _fact(key: str, name: str) -> Measure:
    return lambda found: found.fact(key, name)


def _latency(key: str, policy: str = "") -> Measure:
    return lambda found: found.latency(key, policy)


def _most_memory(found: Found) -> float:
    facts = found.outcome("memory").facts
    beyond = [v for k, v in facts.items() if k.startswith(memory.BEYOND.format(""))]
    if not beyond:
        raise Lacking("; ".join(found.outcome("memory").missing.values()) or "not measured")
    return max(beyond)


def _lstm(units: int, tokens: float, vectors: float) -> list[Target]:
    name, at_once = f"lstm-{units}", f"LSTM, {units} units, 512 requests at once"
    return [
        Target(
            f"{at_once}, tokens in, to PyTorch in buckets",
            tokens, "x", name, _ratio(f"{name} tokens", CELLC, BUCKETS),
        ),
        Target(
            f"{at_once}, vectors in, to PyTorch in buckets",
            vectors, "x", name, _ratio(f"{name} vectors", CELLC, BUCKETS),
        ),
    ]  # fmt: skip


def _served(what: str, name: str, case: str) -> list[Target]:
    key = f"{name} {case}".strip()
    served = f"{what}, 256 units, Poisson, {SHARE:.0%} of the padded server's peak"
    return [
        Target(
            f"{served}: p90 to that of waiting 10 ms",
            1 / 5, "x", name, _latency(key, str(STATED)), at_least=False, online=True,
        ),
        Target(
            f"{served}: p90 to that of its best timeout",
            1 / 2, "x", name, _latency(key), at_least=False, online=True,
        ),
    ]  # fmt: skip


_TREES = "binary TreeLSTM, 256 units, 512 trees at once"
TARGETS: Sequence[Target] = [
    *_lstm(256, 2.5, 1.5),
    Target(
        "the same on vectors, to onnxruntime in buckets",
        1.3, "x", "lstm-256", _ratio("lstm-256 vectors", CELLC, ONNX_BUCKETS),
    ),
    *_lstm(1024, 2.8, 1.5),
    Target(
        "one request of 24 vectors alone, LSTM, 256 units: time to onnxruntime's",
        1.0, "x", "lstm-256", _ratio("lstm-256 alone", ONNX, CELLC), at_least=False,
    ),
    *_served("LSTM, tokens in", "lstm-256", "tokens"),
    *_served("LSTM, vectors in", "lstm-256", "vectors"),
    *_served("greedy decoding", "seq2seq-256", ""),
    Target(
        f"{_TREES}, plain recursion, structures seen, to eager one at a time",
        12.0, "x", "treelstm-256", _ratio("treelstm-256", trees.SEEN, trees.EAGER),
    ),
    Target(
        "the same, every tree new, to DyNet autobatching",
        3.0, "x", "treelstm-256", _ratio("treelstm-256", trees.NEW, trees.DYNET),
    ),
    Target(
        "the same by cellc.Tree, every tree new, to PyTorch's levels by hand",
        1.5, "x", "treelstm-256", _ratio("treelstm-256", trees.TREE_NEW, trees.LEVELS),
    ),
    Target(
        "the same, to levels by hand in the batches and layout that suit this processor",
        1.5, "x", "treelstm-256", _ratio("treelstm-256", trees.TREE_NEW, trees.LEVELS_PACKED),
    ),
    Target(
        "greedy decoding with an end token, 256 units, 512 at once, to padded PyTorch",
        2.0, "x", "seq2seq-256", _ratio("seq2seq-256", decode.CELLC, decode.PADDED),
    ),
    Target(
        "useful share of a matrix product's speed at saturation, LSTM, 1024 units",
        0.85, "", "saturation", _fact("saturation", host.SHARE.format(host.EQUAL)),
    ),
    Target(
        "host cost of a launch at 64 rows, structure seen",
        100.0, " us", "host", _fact("host", host.LAUNCH.format(64)), at_least=False,
    ),
    Target(
        "host cost of a cell at 256 rows, structure seen",
        0.5, " us", "host", _fact("host", host.CELL.format(256)), at_least=False,
    ),
    Target(
        "two CPU workers of one thread each to one, LSTM, 128 units, tokens in",
        1.6, "x", "workers", _ratio("workers long", workers.TWO, workers.ONE),
    ),
    Target(
        "a cell of a new tree unfolded from plain recursion",
        4.0, " us", "treelstm-256",
        _fact("treelstm-256", trees.UNFOLD.format(trees.RECURSION)), at_least=False,
    ),
    Target(
        "the same from arrays (cellc.Tree)",
        1.0, " us", "treelstm-256",
        _fact("treelstm-256", trees.UNFOLD.format(trees.ARRAYS)), at_least=False,
    ),
    Target(
        "memory beyond weights and the arenas of rows, the most of all workloads",
        200.0, " MB", "memory", _most_memory, at_least=False,
    ),
    Target(
        "import cellc beyond torch's own import",
        100.0, " ms", "startup", _fact("startup", startup.IMPORT), at_least=False,
    ),
    Target(
        "an LSTM classifier's first result, in a process where nothing is cached",
        3.0, " s", "startup", _fact("startup", startup.COLD), at_least=False,
    ),
    Target(
        "the same in the next process, its kernels cached",
        0.3, " s", "startup", _fact("startup", startup.WARM), at_least=False,
    ),
]  # fmt: skip


def workloads(*, online: bool = False) -> list[str]:
    """What decides the targets."""
    return list(dict.fromkeys(t.workload for t in TARGETS if t.online is online))


def judge(found: Found) -> list[Verdict]:
    """Every target."""
    verdicts = []
    for target in TARGETS:
        try:
            value = target.measured(found)
        except Lacking as why:
            verdicts.append(Verdict(target.what, target.text, None, None, str(why)))
        else:
            held = target.holds(value)
            verdicts.append(Verdict(target.what, target.text, value, held))
    return verdicts


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    return [asdict(v) for v in verdicts]


def sheet(found: Found) -> Sheet:
    """One row a target."""
    rows = []
    for target, verdict in zip(TARGETS, judge(found), strict=True):
        if verdict.measured is None:
            rows.append([target.what, target.text, verdict.why, ""])
        else:
            held = "held" if verdict.held else "not held"
            rows.append(
                [target.what, target.text, f"{number(verdict.measured)}{target.unit}", held]
            )
    columns = ("what", "target", "measured", "")
    unlike = found.unlike({t.workload for t in TARGETS})
    notes = f"not as targets are meant: {unlike}" if unlike else ""
    return Sheet("Targets", columns, rows, notes, left=len(columns))
