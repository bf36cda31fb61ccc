"""The authors' released code on tiny models, case by case. `SHORTV_GOLDENS` points to the full set, if there is one."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import discard_updates
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from shortv_hf import ShortVLlavaForConditionalGeneration, ShortVLlavaNextForConditionalGeneration
from shortv_hf.upstream import CACHE, find_cache


ROOT = Path(os.environ.get("SHORTV_GOLDENS", Path(__file__).parent / "goldens" / "shortv"))
VARIANTS = {
    "llava15_mha": (ShortVLlavaForConditionalGeneration, LlavaForConditionalGeneration),
    "llavanext_gqa": (ShortVLlavaNextForConditionalGeneration, LlavaNextForConditionalGeneration),
}
LOGITS, HIDDEN = {"atol": 1e-4, "rtol": 0}, {"atol": 2e-4, "rtol": 0}


def entries(kind):
    manifests = {variant: json.loads((ROOT / variant / "manifest.json").read_text()) for variant in VARIANTS}
    return [
        pytest.param(variant, entry, id=f"{variant}-{entry['id']}")
        for variant, manifest in manifests.items()
        for entry in manifest.get(kind, [])
    ]


@pytest.fixture(scope="module")
def models():
    return {
        variant: ours.from_pretrained(ROOT / variant, dtype=torch.float32) for variant, (ours, _) in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def stock_models():
    return {
        variant: stock.from_pretrained(ROOT / variant, dtype=torch.float32) for variant, (_, stock) in VARIANTS.items()
    }


def load_case(variant, entry):
    tensors = load_file(ROOT / variant / entry["file"])
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    prefix = entry["expected_prefix"]
    expected = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {name: tensors[name] for name in names if name in tensors}, expected, tensors["visual_mask"]


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("variant", "entry"), entries("cases"))
def test_case(models, variant, entry, attn):
    model = models[variant]
    model.set_attn_implementation(attn)
    model.set_shortv_layers(entry["replaced_layers"])
    inputs, expected, visual_mask = load_case(variant, entry)
    assert torch.equal(inputs["input_ids"] == model.config.image_token_id, visual_mask)

    output = model(**inputs, output_hidden_states=True, use_cache=True)
    torch.testing.assert_close(output.logits[:, -1], expected["prefill_logits_last"], **LOGITS)
    if "last_hidden_state" in expected:
        torch.testing.assert_close(output.hidden_states[-1], expected["last_hidden_state"], **LOGITS)
    if "hidden_states" in expected:
        torch.testing.assert_close(torch.stack(output.hidden_states), expected["hidden_states"], **HIDDEN)
    for name, part in (("key_cache", "keys"), ("value_cache", "values")):
        if name in expected:
            cache = torch.stack([getattr(layer, part) for layer in find_cache(output).layers])
            torch.testing.assert_close(cache, expected[name], **HIDDEN)

    new_ids = expected["generated_ids"]
    for step in range(new_ids.shape[1]):  # the greedy path of the released code, step by step on our cache
        torch.testing.assert_close(output.logits[:, -1], expected["step_logits"][:, step], **LOGITS)
        assert torch.equal(output.logits[:, -1].argmax(-1), new_ids[:, step])
        output = model(input_ids=new_ids[:, step : step + 1], **{CACHE: find_cache(output)})
    generated = model.generate(**inputs, max_new_tokens=new_ids.shape[1], do_sample=False, eos_token_id=-1)
    assert torch.equal(generated[:, inputs["input_ids"].shape[1] :], new_ids)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "entry"), entries("quirks"))
def test_quirk(models, stock_models, variant, entry):
    """Prompts that the released code gets wrong (its window is not the set of visual tokens): ours freezes the visual
    tokens, as the simple reference does."""
    model, stock = models[variant], stock_models[variant]
    model.set_attn_implementation("sdpa")
    layers = entry["replaced_layers"]
    model.set_shortv_layers(layers)
    inputs, _, _ = load_case(variant, entry)
    visual_mask = inputs["input_ids"] == model.config.image_token_id
    output = model(**inputs, output_hidden_states=True)
    with discard_updates(stock, layers, visual_mask):
        expected = stock(**inputs, output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected.logits, **LOGITS)
    for one, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, **HIDDEN)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    with discard_updates(stock, layers, visual_mask):
        expected = stock.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
