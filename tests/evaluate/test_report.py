"""Scores beside what they cost."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shortv_hf.benchmark.subjects import Method
from shortv_hf.evaluate import report as reports
from shortv_hf.evaluate.run import Part
from shortv_hf.evaluate.suites import SUITES, Benchmark
from shortv_hf.hub.paper import PAPER_MODELS


pytestmark = pytest.mark.once
DENSE, OURS = Method("dense"), Method("ShortV N=19", (31, 29))
CONDITIONS = {"model": "m", "limit": None, "batch_size": 8}


def part(task, method, score, questions=None, answers=None, **figures):
    return Part(task, method, "exact_match", score, questions or {}, answers or {}, figures, "owner/data")


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=20))
def test_a_paired_difference(pairs):
    ours, theirs = zip(*pairs, strict=True)
    mean, error = reports.paired_difference(ours, theirs)
    differences = [a - b for a, b in pairs]
    assert mean == pytest.approx(statistics.fmean(ours) - statistics.fmean(theirs), abs=1e-9)
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(len(pairs)), abs=1e-9)


def test_of_one_question_there_is_no_error():
    mean, error = reports.paired_difference([1.0], [0.0])
    assert mean == 1.0 and error is None


def test_questions_and_answers_are_compared_one_by_one():
    dense = part("gqa", "dense", 50.0, {"0": 100.0, "1": 0.0, "2": 100.0}, {"0": "a", "1": "b", "2": "c"})
    ours = part("gqa", "ours", 50.0, {"0": 0.0, "1": 0.0, "9": 100.0}, {"0": "a", "1": "x", "9": "y"})
    found = reports.compare(ours, dense)
    assert found["questions"] == 2 and found["difference"] == -50.0 and found["same_answers"] == 0.5


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_average_is_that_of_table_2(name):
    """MME by 2000, the mean of all, and what is retained of the dense model's: as the paper prints them."""
    paper = PAPER_MODELS[name]
    benchmarks = [each for each in SUITES["shortv"] if each.task != "vqav2_val"]
    parts = [
        part(each.task, method.name, score)
        for method, scores in ((DENSE, paper.dense), (OURS, paper.shortv))
        for each, score in zip(benchmarks, scores, strict=False)
    ]
    dense, ours = reports.make(CONDITIONS, [DENSE, OURS], benchmarks, parts, [], [])["methods"]
    assert dense["average"] == pytest.approx(paper.dense[-2], abs=0.05)
    assert ours["average"] == pytest.approx(paper.shortv[-2], abs=0.05)
    assert 100 * ours["retained"] == pytest.approx(paper.shortv[-1], abs=0.15)  # of averages that it had rounded


def test_what_is_missing_is_said_and_not_averaged():
    benchmarks = [Benchmark("GQA", "gqa", "exact_match"), Benchmark("mine", "mine", None, 1.0, 1.0)]
    parts = [
        part("gqa", "dense", 60.0, {"0": 100.0, "1": 0.0}, {"0": "a", "1": "b"}, first_token_s=0.2, flops_ratio=1.0),
        part("gqa", OURS.name, 50.0, {"0": 0.0, "1": 0.0}, {"0": "x", "1": "b"}, first_token_s=0.1, flops_ratio=0.5),
        part("mine", "dense", 0.25),
    ]
    failed = [{"task": "mine", "method": OURS.name, "reason": "RuntimeError: no"}]
    report = reports.make(CONDITIONS, [DENSE, OURS], benchmarks, parts, failed, ["mmvet is scored by a judge"])
    assert report["methods"][1] == {
        "method": OURS.name, "average": 50.0, "retained": 50 / 60, "flops_ratio": 0.5, "first_token_s": 0.1, "speed_up": 2.0,
    }  # fmt: skip
    text = reports.markdown(report)
    assert f"| {OURS.name} | 50.0% | – | – | 100.0 ms | 2.00× | 50.0 | – | 50.0 | 83.3% |" in text
    assert f"| GQA | {OURS.name} | 2 | -50.0 ± 50.0 | 50.0% |" in text
    assert "failed: mine, ShortV N=19: RuntimeError: no" in text and "left out: mmvet is scored" in text


def test_table_and_chart(tmp_path):
    benchmarks = [SUITES["shapes"][0]]
    parts = [part("shapes", each.name, 90.0, first_token_s=0.1, flops_ratio=0.7) for each in (DENSE, OURS)]
    report = reports.make(CONDITIONS, [DENSE, OURS], benchmarks, parts, [], [])
    reports.write(report, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "report.md", "report.png"}
    assert Image.open(tmp_path / "report.png").width > 800
    panels = reports.trade_offs(report)
    assert panels["time to the first tokens of a batch of 8, ms"] == {"dense": (100.0, 90.0), OURS.name: (100.0, 90.0)}
