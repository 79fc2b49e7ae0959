"""Tiles of Triton kernels: what may be chosen, and what is kept of what was measured."""

from __future__ import annotations

from pathlib import Path

import kernel_cells as kc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellc.kernels import triton_tuned
from cellc.kernels.triton_backend import print_cell
from cellc.kernels.triton_tiles import Space, Tiles

SHARED = 232448
spaces = st.builds(
    Space,
    st.integers(1, 2000),
    st.lists(st.integers(1, 2000), min_size=1, max_size=3).map(tuple),
    st.integers(1, 8),
    st.sampled_from([2, 4]),
    st.booleans(),
    st.booleans(),
)


@given(spaces, st.sampled_from([65536, 166912, SHARED]))
def test_choices_fit(space: Space, shared: int) -> None:
    for t in space.choices(shared):
        loaded = (t.BM + space.accumulators * t.BN) * t.BK * space.item_bytes
        assert loaded * t.num_stages <= shared
        assert space.accumulators * t.BM * t.BN <= 64 * 32 * t.num_warps
        assert space.masks_columns or space.columns % t.BN == 0
        assert space.masks_depth or all(d % t.BK == 0 for d in space.depths)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("H", [256, 1024])
def test_recurrences_have_choices(H: int, dtype: str) -> None:
    for cell in (kc.lstm_cell(H, H, dtype), kc.gru_cell(H, H, dtype)):
        (kernel,) = [k for k in print_cell(cell)[1].kernels if k.space is not None]
        assert kernel.space is not None
        choices = list(kernel.space.choices(SHARED))
        assert len(choices) > 20
        assert kernel.tiled(kernel.tiles) == kernel
        for tiles in choices:
            x, y, _ = kernel.tiled(tiles).grid(512)
            assert x * tiles.BM >= 512 and y * tiles.BN >= H


def test_what_is_kept_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path))
    _, printed = print_cell(kc.lstm_cell(64, 64, "bf16"))
    (kernel,) = printed.kernels
    assert triton_tuned.tuned(printed, "Some GPU") == printed.kernels
    tiles = Tiles(16, 32, 64, 8, 2)
    triton_tuned.keep("Some GPU", {triton_tuned.key_of(printed.source, kernel): tiles})
    triton_tuned.keep("Some GPU", {"another": Tiles(32, 32, 32)})
    (got,) = triton_tuned.tuned(printed, "Some GPU")
    assert got == kernel.tiled(tiles) and got.num_warps == 8 and got.constants["BN"] == 32
    assert triton_tuned.tuned(printed, "Another GPU") == printed.kernels
    _, other = print_cell(kc.lstm_cell(64, 128, "bf16"))
    assert triton_tuned.tuned(other, "Some GPU") == other.kernels


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"a": {"BM": 1}}'])
def test_a_broken_file_counts_as_empty(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLC_CACHE", str(tmp_path))
    triton_tuned.keep("Some GPU", {})
    (file,) = (tmp_path / "tuned").iterdir()
    file.write_text(text)
    assert triton_tuned.known("Some GPU") == {}
