"""On a real GPU, kernels compiled by Triton: the zoo, library recurrences, halves, company.

Run with `TRITON_INTERPRET=0 pytest -m gpu`; elsewhere they skip themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import kernel_cells as kc
import pytest
import torch
from test_zoo import NAMES, check
from torch import Tensor, nn

import cellc
from cellc.cells import Cell
from cellc.kernels.eager import EagerBackend
from cellc.kernels.triton_backend import TritonBackend, TritonKernel
from cellc.kernels.triton_graphs import Graphs, captured
from cellc.launch import Launch
from cellc.ops import RowType

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
Arenas = Mapping[RowType, Tensor]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """f32 products of the reference in f32."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@pytest.mark.parametrize("name", NAMES)
def test_zoo_equals_eager(name: str) -> None:
    check(name, "triton", device=DEVICE)


@pytest.mark.parametrize("B", [1, 200])
@pytest.mark.parametrize("name", kc.CELLS)
def test_cell_equals_eager(name: str, B: int) -> None:
    cell = kc.CELLS[name]()
    params = kc.random_params(cell, 0)
    there = TritonBackend(DEVICE).kernel(cell, {k: v.to(DEVICE) for k, v in params.items()})

    class There:
        source = there.source

        def __call__(self, launch: Launch, arenas: Mapping[RowType, Tensor]) -> Sequence[int]:
            copies = {k: v.to(DEVICE) for k, v in arenas.items()}
            bad = list(there(launch, copies))
            for kind, arena in copies.items():
                arenas[kind].copy_(arena)
            return bad

    run = kc.make_run(cell, B, seed=B)
    kc.check(There(), EagerBackend().kernel(cell, params), run, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("H", [32, 256])
@pytest.mark.parametrize("library", [nn.LSTM, nn.GRU])
def test_library_recurrence(library: type[nn.RNNBase], H: int) -> None:
    torch.manual_seed(0)
    model = library(H, H).to(DEVICE).eval()
    requests = [torch.randn(t, H, device=DEVICE) for t in (1, 3, 24, 7, 24, 50)]
    with cellc.compile(model) as compiled:
        for x, (got, _) in zip(requests, compiled.map(requests), strict=True):
            with torch.no_grad():
                torch.testing.assert_close(got, model(x)[0], rtol=1e-4, atol=1e-5)
            assert got.device.type == DEVICE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(128, 256).to(DEVICE).eval()
    requests = [torch.randn(t, 128, device=DEVICE) for t in (1, 5, 24, 24, 40)]
    with cellc.compile(model, dtype=dtype) as compiled:
        for x, (got, _) in zip(requests, compiled.map(requests), strict=True):
            with torch.no_grad():
                want = model(x)[0]
            assert got.dtype == dtype
            assert torch.norm(got.float() - want) / torch.norm(want) < 1e-2


class Greedy(nn.Module):
    """[T] tokens to [L] tokens, until one says stop."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, hidden), nn.Linear(hidden, 20)
        self.encoder, self.decoder = nn.LSTMCell(hidden, hidden), nn.LSTMCell(hidden, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        h = c = torch.zeros(self.head.in_features, device=tokens.device)
        for token in tokens:
            h, c = self.encoder(self.embedding(token), (h, c))
        token, said = tokens[0], []
        for _ in range(30):
            h, c = self.decoder(self.embedding(token), (h, c))
            token = self.head(h).argmax(-1)
            said.append(token)
            if token == 3:
                break
        return torch.stack(said)


def test_values_that_steer() -> None:
    torch.manual_seed(0)
    model = Greedy().to(DEVICE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    requests = [torch.randint(20, (t,), device=DEVICE) for t in range(1, 60)]
    with cellc.compile(model) as compiled, torch.no_grad():
        for _ in range(2):
            for x, got in zip(requests, compiled.map(requests), strict=True):
                assert torch.equal(got, model(x))


def test_requests_on_the_host() -> None:
    """Tensors of requests are copied to the device."""
    torch.manual_seed(0)
    model = nn.GRU(16, 32).eval()
    with cellc.compile(model, device=DEVICE) as compiled, torch.no_grad():
        x = torch.randn(9, 16)
        torch.testing.assert_close(compiled(x)[0].cpu(), model(x)[0], rtol=1e-4, atol=1e-5)


def test_company_changes_no_bit() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(64, 128).to(DEVICE).eval()
    requests = [torch.randn(1 + i % 30, 64, device=DEVICE) for i in range(200)]
    with cellc.compile(model) as compiled:
        together = compiled.map(requests)
        for x, (want, _) in list(zip(requests, together, strict=True))[::10]:
            assert torch.equal(compiled(x)[0], want)


def test_session() -> None:
    torch.manual_seed(0)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(8, 16)

        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
            h = torch.zeros(16, device=x.device) if state is None else state
            h = self.cell(x, h)
            return h.sum(-1), h

    model = Step().to(DEVICE).eval()
    signals = torch.randn(5, 12, 8, device=DEVICE)
    with cellc.compile(model, carry={"state": "1"}) as compiled, torch.no_grad():
        sessions = [compiled.session() for _ in signals]
        said = [[s.step(x)[0] for x in signal] for s, signal in zip(sessions, signals, strict=True)]
        for got, signal in zip(said, signals, strict=True):
            h = None
            for x, y in zip(signal, got, strict=True):
                want, h = model(x, h)
                torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


CHAINS = {
    "lstm-f32": (kc.lstm_folded(50, 64), {0: 1, 1: 2}),
    "lstm-bf16": (kc.lstm_folded(50, 128, "bf16"), {0: 1, 1: 2}),
    "gru-bf16": (kc.gru_cell(64, 64, "bf16"), {0: 1}),
    "layernorm_lstm": (kc.layernorm_lstm(32, 40), {0: 1, 1: 2}),
}


def on_device(cell: Cell) -> TritonKernel:
    params = {k: v.to(DEVICE) for k, v in kc.random_params(cell).items()}
    return TritonBackend(DEVICE).kernel(cell, params)


def both(
    run: kc.Run, one: Callable[[Launch, Arenas], object], other: Callable[[Launch, Arenas], object]
) -> tuple[Arenas, Arenas]:
    """What each wrote, in the same arenas, one after the other."""
    arenas = {k: v.to(DEVICE) for k, v in run.arenas.items()}
    found = []
    for call in (one, other):
        for kind, rows in run.arenas.items():
            arenas[kind].copy_(rows)
        call(run.launch, arenas)
        found.append({k: v.clone() for k, v in arenas.items()})
    return found[0], found[1]


@pytest.mark.parametrize("name", CHAINS)
def test_graphs_equal_kernel_by_kernel(name: str) -> None:
    """Bit for bit, by one graph for launches of other rows and steps."""
    cell, feed = CHAINS[name]
    kernel = on_device(cell)
    assert kernel.launches is not None
    kernel.launches.loop = None  # as if it were not known to be faster
    own: dict[RowType, Tensor] = {}

    def graph(launch: Launch, arenas: Arenas) -> None:
        for kind, rows in arenas.items():
            own.setdefault(kind, torch.zeros((20000, *kind.shape), dtype=rows.dtype, device=DEVICE))
            own[kind][: len(rows)] = rows
        kernel(launch, own)
        for kind, rows in arenas.items():
            rows.copy_(own[kind][: len(rows)])

    for seed, (B, K) in enumerate([(60, 11), (64, 12), (40, 9), (64, 10)]):
        run = kc.make_run(cell, B, K, feed, seed=seed, shrink=True)
        got, want = both(run, graph, lambda *given: kernel.plain(*given)())
        for kind in run.arenas:
            assert torch.equal(got[kind], want[kind]), (seed, kind)
    graphs = kernel.launches.graphs
    assert (graphs.captures, graphs.replays) == (1, 3)


@pytest.mark.parametrize("B", [1, 100])
@pytest.mark.parametrize("name", [n for n in CHAINS if n != "layernorm_lstm"])
def test_persistent_kernel_equals_single_steps(name: str, B: int) -> None:
    cell, feed = CHAINS[name]
    kernel = on_device(cell)
    assert kernel.persistent is not None
    properties: Any = torch.cuda.get_device_properties(0)
    run = kc.make_run(cell, B, 12, feed, shrink=True)
    choices = list(kernel.persistent.choices(properties.shared_memory_per_block_optin))
    assert choices
    for choice in choices:
        looped = kernel.launched(Graphs(torch.device(DEVICE), captured), (choice, 1000))
        assert looped.looped(run.launch)
        got, want = both(
            run,
            lambda *given, looped=looped: looped.bind(*given)(),  # type: ignore[misc]
            lambda *given: kernel.plain(*given)(),
        )
        for kind in run.arenas:
            close = 2e-2 if kind.dtype == "bf16" else 1e-4
            torch.testing.assert_close(got[kind], want[kind], rtol=close, atol=close)
