"""Which part of the work is this process's. With several of them: `search/test_search_command.py`."""

import pytest

from shortv_hf.data import processes


pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(processes, "_joined", False)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)


def test_whoever_has_not_joined_works_alone():
    """A training script's processes, say, which have samples of their own."""
    assert (processes.rank(), processes.size()) == (0, 1)
    assert list(processes.share("abc")) == [(0, "a"), (1, "b"), (2, "c")]
    assert processes.gather([1]) == [1] and processes.own_device("auto") == "auto"


def test_shares(monkeypatch):
    processes.join()
    assert list(processes.share("abcde")) == [(1, "b"), (4, "e")]
    assert processes.own_device("cpu") == "cpu"
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: False)
    assert processes.own_device("auto") == "cpu"


@pytest.mark.parametrize(("gpus", "expected"), [(4, "cuda:1"), (1, "cuda:0")])
def test_a_gpu_each_or_a_shared_one(monkeypatch, gpus, expected):
    processes.join()
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: gpus)
    assert processes.own_device("auto") == expected
