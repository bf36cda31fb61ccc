"""`shortv eval` and calibration on tasks: one run, resumed, refused, failing."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
from lmms_tasks import launch, write_tasks
from PIL import Image

from shortv_hf.data import scoring
from shortv_hf.data.sources import Samples, encode, load_cases
from shortv_hf.hub import load
from shortv_hf.hub.loading import demo_model
from shortv_hf.layer_contribution import rank_layers


pytest.importorskip("lmms_eval")
typer_testing = pytest.importorskip("typer.testing")
from shortv_hf import cli  # noqa: E402
from shortv_hf.evaluate import lmms_eval, run, tasks  # noqa: E402
from shortv_hf.evaluate.lmms_eval import ShortV  # noqa: E402
from shortv_hf.evaluate.run import EvaluationOptions, evaluate, methods_of  # noqa: E402


pytestmark = pytest.mark.once
FASTV = "fastv:k=2,ratio=0.5"


@pytest.fixture(autouse=True)
def cheap(tmp_path, monkeypatch):
    """A cache of its own, and one batch whose FLOPs are counted, which takes long."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lmms_eval, "ShortV", partial(ShortV, profiled_batches=1))


@pytest.fixture
def options(tmp_path):
    return EvaluationOptions(
        demo_model(),
        suites=("shapes",),
        methods=("shortv", f"shortv+{FASTV}"),
        limit=14,
        batch_size=5,
        device="cpu",
        dtype="float32",
        output=tmp_path / "out",
    )


def quiet(message):
    pass


def without_times(report):
    """Of a report what a second run has to repeat."""
    report = json.loads(json.dumps(report))
    for row in (*report["results"], *report["methods"]):
        for figures in (row, row.get("figures", {})):
            for name in (
                "first_token_s",
                "first_token_low_s",
                "first_token_high_s",
                "decode_tokens_per_s",
                "speed_up",
                "memory_mb",
                "memory_ratio",
            ):
                figures.pop(name, None)
    return report


def test_dense_and_methods_in_one_run(options, tmp_path):
    report = evaluate(options, quiet)
    model, processor = load(demo_model(), dtype="float32", device="cpu")
    cases = scoring.held_out_cases(14)
    dense, ours, both = report["results"]
    for row, settings in zip(report["results"], report["conditions"]["methods"].values(), strict=True):
        with model.using(**settings):
            answers = scoring.answer(model, processor, cases)
        assert row["score"] == pytest.approx(100 * scoring.accuracy(answers, cases)["overall"])
        (file,) = (tmp_path / "out" / "parts").glob(
            f"shapes--{row['method'].replace(' ', '_').replace(':', '_')}--*.json"
        )
        part = json.loads(file.read_text())
        assert list(part["answers"].values()) == answers
    assert [row["method"] for row in report["results"]] == ["dense", "ShortV N=8", f"ShortV N=8 + {FASTV}"]
    assert dense["difference"] == 0 and dense["figures"]["flops_ratio"] == 1
    assert 1 > ours["figures"]["flops_ratio"] > both["figures"]["flops_ratio"]
    assert both["figures"]["kv_ratio"] < ours["figures"]["kv_ratio"] == 1
    assert report["conditions"]["model"] == "shortv-shapes-demo" and not report["failed"]
    assert Image.open(tmp_path / "out" / "report.png").width > 800


@pytest.mark.parametrize("batches", [1, 3])
def test_a_run_that_broke_off_goes_on(options, tmp_path, monkeypatch, batches):
    """After any batch: nothing is asked twice, and the report is that of a run in one piece."""
    options = replace(options, methods=("shortv",), limit=9)
    whole = evaluate(replace(options, output=tmp_path / "whole"), quiet)
    answer, asked = ShortV._answer, []

    def breaking(self, requests, dialogues, profile):
        if len(asked) == batches:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return answer(self, requests, dialogues, profile)

    monkeypatch.setattr(ShortV, "_answer", breaking)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, quiet)
    journal = next((tmp_path / "out" / "answers").iterdir())
    journal.write_bytes(journal.read_bytes() + b'{"answers": {"shapes')  # half a line
    batches = 1000
    assert without_times(evaluate(options, quiet)) == without_times(whole)
    assert sum(asked) == 2 * 9
    assert without_times(evaluate(options, quiet)) == without_times(whole) and sum(asked) == 2 * 9


