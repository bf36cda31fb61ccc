"""`scripts/check_vllm.py` and `load_vllm.py`, as far as they go without vLLM: their models, and how they judge."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


pytestmark = pytest.mark.once
pytest.importorskip("openai")
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """A script as a module, in the environment that is there."""
    monkeypatch.setenv("SHORTV_ON_VLLM", "1")
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module
    for name in ("check_vllm", "load_vllm"):
        sys.modules.pop(name, None)


REFERENCE = [
    {"prompt": [1, 2, 3], "new": [4, 5], "logprobs": [-1.0, -2.0]},
    {"prompt": [1], "new": [6], "logprobs": []},
]


def result(i: int, **changes) -> dict:
    return {**REFERENCE[i], "cached": 0, **changes}


@pytest.mark.parametrize(
    "changes, equal",
    [
        ({}, 4),
        ({"logprobs": None, "cached": 64}, 4),
        ({"logprobs": [-1.0, -2.0001]}, 4),
        ({"logprobs": [-1.0, -2.01]}, 3),
        ({"logprobs": [-1.0]}, 3),
        ({"new": [4, 6]}, 3),
        ({"prompt": [1, 2, 4]}, 3),
    ],
)
def test_an_answer_is_equal_or_not(script, changes, equal):
    given = [result(0), result(1), result(0, **changes), result(1)]
    found = script("check_vllm").compare(given, REFERENCE, exact=True)
    assert (found["answers"], found["equal"]) == (4, equal)
    assert found["answers_from_cache"] == bool(changes.get("cached"))


def test_a_configuration_is_judged_by_its_answers(script, tmp_path, monkeypatch):
    """Equal, for a control different, and none at all are a failure; in bfloat16 the stock configuration before is the measure."""
    check_vllm = script("check_vllm")
    monkeypatch.setattr(check_vllm, "make", lambda name, folder: folder)
    monkeypatch.setattr(check_vllm, "answers", lambda *arguments: REFERENCE)
    check = check_vllm.Check(tmp_path)

    def right(results, **fields):
        check.engine = lambda job, variables: results
        return check.row(check_vllm.Configuration("any", **fields))["right"]

    same, other = [result(0), result(1)], [result(0, new=[9, 9]), result(1)]
    assert right(same) and not right(other) and not right([])
    assert right(other, differs=True) and not right(same, differs=True)
    rough = {"options": {"dtype": "bfloat16"}}
    assert right([result(0, logprobs=[-1.0, -2.1]), result(1)], repo="stock", **rough)
    assert right([result(0, logprobs=[-1.0, -2.19], new=[4, 6]), result(1)], **rough)
    assert not right([result(0, logprobs=[-1.0, -2.21]), result(1)], **rough)


def test_rows_of_earlier_runs_stay(script, tmp_path, monkeypatch):
    check_vllm = script("check_vllm")
    monkeypatch.setattr(check_vllm, "versions", lambda: {"vllm": "1"})
    row = {
        "answers": 4,
        "max_logprob_difference": 0.0,
        "answers_from_cache": 0,
        "control": False,
        "right": True,
        "seconds": 1,
    }
    output = tmp_path / "table.json"

    def names():
        return {found["name"]: found["equal"] for found in json.loads(output.read_text())["rows"]}

    check_vllm.write(output, "cpu", [{**row, "name": "compiled", "equal": 4}])
    check_vllm.write(output, "cpu", [{**row, "name": "stock vLLM, dense", "equal": 4}])
    check_vllm.write(output, "cpu", [{**row, "name": "compiled", "equal": 3}])
    assert names() == {"stock vLLM, dense": 4, "compiled": 3} and list(names())[0] == "stock vLLM, dense"
    assert "| compiled | 3 of 4 |" in output.with_suffix(".md").read_text()
    monkeypatch.setattr(check_vllm, "versions", lambda: {"vllm": "2"})
    check_vllm.write(output, "cpu", [{**row, "name": "compiled", "equal": 2}])
    assert names() == {"compiled": 2}


def test_configurations_are_told_apart_by_name(script):
    check_vllm = script("check_vllm")
    for configurations in (check_vllm.CPU, check_vllm.cuda()):
        assert len({each.name for each in configurations}) == len(configurations)


def test_the_models_repos_have_one_set_of_weights(script, tmp_path):
    """The small repo that references the stock one answers as the one with weights, and not as the dense model."""
    models, cases = script("on_vllm.models"), script("on_vllm.cases")
    folder = models.make("LLaVA-1.5, Llama", tmp_path)
    assert not list((folder / "reference").glob("*.safetensors"))
    assert json.loads((folder / "stock" / "config.json").read_text())["model_type"] == "llava"
    own, referenced, dense = (
        cases.answers(folder / repo, "<image>", layers)
        for repo, layers in (("shortv", None), ("reference", None), ("shortv", []))
    )
    assert own == referenced and own != dense
    assert len(own) == sum(map(len, cases.batches("<image>"))) and all(
        len(each["new"]) == cases.NEW_TOKENS for each in own
    )


def test_ratios_are_medians_over_rounds(script):
    def measured(first, rate):
        return {"first_token_s": first, "per_token_s": 1.0, "requests_per_s": rate}

    rows = [
        {"concurrency": 2, "stock": measured(first, 1.0), "shortv": measured(1.0, rate)}
        for first, rate in ((1.5, 1.2), (1.7, 1.3), (9.0, 9.0))
    ]
    rows.append({"concurrency": 1, "stock": measured(0.1, 1.0), "shortv": measured(1.0, 1.0)})
    found = script("load_vllm").ratio(rows, 2)
    assert found == {"concurrency": 2, "first_token_s": 1.7, "per_token_s": 1.0, "requests_per_s": 1.3}


def test_a_torchvision_for_cuda_is_worked_around(script, tmp_path, monkeypatch):
    """The script begins anew, with a file that declares the operators before torchvision asks for them."""
    environment = script("on_vllm.environment")
    monkeypatch.delenv("SHORTV_ON_VLLM")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(environment.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    became = []
    monkeypatch.setattr(environment.os, "execve", lambda *arguments: became.append(arguments))
    for problem, written in (
        ("operator torchvision::nms does not exist", True),
        ("No module named 'torchvision'", False),
    ):
        monkeypatch.setattr(
            environment.subprocess, "run", lambda *_, stderr=problem, **__: SimpleNamespace(stderr=stderr)
        )
        environment.enter()
        program, command, variables = became[-1]
        assert program == command[0] == sys.executable and command[1:] == sys.argv
        assert variables["SHORTV_ON_VLLM"] == "1" and variables["OMP_NUM_THREADS"] == "3"
        assert variables["PYTHONPATH"].startswith(f"{tmp_path}:") == written
    compile((tmp_path / "sitecustomize.py").read_text(), "sitecustomize.py", "exec")
