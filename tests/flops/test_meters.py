"""What a prefill takes: dropping tokens lowers the peak, and no method makes an attention matrix."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from shortv_hf import ShortVLlavaConfig
from shortv_hf.benchmark.subjects import build_models, make_inputs
from shortv_hf.flops.meters import FUSED_ATTENTION, LiveTensorBytes, _flop_counter, profile_prefill


pytestmark = pytest.mark.once

T, V = 64, 32 * 32


@pytest.fixture(scope="module")
def models():
    """A stock and a ShortV model with long prompts and narrow layers: a matrix of sequence x sequence would be the
    largest tensor by far."""
    text = LlamaConfig(
        hidden_size=32, intermediate_size=86, num_hidden_layers=6, num_attention_heads=8, vocab_size=400,
        max_position_embeddings=2048,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=2,
    )  # fmt: skip
    config = ShortVLlavaConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=399, vision_feature_layer=-2
    )
    torch.manual_seed(0)
    return build_models(config, torch.device("cpu"), torch.float32)


def profile(models, layers=(), options=None):
    """Peak bytes of a prefill, and the bytes of the largest tensor per entry of a sequence x sequence matrix."""
    stock, shortv = models
    shortv.set_shortv_layers(list(layers))
    shortv.set_visual_reduction(options)
    found = profile_prefill(shortv, make_inputs(stock, T, 1, 1))
    return found["peak_memory_bytes"], found["largest_tensor_bytes"] / (T + V) ** 2


@pytest.mark.parametrize("kernel", FUSED_ATTENTION)
@pytest.mark.parametrize("key_heads", [8, 2])
def test_every_kernel_of_attention_is_counted(kernel, key_heads):
    """By shapes alone, so those of CUDA too, with keys of as many heads as queries and of fewer."""
    query, key = (torch.empty(3, heads, tokens, 16, device="meta") for heads, tokens in ((8, 5), (key_heads, 24)))
    more = {"efficient": (None, False), "cudnn": (None, False)}.get(kernel.split("_")[4], ())
    with _flop_counter() as counter:
        getattr(torch.ops.aten, kernel)(query, key, key, *more)
    assert counter.get_total_flops() == 4 * 3 * 8 * 5 * 24 * 16


def test_live_bytes():
    kept = torch.zeros(1000)
    with LiveTensorBytes() as memory:
        a = kept + 1
        view = a[:10]
        del a
        b = kept + view.sum()
        assert memory.live >= 8000
        del view
        c = torch.empty(100)
        assert 4400 <= memory.live < 8000
        kept[:5].add_(1)
    assert 8000 <= memory.peak < 8500 and memory.largest == 4000
    del b, c
    assert memory.live == 0


@pytest.mark.parametrize("layers", [[], [1, 3, 4, 5]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "fastv", "k": 1, "ratio": 0.5}, {"method": "fastv", "k": 2, "ratio": 0.5}, {"method": "vtw", "k": 1},
        {"method": "vtc_cls", "layer": 0, "token_num": 128}, {"method": "downsample", "factor": 2},
        {"method": "illava", "vit_k": [0], "vit_r": 412, "llm_k": [2], "llm_r": 0.5},
        {"method": "illava", "vit_k": [], "llm_k": [1], "llm_r": 0.3},
    ],
    ids=str,
)  # fmt: skip
def test_peak_is_below_dense(models, options, layers):
    dense, _ = profile(models, layers)
    reduced, largest = profile(models, layers, options)
    assert reduced < 0.9 * dense
    if not layers:  # ShortV's own mask is text x sequence
        assert largest < 0.5  # not even of booleans


def test_an_attention_matrix_would_be_seen(models):
    models[1].set_attn_implementation("eager")
    try:
        assert profile(models)[1] >= 4 * 8  # float32, 8 heads
    finally:
        models[1].set_attn_implementation("sdpa")