def test_other_settings_do_not_go_on(options):
    evaluate(replace(options, methods=("shortv",), limit=2), quiet)
    with pytest.raises(ValueError, match=r"holds a run of other settings \(limit: 2, now 3\)"):
        evaluate(replace(options, methods=("shortv",), limit=3), quiet)
    report = evaluate(replace(options, methods=("shortv",), limit=3, overwrite=True), quiet)
    assert report["results"][0]["answered"] == 3


def test_methods_and_tasks_can_be_added(options, tmp_path, monkeypatch):
    """What is there is not asked again; a method of the same name with other settings is another."""
    options = replace(options, methods=("shortv",), limit=2)
    evaluate(options, quiet)
    answer, asked = ShortV._answer, []

    def counting(self, requests, dialogues, profile):
        asked.append(len(requests))
        return answer(self, requests, dialogues, profile)

    monkeypatch.setattr(ShortV, "_answer", counting)
    tasks = write_tasks(tmp_path / "tasks", {"good": {}})
    report = evaluate(replace(options, methods=("shortv", FASTV)), quiet)
    assert [row["method"] for row in report["results"]] == ["dense", "ShortV N=8", FASTV] and sum(asked) == 2
    evaluate(replace(options, layers=(0, 1, 2, 3, 4, 5, 6, 7)), quiet)
    assert sum(asked) == 4 and len(list((tmp_path / "out" / "parts").iterdir())) == 4
    with pytest.raises(ValueError, match="run of other settings"):
        evaluate(replace(options, tasks=("good",), include_path=tasks), quiet)


def test_another_model_of_the_same_name_does_not_go_on(options, tmp_path):
    """Nor do changed tasks; copies of one model may."""
    for place in ("a", "b"):
        shutil.copytree(demo_model(), tmp_path / place / "model")
    written = write_tasks(tmp_path / "tasks", {"good": {}})
    asked = replace(
        options, model=str(tmp_path / "a" / "model"), suites=(), tasks=("good",), methods=("shortv",), limit=1,
        include_path=written,
    )  # fmt: skip
    before = evaluate(asked, quiet)
    assert "path" not in json.dumps(before["conditions"]).replace("include_path", "")
    with pytest.raises(ValueError, match=r"run of other settings \(include_path"):
        (written / "utils.py").write_text((written / "utils.py").read_text() + "\n")
        evaluate(asked, quiet)
    other = tmp_path / "b" / "model"
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"run of other settings \(files"):
        evaluate(replace(asked, model=str(other)), quiet)
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json: it is no JSON"):
        evaluate(asked, quiet)


def test_the_first_filter_counts(tmp_path, options):
    folder = write_tasks(tmp_path / "tasks", {"two": {}})
    filters = "filter_list:\n- name: first\n  filter:\n  - function: take_first\n"
    filters += "- name: loud\n  filter:\n  - function: uppercase\n  - function: take_first\n"
    (folder / "two.yaml").write_text((folder / "two.yaml").read_text() + filters)
    report = evaluate(
        replace(options, suites=(), tasks=("two",), methods=("shortv",), limit=3, include_path=folder), quiet
    )
    assert report["results"][0]["score"] == 1.0
    (file,) = (tmp_path / "out" / "parts").glob("two--dense--*.json")
    saved = json.loads(file.read_text())
    assert not any(answer.isupper() for answer in saved["answers"].values())


