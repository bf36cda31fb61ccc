"""Answers on disk: whatever a break leaves, what was written whole is there, and nothing twice."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortv_hf.evaluate.figures import Figures
from shortv_hf.evaluate.journal import Answer, Journal


pytestmark = pytest.mark.once
BATCHES = [
    {"gqa 0 0": Answer("a\nb", 5, 2), "gqa 1 0": Answer("\u2028 „x“", 6, 1)},
    {"gqa 2 0": Answer("", 7, 0)},
    {"gqa 3 0": Answer("no", 8, 1)},
]


def write(path, batches, rank=0):
    journal = Journal(path, rank)
    for batch in batches:
        journal.add(batch, Figures(requests=len(batch), first_token_s=[0.5]))
    return journal


@given(st.integers(0, 10_000))
def test_a_break_anywhere(cut):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "gqa--fastv:k=2,ratio=0.5[x]"
        file = write(path, BATCHES).file
        content = file.read_bytes()
        cut %= len(content) + 1
        file.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        found = Journal(path)
        expected = {key: answer for batch in BATCHES[:whole] for key, answer in batch.items()}
        assert found.answers == expected
        assert found.figures.requests == len(expected) and len(found.figures.first_token_s) == whole
        for batch in BATCHES[whole:]:
            found.add(batch, Figures(requests=len(batch), first_token_s=[0.5]))
        assert file.read_bytes() == content
        assert Journal(path).figures.requests == 4


def test_ranks_share_answers_and_not_figures(tmp_path):
    write(tmp_path / "a", BATCHES[:1], rank=0)
    write(tmp_path / "a", BATCHES[1:], rank=1)
    write(tmp_path / "ab", BATCHES[:1], rank=0)  # another part
    found = [Journal(tmp_path / "a", rank) for rank in (0, 1, 2)]
    assert all(len(each.answers) == 4 for each in found)
    assert [each.figures.requests for each in found] == [2, 2, 0]
