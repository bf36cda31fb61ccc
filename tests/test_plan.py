"""The plan's tensor operations, on any mask."""

import types

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shortv_hf.plan import Plan


@st.composite
def masks(draw):
    """(visual mask, padding mask) of a batch; padding is on the left or on the right and never visual."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    rows, padding = [], []
    for _ in range(batch):
        n_padding = draw(st.integers(0, length - 1))
        left = draw(st.booleans())
        valid = [(i >= n_padding) if left else (i < length - n_padding) for i in range(length)]
        rows.append([ok and draw(st.booleans()) for ok in valid])
        padding.append(valid)
    return torch.tensor(rows), torch.tensor(padding)


@settings(deadline=None)
@given(masks(), st.booleans())
def test_select_and_write(masks, skip_padding):
    visual, valid = masks
    plan = Plan.build([1], visual, valid.long() if skip_padding else None)
    if not visual.any():
        assert plan is None
        return
    text = ~visual & valid if skip_padding else ~visual
    states = torch.randn(*visual.shape, 3)
    selected = plan.text.select(states)
    assert selected.shape[1] == max(int(text.sum(1).max()), 1)
    written = plan.text.write(states, selected + 1)
    assert torch.equal(written, torch.where(text[..., None], states + 1, states))
    for row in range(len(text)):
        n = int(text[row].sum())
        assert torch.equal(selected[row, :n], states[row][text[row]])
        assert len(set(plan.text.index[row].tolist())) == plan.text.index.shape[1]  # fillers are distinct


@settings(deadline=None)
@given(masks(), st.integers(0, 5), st.sampled_from([None, 1, 3]))
def test_rows_of_the_causal_mask(masks, past, window):
    """Whatever the parent hands over, the rows are those of the full mask."""
    visual, valid = masks
    batch, length = visual.shape
    plan = Plan.build([0], visual, valid.long())
    if plan is None:
        return
    keys = torch.cat([torch.ones(batch, past, dtype=torch.bool), valid], 1)
    q, k = torch.arange(length)[:, None] + past, torch.arange(length + past)
    full = (k <= q) & ((k > q - window) if window else True) & keys[:, None, :]
    key_states = torch.zeros(batch, 1, length + past, 2)

    def rows(implementation, attention_mask):
        config = types.SimpleNamespace(_attn_implementation=implementation)
        attention = types.SimpleNamespace(config=config, sliding_window=window)
        fresh = Plan.build([0], visual, valid.long())
        return fresh.text_mask(attention, attention_mask, key_states, cached=True, position_ids=None)

    expected = torch.stack([full[row][plan.text.index[row]] for row in range(batch)])[:, None]
    is_text = plan.text.valid if plan.text.valid is not None else torch.ones_like(plan.text.index, dtype=torch.bool)
    is_text = is_text[:, None, :, None].expand_as(expected)
    from_4d = rows("sdpa", full[:, None])
    from_2d = rows("flash_attention_2", keys)
    additive = rows("eager", torch.zeros(full[:, None].shape).masked_fill(~full[:, None], torch.finfo().min))
    assert torch.equal(from_4d[is_text], expected[is_text])
    assert torch.equal(from_2d[is_text], expected[is_text])
    assert torch.equal((additive == 0)[is_text], expected[is_text])
    if past == 0 and window is None and valid.all():
        assert torch.equal(rows("sdpa", None)[is_text], expected[is_text])


def test_upper_bound_without_a_count():
    visual = torch.tensor([[False, True, True, False], [True, False, True, True]])
    plan = Plan.build([0], visual, max_text_tokens=3)
    states = torch.randn(2, 4, 5)
    written = plan.text.write(states, plan.text.select(states) * 2)
    assert torch.equal(written, torch.where(visual[..., None], states, states * 2))


def test_all_visual_chunk_writes_nothing():
    plan = Plan.build([0], torch.ones(2, 3, dtype=torch.bool))
    states = torch.randn(2, 3, 4)
    assert torch.equal(plan.text.write(states, plan.text.select(states) + 1), states)


def test_expanded_attention_rows():
    visual = torch.tensor([[False, True, False], [True, True, False]])
    plan = Plan.build([0], visual)
    weights = torch.rand(2, 2, 2, 3)
    full = plan.expand_rows(weights)
    assert full.shape == (2, 2, 3, 3)
    assert not full.transpose(1, 2)[visual].any()
    assert torch.equal(plan.select_rows(full)[0], weights[0])
