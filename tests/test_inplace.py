"""Writes in place: whatever shares memory with what is written sees it, or it is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cellc

Change = Callable[[Tensor], Any]

# Views of a tensor of [4, 4]; the first must be right, the others right or refused.
VIEWS: dict[str, Change] = {
    "itself": lambda a: a,
    "row": lambda a: a[1],
    "last": lambda a: a[-1],
    "slice": lambda a: a[1:3],
    "steps": lambda a: a[::2, 1:],
    "column": lambda a: a[:, 1],
    "element": lambda a: a[1, 2],
    "new axis": lambda a: a[None],
    "dots": lambda a: a[..., 0],
    "view": lambda a: a.view(2, 8),
    "view_as": lambda a: a.view_as(torch.zeros(8, 2)),
    "reshape": lambda a: a.reshape(-1),
    "reshape, copied": lambda a: a.t().reshape(-1),
    "reshape_as": lambda a: a.reshape_as(torch.zeros(16)),
    "transpose": lambda a: a.transpose(0, 1),
    "t": lambda a: a.t(),
    "T": lambda a: a.T,
    "mT": lambda a: a.mT,
    "permute": lambda a: a.permute(1, 0),
    "squeeze": lambda a: a[:1].squeeze(0),
    "squeeze, nothing": lambda a: a.squeeze(),
    "unsqueeze": lambda a: a.unsqueeze(1),
    "select": lambda a: a.select(1, 2),
    "narrow": lambda a: a.narrow(0, 1, 2),
    "unbind": lambda a: a.unbind(1)[2],
    "unbound row": lambda a: a.unbind()[2],
    "iterated": lambda a: list(a)[1],
    "chunk": lambda a: a.chunk(2, 1)[1],
    "split": lambda a: a.split([1, 3])[1],
    "flatten": lambda a: a.flatten(),
    "unflatten": lambda a: a.unflatten(1, (2, 2)),
    "movedim": lambda a: a.movedim(0, 1),
    "swapaxes": lambda a: a.swapaxes(0, 1),
    "tensor_split": lambda a: a.tensor_split(3, 0)[0],
    "ravel": lambda a: a.ravel(),
    "ravel, copied": lambda a: a.t().ravel(),
    "detach": lambda a: a.detach(),
    "contiguous": lambda a: a.contiguous(),
    "contiguous, copied": lambda a: a.t().contiguous(),
    "contiguous, of a copy of a turn": lambda a: (a.t() * 1).contiguous(),
    "reshape, of a copy of a turn": lambda a: (a.t() + 1).reshape(-1),
    "turned twice": lambda a: a.t().t().reshape(-1),
    "to": lambda a: a.to(torch.float32),
    "to, copied": lambda a: a.to(torch.float64),
    "float": lambda a: a.float(),
    "dropout": lambda a: F.dropout(a, 0.5, False),
    "Dropout": nn.Dropout(0.5).eval(),
    "Identity": nn.Identity(),
    "Flatten": nn.Flatten(0),
    "clone": lambda a: a.clone(),
    "clone of a part": lambda a: a[1].clone(),
    "chosen": lambda a: a[[1, 2]],
    "repeat": lambda a: a.repeat(1, 1),
    "pad": lambda a: F.pad(a, (0, 0)),
    "roll": lambda a: a.roll(0, 0),
    "cat": lambda a: torch.cat([a]),
    "stack": lambda a: torch.stack([a[0], a[1]]),
    "flip": lambda a: a.flip(0),
    "row of columns": lambda a: a[:, 1:3][2],
    "part of a flat part": lambda a: a.view(-1)[3:13].view(5, 2)[1:, 1],
    "turn of a part": lambda a: a[1:].t()[1:],
}
ODD_VIEWS: dict[str, Change] = {
    "diagonal": lambda a: a.diagonal(),
    "expand": lambda a: a[:1].expand(4, 4),
    "expand, nothing": lambda a: a.expand(4, 4),
    "expand_as": lambda a: a[0].expand_as(a),
    "broadcast_to": lambda a: a[0].broadcast_to(3, 4),
    "broadcast_tensors": lambda a: torch.broadcast_tensors(a, torch.zeros(4))[0],
    "unfold": lambda a: a.unfold(0, 2, 2),
    "unfold, overlapping": lambda a: a.unfold(0, 2, 1),
    "as_strided": lambda a: a.as_strided((2, 2), (4, 2)),
    "as_strided of a part": lambda a: a[1:].as_strided((2, 2), (4, 2), 0),
    "as_strided of a turn": lambda a: a.t().as_strided((4, 2), (4, 1)),
    "hsplit": lambda a: a.hsplit(2)[1],
    "vsplit": lambda a: a.vsplit(2)[1],
    "atleast_1d": lambda a: torch.atleast_1d(a),
    "atleast_3d": lambda a: torch.atleast_3d(a),
    "data": lambda a: a.data,
    "data of a row": lambda a: a[1].data,
    "type_as": lambda a: a.type_as(torch.zeros(1)),
    "cpu": lambda a: a.cpu(),
    "real": lambda a: a.real,
    "H": lambda a: a.H,
    "einsum": lambda a: torch.einsum("ij->ji", a),
    "einsum, diagonal": lambda a: torch.einsum("ii->i", a),
    "as_tensor": lambda a: torch.as_tensor(a),
    "asarray": lambda a: torch.asarray(a),
    "moveaxis": lambda a: torch.moveaxis(a, 0, 1),
    "swapdims": lambda a: torch.swapdims(a, 0, 1),
    "adjoint": lambda a: torch.adjoint(a),
    "view dtype": lambda a: a.view(torch.int32),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "meshgrid": lambda a: torch.meshgrid(a[0], a[1], indexing="ij")[0],
    "cartesian": lambda a: torch.cartesian_prod(a[0]),
    "block_diag": lambda a: torch.block_diag(a),
    "tile": lambda a: a.tile(1),
    "max, nothing": lambda a: a.clamp(-100, 100),
    "index by tensor": lambda a: a[torch.tensor(1)],
    "alpha_dropout": lambda a: F.alpha_dropout(a, 0.5, False),
    "positive": lambda a: +a,
    "resolve_conj": lambda a: a.resolve_conj(),
    "unsafe_chunk": lambda a: a.unsafe_chunk(2)[0],
    "where": lambda a: torch.where(torch.ones(4, 4, dtype=torch.bool), a, a),
    "sum": lambda a: a[None].sum(0),
    "unique size": lambda a: a.sum((), keepdim=True),
    "from a list": lambda a: torch.stack(list(a.unbind(1)), 1),
    "nested": lambda a: a.view(2, 2, 4).permute(2, 0, 1)[1:, 1].t()[0],
}


def _iadd(v: Tensor) -> None:
    v += 1


def _isub_own_row(v: Tensor) -> None:
    v -= v.sum()


def _floor(v: Tensor) -> None:
    v //= 2


def _power(v: Tensor) -> None:
    v **= 2


def _remainder(v: Tensor) -> None:
    v %= 3


def _set(v: Tensor) -> None:
    v[0] = 7.0


def _set_row(v: Tensor) -> None:
    v[-1] = v[0] * 2


def _set_all(v: Tensor) -> None:
    v[...] = 3


def _add_at(v: Tensor) -> None:
    v[0] += 5


def _kept(v: Tensor) -> None:
    rows = list(v)
    rows[0] += 5


def _mask(v: Tensor) -> None:
    v[v > 1] = -1


def _index(v: Tensor) -> None:
    v[torch.tensor([0, 1])] = 4.0


def _number(v: Tensor) -> None:
    v[torch.tensor(1)] = 4.0


def _number_add(v: Tensor) -> None:
    v[torch.tensor(1)] += 4.0


def _out(v: Tensor) -> None:
    torch.add(v, 1, out=v)


def _data(v: Tensor) -> None:
    v.data = v * 2


def _data_write(v: Tensor) -> None:
    v.data[0] = 2


def _stack_out(v: Tensor) -> None:
    torch.stack(list(v * 2), out=v)


def _overlap(v: Tensor) -> None:
    v[1:] = v[:-1]


def _swap(v: Tensor) -> None:
    v[0], v[1] = v[1].clone(), v[0].clone()


def _swap_badly(v: Tensor) -> None:
    v[0], v[1] = v[1], v[0]


def _turn(v: Tensor) -> None:
    v.t_()
    v[0] = 1


def _inner(v: Tensor) -> None:
    v.T[0] += 1


def _index_add(v: Tensor) -> None:
    v.index_add_(0, torch.tensor([0, 1, 0]), torch.ones(3, *v.shape[1:]))


def _scatter(v: Tensor) -> None:
    v.scatter_(0, torch.zeros(v.shape, dtype=torch.int64), 3.0)


WRITES: dict[str, Change] = {
    "+=": _iadd,
    "-= own sum": _isub_own_row,
    "[0] =": _set,
    "[-1] = computed": _set_row,
    "[...] =": _set_all,
    "[0] +=": _add_at,
    "row +=": _kept,
    "mul_": lambda v: v.mul_(3),
    "copy_": lambda v: v.copy_(v * 2 + 1),
    "fill_": lambda v: v.fill_(2),
    "zero_": lambda v: v.zero_(),
    "clamp_": lambda v: v.clamp_(0, 1),
    "masked_fill_": lambda v: v.masked_fill_(v > 0, 9),
    "relu_": lambda v: torch.relu_(v),
    "none": lambda v: None,
}
ODD_WRITES: dict[str, Change] = {
    "//=": _floor,
    "**=": _power,
    "%=": _remainder,
    "[mask] =": _mask,
    "[list] =": _index,
    "[number] =": _number,
    "[number] +=": _number_add,
    "out=": _out,
    "stack out=": _stack_out,
    "data =": _data,
    "data[0] =": _data_write,
    "overlap": _overlap,
    "swap": _swap,
    "swap badly": _swap_badly,
    "t_": _turn,
    "T[0] +=": _inner,
    "index_add_": _index_add,
    "scatter_": _scatter,
    "relu(inplace)": lambda v: F.relu(v, inplace=True),
    "ReLU(inplace)": nn.ReLU(inplace=True),
    "add_ itself": lambda v: v.add_(v),
    "add_ turned": lambda v: v.add_(v.t()),
    "squeeze_": lambda v: v.unsqueeze_(0),
    "sigmoid_": lambda v: v.sigmoid_(),
    "addcmul_": lambda v: v.addcmul_(v * 1, v * 2),
    "lerp_": lambda v: v.lerp_(v * 2, 0.5),
    "cumsum_": lambda v: v.cumsum_(0),
    "requires_grad_": lambda v: v.requires_grad_(False),
    "resize_": lambda v: v.resize_(3),
    "tril_": lambda v: v.tril_(),
    "neg_ of a view": lambda v: v.view(-1).neg_(),
    "swap rows by copy_": lambda v: v[0].copy_(v[1]),
    "fill_diagonal_": lambda v: v.fill_diagonal_(5.0),
    "index_fill_": lambda v: v.index_fill_(0, torch.tensor([1]), 2.0),
    "index_put_": lambda v: v.index_put_((torch.tensor([1]),), torch.tensor(2.0)),
    "put_": lambda v: v.put_(torch.tensor([1]), torch.tensor([2.0])),
    "masked_scatter_": lambda v: v.masked_scatter_(v > 0, torch.arange(16.0)),
    "set_": lambda v: v.set_(v * 2),
}
MODES = ["traced", "unfolded", "reads"]


def forward_of(mode: str, make: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A forward that is traced, unfolded, or reads a value."""
    if mode == "traced":
        return lambda x: make(x)
    if mode == "unfolded":
        return lambda xs: make(xs[0])

    def reads(x: Tensor) -> Any:
        if x[0, 0] > 1e6:
            return x
        return make(x)

    return reads


