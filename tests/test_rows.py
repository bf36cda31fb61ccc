"""Rows of states, and what they attend to, on any mask."""

import types

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shortv_hf.plan import Plan
from shortv_hf.rows import Rows, Tokens, additive, mask_at, packed_sequences


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
        index = plan.text.index[row].tolist()
        assert len(set(index)) == len(index)  # fillers are distinct
        here = selected[row] if plan.text.valid is None else selected[row][plan.text.valid[row]]
        assert torch.equal(here, states[row][text[row]])
    spread = plan.text.spread(selected, visual.shape[1])
    assert torch.equal(spread, torch.where(text[..., None], states, 0))


@settings(deadline=None)
@given(masks(), st.integers(0, 5), st.sampled_from([None, 1, 3]))
def test_rows_of_the_causal_mask(masks, past, window):
    """Whatever upstream hands over, the rows are those of the full mask."""
    visual, valid = masks
    batch, length = visual.shape
    plan = Plan.build([0], visual, valid.long())
    if plan is None:
        return
    real = torch.cat([torch.ones(batch, past, dtype=torch.bool), valid], 1)
    q, k = torch.arange(length)[:, None] + past, torch.arange(length + past)
    full = (k <= q) & ((k > q - window) if window else True) & real[:, None, :]
    expected = torch.stack([full[row][plan.text.index[row]] for row in range(batch)])[:, None]
    is_text = torch.ones_like(plan.text.index, dtype=torch.bool) if plan.text.valid is None else plan.text.valid
    is_text = is_text[:, None, :, None].expand_as(expected)
    keys = Tokens.range(0, past + length, q.device)

    def rows(given, start=past, **options):
        queries = Tokens.range(start, length, q.device).at(plan.text)
        return mask_at(given, queries, keys, past=start, window=window, every_key=True, **options)

    block = types.SimpleNamespace(mask_mod=lambda b, h, row, column: full[b, row, column])
    assert torch.equal(rows(full[:, None], 0)[is_text], expected[is_text])
    assert torch.equal(rows(block, 0)[is_text], expected[is_text])
    assert torch.equal(rows(real)[is_text], expected[is_text])
    eager = rows(additive(full[:, None], torch.float32), 0)
    assert torch.equal((eager == 0)[is_text], expected[is_text])
    if valid.all():
        assert torch.equal(rows(None)[is_text], expected[is_text])


@settings(deadline=None)
@given(st.data(), st.integers(2, 10), st.integers(1, 4), st.sampled_from([None, 2]))
def test_keys_that_are_left(data, past, length, window):
    """A cache that has lost tokens: the columns of the full mask at the slots that are left, and none for fillers."""
    total = past + length
    slots = [sorted(data.draw(st.sets(st.integers(0, total - 1)))) for _ in range(2)]
    width = max(max(map(len, slots)), 1)
    keys = torch.tensor([[-1] * (width - len(row)) + row for row in slots])
    real = torch.tensor([[1] * total, [0] + [1] * (total - 1)]).bool()
    q, k = torch.arange(length)[:, None] + past, torch.arange(total)
    full = (k <= q) & ((k > q - window) if window else True) & real[:, None, :]
    queries = Tokens.range(past, length, q.device)
    queries = Tokens(queries.slots.expand(2, -1), queries.places.expand(2, -1))
    expected = torch.stack([full[row][:, keys[row].clamp(min=0)] & (keys[row] >= 0) for row in range(2)])[:, None]
    for whole in (real, full[:, None], full[:, None, :, 1:]):  # the last: of a cache with a window
        first = total - whole.shape[-1] if whole.ndim == 4 else 0
        found = mask_at(whole, queries, Tokens(keys, keys), past=past, first=first, window=window)
        assert torch.equal(found, expected & (keys >= first)[:, None, None])
    eager = mask_at(additive(full[:, None], torch.float32), queries, Tokens(keys, keys), past=past)
    assert torch.equal(eager == 0, expected)


def test_a_window_is_measured_in_places():
    """Tokens that never reached the model leave no gap in it."""
    queries, keys = (
        Tokens(torch.tensor([[9]]), torch.tensor([[3]])),
        Tokens(torch.tensor([[0, 1, 8, 9]]), torch.tensor([[0, 1, 2, 3]])),
    )
    assert mask_at(None, queries, keys, window=3).flatten().tolist() == [False, True, True, True]


def test_a_filler_attends_to_everything():
    """A query with no key at all could give NaN."""
    keys = Tokens.range(0, 3, torch.device("cpu"))
    queries = Tokens(torch.tensor([[-1, 1]]), torch.tensor([[0, 1]]))
    assert mask_at(None, queries, keys).tolist() == [[[[True, True, True], [True, True, False]]]]


def test_packed_sequences():
    packed = packed_sequences(torch.tensor([[0, 1, 0, 1]]), 2)
    keys = Tokens.range(0, 4, torch.device("cpu"))
    mask = mask_at(None, keys, keys, every_key=True, packed=packed[:1])
    assert mask[0, 0].tolist() == [[i >= j and i // 2 == j // 2 for j in range(4)] for i in range(4)]
    assert packed_sequences(None, 2) is None and packed_sequences(torch.zeros(3, 1, 4), 1) is None


def test_rows_of_tables():
    """`[1, S, d]`, and `[3, B, S, d]` where positions are in three dimensions."""
    rows = Rows(torch.tensor([[0, 2], [1, 3]]))
    tables = torch.randn(3, 2, 4, 5)
    found = rows.select(tables)
    assert found.shape == (3, 2, 2, 5)
    assert torch.equal(found[:, 1], tables[:, 1, [1, 3]])
    assert torch.equal(rows.select(tables[:1, 0])[1], tables[0, 0, [1, 3]])


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


def test_spread_attention_rows():
    visual = torch.tensor([[False, True, False], [True, True, False]])
    rows = Plan.build([0], visual).text
    weights = torch.rand(2, 2, 2, 3)
    full = rows.spread(weights, 3)
    assert full.shape == (2, 2, 3, 3)
    assert not full.transpose(1, 2)[visual].any()
    assert torch.equal(rows.select(full.transpose(0, 1)).transpose(0, 1)[0], weights[0])
