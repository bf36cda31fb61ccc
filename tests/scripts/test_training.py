"""Gradients, gradient checkpointing, adapters."""

import pytest
import torch
from helpers import FAMILIES, IMAGE_TOKEN, make_inputs, make_model, make_stock, reference_forward


LAYERS = [0, 2, 3]
ROWS = ["ttItt", "tIttItt", "ttt"]


def labelled(model, rows=ROWS, padding_side="right"):
    inputs = make_inputs(model, rows, padding_side)
    hidden = (inputs["input_ids"] == IMAGE_TOKEN) | (inputs["attention_mask"] == 0)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(hidden, -100)}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["llama", "mistral_sliding", "qwen2"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_gradients_equal_those_of_the_reference(family, text, attn, padding_side):
    """Rows of different text length: the fillers of the shorter ones must not count twice."""
    model = make_model(family, text, attn, shortv_layers=LAYERS)
    stock = make_stock(model)
    inputs = labelled(model, padding_side=padding_side)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    expected = reference_forward(stock, LAYERS, inputs, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    actual, expected = gradients(model), gradients(stock)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = make_model(shortv_layers=LAYERS).train()
    inputs = labelled(model)
    model(**inputs, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    layer = model.model.language_model.layers[LAYERS[0]]
    layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    model(**inputs, use_cache=False).loss.backward()
    assert len(calls) == 2  # the second time during the backward pass
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_gradient_checkpointing_in_the_config():
    model = make_model()
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.language_model.layers)


def test_lora_step():
    peft = pytest.importorskip("peft")
    model = make_model(shortv_layers=LAYERS)
    inputs = labelled(model)
    with torch.no_grad():
        before = model(**inputs).logits
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=True)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, before)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if name not in trained}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, p in adapted.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
    for layer in LAYERS:  # adapters of frozen layers are trained too: K and V of all tokens, Q and FFN of the text
        weight = adapted.base_model.model.model.language_model.layers[layer].self_attn.v_proj.lora_B["default"].weight
        assert weight.abs().sum() > 0


def test_checkpointing_with_a_cache_is_not_blamed_on_the_version():
    """Upstream's layers then leave the cache alone; nothing of ours is missing from it."""
    model = make_model(shortv_layers=LAYERS).train()
    model.gradient_checkpointing_enable()
    assert model(**labelled(model), use_cache=True).loss.isfinite()
