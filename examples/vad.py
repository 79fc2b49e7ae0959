"""Is somebody speaking? Silero VAD at 16 kHz, streaming, with its own pretrained weights.

Silero Team, github.com/snakers4/silero-vad. A step takes 32 ms of one stream and the state it left:
a spectrum, four convolutions, an LSTM cell. `python examples/vad.py` serves 1000 streams that join
and leave at random, each a session, checks every probability against the package's ONNX model run
on each stream alone, and measures both. Needs `pip install 'cellc[examples]'`.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import linear

import cellc
from cellc.sessions import Session

Signal = NDArray[np.float32]
Floats = NDArray[Any]

RATE, CHUNK, CONTEXT, HIDDEN = 16_000, 512, 64, 128
WINDOW, HOP, BINS = 256, 128, 129  # of the spectrum
TOLERANCE = 1e-4
ONNX, CELLC = "onnxruntime, a call a chunk", "cellc sessions"


def package_file(name: str) -> Path:
    """A file of the installed package, which is not imported: that would set torch's threads."""
    try:
        return Path(str(metadata.distribution("silero-vad").locate_file(f"silero_vad/data/{name}")))
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            "the weights of this model come with silero-vad: pip install 'cellc[examples]', "
            "or silero-vad==6.2.3 alone",
            name="silero_vad",
        ) from None


