"""How peers may be tuned: what their users would try, side by side, on LSTMs over vectors.

The fastest of each is what the other workloads compare with, or one as fast that is simpler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch

from cellc.bench.batch_server import MAX_BATCH as BATCH
from cellc.bench.batch_server import WIDTH, make_buckets
from cellc.bench.case import Case, Way
from cellc.bench.dynet_peer import DynetLSTM
from cellc.bench.onnx_peer import RecurrentSession
from cellc.bench.openvino_peer import OpenvinoLSTM
from cellc.bench.peers import Array, by_length
from cellc.bench.recurrent import (
    BUCKETS,
    DYNET,
    LastState,
    Others,
    Torch,
    buckets_of,
    make_requests,
    small_buckets,
)
from cellc.bench.shrinking import Shrinking, linear, packed

Batches = Callable[[Sequence[Array]], list[list[int]]]
SIZES = (128, 512)  # of sequences that shrink, or are packed


def variants_case(hidden: int, lengths: Sequence[int]) -> Case:
    """Every variant that runs here."""
    torch.manual_seed(0)
    model = LastState("lstm", hidden, tokens=False).eval().requires_grad_(False)
    rnn, requests, ways = model.rnn, make_requests(lengths, hidden, tokens=False), Torch(model)
    assert isinstance(rnn, torch.nn.LSTM)
    variants = [Way(BUCKETS, lambda: ways.padded(requests, buckets_of(requests)))]
    for size in (*SIZES, 256):
        name = f"PyTorch, packed, {size} of like lengths"
        variants.append(Way(name, partial(ways.packed, requests, size)))
    for size in SIZES:
        for layout, product in (("oneDNN's layout", packed), ("PyTorch's layout", linear)):
            shrinking = Shrinking(rnn, model.embedding, size, product)
            name = f"PyTorch, steps by hand, {size} that shrink, weights in {layout}"
            variants.append(Way(name, partial(shrinking, requests)))
    others = Others(rnn, lambda: [np.ascontiguousarray(x.numpy()) for x in requests])
    small = f"buckets of {WIDTH}, at most {BATCH}"
    whole, like = f"buckets of {WIDTH}, whole", f"{BATCH} of like lengths"
    batches: dict[str, Batches] = {
        whole: lambda rows: make_buckets([len(r) for r in rows]),
        small: small_buckets,
        like: lambda rows: by_length(rows, BATCH),
    }
    onnx = ["onnx", "onnxruntime"]
    session, openvino = cache(partial(RecurrentSession, rnn)), cache(partial(OpenvinoLSTM, rnn))
    for name, chosen in batches.items():
        others.add(f"onnxruntime, {name}", onnx, session, chosen)
        others.add(f"OpenVINO, {name}", ["openvino"], openvino, chosen)
    asleep = cache(partial(RecurrentSession, rnn, spinning=False))
    others.add(f"onnxruntime, {small}, threads wait asleep", onnx, asleep, small_buckets)
    dynet = cache(partial(DynetLSTM, rnn))
    others.add(f"DyNet autobatching, {like}", ["dynet"], dynet, batches[like])
    others.add(DYNET, ["dynet"], dynet, lambda rows: by_length(rows, len(rows)))
    return Case(
        f"How peers are tuned: LSTM, {hidden} units, {len(requests)} requests at once, vectors in",
        len(requests),
        [*variants, *others.ways],
        BUCKETS,
        missing=others.missing,
    )