def test_what_fails_is_in_the_report_and_the_rest_is_done(options, tmp_path):
    ways = {"good": "mean", "bad": "fail", "sent": "uploaded", "sum": "remembering"}
    write_tasks(tmp_path / "tasks", {name: {"aggregation": way} for name, way in ways.items()})
    asked = replace(
        options,
        suites=(),
        tasks=tuple(ways),
        methods=("shortv",),
        limit=None,
        include_path=tmp_path / "tasks",
    )
    said = []
    report = evaluate(asked, said.append)
    assert [(each["task"], each["method"]) for each in report["failed"]] == [("bad", "dense"), ("bad", "ShortV N=8")]
    assert "this task cannot be scored" in report["failed"][0]["reason"]
    rows = {(row["task"], row["method"]): row for row in report["results"]}
    assert rows["good", "dense"]["questions"] == 4
    assert rows["sum", "dense"]["score"] == rows["sum", "ShortV N=8"]["score"] == 4  # not what was scored before, too
    assert (tmp_path / "out" / "upload.txt").read_text().count("\n") == 3
    assert rows["sent", "ShortV N=8"]["difference"] == rows["good", "ShortV N=8"]["difference"]
    result = invoke("eval", "--tasks", "bad", "--include-path", tmp_path / "tasks", "--output", tmp_path / "cli")
    assert result.exit_code == 1 and "failed: bad, dense: RuntimeError" in result.stdout


