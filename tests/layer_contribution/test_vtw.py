"""Choosing VTW's layer."""

import pytest
import torch
from helpers import make_inputs, make_model, make_stock
from reduction_reference import text_logits

from shortv_hf.layer_contribution.vtw import choose_vtw_k, first_layer_below, withdrawal_divergences


@pytest.fixture
def model():
    return make_model(shortv_layers=[1])


def samples(model):
    return [make_inputs(model, ["ttItt"]), make_inputs(model, ["tIttt", "tttIt"], seed=3)]


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_divergences_equal_the_reference(model, kl):
    model.set_visual_reduction({"method": "fastv", "k": 2})
    stock = make_stock(model)
    stock.set_attn_implementation("eager")
    rows = [make_inputs(model, ["ttItt"])]
    pair = make_inputs(model, ["tIttt", "tttIt"], seed=3)
    for i in range(2):
        rows.append({"input_ids": pair["input_ids"][i : i + 1], "pixel_values": pair["pixel_values"][i : i + 1]})
    found = withdrawal_divergences(model, samples(model), kl=kl)
    assert list(found) == [1, 2, 3]
    for k, value in found.items():
        expected = []
        for row in rows:
            withdrawn = text_logits(stock, row, [], {"method": "vtw", "k": k}, [1])[-1].softmax(-1)
            dense = text_logits(stock, row, [], {"method": "vtw", "k": 4}, [1])[-1].softmax(-1)
            p, q = (withdrawn, dense) if kl == "reverse" else (dense, withdrawn)
            expected.append(float((p * (p / q).log()).sum()))
        assert value == pytest.approx(sum(expected) / 3, rel=1e-3, abs=1e-6)
    assert model.config.visual_reduction == {"method": "fastv", "k": 2}


def test_padding_on_the_right(model):
    left = withdrawal_divergences(model, [make_inputs(model, ["ttItt", "tI"])])
    right = withdrawal_divergences(model, [make_inputs(model, ["ttItt", "tI"], "right")])
    torch.testing.assert_close(torch.tensor(list(left.values())), torch.tensor(list(right.values())))


def test_choice(model):
    found = withdrawal_divergences(model, samples(model))
    assert choose_vtw_k(model, samples(model), max_kl=max(found.values())) == 1
    assert choose_vtw_k(model, samples(model), max_kl=0.0) == 4  # nothing is withdrawn
    last = choose_vtw_k(model, samples(model), max_kl=found[3], layers=[3])
    assert last == 3
    assert first_layer_below({5: 0.3, 6: 0.01, 7: 0.1, 8: 0.0}, 0.05, 9) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_kl": -1}, "max_kl is -1"),
        ({"max_kl": float("nan")}, "max_kl is nan"),
        ({"max_kl": 1, "kl": "both"}, "'both'; use one of forward, reverse"),
        ({"max_kl": 1, "layers": [5]}, "k is 5; the valid range is the integers 1 to 4"),
    ],
    ids=str,
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_vtw_k(model, samples(model), **arguments)


def test_no_samples(model):
    with pytest.raises(ValueError, match="no samples"):
        choose_vtw_k(model, [], 0.1)
