"""The `shortv` command."""

from pathlib import Path

import pytest
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


def test_errors_are_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["shortv", "flops", "/no/such/model"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert str(stop.value.code).startswith("shortv: ") and "/no/such/model" in str(stop.value.code)
