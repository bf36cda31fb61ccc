"""The `shortv` command."""

import json
from pathlib import Path

import pytest
import torch
from helpers import make_model
from processor_files import write_processor
from test_base_weights import write_checkpoint
from transformers import AutoModelForImageTextToText


typer_testing = pytest.importorskip("typer.testing")
from shortv_hf import cli  # noqa: E402


HUB_CONFIGS = Path(__file__).parent.parent / "hub_configs"


def invoke(*arguments):
    return typer_testing.CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_flops():
    result = invoke("flops", HUB_CONFIGS / "shortv-llava-1.5-7b-hf")
    assert result.exit_code == 0
    assert "8.504" in result.output and "4.694" in result.output and "55.2%" in result.output


def test_flops_of_other_layers():
    result = invoke("flops", HUB_CONFIGS / "shortv-llava-v1.6-vicuna-7b-hf", "--layers", "1,2", "-v", "2880")
    assert result.exit_code == 0 and "2 of 32" in result.output
    result = invoke("flops", HUB_CONFIGS / "shortv-llava-v1.6-vicuna-7b-hf")
    assert "42.675" in result.output and "21.560" in result.output  # v = 2880 by default


def test_build_repo(tmp_path):
    base = write_checkpoint(tmp_path / "base", make_model())
    write_processor(base)
    result = invoke("build-repo", base, "--layers", "3,1", "--output", tmp_path / "repo")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "repo" / "tokenizer.json").is_file()
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "repo").config.shortv_layers == [3, 1]


@pytest.mark.parametrize(
    ("layers", "message"), [("9", "out of range"), ("1,1", "twice"), ("one", "separated by commas")], ids=str
)
def test_bad_layers(tmp_path, layers, message):
    base = write_checkpoint(tmp_path / "base", make_model())
    result = invoke("build-repo", base, "--layers", layers, "--output", tmp_path / "repo")
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
    assert not (tmp_path / "repo").exists()


def test_build_repo_refuses_what_it_cannot_reference(tmp_path):
    base = write_checkpoint(tmp_path / "base", make_model())
    before = (base / "config.json").read_text()
    result = invoke("build-repo", base, "--layers", "1", "--output", base)
    assert "the checkpoint itself" in str(result.exception) and (base / "config.json").read_text() == before
    make_model().save_pretrained(tmp_path / "own")
    result = invoke("build-repo", tmp_path / "own", "--layers", "1", "--output", tmp_path / "repo")
    assert "holds its own weights" in str(result.exception) and not (tmp_path / "repo").exists()


def write_ranking(file, order, n_layers=4):
    content = {"order": order, "scores": [0.1] * len(order), "model": {"num_hidden_layers": n_layers}}
    file.write_text(json.dumps(content))
    return file


def test_build_repo_from_a_ranking(tmp_path):
    base = write_checkpoint(tmp_path / "base", make_model())
    ranking = write_ranking(tmp_path / "ranking.json", [3, 1, 0, 2])
    result = invoke("build-repo", base, "--ranking", ranking, "--num-layers", 2, "--output", tmp_path / "repo")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "repo" / "config.json").read_text())["shortv_layers"] == [3, 1]
    assert "frozen in 2 of 4 layers" in (tmp_path / "repo" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranking", "good.json"], "--num-layers"),
        (["--ranking", "good.json", "--num-layers", "5"], "cannot freeze 5 layers"),
        (["--ranking", "other.json", "--num-layers", "2"], "a model with 6 layers; this one has 4"),
        (["--ranking", "broken.json", "--num-layers", "2"], "broken.json is not a ranking"),
        (["--ranking", "good.json", "--num-layers", "2", "--layers", "1"], "either --layers, or --ranking"),
        (["--layers", "1", "--base-revision", "main"], "has no revisions"),
        ([], "either --layers, or --ranking"),
    ],
    ids=str,
)
def test_build_repo_refuses_options(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", make_model())
    write_ranking(tmp_path / "good.json", [3, 1, 0, 2])
    write_ranking(tmp_path / "other.json", [3, 1, 0, 2, 4, 5], n_layers=6)
    (tmp_path / "broken.json").write_text("[]")
    result = invoke("build-repo", "base", *arguments, "--output", "repo")
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
    assert not (tmp_path / "repo").exists()


def test_build_repo_with_weights(tmp_path):
    """The files are copied as they are; the base is not needed any more."""
    base = write_processor(write_checkpoint(tmp_path / "base", make_model(), shards=2))
    (base / "README.md").write_text("---\nlicense: mit\n---\nA base.\n")
    result = invoke("build-repo", base, "--layers", "1", "--include-weights", "--output", tmp_path / "repo")
    assert result.exit_code == 0, result.output
    for file in base.glob("*.safetensors*"):
        assert (tmp_path / "repo" / file.name).read_bytes() == file.read_bytes()
    base.rename(tmp_path / "gone")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "repo")
    assert model.config.base_model_name_or_path is None and model.config.shortv_layers == [1]
    expected = make_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "license: mit" in card and "unchanged copy" in card


def test_errors_are_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["shortv", "flops", "/no/such/model"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert str(stop.value.code).startswith("shortv: ") and "/no/such/model" in str(stop.value.code)
