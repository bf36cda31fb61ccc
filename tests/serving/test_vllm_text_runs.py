"""Which keys each text token attends to on vLLM: any mixture of requests, chunks, cached prefixes and images, against a plain
loop."""

import dataclasses
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shortv_hf.serving.vllm.text_runs import TextRuns, text_rows


pytestmark = pytest.mark.once


@dataclass
class Common:
    """vLLM's `CommonAttentionMetadata`, those of its fields that there are for every model."""

    query_start_loc: Any
    query_start_loc_cpu: Any
    seq_lens: Any
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Any
    slot_mapping: Any
    causal: bool = True
    dcp_local_seq_lens: Any = None  # stands for all that there is for some models alone
    positions: Any = None
    is_prefilling: Any = None
    seq_lens_cpu_upper_bound: Any = None
    req_idx: Any = None
    _num_computed_tokens_cache: Any = None
    _token_to_req_indices_cache: Any = None

    replace = dataclasses.replace


@dataclass
class Request:
    """Tokens that are in the cache, and the scheduled ones: True is visual."""

    cached: int
    scheduled: list[bool]


def common(requests: list[Request], padding: int = 0) -> Common:
    """The step's metadata; `padding` requests of no tokens, as a CUDA graph of a fixed size has them, count as none."""
    lengths = [len(request.scheduled) for request in requests]
    starts = torch.tensor([0, *np.cumsum(lengths)] + [sum(lengths)] * padding, dtype=torch.int32)
    seq_lens = torch.tensor([request.cached + len(request.scheduled) for request in requests] + [0] * padding)
    return Common(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(torch.int32),
        num_reqs=len(requests),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.arange(3 * len(seq_lens)).view(-1, 3),
        slot_mapping=torch.arange(sum(lengths)),
        positions=torch.arange(sum(lengths)),
        is_prefilling=torch.arange(len(seq_lens)) % 2 == 0,
        seq_lens_cpu_upper_bound=seq_lens.to(torch.int32) + 1,
        req_idx=np.arange(len(seq_lens)) + 10,
        _num_computed_tokens_cache=seq_lens,
    )


def mask(requests: list[Request]) -> np.ndarray:
    return np.array([visual for request in requests for visual in request.scheduled])


def expected(requests: list[Request]) -> list[tuple[int, int]]:
    """Of each text token: its request, and how many keys it attends to."""
    return [
        (i, request.cached + place + 1)
        for i, request in enumerate(requests)
        for place, visual in enumerate(request.scheduled)
        if not visual
    ]


def attended(runs: TextRuns, queries: Common) -> list[tuple[int, int]]:
    """The same, as paged attention reads the metadata."""
    found = []
    for s, (start, end) in enumerate(pairwise(queries.query_start_loc_cpu.tolist())):
        request = int(queries.block_table_tensor[s, 0]) // 3
        assert queries.block_table_tensor[s].tolist() == [3 * request, 3 * request + 1, 3 * request + 2]
        for place in range(end - start):
            found.append((request, int(queries.seq_lens[s]) - (end - start) + place + 1))
    return found


decoding = st.builds(Request, st.integers(1, 50), st.just([False]))
prompts = st.builds(Request, st.integers(0, 50), st.lists(st.booleans(), min_size=1, max_size=12))
# As prompts are: images of some length between texts, cut by chunks anywhere.
images = st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=6).map(
    lambda runs: [visual for visual, length in runs for _ in range(length)]
)
chunks = st.builds(Request, st.integers(0, 50), images)
steps = st.lists(decoding | prompts | chunks, min_size=1, max_size=8)


@given(steps, st.integers(0, 2))
def test_each_text_token_attends_to_what_is_before_it_in_its_request(requests, padding):
    metadata = common(requests, padding)
    rows, counts = text_rows(mask(requests))
    assert counts == (not mask(requests).all())
    runs = TextRuns.of(rows, metadata.query_start_loc_cpu[: metadata.num_reqs + 1].numpy())
    queries = runs.queries(metadata)
    if counts:
        assert rows.tolist() == np.flatnonzero(~mask(requests)).tolist()
        assert attended(runs, queries) == expected(requests)
    else:  # the last visual token stands in
        assert attended(runs, queries) == [(len(requests) - 1, requests[-1].cached + len(requests[-1].scheduled))]

    requests_of_runs = [request for request, _ in attended(runs, queries)]
    firsts = [requests_of_runs[i] for i in queries.query_start_loc_cpu[:-1].tolist()]
    assert queries.num_reqs == len(runs) == len(queries.seq_lens)
    assert queries.num_actual_tokens == len(rows) == queries.query_start_loc_cpu[-1]
    assert queries.max_query_len == int(queries.query_start_loc.diff().max())
    assert int(queries.seq_lens.max()) <= queries.max_seq_len
    assert queries.req_idx.tolist() == [10 + request for request in firsts]
    assert queries.is_prefilling.tolist() == [request % 2 == 0 for request in firsts]
    assert queries.seq_lens_cpu_upper_bound.tolist() == [length + 1 for length in queries.seq_lens.tolist()]
    assert queries.slot_mapping is metadata.slot_mapping  # K and V of all scheduled tokens are written
    assert queries.positions is queries._num_computed_tokens_cache is None  # of all tokens: out of date
    assert queries.query_start_loc.dtype == queries.seq_lens.dtype == torch.int32


@given(steps)
def test_how_many_sequences_there_can_be(requests):
    """What buffers have to hold: a request's images part its text in at most one run more than there are images."""
    rows, counts = text_rows(mask(requests))
    visual_runs = sum(visual for request in requests for visual, _ in groupby(request.scheduled))
    starts = np.append(0, np.cumsum([len(request.scheduled) for request in requests]))
    runs = TextRuns.of(rows, starts)
    assert 1 <= len(runs) <= min(len(rows), len(requests) + visual_runs)
    text_runs = sum(not visual for request in requests for visual, _ in groupby(request.scheduled))
    assert len(runs) == (text_runs if counts else 1)


def test_a_text_only_step_is_the_step():
    requests = [Request(0, [False] * 5), Request(7, [False]), Request(3, [False] * 2)]
    metadata = common(requests)
    rows, _ = text_rows(mask(requests))
    queries = TextRuns.of(rows, metadata.query_start_loc_cpu.numpy()).queries(metadata)
    for name in ("query_start_loc", "seq_lens", "block_table_tensor", "is_prefilling", "seq_lens_cpu_upper_bound"):
        assert torch.equal(getattr(queries, name), getattr(metadata, name)), name
    assert queries.num_reqs == 3 and queries.num_actual_tokens == 8 and queries.max_query_len == 5


def test_optional_fields_may_be_missing():
    metadata = common([Request(0, [True, False])]).replace(
        is_prefilling=None, seq_lens_cpu_upper_bound=None, req_idx=None
    )
    queries = TextRuns.of(np.array([1]), np.array([0, 2])).queries(metadata)
    assert queries.is_prefilling is queries.seq_lens_cpu_upper_bound is queries.req_idx is None


def test_what_is_not_known_is_an_error():
    metadata = common([Request(0, [True, False])]).replace(dcp_local_seq_lens=torch.tensor([2]))
    with pytest.raises(ValueError, match="does not know what vLLM means by dcp_local_seq_lens"):
        TextRuns.of(np.array([1]), np.array([0, 2])).queries(metadata)
