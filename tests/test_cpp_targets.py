"""C++ for other processors: one source by vector types, for AVX2, AVX-512 and NEON.

The assembler text of the hot loops is read; an aarch64 program runs in an emulator, where a cross
compiler (g++-aarch64-linux-gnu) and qemu-user are installed.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import kernel_cells as kc
import numpy as np
import pytest
import torch

from cellc.cells import Cell
from cellc.kernels import cpp_build
from cellc.kernels.cpp_printer import CppSource, print_cpp
from cellc.kernels.eager import EagerBackend
from cellc.kernels.tile import schedule

HERE = cpp_build.HERE
GEMM = """
#include "gemm.h"
using namespace cellc;
extern "C" void call(const float *const *a, int64_t m, const float *w, float *const *c,
                        int64_t k, int64_t n) {
    gemm<float>(a, m, w, nullptr, c, k, n, 0, 1);
}
"""
ARM, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
UNITS = {"haswell": ("ymm", 2), "skylake-avx512": ("zmm", 4)}  # registers, vectors of a panel


def flags() -> list[str]:
    """What kernels are compiled with, but the processor."""
    return [f for f in cpp_build.FLAGS if f not in ("-shared", "-fPIC")] + [f"-I{HERE}"]


def assembler(source: str, folder: Path, compiler: str, *target: str) -> str:
    file = folder / "kernel.cpp"
    file.write_text(source)
    command = [compiler, *flags(), *target, "-S", str(file), "-o", str(folder / "kernel.s")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (folder / "kernel.s").read_text()


def function(text: str, name: str) -> str:
    """The body of the first function whose mangled name holds `name`."""
    found = re.search(rf"(?ms)^(\w*{name}\w*):\n(.*?)^\s+\.size\s+\1", text)
    assert found, name
    return found.group(2)


def loops(body: str) -> list[str]:
    """What stands between a label and a jump back to it, with no label inside."""
    found = re.finditer(r"(?ms)^(\.L\d+):\n((?:(?!^\.L\d+:).)*?\bj\w+\s+\1)$", body)
    return [m.group(2) for m in found]


@pytest.fixture(scope="module")
def x86_compiler() -> str:
    compiler = cpp_build.find_compiler()
    if compiler is None or cpp_build.platform.machine() != "x86_64":
        pytest.skip("no C++ compiler for x86")
    return compiler


@pytest.mark.parametrize("march", UNITS)
def test_products_multiply_and_add_whole_vectors(
    march: str, x86_compiler: str, tmp_path: Path
) -> None:
    register, width = UNITS[march]
    target = (f"-march={march}", "-mprefer-vector-width=512")
    text = function(assembler(GEMM, tmp_path, x86_compiler, *target), f"microIffLi6ELi{width}E")
    most = max(
        len(re.findall(rf"vfmadd\d+ps\s.*%{register}\d+, %{register}\d+$", loop, re.MULTILINE))
        for loop in loops(text)
    )
    assert most >= 6 * width  # every row of a block, every vector of a panel


@pytest.mark.parametrize("march", UNITS)
def test_activations_are_vector_code(march: str, x86_compiler: str, tmp_path: Path) -> None:
    register, _ = UNITS[march]
    target = (f"-march={march}", "-mprefer-vector-width=512")
    program = schedule(kc.lstm_cell(64, 128))
    text = assembler(print_cpp(program).text, tmp_path, x86_compiler, *target)
    body = function(text, f"stage{len(program.stages) - 1}")
    best = max(loops(body), key=lambda loop: len(re.findall(rf"vfmadd.*%{register}", loop)))
    assert len(re.findall(rf"vfmadd\w+ps\s.*%{register}", best)) >= 5 * 5  # polynomials of 5 exp
    assert re.search(rf"vdivps\s.*%{register}", best) and "call" not in best


# -- aarch64 ---------------------------------------------------------------------------------------

DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include <vector>
#include "runtime.h"
using namespace cellc;
extern "C" {
extern const Kernel cellc_kernel;
int64_t cellc_launch(const Kernel *, const Launch *);
int64_t cellc_packed_count(int64_t, int64_t, int64_t);
void cellc_pack_f32(const float *, int64_t, int64_t, float *);
void *cellc_alloc(int64_t);
}
static int64_t number() {
    int64_t x;
    if (fread(&x, 8, 1, stdin) != 1) abort();
    return x;
}
static char *bytes(int64_t n) {
    char *p = static_cast<char *>(cellc_alloc(n + 64));
    if (n && fread(p, n, 1, stdin) != 1) abort();
    return p;
}
int main() {  // parameters, arenas, steps, operands: see `stream`
    std::vector<const void *> params(number());
    for (auto &p : params) {
        const int64_t packed = number(), k = number(), n = number();
        p = bytes(4 * k * n);
        if (!packed) continue;
        float *to = static_cast<float *>(cellc_alloc(4 * cellc_packed_count(k, n, 4)));
        cellc_pack_f32(static_cast<const float *>(p), k, n, to);
        p = to;
    }
    std::vector<char *> arenas(number());
    std::vector<int64_t> sizes;
    for (auto &a : arenas) sizes.push_back(number()), a = bytes(sizes.back());
    struct { Launch launch; Operand operands[32]; } all = {};
    all.launch.num_steps = number(), all.launch.threads = 2, all.launch.params = params.data();
    all.launch.steps = reinterpret_cast<int32_t *>(bytes(4 * (all.launch.num_steps + 1)));
    const int64_t rows = all.launch.steps[all.launch.num_steps];
    all.launch.bad = static_cast<uint8_t *>(calloc(rows, 1));
    const int64_t count = number();
    for (int64_t i = 0; i < count; ++i) {
        all.operands[i].base = arenas[number()];
        all.operands[i].slots = reinterpret_cast<int32_t *>(bytes(4 * rows));
    }
    if (cellc_launch(&cellc_kernel, &all.launch)) return 3;
    for (size_t i = 0; i < arenas.size(); ++i) fwrite(arenas[i], sizes[i], 1, stdout);
    fflush(stdout);
    _Exit(0);
}
"""


