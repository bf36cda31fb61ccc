"""Benchmarks by name, and what it takes to score them."""

from types import SimpleNamespace

import pytest

from shortv_hf.evaluate import suites
from shortv_hf.evaluate.run import _score_alone
from shortv_hf.evaluate.suites import (
    JAVA,
    JUDGE,
    KNOWN,
    SUITES,
    UPLOAD,
    Benchmark,
    choose_benchmarks,
    lacking,
    needs_of,
)


pytestmark = pytest.mark.once


def test_the_paper_s_table():
    assert [each.title.split()[0] for each in SUITES["shortv"]] == [
        "MME", "MMBench", "MMMU", "MMStar", "SEED-Bench", "GQA", "Flickr30k", "VQAv2",
    ]  # fmt: skip
    assert len({each.title for suite in SUITES.values() for each in suite}) == len(KNOWN)  # one name, one benchmark


def test_each_benchmark_once():
    metrics = {"mine": ["right"], "vqav2_test": ["submission"]}
    chosen = choose_benchmarks(["shortv", "vtc-cls"], ["gqa", *metrics], metrics.get)
    assert len(chosen) == len(set(chosen)) and [each.task for each in chosen].count("gqa") == 1
    mine, uploaded = chosen[-2:]
    assert (mine.scale, mine.needs) == (1.0, None) and uploaded.needs == suites.UPLOAD
    with pytest.raises(ValueError, match="--suite is 'paper'; the suites are shortv"):
        choose_benchmarks(["paper"], [])
    with pytest.raises(ValueError, match="name a --suite"):
        choose_benchmarks([], [])


def test_what_a_machine_lacks(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(suites.shutil, "which", lambda name: None)
    reasons = {each.task: lacking(each) for each in KNOWN.values()}
    assert {task for task, reason in reasons.items() if reason} == {
        "mmvet", "mmbench_cn_dev", "activitynetqa", "flickr30k_test",
    }  # fmt: skip
    assert "OPENAI_API_KEY" in reasons["mmvet"] and "Java" in reasons["flickr30k_test"]
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setattr(suites.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(suites, "find_spec", lambda name: object())
    assert not any(map(lacking, KNOWN.values()))
    assert "writes what to upload" in lacking(Benchmark("x", "vqav2_test", needs=suites.UPLOAD))


def test_lmms_eval_has_these_tasks_and_figures():
    pytest.importorskip("lmms_eval")
    from lmms_eval import utils

    from shortv_hf.evaluate.tasks import metrics_of, task_manager

    others = {
        "vqav2_test": UPLOAD, "infovqa_test": UPLOAD, "mmbench_en_test": UPLOAD, "mathvista_testmini_format": JUDGE,
        "nocaps_val": JAVA, "chartqa_lite": None, "mvbench": None,
    }  # fmt: skip
    manager = task_manager([*KNOWN, *others])
    assert {name: needs_of(metrics_of(manager, name)) for name in others} == others
    for each in KNOWN.values():
        files = [manager.task_index[each.task]["yaml_path"]]
        if manager.task_index[each.task]["type"] == "group":
            names = utils.load_yaml_config(files[0], mode="simple")["task"]
            files = [manager.task_index[name]["yaml_path"] for name in names]
        for file in files:
            config = utils.load_yaml_config(file, mode="simple")
            metrics = [metric["metric"] for metric in config["metric_list"]]
            assert each.metric in metrics, each
    assert {each.needs for each in KNOWN.values()} == {None, JUDGE, JAVA}


# What each task says of a right and of a wrong answer
SAID = {
    "mme": ({"score": 1.0}, {"score": 0.0}),
    "mmstar": ({"score": 1}, {"score": 0}),
    "pope": ({"score": 1.0, "prediction": "no", "ground_truth": "no"}, {"score": 0.0}),
    "ocrbench": ({"score": 1, "question_type": "Digit String Recognition"}, {"score": 0}),
    "mvbench": ({"pred_answer": "A", "gt_answer": "A", "score": 1}, {"score": 0}),
    "seedbench": ({"pred": "a", "answer": "A", "question_id": 1}, {"pred": "B", "answer": "A"}),
    "muirbench": ({"pred": "A", "answer": "A", "task": "Counting"}, {"pred": "", "answer": "A"}),
    "videomme": ({"pred_answer": "C", "answer": "C"}, {"pred_answer": "C", "answer": "D"}),
    "mlvu_dev": ({"pred_answer": "C", "answer": "C", "task_type": "count"}, {"pred_answer": "C", "answer": "D"}),
    "egoschema_subset": ({"pred": 1, "ground_truth": "1"}, {"pred": 2, "ground_truth": "1"}),
    **dict.fromkeys(
        [
            "gqa",
            "vqav2_val",
            "textvqa_val",
            "scienceqa_img",
            "ai2d",
            "chartqa",
            "docvqa_val",
            "infovqa_val",
            "realworldqa",
        ],
        (1.0, 0.0),
    ),
    "nextqa_mc_test": (1.0, 0.0),
    "shapes": (1.0, 0.0),
}


@pytest.mark.parametrize("task", [each.task for each in KNOWN.values() if not each.needs and not each.alone])
def test_a_single_question_is_right_or_wrong(task):
    alone = _score_alone(None, KNOWN[task].metric, KNOWN[task])
    assert [alone(said) for said in SAID[task]] == [100.0, 0.0]


def test_tasks_that_know_by_their_way_to_score_many(tmp_path):
    """With what the real ones say of a question."""
    pytest.importorskip("lmms_eval")
    from lmms_eval import utils

    from shortv_hf.evaluate.tasks import task_manager

    said = {
        "mmmu_val": [
            {
                "id": "validation_Art_1",
                "subdomain": "Art",
                "question_type": "multiple-choice",
                "answer": "A",
                "parsed_pred": [each],
            }
            for each in "AB"
        ],
        "mmbench_en_dev_static": [
            {
                "index": 1,
                "question": "?",
                "answer": "A",
                "prediction": each,
                "hint": "nan",
                "source": "s",
                "split": "dev",
            }
            | {"category": "c", "L2-category": "d", "A": "one", "B": "two", "C": "nan", "D": "nan", "E": "nan"}
            for each in "AB"
        ],
        "longvideobench_val_v": [
            {"id": 1, "duration_group": 15, "question_category": "S2E", "answer": "A", "parsed_pred": each}
            for each in "AB"
        ],
    }
    assert set(said) == {each.task for each in KNOWN.values() if each.alone}
    manager = task_manager(list(said))
    for task, answers in said.items():
        each, metric = KNOWN[task], str(KNOWN[task].metric)
        try:
            config = utils.load_yaml_config(manager.task_index[task]["yaml_path"], mode="full")
        except ImportError as error:  # a package for videos
            assert task == "longvideobench_val_v", error
            continue
        aggregate = next(m["aggregation"] for m in config["metric_list"] if m["metric"] == metric)
        stand_in = SimpleNamespace(aggregation=lambda found={metric: aggregate}: found)
        alone = _score_alone(stand_in, metric, each)
        assert [alone(answer) for answer in answers] == [100.0, 0.0], task


def test_what_a_judge_says_is_of_its_own_scale():
    assert _score_alone(None, "gpt_eval_score", KNOWN["mmvet"])({"score": 4}) is None
