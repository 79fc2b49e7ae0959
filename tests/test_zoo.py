"""The zoo: models of the literature as their users write them, compared with eager PyTorch.

Each module of `tests/zoo` names its paper, and has `make()`, a model that knows nothing of cellc,
and `requests()`, of different structures, in the forms of `Compiled.map`.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import cellc
from cellc.request import as_call
from cellc.survey import survey

NAMES = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "zoo")]))


# Models with a cell for every length or place that occurs: how many there are says little.
BY_LENGTH = {
    "arc_hybrid_parser",
    "beam_search_gru",
    "dot_attention_decoder",
    "iterative_refinement",
    "luong_attention_decoder",
    "multi_head_attention_decoder",
    "rationale_selection",
    "transformer_greedy",
}
# Recurrent cells that `cellc inspect --json` lists: one for each weight-shared step that feeds
# itself, and one for each operation between such steps that runs over a list of any length.
RECURRENT = {
    "adaptive_computation_time": 4,
    "attention_pooling_classifier": 4,
    "bilstm_crf_scores": 4,
    "cfc": 1,
    "char_rnn_generate": 4,
    "char_word_bilstm": 4,
    "clockwork_rnn": 3,
    "conv_lstm": 2,
    "crf_viterbi_decode": 3,
    "ctc_greedy_collapse": 2,
    "dag_rnn": 2,
    "delta_net": 1,
    "dependency_tree": 5,
    "dialogue_two_ends": 7,
    "early_exit_rnn": 4,
    "generate_tree": 3,
    "graph_message_passing": 5,
    "greedy_seq2seq_attention_bahdanau": 9,
    "greedy_seq2seq_gru": 2,
    "hierarchical_bilstm": 4,
    "hierarchical_decoder": 4,
    "ind_rnn": 2,
    "lattice_lstm": 5,
    "layer_norm_lstm": 1,
    "linear_attention": 2,
    "lru": 1,
    "lstm_jump": 1,
    "mamba_scan": 2,
    "memory_network_hops": 6,
    "mgu": 1,
    "mixture_of_experts_router": 1,
    "mlstm": 3,
    "monotonic_attention": 2,
    "multiplicative_lstm": 1,
    "mv_rnn": 2,
    "neural_ode_rnn_fixed_step": 4,
    "ntm_addressing_free": 3,
    "peephole_lstm": 1,
    "phased_lstm": 2,
    "pointer_generator": 16,
    "pointer_network": 12,
    "program_tree": 4,
    "qrnn": 1,
    "residual_lstm_stack": 4,
    "retnet": 1,
    "rnn_transducer_greedy": 2,
    "rntn": 1,
    "rwkv_time_mix": 2,
    "shift_reduce_predicted": 1,
    "shift_reduce_tracking": 2,
    "siamese": 1,
    "skim_rnn": 2,
    "skip_rnn": 1,
    "slstm": 1,
    "spinn": 1,
    "sru": 2,
    "tacotron_stop_token": 18,
    "tree_gru": 3,
    "tree_index_arrays": 1,
    "tree_lstm_ast": 6,
    "tree_lstm_binary": 1,
    "tree_lstm_child_sum": 4,
    "tree_rnn_dataclass": 2,
    "two_towers_bow": 0,
    "zoneout_gru_eval": 1,
}
COVERED = 35  # models with at least 0.9 of their FLOPs in cells with weights


@pytest.fixture(scope="module")
def surveys() -> dict[str, dict[str, Any]]:
    """What `cellc inspect --json` prints for every model."""
    found = {}
    for name in sorted(set(NAMES) - BY_LENGTH):
        zoo = importlib.import_module(f"zoo.{name}")
        torch.manual_seed(0)
        with cellc.compile(zoo.make().eval(), backend="eager") as compiled:
            found[name] = survey(compiled, zoo.requests()).as_json()
    return found


def test_recurrent_cells(surveys: dict[str, dict[str, Any]]) -> None:
    counts = {
        name: sum(cell["recurrent"] for cell in found["cells"]) for name, found in surveys.items()
    }
    assert counts == RECURRENT


def test_coverage(surveys: dict[str, dict[str, Any]]) -> None:
    covered = [name for name, found in surveys.items() if found["coverage"] >= 0.9]
    assert len(covered) >= COVERED


def check(name: str, backend: Any, most: int | None = None, device: str | None = None) -> None:
    """Compare with eager on the CPU."""
    zoo = importlib.import_module(f"zoo.{name}")
    torch.manual_seed(0)
    model = zoo.make().eval()
    requests = zoo.requests()[:most]
    with cellc.compile(model, backend=backend, device=device) as compiled:
        results = compiled.map(requests)
    for request, got in zip(requests, results, strict=True):
        args, kwargs = as_call(request)
        with torch.no_grad():
            want = model(*args, **kwargs)
        got_leaves, got_tree = pytree.tree_flatten(got)
        want_leaves, want_tree = pytree.tree_flatten(want)
        assert got_tree == want_tree
        for a, b in zip(got_leaves, want_leaves, strict=True):
            assert type(a) is type(b)
            a = a.cpu() if isinstance(a, torch.Tensor) else a
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_equals_eager(name: str) -> None:
    check(name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equals_eager_on_cpp(name: str) -> None:
    check(name, "cpp")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equals_eager_interpreted(name: str) -> None:
    check(name, "triton", most=3)