def stream(printed: CppSource, run: kc.Run, params: dict[str, torch.Tensor]) -> bytes:
    """What the driver reads."""
    parts: list[bytes] = []

    def numbers(*values: int) -> None:
        parts.append(struct.pack(f"{len(values)}q", *values))

    numbers(len(printed.wants))
    for want in printed.wants:
        weight = params[run.cell.params[want.param].name].contiguous()
        rows = weight.shape[0] if want.packed else 1
        numbers(want.packed, rows, weight.numel() // rows)
        parts.append(weight.numpy().tobytes())
    numbers(len(run.arenas))
    for arena in run.arenas.values():
        numbers(arena.nbytes)
        parts.append(arena.numpy().tobytes())
    launch, kinds = run.launch, list(run.arenas)
    numbers(launch.num_steps)
    parts.append(np.asarray(launch.steps, np.int32).tobytes())
    operands = [(i.type, run.slots(k)) for k, i in enumerate(run.cell.inputs)]
    operands += zip(run.cell.output_types, launch.outputs, strict=True)
    numbers(len(operands))
    for kind, slots in operands:
        numbers(kinds.index(kind))
        parts.append(np.asarray(slots, np.int32).tobytes())
    return b"".join(parts)


CELLS = {
    "lstm": (lambda: kc.lstm_cell(13, 70), {0: 1, 1: 2}),
    "lstm_folded": (lambda: kc.lstm_folded(11, 33), {0: 1, 1: 2}),
    "layernorm_lstm": (lambda: kc.layernorm_lstm(6, 40), {0: 1, 1: 2}),
    "softmax_head": (lambda: kc.softmax_head(33, 50), {}),
}


def build(cell: Cell, folder: Path) -> Path:
    """A program of the kernel, the runtime and the driver, static: it needs no libraries there."""
    (folder / "kernel.cpp").write_text(print_cpp(schedule(cell)).text)
    (folder / "driver.cpp").write_text(DRIVER)
    files = [folder / "kernel.cpp", folder / "driver.cpp", HERE / "runtime.cpp"]
    command = [str(ARM), *flags(), "-static", *map(str, files), "-o", str(folder / "program")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "program"


@pytest.mark.slow
@pytest.mark.skipif(ARM is None, reason="no g++-aarch64-linux-gnu")
@pytest.mark.skipif(EMULATOR is None, reason="no qemu-user")
@pytest.mark.parametrize("name", CELLS)
def test_numbers_on_aarch64(name: str, tmp_path: Path) -> None:
    make, feed = CELLS[name]
    cell = make()
    params, run = kc.random_params(cell), kc.make_run(cell, 29, 3, feed)
    want = run.copy()
    EagerBackend().kernel(cell, params)(want.launch, want.arenas)
    program = build(cell, tmp_path)
    given = stream(print_cpp(schedule(cell)), run, params)
    done = subprocess.run(
        [str(EMULATOR), str(program)], input=given, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    at = 0
    for kind, arena in want.arenas.items():
        got = np.frombuffer(done.stdout[at : at + arena.nbytes], arena.numpy().dtype)
        at += arena.nbytes
        torch.testing.assert_close(
            torch.from_numpy(got.copy()).reshape(arena.shape), arena, rtol=2e-5, atol=2e-5
        )
        assert kind in run.arenas
    assert at == len(done.stdout)


@pytest.mark.parametrize("march", UNITS)
@pytest.mark.parametrize(
    ("weight", "widening"),
    [("NS_4bf16E", ("vpmovzxwd", "vpslld")), ("a", ("vpmovsxbd", "vcvtdq2ps"))],
)
def test_narrow_weights_are_widened_a_vector_at_a_time(
    march: str, weight: str, widening: tuple[str, str], x86_compiler: str, tmp_path: Path
) -> None:
    register, width = UNITS[march]
    target = (f"-march={march}", "-mprefer-vector-width=512")
    text = assembler((HERE / "gemm_narrow.cpp").read_text(), tmp_path, x86_compiler, *target)
    inner = max(loops(function(text, f"microIf{weight}Li1ELi{width}E")), key=len)
    for instruction in widening:
        assert len(re.findall(rf"{instruction}\s.*%{register}\d+$", inner, re.MULTILINE)) == width
    assert not re.search(r"vp(insr|unpck)|vinsert|vextract", inner)


@pytest.mark.skipif(ARM is None, reason="no g++-aarch64-linux-gnu")
def test_neon_multiplies_and_adds_whole_vectors(tmp_path: Path) -> None:
    text = function(assembler(GEMM, tmp_path, str(ARM)), "microIffLi6ELi4E")
    assert len(re.findall(r"fmla\s+v\d+\.4s", text)) >= 6 * 4
    program = schedule(kc.lstm_cell(64, 128))
    body = function(
        assembler(print_cpp(program).text, tmp_path, str(ARM)), f"stage{len(program.stages) - 1}"
    )
    assert len(re.findall(r"fml[as]\s+v\d+\.4s", body)) >= 25 and re.search(r"fdiv\s+v\d", body)
    assembler((HERE / "gemm_f64.cpp").read_text(), tmp_path, str(ARM))
    text = assembler((HERE / "gemm_narrow.cpp").read_text(), tmp_path, str(ARM))
    for weight, widening in (("NS_4bf16E", r"(ushll|uxtl)\s+v\d+\.4s"), ("a", r"(sshll|sxtl)\s")):
        body = function(text, f"microIf{weight}Li1ELi4E")
        assert len(re.findall(widening, body)) >= 4 and not re.search(r"ins\s+v", body)
