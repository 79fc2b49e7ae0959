"""examples/vad.py against Silero's ONNX and TorchScript models."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

import cellc

EXAMPLE = Path(__file__).parent.parent / "examples" / "vad.py"
SENTENCES = {
    "en": "Cells are batched, not requests: whatever is ready now, from whatever request.",
    "en-us+f3": "The quick brown fox jumps over the lazy dog. Then, after a while, it sleeps.",
    "de": "Guten Morgen, wie geht es Ihnen heute?",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, operations this small only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vad() -> Any:
    try:
        return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))
    except ModuleNotFoundError as error:
        if error.name != "silero_vad":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def alone(vad: Any) -> Any:
    pytest.importorskip("onnxruntime", reason="compares with onnxruntime, which is not installed")
    return vad.onnx_model()


def eager(vad: Any, stream: Any) -> np.ndarray[Any, Any]:
    state, heard = vad.silence(), []
    for chunk in stream.chunks:
        probability, state = vad.model(chunk, state)
        heard.append(probability.item())
    return np.array(heard)


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_eager_hears_what_onnx_hears(vad: Any, alone: Any) -> None:
    for name, signal in vad.signals(seconds=4, seed=3).items():
        for loud in (0.01, 1, 20):  # the last far past what a microphone gives
            stream = vad.Stream.of(np.float32(loud) * signal)
            want = alone(stream)
            close(eager(vad, stream), want)
            assert want.max() > 0.5 or loud != 1 or "voice" not in name  # or it would prove little


def test_eager_hears_what_torchscript_hears(vad: Any) -> None:
    script = cast(Any, torch.jit.load)(str(vad.package_file("silero_vad.jit")))
    for signal in vad.signals(seconds=2, seed=4).values():
        stream = vad.Stream.of(signal)
        script.reset_states()
        close(eager(vad, stream), [script(c, vad.RATE).item() for c in stream.chunks])


def spoken(voice: str, text: str, path: Path) -> np.ndarray[Any, Any]:
    """Speech at 16 kHz."""
    subprocess.run(["espeak-ng", "-v", voice, "-w", str(path), text], check=True, timeout=60)
    with wave.open(str(path)) as file:
        rate, data = file.getframerate(), file.readframes(file.getnframes())
    samples = np.frombuffer(data, np.int16) / 32768
    at = np.arange(0, len(samples), rate / 16000)
    return np.interp(at, np.arange(len(samples)), samples).astype(np.float32)


def test_eager_hears_what_onnx_hears_of_speech(vad: Any, alone: Any, tmp_path: Path) -> None:
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed: only synthetic voices are checked")
    for voice, text in SENTENCES.items():
        speech = spoken(voice, text, tmp_path / "speech.wav")
        stream = vad.Stream.of(np.pad(speech, (8000, 8000)))
        want = alone(stream)
        close(eager(vad, stream), want)
        assert want.max() > 0.9 and want[:8].max() < 0.2


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match="silero-vad==6"):
        runpy.run_path(str(EXAMPLE))
    with pytest.raises(SystemExit, match="silero-vad==6"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


# -- with cellc ------------------------------------------------------------------------------------


def test_cellc_takes_a_step_with_its_state(vad: Any) -> None:
    requests = vad.example_inputs()
    with cellc.compile(vad.model) as compiled:
        for request, (got, state) in zip(requests, compiled.map(requests), strict=True):
            probability, following = vad.model(*request)
            close(got, probability)
            torch.testing.assert_close(state, following, rtol=1e-4, atol=1e-4)


def test_sessions_hear_what_onnx_hears(vad: Any, alone: Any) -> None:
    streams = vad.make_streams(60, seed=5)
    with cellc.compile(vad.model, carry={"state": "1"}) as compiled:
        for got, stream in zip(vad.serve(compiled, streams), streams, strict=True):
            close(got, alone(stream))


def test_the_script_finds_all_close(alone: Any) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--sessions", "40", "--rounds", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "difference to onnxruntime" in " ".join(done.stdout.split())
