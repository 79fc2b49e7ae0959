"""Tile programs: which stages a cell becomes, and what they print as."""

from __future__ import annotations

import kernel_cells as kc
import pytest

from cellc.kernels.tile import (
    Map,
    MatMul,
    Product,
    RaggedReduce,
    Reduce,
    Ref,
    TileProgram,
    read,
    schedule,
    unsupported,
    written,
)

FOLDED = """\
tile lstm_folded(token: i64[], h: f32[8], c: f32[8]) -> (out0: f32[8], out1: f32[8]):
    buffer linear_1: f32[32]
    product linear_1[1, 32] = h[1, 8]:[8, 1] @ @wh  # cells.py:2
    map i < 8:
        v0: i64 = token[0]
        v1: f32 = @table[32 * v0 + i + 8]  # cells.py:1
        v2: f32 = linear_1[i + 8]
        v3: f32 = add(v1, v2)  # cells.py:3
        v4: f32 = sigmoid(v3)  # cells.py:8
        v5: f32 = c[i]
        v6: f32 = mul(v4, v5)  # cells.py:9
"""


def kinds(program: TileProgram) -> list[str]:
    return [type(s).__name__ for s in program.stages]


def test_text() -> None:
    program = schedule(kc.lstm_folded(5, 8))
    assert str(program).startswith(FOLDED)
    assert str(program).endswith("        out1[i] = v16\n        out0[i] = v22\n")
    assert str(schedule(kc.lstm_folded(5, 8))) == str(program)


def test_lstm_is_products_and_one_map() -> None:
    program = schedule(kc.lstm_cell(4, 8))
    assert kinds(program) == ["Product", "Product", "Map"]
    stage, first = program.stages[2], program.stages[0]
    assert isinstance(stage, Map) and isinstance(first, Product)
    assert stage.column_offsets(first.out) == (0, 8, 16, 24)
    assert [t.ref for t in stage.targets] == [Ref("output", 1), Ref("output", 0)]
    assert program.producer(first.out) == 0 and program.producer(Ref("input", 0)) is None
    assert read(first) == (Ref("input", 0), Ref("param", 0), Ref("param", 2))
    assert written(stage) == (Ref("output", 1), Ref("output", 0))


def test_softmax_computes_exp_once() -> None:
    program = schedule(kc.softmax_head(4, 9))
    exps = [
        x for s in program.stages if isinstance(s, Map | Reduce) for x in s.body if x.op == "exp"
    ]
    assert len(exps) == 1
    assert kinds(program).count("Reduce") == 3


def test_each_kind_of_stage() -> None:
    assert MatMul in map(type, schedule(kc.mv_cell(3)).stages)
    assert RaggedReduce in map(type, schedule(kc.ragged_cell(3)).stages)


def test_views_cost_nothing() -> None:
    b = kc.Builder()
    x, m = b.input("x", 4, 6), b.input("m", 4)
    rows = b("permute", b("flip", x, dims=(1,)), dims=(1, 0))  # [6, 4]
    y = b("add", b("slice", rows, dim=0, start=1, stop=6, step=2), m)
    program = schedule(b.cell("views", b("tanh", b("reshape", y, shape=(1, 3, 4)))))
    assert kinds(program) == ["Map"] and not program.buffers
    (stage,) = program.stages
    assert isinstance(stage, Map) and stage.space == (3, 4)
    index = next(i for r, i in stage.reads() if r == Ref("input", 0))
    assert (index.const, index.coefs) == (4, (-2, 6))


def test_windows_are_views() -> None:
    b = kc.Builder()
    x = b.input("x", 9, 4)
    windows = b("window", x, dim=0, size=3, step=2, spread=2)  # [3, 4, 3]
    program = schedule(b.cell("windows", b("tanh", windows)))
    (stage,) = program.stages
    assert isinstance(stage, Map) and stage.space == (3, 4, 3) and not program.buffers
    ((_, index),) = stage.reads()
    assert (index.const, index.coefs) == (0, (8, 1, 8))


def test_dimensions_are_merged_and_cat_is_written_in_parts() -> None:
    b = kc.Builder()
    x, y = b.input("x", 3, 4), b.input("y", 2, 4)
    program = schedule(b.cell("cat", b("neg", b("cat", x, y, dim=0))))
    first, second, last = program.stages
    assert isinstance(first, Map) and isinstance(second, Map) and isinstance(last, Map)
    assert (first.space, second.space, last.space) == ((12,), (8,), (20,))
    assert second.targets[0].index.const == 12


def test_a_product_reads_a_plain_view_where_it_lies() -> None:
    b = kc.Builder()
    x, w = b.input("x", 3, 8), b.param("w", 4, 2)
    program = schedule(b.cell("part", b("linear", b.slice(x, 4, 8, dim=1), w)))
    (stage,) = program.stages
    assert isinstance(stage, Product)
    assert (stage.x.offset, stage.x.shape, stage.x.strides) == (4, (3, 4), (8, 1))
    b = kc.Builder()
    x = b.input("x", 3, 8)
    turned = schedule(
        b.cell("turned", b("linear", b("permute", x, dims=(1, 0)), b.param("v", 3, 2)))
    )
    assert kinds(turned) == ["Map", "Product"]


def test_expensive_values_are_not_computed_again() -> None:
    b = kc.Builder()
    x = b.input("x", 4)
    e = b("exp", x)
    wide = b("expand", b("reshape", e, shape=(1, 4)), shape=(3, 4))
    program = schedule(b.cell("wide", b("add", wide, b.input("m", 3, 4))))
    assert kinds(program) == ["Map", "Map"] and len(program.buffers) == 1


def test_long_chains_are_cut() -> None:
    b = kc.Builder()
    x = b.input("x", 4)
    for _ in range(3000):
        x = b("add", x, 1.0) if len(b.ops) % 2 else b("neg", x)
    assert len(schedule(b.cell("long", x)).stages) == 1  # still one map: all at the same point


def test_what_is_not_supported() -> None:
    assert unsupported(kc.lstm_cell(3, 4)) is None
    assert unsupported(kc.lstm_cell(3, 4, "bf16"), {"f32"}) == "dtype bf16"
    assert unsupported(kc.fallback_cell(3)) == "operation aten:cumsum.default"
    b = kc.Builder()
    rows = b.input("rows", 4, ragged=True)
    assert unsupported(b.cell("bad", b("neg", rows))) == "an output along a vector"


@pytest.mark.parametrize("name", kc.CELLS)
def test_stages_read_what_was_written_before(name: str) -> None:
    program = schedule(kc.CELLS[name]())
    known: set[Ref] = set()
    for stage in program.stages:
        assert all(r in known or r.kind in ("input", "param") for r in read(stage))
        known |= set(written(stage))
    assert {Ref("output", k) for k in range(len(program.output_names))} <= known