class VAD(nn.Module):
    """512 samples and the state before them to the probability of speech and the state after."""

    basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", torch.zeros(2 * BINS, 1, WINDOW))
        sizes = ((BINS, 128, 1), (128, 64, 2), (64, 64, 2), (64, HIDDEN, 1))
        self.encoder = nn.ModuleList([nn.Conv1d(i, o, 3, stride) for i, o, stride in sizes])
        self.rnn = nn.LSTMCell(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, chunk: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """[1, 512] samples and the [1, 320] state: context, h and c. A convolution over three
        frames is a linear map of the three side by side, and so is each frame of the spectrum.
        """
        context, h, c = state.split([CONTEXT, HIDDEN, HIDDEN], 1)
        mirrored = chunk[:, -CONTEXT - 1 : -1].flip(1)
        samples = torch.cat([context, chunk, mirrored], 1)
        frames = []
        for at in range(0, samples.shape[1] - WINDOW + 1, HOP):
            real, imaginary = linear(samples[:, at : at + WINDOW], self.basis[:, 0]).chunk(2, 1)
            frames.append(torch.sqrt(real**2 + imaginary**2))
        for conv in self.encoder:
            weight = conv.weight.transpose(1, 2).flatten(1)  # type: ignore[operator]
            edge = torch.zeros_like(frames[0])
            frames = [edge, *frames, edge]
            starts = range(0, len(frames) - 2, conv.stride[0])  # type: ignore[index]
            threes = [torch.cat(frames[i : i + 3], 1) for i in starts]
            frames = [torch.relu(linear(x, weight, conv.bias)) for x in threes]  # type: ignore[arg-type]
        h, c = self.rnn(frames[0], (h, c))
        probability = torch.sigmoid(self.head(torch.relu(h)))[0, 0]
        return probability, torch.cat([chunk[:, -CONTEXT:], h, c], 1)


def silence() -> Tensor:
    """The state of a stream that has not begun."""
    return torch.zeros(1, CONTEXT + 2 * HIDDEN)


def load_model() -> VAD:
    """The model with the package's weights for 16 kHz."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        script = cast(Any, torch.jit.load)(str(package_file("silero_vad.jit")))
    given = script._model.state_dict()  # the other branch is for 8 kHz
    names = {"basis": "stft.forward_basis_buffer"}
    for kind in ("weight", "bias"):
        names |= {f"encoder.{i}.{kind}": f"encoder.{i}.reparam_conv.{kind}" for i in range(4)}
        names |= {f"rnn.{kind}_{side}": f"decoder.rnn.{kind}_{side}" for side in ("ih", "hh")}
        names[f"head.{kind}"] = f"decoder.decoder.2.{kind}"
    net = VAD()
    weights = {ours: given[theirs] for ours, theirs in names.items()}
    weights["head.weight"] = weights["head.weight"].flatten(1)  # a convolution of width 1
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


try:
    model = load_model()
except ModuleNotFoundError as error:
    if __name__ == "__main__":
        raise SystemExit(str(error)) from None
    raise


# -- what is heard ---------------------------------------------------------------------------------


def contour(rng: np.random.Generator, num: int, low: float, high: float, every: int) -> Floats:
    """Random values between the two, a new one every so many samples, joined by lines."""
    points = rng.uniform(low, high, num // every + 2)
    line: Floats = np.interp(np.arange(num) / every, np.arange(len(points)), points)
    return line


def voice(rng: np.random.Generator, num: int) -> Floats:
    """Something like speech: harmonics of a moving pitch under moving formants, in syllables."""
    pitch = rng.uniform(90, 220) * contour(rng, num, 0.85, 1.2, RATE // 6)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    bands = ((270, 800, 60), (850, 2300, 90), (2300, 3000, 150))  # of adults' vowels
    formants = [(contour(rng, num, lo, hi, RATE // 8), width) for lo, hi, width in bands]
    heard: Floats = np.zeros(num)
    for k in range(1, 32):
        for at, width in formants:
            heard += np.sin(k * phase) / k**0.5 / (1 + ((k * pitch - at) / width) ** 2)
    heard *= contour(rng, num, -0.4, 1, RATE // 10).clip(0)
    return heard


def signals(seconds: int = 10, seed: int = 0) -> dict[str, Signal]:
    """Noise, tones, a chirp, a knock, and voices with a little noise."""
    rng, num = np.random.default_rng(seed), seconds * RATE
    t = np.arange(num) / RATE
    found = {f"voice {i}": 0.2 * voice(rng, num) + 0.003 * rng.normal(size=num) for i in range(8)}
    found["noise"] = 0.1 * rng.normal(size=num) * contour(rng, num, 0, 1, RATE)
    found["tones"] = 0.1 * np.sin(np.outer((1400, 2800, 19000), t)).sum(0)
    found["chirp"] = 0.3 * np.sin(2 * np.pi * (50 * t + 3900 * t**2 / seconds))
    found["knock"] = np.where(np.arange(num) % 8000 < 40, rng.normal(size=num), 0)
    return {name: signal.astype(np.float32) for name, signal in found.items()}


@dataclass
class Stream:
    """A part of a signal that somebody starts to send at a tick of 32 ms."""

    joins: int
    windows: list[Signal]  # [1, 576] each, the last samples before the chunk first
    chunks: tuple[Tensor, ...]  # [1, 512] each

    @classmethod
    def of(cls, signal: Signal, joins: int = 0) -> Stream:
        signal = signal[: len(signal) // CHUNK * CHUNK]
        whole = np.pad(signal, (CONTEXT, 0))[None]
        windows = [whole[:, at : at + CONTEXT + CHUNK] for at in range(0, len(signal), CHUNK)]
        return cls(joins, windows, torch.split(torch.from_numpy(signal)[None], CHUNK, 1))


def make_streams(count: int, seed: int = 0) -> list[Stream]:
    """Parts of 20 to 60 chunks, as loud as it happens, joining within about two seconds."""
    rng, pool = np.random.default_rng(seed), list(signals(seed=seed).values())
    streams = []
    for i in range(count):
        signal, num = pool[i % len(pool)], int(rng.integers(20, 60)) * CHUNK
        at, joins = int(rng.integers(0, len(signal) - num)), int(rng.integers(0, 60))
        loud = np.float32(rng.uniform(0.2, 2))
        streams.append(Stream.of(loud * signal[at : at + num], joins))
    return streams


def example_inputs() -> list[tuple[Tensor, Tensor]]:
    """Chunks of each signal, with the states before them."""
    requests = []
    for signal in signals(seconds=1).values():
        chunk, following, *_ = Stream.of(signal).chunks
        _, state = model(chunk, silence())
        requests += [(chunk, silence()), (following, state)]
    return requests


# -- ways to serve it ------------------------------------------------------------------------------


def steps(
    compiled: cellc.Compiled, sessions: Sequence[Session], chunks: Sequence[Tensor]
) -> list[Tensor]:
    """One step of every session, batched."""
    calls = [(session, (chunk,)) for session, chunk in zip(sessions, chunks, strict=True)]
    return [probability for probability, _ in compiled.step_all(calls)]


def serve(compiled: cellc.Compiled, streams: Sequence[Stream]) -> list[Floats]:
    """Tick by tick: those who join get a session, all present are stepped, those done leave."""
    heard: list[list[Tensor]] = [[] for _ in streams]
    waiting = sorted(range(len(streams)), key=lambda i: -streams[i].joins)
    sessions: dict[int, Session] = {}
    tick = 0
    while waiting or sessions:
        while waiting and streams[waiting[-1]].joins <= tick:
            sessions[waiting.pop()] = compiled.session({"state": silence()})
        chunks = [streams[i].chunks[len(heard[i])] for i in sessions]
        results = steps(compiled, list(sessions.values()), chunks)
        for i, probability in zip(sessions, results, strict=True):
            heard[i].append(probability)
        for i in [i for i in sessions if len(heard[i]) == len(streams[i].chunks)]:
            sessions.pop(i).close()
        tick += 1
    return [torch.stack(found).numpy() for found in heard]


def onnx_model() -> Callable[[Stream], Floats]:
    """The package's ONNX model on one stream: one call for each chunk."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise SystemExit("this needs onnxruntime: pip install 'cellc[examples]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # so small, more only cost
    path, rate = str(package_file("silero_vad.onnx")), np.array(RATE)
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    def run(stream: Stream) -> Floats:
        state, heard = np.zeros((2, 1, HIDDEN), np.float32), []
        for window in stream.windows:
            found, state = session.run(None, {"input": window, "state": state, "sr": rate})
            heard.append(found[0, 0])
        return np.array(heard)

    return run


# -- measured --------------------------------------------------------------------------------------


def measure(console: Console, count: int, rounds: int) -> Table:
    """Both ways in turn, round after round; every probability is checked."""
    streams, alone = make_streams(count), onnx_model()
    num = sum(len(stream.chunks) for stream in streams)
    console.print(f"{count:,} streams, {num:,} chunks of 32 ms")
    error = 0.0
    rates: dict[str, list[float]] = {ONNX: [], CELLC: []}
    with cellc.compile(model, carry={"state": "1"}, max_batch=4096) as compiled:
        serve(compiled, make_streams(64, seed=1))  # kernels are compiled here

        def timed(text: str, way: Callable[[], list[Floats]]) -> Floats:
            start = time.perf_counter()
            found = np.concatenate(way())
            rates[text].append(num / (time.perf_counter() - start))
            return found

        for _ in range(rounds):
            expected = timed(ONNX, lambda: [alone(stream) for stream in streams])
            results = timed(CELLC, lambda: serve(compiled, streams))
            error = max(error, float(np.abs(results - expected).max()))
    if error > TOLERANCE:
        raise SystemExit(f"probabilities differ from onnxruntime's by up to {error:.1e}")
    table = Table("", "steps/s", "us a step", "to onnxruntime")
    for text, found in rates.items():
        rate = statistics.median(found)
        ratio = statistics.median(a / b for a, b in zip(found, rates[ONNX], strict=True))
        table.add_row(text, f"{rate:,.0f}", f"{1e6 / rate:.1f}", f"{ratio:.2f}x")
    table.caption = (
        f"medians of {rounds} rounds; speech in {(expected > 0.5).mean():.0%} of the chunks; "
        f"largest difference to onnxruntime: {error:.1e}"
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Hears speech in many streams at once.")
    parser.add_argument("--sessions", type=int, default=1000, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    args, console = parser.parse_args(), Console(highlight=False)
    try:
        with torch.no_grad():
            console.print(measure(console, max(1, args.sessions), max(1, args.rounds)))
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None


if __name__ == "__main__":
    main()
