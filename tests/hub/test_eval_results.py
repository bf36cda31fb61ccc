"""Scores in a repo: the file, the card's table, and that they are of the repo as it is."""

import json

import pytest
import yaml
from helpers import make_config

from shortv_hf.hub import build_repo, eval_results
from shortv_hf.hub.card import UNMEASURED
from shortv_hf.hub.check import check_files
from shortv_hf.hub.publish import plan_publication


pytestmark = pytest.mark.once
LAYERS = [3, 1]


def report(config, **changes):
    own = eval_results.settings_of(config)
    rows = [
        {"task": task, "title": title, "method": method, "metric": "exact_match", "score": score, "answered": 100}
        | {"data_set": data_set, "figures": {"flops_ratio": 0.55}}
        | {"difference": -1.25, "error": 0.5}
        for task, title, data_set in (("gqa", "GQA", "lmms-lab-encoder/GQA"), ("shapes", "shapes", "json"))
        for method, score in (("dense", 61.9), ("ShortV N=2", 60.65))
    ]
    conditions = {"methods": {"dense": {"shortv_layers": [], "visual_reduction": None}, "ShortV N=2": own}}
    conditions |= {"limit": None, "dtype": "float32", "batch_size": 8, "lmms_eval": "0.7.3"}
    conditions |= {"shortv_hf": "1", "transformers": "5", "torch": "2"}
    return {"conditions": {**conditions, **changes}, "results": rows}


@pytest.fixture
def config():
    return make_config(shortv_layers=LAYERS)


@pytest.fixture
def repo(config, tmp_path):
    config.base_model_name_or_path, config.base_model_revision = "owner/base", "a" * 40
    return build_repo(config, tmp_path / "repo")


def test_the_hub_s_format(config, repo):
    eval_results.write(repo, eval_results.entries_of(report(config), repo, config, "2026-11-25"))
    entries = yaml.safe_load((repo / ".eval_results" / "shortv_eval.yaml").read_text())
    assert entries == eval_results.read(repo) and len(entries) == 2
    gqa, shapes = entries
    assert gqa["dataset"] == {"id": "lmms-lab-encoder/GQA", "task_id": "gqa"} and gqa["value"] == 60.65
    assert shapes["dataset"]["id"] == "shortv_hf/shapes" and gqa["date"] == "2026-11-25"
    for text in (
        "dense 61.9 in the same run",
        "-1.2 ± 0.5 points",
        "55.0%",
        "lmms_eval 0.7.3",
        '"shortv_layers": [3, 1]',
    ):
        assert text in gqa["notes"]
    api = pytest.importorskip("huggingface_hub._eval_results", reason="an older Hub library")
    parsed = api.parse_eval_result_entries(entries)
    assert [each.value for each in parsed] == [60.65, 60.65] and parsed[0].task_id == "gqa"


def test_the_card_has_one_table(config, repo):
    before = (repo / "README.md").read_text()
    for score in (1.0, 2.0):
        found = report(config)
        found["results"][1]["score"] = score
        eval_results.write(repo, eval_results.entries_of(found, repo, config, "2026-11-25"))
    card = (repo / "README.md").read_text()
    assert card.count("## Evaluation") == 1 and "| GQA | 2.0 | 2026-11-25 | 100 questions; dense 61.9" in card
    assert "settings:" not in card
    start, end = card.index(eval_results.START), card.index("## License and citation")
    assert "neither speed nor quality" in before and "neither speed nor quality" not in card
    said = "This project has not measured the speed of this model itself; its quality [below](#evaluation)."
    assert card[:start] + card[end:] == before.replace(UNMEASURED, said)


def test_an_author_s_own_sections_stay(config, repo):
    own = "# A card\n\n### Evaluation\n\nMine.\n\n## Evaluation\n\nMine too.\n\n## How to use\n\nSo.\n"
    entries = eval_results.entries_of(report(config), repo, config, "2026-11-25")
    once = eval_results.with_table(own, entries)
    assert once.startswith(own) and eval_results.with_table(once, entries) == once


def test_scores_of_other_tasks_are_kept(config, repo):
    found = report(config)
    for task in ("gqa", "shapes"):
        part = {**found, "results": [row for row in found["results"] if row["task"] == task]}
        eval_results.write(repo, eval_results.entries_of(part, repo, config, "2026-11-25"))
    assert [each["dataset"]["task_id"] for each in eval_results.read(repo)] == ["gqa", "shapes"]
    config.shortv_layers = [2]
    new = eval_results.entries_of(report(config), repo, config, "2026-11-26")[:1]
    eval_results.write(repo, new)  # those of other layers go
    assert eval_results.read(repo) == new


def test_a_repo_on_another_base_has_no_scores(config, repo, tmp_path):
    eval_results.write(repo, eval_results.entries_of(report(config), repo, config, "2026-11-25"))
    config.base_model_revision = "b" * 40
    build_repo(config, repo)
    assert "## Evaluation" not in (repo / "README.md").read_text()
    with pytest.raises(ValueError, match="was measured with"):
        eval_results.check(repo, config)
    config.base_model_name_or_path = config.base_model_revision = None
    (tmp_path / "model.safetensors").write_bytes(b"one")
    one = eval_results.identity_of(tmp_path, config)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert eval_results.identity_of(tmp_path, config) != one


def test_no_path_gets_out(config):
    found = report(config)
    for row in found["results"]:
        row["data_set"] = "/home/me/data"
    assert eval_results.entries_of(found, ".", config, "2026-11-25")[0]["dataset"]["id"] == "shortv_hf/gqa"


def test_a_repo_that_is_built_again_keeps_what_is_its_own(config, repo):
    eval_results.write(repo, eval_results.entries_of(report(config), repo, config, "2026-11-25"))
    card = (repo / "README.md").read_text()
    build_repo(config, repo)  # not refused: the card counts as unchanged
    assert (repo / "README.md").read_text() == card
    (check,) = [each for each in check_files(repo) if each.name == "evaluation"]
    assert check.problem is None and check.note == "2 scores"
    assert eval_results.FILE in plan_publication(repo, "me/repo", may_be_offline=True).contents
    config.shortv_layers = [1]
    build_repo(config, repo)
    assert "## Evaluation" not in (repo / "README.md").read_text()
    (check,) = [each for each in check_files(repo) if each.name == "evaluation"]
    assert "gqa was measured with" in check.problem
    with pytest.raises(ValueError, match="evaluation: .*evaluate again, or delete the file"):
        plan_publication(repo, "me/repo", may_be_offline=True)


def test_only_the_repo_as_it_is_set(config):
    config.shortv_layers = [2]
    with pytest.raises(ValueError, match="add --methods model"):
        eval_results.entries_of(report(make_config(shortv_layers=LAYERS)), ".", config, "2026-11-25")


@pytest.mark.parametrize(
    "content",
    [
        "- 1",
        "a: [",
        "- {dataset: {id: a}, value: 1}",
        "- {dataset: {id: a, task_id: b}, value: x}",
        "- {dataset: {id: a, task_id: b}, value: 1, notes: }",
    ],
)
def test_a_file_that_is_not_of_the_format(tmp_path, content):
    assert eval_results.read(tmp_path) == []
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results" / "shortv_eval.yaml").write_text(content)
    with pytest.raises(ValueError, match="is no list of results"):
        eval_results.read(tmp_path)


def test_first_questions_are_said(config):
    (entry, _) = eval_results.entries_of(report(config, limit=100), ".", config, "2026-11-25")
    assert "100 questions (the first)" in entry["notes"]
    assert json.loads(eval_results.SETTINGS.search(entry["notes"])[1])["visual_reduction"] is None
