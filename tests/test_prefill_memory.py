"""Dropping tokens lowers the peak, and no method makes an attention matrix."""

import importlib.util
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parent.parent / "scripts" / "prefill_memory.py"
specification = importlib.util.spec_from_file_location("prefill_memory", SCRIPT)
prefill_memory = importlib.util.module_from_spec(specification)
specification.loader.exec_module(prefill_memory)


@pytest.fixture(scope="module")
def model():
    return prefill_memory.build_model(layers=6, hidden=32)


def test_live_bytes():
    kept = torch.zeros(1000)
    with prefill_memory.PeakMemory() as memory:
        a = kept + 1
        view = a[:10]
        del a
        b = kept + view.sum()
        assert memory.live >= 8000
        del view
        c = torch.empty(100)
        assert 4400 <= memory.live < 8000
        kept[:5].add_(1)
    assert 8000 <= memory.peak < 8500 and memory.largest == 1000
    del b, c
    assert memory.live == 0


@pytest.mark.parametrize("layers", [[], [1, 3, 4, 5]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "fastv", "k": 1, "ratio": 0.5}, {"method": "fastv", "k": 2, "ratio": 0.5}, {"method": "vtw", "k": 1},
        {"method": "vtc_cls", "layer": 0, "token_num": 128}, {"method": "downsample", "factor": 2},
    ],
    ids=str,
)  # fmt: skip
def test_peak_is_below_dense(model, options, layers):
    model.set_shortv_layers(layers)
    model.set_visual_reduction(None)
    dense, _ = prefill_memory.prefill_memory(model)
    model.set_visual_reduction(options)
    reduced, largest = prefill_memory.prefill_memory(model)
    assert reduced < 0.9 * dense
    if not layers:  # ShortV's own mask is text x sequence
        assert largest < 0.5  # of sequence x sequence elements


def test_an_attention_matrix_would_be_seen(model):
    model.set_shortv_layers([])
    model.set_visual_reduction(None)
    model.set_attn_implementation("eager")
    try:
        assert prefill_memory.prefill_memory(model)[1] >= 8
    finally:
        model.set_attn_implementation("sdpa")
