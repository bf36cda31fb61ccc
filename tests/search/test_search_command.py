"""`shortv search`, the repo that it writes, and several processes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import make_model
from PIL import Image
from processor_files import write_processor
from test_base_weights import write_checkpoint
from transformers import AutoModelForImageTextToText

from shortv_hf.hub.check import check_repo
from shortv_hf.layer_contribution import LayerRanking
from shortv_hf.search import SearchResult
from shortv_hf.search.report import cells, describe, options_of


typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("matplotlib")
from shortv_hf import cli  # noqa: E402


def invoke(*arguments):
    return typer_testing.CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    base = write_checkpoint(folder / "base", make_model())
    write_processor(base)
    data = folder / "data"
    data.mkdir()
    for number in range(4):
        Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(data / f"{number}.png")
    lines = [json.dumps({"image": f"{number}.png", "prompt": f"w{number + 3} w2"}) for number in range(4)]
    (data / "prompts.jsonl").write_text("\n".join(lines))
    return base, ["--data", str(data), "--samples", "4", "--finalists", "6"]


@pytest.fixture(scope="module")
def found(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    result = invoke(
        "search", base[0], *base[1], "--flops-ratio", 0.6, "--output", folder / "out", "--output-repo", folder / "repo"
    )
    assert result.exit_code == 0, result.output
    return folder, SearchResult.load(folder / "out" / "search.json"), result.output


def test_what_it_writes(base, found):
    folder, result, printed = found
    Image.open(folder / "out" / "search.png").verify()
    assert result.samples == {"choosing": 2, "judging": 2} and result.best.flops_ratio <= 0.6
    assert result.command.startswith("shortv") and result.data["name"] == "data, 4 each, seed 0"
    assert options_of(result.best) in printed.replace("\n", "")
    table = cells(result)
    assert [row[0] for row in table].count(">") == 1
    model = AutoModelForImageTextToText.from_pretrained(folder / "repo")
    assert model.config.shortv_layers == result.best.shortv_layers
    assert model.config.visual_reduction == result.best.visual_reduction
    assert model.config.base_model_name_or_path == str(base[0])
    assert SearchResult.load(folder / "repo" / "search.json") == replace(result, command=None)  # it names paths
    card = (folder / "repo" / "README.md").read_text()
    assert "## How the schedule was chosen" in card and describe(result.best, 4) in card and "(search.png)" in card


def test_the_repo_is_checked(found, tmp_path):
    folder, result, _ = found
    notes = {check.name: check for check in check_repo(folder / "repo", None, "cpu")}
    assert notes["search"].problem is None and "2 samples judged" in notes["search"].note
    config = json.loads((folder / "repo" / "config.json").read_text())
    changed = tmp_path / "changed"
    invoke("build-repo", config["base_model_name_or_path"], "--layers", "0,1,2", "--output", changed)
    (changed / "search.json").write_text((folder / "repo" / "search.json").read_text())
    assert (
        "no row of the search does"
        in {check.name: check for check in check_repo(changed, None, "cpu")}["search"].problem
    )


def test_the_repo_is_a_new_one(base, found):
    """Before anything is measured."""
    folder, _, _ = found
    refused = invoke(
        "search", base[0], *base[1], "--max-kl", 1, "--output", folder / "new", "--output-repo", folder / "repo"
    )
    assert f"{folder / 'repo'} is not empty" in str(refused.exception) and not (folder / "new").exists()


def test_options_are_those_of_other_commands(found):
    """What is printed can be passed on."""
    _, result, _ = found
    row = next(row for row in result.rows if row.shortv_layers and row.visual_reduction)
    printed = invoke("flops", *options_of(row).split(), "-t", 64, "-v", 576).output
    assert f"ShortV + {row.visual_reduction['method']}" in printed


def test_another_budget_needs_no_new_passes(base, found, tmp_path, monkeypatch):
    folder, result, _ = found
    again = ["search", base[0], *base[1], "--max-kl", 1000, "--output", folder / "out"]
    refused = invoke(*again)
    assert "is not empty" in str(refused.exception)  # a result is replaced only when that is asked for
    monkeypatch.setattr("shortv_hf.search.run.isolated", None)
    replaced = invoke(*again, "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    changed = SearchResult.load(folder / "out" / "search.json")
    assert changed.budget == {"max_kl": 1000} and changed.best == changed.rows[0]
    result.save(folder / "out" / "search.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-kl", 1, "--flops-ratio", 0.5], "max_kl and flops_ratio exclude each other"),
        (["--output-repo", "repo"], "--output-repo needs --max-kl or --flops-ratio"),
        (["--parts", "layer,head"], "parts is"),
        (["--max-kl", 1, "--output", "repo/out", "--output-repo", "repo"], "is inside --output-repo"),
        (["--samples", 1], "a search needs 2 samples with visual tokens or more"),
    ],
)
def test_bad_options(base, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(option) for option in options]
    result = invoke("search", base[0], *base[1][:2], *arguments)
    assert message in str(result.exception)
    assert not any(tmp_path.glob("*/search.json"))


def test_nothing_within_the_budget(base, tmp_path):
    result = invoke("search", base[0], *base[1], "--flops-ratio", 0.01, "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert "no schedule is within --flops-ratio 0.01; the least that was measured is" in " ".join(
        result.output.split()
    )
    assert SearchResult.load(tmp_path / "out" / "search.json").best is None
    more = ["--output", tmp_path / "out", "--overwrite", "--output-repo", tmp_path / "repo"]
    assert invoke("search", base[0], *base[1], "--flops-ratio", 0.01, *more).exit_code == 1
    assert not (tmp_path / "repo").exists()


@pytest.mark.once
@pytest.mark.parametrize("command", ["lc", "search"])
def test_several_processes_are_one(base, found, tmp_path, command):
    """Each takes its share of the samples."""
    folder, expected, _ = found
    options = ["--metric", "greedy", "--max-kl", "1000"] if command == "lc" else ["--flops-ratio", "0.6", *base[1][4:]]
    arguments = [command, str(base[0]), *base[1][:4], *options]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "shortv_hf.cli"]
    done = subprocess.run([*launch, *arguments, "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if command == "search":
        shared = SearchResult.load(tmp_path / "out" / "search.json")
        assert len(list((tmp_path / "out" / "progress").glob("choosing.*.jsonl"))) == 2
        assert [row.settings for row in shared.rows] == [row.settings for row in expected.rows]
        for one, other in zip(shared.rows + shared.baselines, expected.rows + expected.baselines, strict=True):
            assert one.sample_kl == pytest.approx(other.sample_kl, abs=1e-6)
        return
    alone = invoke(*arguments, "--output", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    shared, ranking = (LayerRanking.load(tmp_path / name / "ranking.json") for name in ("out", "alone"))
    assert shared.order == ranking.order and shared.data == ranking.data
    torch.testing.assert_close(torch.tensor(shared.scores), torch.tensor(ranking.scores), atol=1e-6, rtol=1e-4)
