"""What answering costs: sums, and how they are read."""

import pytest
import torch
from helpers import make_inputs, make_model
from hypothesis import given
from hypothesis import strategies as st

from shortv_hf.evaluate.figures import Clock, Figures, answer_lengths
from shortv_hf.flops import flops_ratio


def clock(*times):
    found = Clock()
    found.times = list(times)
    return found


@pytest.mark.once
def test_times():
    figures = Figures()
    figures.add_answers(clock(10.0, 12.0, 13.0, 14.0), 9.0, 15.0, [3, 2])
    figures.add_answers(clock(20.0, 21.0), 20.0, 22.0, [1])
    figures.add_answers(None, 30.0, 40.0, [5])  # beam search
    assert (figures.requests, figures.tokens, figures.seconds) == (4, 11, 18.0)
    found = figures.summary()
    assert found["first_token_s"] == 2.0  # the median of 3 and 1
    assert found["decode_tokens_per_s"] == 3 / 4  # 3 tokens after the first ones, in 3 + 1 seconds
    assert "flops_ratio" not in found and Figures().summary() == {}


@pytest.mark.once
@given(st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_sums_do_not_depend_on_who_adds(numbers):
    parts = []
    for number in numbers:
        part = Figures(requests=number, memory=number, dense_memory=2 * number, first_token_s=[float(number)])
        parts.append(part)
    left = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    right = parts[0] + (parts[1] + (parts[2] + parts[3]))
    assert left == right and left.requests == sum(numbers) and left.memory == max(numbers)
    assert sum(parts, Figures()).summary()["first_token_s"] == left.summary()["first_token_s"]


@pytest.mark.once
@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_an_answer_ends_with_its_first_end_of_sequence(rows):
    expected = [row.index(2) + 1 if 2 in row else 5 for row in rows]
    assert answer_lengths(torch.tensor(rows), [2]) == expected
    assert answer_lengths(torch.tensor(rows), []) == [5] * len(rows)
    assert answer_lengths(torch.empty(2, 0, dtype=torch.long), [2]) == [0, 0]


def test_a_profile_counts_the_model_as_it_is_set_and_dense():
    model = make_model(shortv_layers=[1, 2]).eval()
    inputs = make_inputs(model, ["ttttItttt"])
    figures = Figures()
    figures.add_profile(model, inputs)
    v = int((inputs["input_ids"] == model.config.image_token_id).sum())
    t = inputs["input_ids"].shape[1] - v
    found = figures.summary()
    assert found["flops_ratio"] == pytest.approx(flops_ratio(t, v, model.config, shortv_layers=[1, 2]), rel=0.02)
    assert found["flops_ratio"] < found["model_flops_ratio"] < 1
    assert found["memory_mb"] > 0 and found["memory_ratio"] == figures.memory / figures.dense_memory
    assert (found["kv_tokens"], found["kv_ratio"]) == (t + v, 1.0)
    reduction = {"method": "fastv", "k": 2, "ratio": 0.5}
    with model.using(shortv_layers=[], visual_reduction=reduction):
        dropped = Figures()
        dropped.add_profile(model, inputs)
    assert dropped.summary()["kv_tokens"] == (2 * (t + v) + 2 * (t + v / 2)) / 4
    with model.using(shortv_layers=[], visual_reduction=None):
        dense = Figures()
        dense.add_profile(model, inputs)
    assert dense.summary()["flops_ratio"] == 1 and dense.flops == figures.dense_flops
    assert (figures + dense).summary()["flops_ratio"] == pytest.approx((found["flops_ratio"] + 1) / 2)