def check(mode: str, make: Callable[[Tensor], Any], right: bool = False) -> None:
    """Right or refused; where eager PyTorch fails, anything but a result that it could give."""
    forward = forward_of(mode, make)
    x = (torch.arange(16.0).reshape(4, 4) - 6) / 2
    request: Any = ([x],) if mode == "unfolded" else (x,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            want = forward(*copy.deepcopy(request))
        except Exception:
            want = None
        with cellc.compile(forward, backend="eager") as compiled:
            try:
                got = compiled(*request)
            except Exception as error:
                if want is None:
                    return
                assert not right, f"refused: {error}"
                raise
    if want is not None:
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


def right_or_refused(mode: str, make: Callable[[Tensor], Any]) -> None:
    try:
        check(mode, make)
    except cellc.CellcError as error:
        assert "test_inplace.py:" in str(error) or "in place" in str(error), str(error)


def to_view(view: Change, write: Change) -> Callable[[Tensor], Any]:
    def make(x: Tensor) -> Any:
        a = x * 2
        before = a.sum()
        v = view(a)
        write(v)
        return a * 1, v * 1, before

    return make


def to_base(view: Change, write: Change) -> Callable[[Tensor], Any]:
    def make(x: Tensor) -> Any:
        a = x * 2
        v = view(a)
        w = a[1:]
        write(a)
        return v * 1, a * 1, w * 1

    return make


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("view", VIEWS)
def test_known_views(view: str, mode: str) -> None:
    for write in ("+=", "[0] +="):
        if view != "element" or write == "+=":
            check(mode, to_view(VIEWS[view], WRITES[write]), right=True)
        check(mode, to_base(VIEWS[view], WRITES[write]), right=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", WRITES)
def test_known_writes(write: str, mode: str) -> None:
    for view in ("itself", "row", "transpose", "column"):
        check(mode, to_view(VIEWS[view], WRITES[write]), right=True)
        check(mode, to_base(VIEWS[view], WRITES[write]), right=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("view", ODD_VIEWS)
def test_odd_views_are_right_or_refused(view: str, mode: str) -> None:
    for write in ("+=", "[0] +="):
        right_or_refused(mode, to_view(ODD_VIEWS[view], WRITES[write]))
        right_or_refused(mode, to_base(ODD_VIEWS[view], WRITES[write]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", ODD_WRITES)
def test_odd_writes_are_right_or_refused(write: str, mode: str) -> None:
    for view in ("row", "transpose", "reshape"):
        right_or_refused(mode, to_view(VIEWS[view], ODD_WRITES[write]))
        right_or_refused(mode, to_base(VIEWS[view], ODD_WRITES[write]))


# -- what the forward must not write --


def _of_the_model(held: Tensor, view: Change) -> Callable[[Tensor], Any]:
    def make(x: Tensor) -> Any:
        v = view(held)
        v += x.sum()
        return v * 1, x * 1

    return make


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("view", ["itself", "row", "t", "reshape", "detach", "Identity"])
def test_what_others_hold_is_not_written(view: str, mode: str) -> None:
    held, x = torch.ones(4, 4), torch.ones(4, 4)

    def make(x: Tensor) -> Any:
        v = VIEWS[view](x)
        v += 1
        return v * 1, x * 1

    for forward in (forward_of(mode, make), forward_of(mode, _of_the_model(held, VIEWS[view]))):
        with (
            cellc.compile(forward, backend="eager") as compiled,
            pytest.raises(cellc.CellcError, match="(?s)(?=.*test_inplace.py).*(clone|in place)"),
        ):
            compiled([x] if mode == "unfolded" else x)
    assert torch.equal(held, torch.ones(4, 4)) and torch.equal(x, torch.ones(4, 4))


# -- numbers, lists, methods --


def _number_read_before(x: Tensor) -> Any:
    a = x * 2
    n, first = a[0, 0].item(), a[0, 0]
    m = first.item()
    first += 1
    t = torch.tensor(m)
    t += 1
    return torch.tensor([n, m]), t * 1, a * 1


def _row_chosen_by_a_tensor(x: Tensor) -> Any:
    a = x * 2
    at = a[:, 1].argmax()
    v = a[at]
    a[at, 0] = -9.0
    before = v * 1
    v += 3
    a[3] += 1
    return v * 1, a * 1, before


def _list_of_rows(x: Tensor) -> Any:
    out = torch.zeros(4, 4)
    turned, rows = out.t(), list(out.unbind(0))
    for i in range(4):
        out[i] = x[i] * 2
        rows[i] += 1
        turned[0, i] = i
    return out * 1, turned * 1, torch.stack(rows), turned[1:].reshape(-1)


def _slices_of_rows(x: Tensor) -> Any:
    out = torch.zeros(4, 4)
    back, part, half = out.flip(0), out[1:3], out[:, :2]
    both = torch.cat([out, out])
    part[0] = x[0]
    out[2] += x[1]
    half[:] += 1
    return out * 1, back * 1, part * 1, half * 1, both * 1


def _same_constants(x: Tensor) -> Any:
    a, b = torch.zeros(4), torch.zeros(4)
    c = a.view(2, 2)
    a += x[0]
    return a * 1, b * 1, c * 1


def _augmented_in_containers(x: Tensor) -> Any:
    a = x * 2
    states = {"h": a[0], "c": a[1]}
    h = states["h"]
    states["h"] += 1
    states["c"][1:] *= 2
    return a * 1, h * 1, states["h"] * 1


def _stacked_arguments(x: Tensor) -> Any:
    pair = torch.stack([x[0], x[1]])
    pair += 1
    pair[0] = pair[1]
    return pair * 1, x * 1


def _swapped(x: Tensor) -> Any:
    a = x * 2
    first = a[0].clone()
    a[0] = a[1]
    a[1] = first
    a[:, 2] = a[:, 3]
    a[...] = a
    return a * 1, first


class Parts(nn.Module):
    """Methods that give views, and write what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)
        self.same = nn.Sequential(nn.Identity(), nn.Dropout(0.1))

    def halves(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return a[:2], a[2:]

    def step(self, h: Tensor, out: Tensor, at: int) -> Tensor:
        h = self.cell(out[at], h)
        out[at] = h
        return h

    def own(self, a: Tensor) -> tuple[Tensor, Tensor]:
        b = a * 2
        return b, b[0]

    def forward(self, x: Tensor) -> Any:
        a = self.same(x * 2)
        b = self.same(a)
        low, high = self.halves(a)
        h = torch.zeros(4)
        if x.sum() > 1e6:
            return h
        for i in range(4):
            h = self.step(h, a, i)
        high -= low
        c, row = self.own(a)
        c = c + row
        return a * 1, b * 1, low * 1, high * 1, h, c


OTHERS = [
    _number_read_before, _row_chosen_by_a_tensor, _list_of_rows, _slices_of_rows, _same_constants,
    _augmented_in_containers, _stacked_arguments, _swapped, Parts().eval().requires_grad_(False),
]  # fmt: skip


@pytest.mark.parametrize("make", OTHERS)
def test_idioms(make: Any) -> None:
    check("reads", make, right=True)
    if make not in OTHERS[:2] and not isinstance(make, nn.Module):
        check("traced", make, right=True)
        check("unfolded", make, right=True)


@torch.no_grad()
def test_writing_is_followed_from_the_first_request_on() -> None:
    model = Parts().eval()
    requests = [torch.randn(4, 4) for _ in range(6)]
    with cellc.compile(model, backend="eager") as compiled:
        for _ in range(2):
            for x, got in zip(requests, compiled.map(requests), strict=True):
                for a, b in zip(got, model(x), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- little programs of views and writes --

STEPS = [*VIEWS, *ODD_VIEWS]
CHANGES = [*WRITES, *ODD_WRITES]


def program(steps: list[tuple[int, str, str]]) -> Callable[[Tensor], Any]:
    views, writes = {**VIEWS, **ODD_VIEWS}, {**WRITES, **ODD_WRITES}

    def make(x: Tensor) -> Any:
        tensors = [x * 2]
        for at, view, write in steps:
            if view:
                tensors.append(views[view](tensors[at % len(tensors)]))
            if write:
                writes[write](tensors[(at + 1) % len(tensors)])
        return [t * 1 for t in tensors]

    return make


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(["", *STEPS]),
            st.sampled_from(["", "", *CHANGES]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(MODES),
)
def test_programs_are_right_or_refused(steps: list[tuple[int, str, str]], mode: str) -> None:
    right_or_refused(mode, program(steps))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(["", "row", "slice", "t", "reshape", "view", "narrow", "chunk", "mT"]),
            st.sampled_from(["+=", "[0] =", "[0] +=", "mul_", "fill_", "clamp_"]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(MODES),
)
def test_common_programs_are_right(steps: list[tuple[int, str, str]], mode: str) -> None:
    try:  # a column that is written while it is held is refused where values are read
        check(mode, program(steps), right=mode != "reads")
    except cellc.UnsupportedError as error:
        assert "columns are held" in str(error)


def test_counts_at_places_that_values_name() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, xs: Tensor) -> Any:
            load, h, out = torch.zeros(3), torch.zeros(4), []
            for x in xs:
                k = self.gate(x + h).argmax()
                load[k] += 1
                load[k] *= 1.5
                h = torch.tanh(self.experts[int(k)](x))
                out.append(h)
            return torch.stack(out), load

    torch.manual_seed(0)
    model = Experts().eval()
    requests = [torch.randn(n, 4) for n in (1, 2, 3, 5, 2, 4)]
    with cellc.compile(model, backend="eager") as compiled, torch.no_grad():
        for _ in range(2):
            for x, got in zip(requests, compiled.map(requests), strict=True):
                torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