def test_what_cannot_be_scored_here_is_said_before_the_run(options, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(run, "_Run", None)  # no model, no data set
    judged = replace(options, tasks=("mmvet", "vqav2_test", "mmbench_en_dev"))
    message = "mmvet is scored by a judge.*vqav2_test is scored by its authors.*mmbench_en_dev.*judge.*--available"
    with pytest.raises(ValueError, match=message):
        evaluate(judged, quiet)
    with pytest.raises(ValueError, match="nothing is left to evaluate"):
        evaluate(replace(judged, suites=(), available=True), quiet)
    benchmarks, left_out = run.choose(replace(judged, available=True))
    assert [each.task for each in benchmarks] == ["shapes"] and len(left_out) == 3
    for wrong, message in (
        ({"tasks": ("shape",)}, "lmms-eval has no task 'shape'; close to it: shapes"),
        ({"suites": ()}, "name a --suite"),
        ({"limit": 0}, "--limit is 0"),
        ({"methods": ("slow",)}, "--methods takes shortv"),
        ({"methods": ("fastv:k=99",)}, "k is 99"),
        ({"device": "cuda:7"}, "device 'cuda:7' cannot be used"),
        ({"fps": -1.0}, "--fps is -1.0"),
        ({"layers": (12,)}, "shortv_layers holds 12, which is out of range; valid layer ids are the integers 0 to 11"),
        ({"include_path": options.output / "none"}, "there is no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(replace(options, **wrong), quiet)


def test_methods():
    model, _ = load(demo_model(), dtype="float32", device="cpu")
    config = model.config
    names = [each.name for each in methods_of(config, ("model", "shortv", "vtw", "shortv+fastv", FASTV))]
    assert names == ["dense", "ShortV N=8", "VTW", "ShortV N=8 + FastV", FASTV]
    assert methods_of(config, ("shortv",), (3, 1))[1].shortv_layers == (3, 1)
    config.visual_reduction = {"method": "fastv", "k": 2, "ratio": 0.5}
    assert methods_of(config, ("model",))[1].name == f"ShortV N=8 + {FASTV}"
    both = methods_of(config, ("model", f"shortv+{FASTV}"))  # the same, twice
    assert [each.name for each in both] == ["dense", f"ShortV N=8 + {FASTV}"]
    with pytest.raises(ValueError, match="token_num is 128; the valid range is the integers 1 to 64"):
        methods_of(config, ("random",))
    config.shortv_layers, config.visual_reduction = [], None
    for name in ("model", "shortv", "shortv+fastv"):
        with pytest.raises(ValueError, match="pass --layers"):
            methods_of(config, (name,))


def invoke(*arguments):
    return typer_testing.CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command(tmp_path):
    options = ["--limit", 7, "--batch-size", 7, "--dtype", "float32", "--device", "cpu", "--output", tmp_path / "out"]
    result = invoke("eval", *options, "--methods", "shortv", "--methods", "random:token_num=32")
    assert result.exit_code == 0, result.output
    for text in (
        "| ShortV N=8 | 55.",
        "| random:token_num=32 |",
        "difference to dense",
        f"{tmp_path / 'out'}: report.md, report.png",
    ):
        assert text in result.stdout
    result = invoke("eval", "/nonexistent", "--suite", "shapes")
    assert "no such directory: /nonexistent" in str(result.exception)


def test_two_processes(options, tmp_path):
    """They share the questions; the report is that of one; `--overwrite` clears the folder for both."""
    options = replace(options, methods=("model",), limit=5, batch_size=2)
    alone = evaluate(replace(options, output=tmp_path / "alone"), quiet)
    (made,) = (tmp_path / "alone" / "parts").glob("shapes--dense--*.json")
    stale = tmp_path / "out" / "parts" / made.name
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    command = ["eval", "--limit", "5", "--batch-size", "2", "--dtype", "float32", "--output", "out", "--overwrite"]
    done = launch(["-m", "shortv_hf.cli", *command], 2, tmp_path)
    assert done.returncode == 0 and "out: report.md" in done.stdout, done.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["conditions"]["processes"] == 2
    assert [row["score"] for row in report["results"]] == [row["score"] for row in alone["results"]]
    assert [row["answered"] for row in report["results"]] == [5, 5]
    assert len(list((tmp_path / "out" / "answers").iterdir())) == 4


def test_without_lmms_eval(monkeypatch, options):
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    with pytest.raises(ValueError, match=r"lmms-eval is needed: pip install '.\[eval\]'"):
        evaluate(options, quiet)


def test_calibration_on_a_task(tmp_path):
    """Seeded; each question about its own picture; the ranking is that of the same questions asked without lmms-eval."""
    model, processor = load(demo_model(), dtype="float32", device="cpu")
    found = list(load_cases("task:shapes", 5, seed=3))
    assert [case.prompt for case in found] == [case.prompt for case in load_cases("task:shapes", 5, seed=3)]
    assert [case.prompt for case in found] != [case.prompt for case in load_cases("task:shapes", 5, seed=4)]
    of = {(case.prompt, case.images[0].tobytes()): case.answer for case in scoring.held_out_cases(1400)}
    assert all(of[case.prompt, case.images[0].tobytes()] == case.answer for case in found)
    ranking = rank_layers(model, Samples("task:shapes", processor, 5, seed=3))
    assert ranking.scores == rank_layers(model, [encode(case, processor) for case in found]).scores
    output = tmp_path / "lc"
    result = invoke(
        "lc",
        "--data",
        "task:shapes,shapes",
        "--limit",
        2,
        "--num-layers",
        3,
        "--output",
        output,
        "--device",
        "cpu",
        "--no-text",
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.count("--cal_lc") == 1 and (output / "ranking.json").is_file()
    assert json.loads((output / "ranking.json").read_text())["data"]["samples"] == 4
    write_tasks(tmp_path / "tasks", {"pair": {"visual": "two"}, "heard": {"visual": "sound"}})
    (case,) = load_cases("task:pair", 1, include_path=tmp_path / "tasks")
    assert len(case.images) == 2 and "<image>" not in case.prompt and case.type == "pair"
    for name, n, message in (
        ("task:pair", 5, "task:pair has only 4 samples, 5 were asked for"),
        ("task:nothing", 1, "lmms-eval has no task 'nothing'"),
    ):
        with pytest.raises(ValueError, match=message):
            list(load_cases(name, n, include_path=tmp_path / "tasks"))


@pytest.mark.parametrize(
    ("path", "others"),
    [
        ("lmms-lab/GQA", ["lmms-lab-encoder/GQA", "lmms-eval/GQA"]),
        ("lmms-lab-encoder/GQA", ["lmms-lab/GQA"]),
        ("lmms-eval/VideoMME", ["lmms-lab/VideoMME"]),
        ("Lin-Chen/MMStar", []),
        ("parquet", []),
    ],
)
def test_names_of_data_sets(path, others, monkeypatch):
    import datasets

    assert tasks.other_names(path) == others
    asked = []

    def load_dataset(name, *args, **kwargs):
        asked.append(name)
        if len(asked) <= len(others):
            raise ConnectionError(f"no {name}")
        return kwargs

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with tasks.either_name_of_data_sets():
        assert datasets.load_dataset(path, split="test") == {"split": "test"}
    assert asked == [path, *others] and datasets.load_dataset is load_dataset
    asked.clear()
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **kwargs: (_ for _ in ()).throw(ConnectionError(name)))
    with tasks.either_name_of_data_sets(), pytest.raises(ConnectionError, match=path):
        datasets.load_dataset(path)
