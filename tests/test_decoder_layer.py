"""Grafted modules: the stock class in front of everybody but Python."""

import copy
import pickle
from types import MethodType

import pytest
import torch
from helpers import make_inputs, make_model, make_stock
from torch import nn

from shortv_hf.decoder_layer import ShortVAttentionMixin, ShortVDecoderLayerMixin, graft, grafted_class


class Stock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)


class Doubled:
    def forward(self, x):
        return 2 * super().forward(x)


def test_graft_puts_a_forward_before_the_modules_own():
    module, x = Stock(), torch.randn(3, 2)
    before, parts = module(x), dict(module.named_parameters())
    graft(module, Doubled)
    assert torch.equal(module(x), 2 * before) and dict(module.named_parameters()).keys() == parts.keys()
    assert type(module).__name__ == "Stock" and type(module).__module__ == Stock.__module__
    assert str(type(module)) == str(Stock) and isinstance(module, Stock)
    graft(module, Doubled)  # once
    assert torch.equal(module(x), 2 * before)
    assert grafted_class(Stock, Doubled) is type(module)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_copies_are_grafted_too(copied):
    module, x = Stock(), torch.randn(3, 2)
    graft(module, Doubled)
    other = copied(module)
    assert torch.equal(other(x), module(x)) and type(other) is type(module)
    with torch.no_grad():
        other.linear.weight.zero_()
    assert not torch.equal(other(x), module(x))


def test_a_forward_left_on_the_instance():
    """4.57 leaves the class's own behind when it has recorded outputs; accelerate's hooks call the one they found."""
    x = torch.randn(3, 2)
    left = Stock()
    left.forward = MethodType(Stock.forward, left)
    expected = 2 * left(x)
    graft(left, Doubled)
    assert torch.equal(left(x), expected)

    hooked = Stock()
    hooked._old_forward = hooked.forward
    hooked.forward = lambda x: hooked._old_forward(x) + 1
    expected = 2 * (hooked(x) - 1) + 1
    graft(hooked, Doubled)
    torch.testing.assert_close(hooked(x), expected)

    other = Stock()
    other.forward = lambda x: x
    with pytest.raises(ValueError, match="Stock has a forward of its own"):
        graft(other, Doubled)


def test_a_model_is_made_of_grafted_stock_modules():
    model = make_model(shortv_layers=[1])
    stock = make_stock(model)
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert isinstance(ours, type(theirs))
    layer = model.model.language_model.layers[0]
    assert isinstance(layer, ShortVDecoderLayerMixin) and isinstance(layer.self_attn, ShortVAttentionMixin)
    assert repr(layer) == repr(stock.model.language_model.layers[0])
    assert "LlamaDecoderLayer" in model.model.language_model._no_split_modules


def test_a_whole_model_pickles():
    model = make_model(shortv_layers=[1, 2])
    inputs = make_inputs(make_model(), ["ttItt"])
    other = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)
