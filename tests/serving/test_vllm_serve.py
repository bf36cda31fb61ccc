"""`shortv serve --engine vllm`: what it hands on to vLLM's server, and what it refuses before."""

import json
import os
import sys

import pytest

from shortv_hf.serving.vllm import serve as vllm_serve


typer_testing = pytest.importorskip("typer.testing")
pytestmark = pytest.mark.once


class Became(Exception):
    """Instead of the process becoming another."""


@pytest.fixture
def command(monkeypatch):
    """What `shortv serve` would become."""
    from shortv_hf.cli import app

    def become(program, command):
        raise Became(program, command)

    monkeypatch.setattr(os, "execv", become)
    monkeypatch.setattr(vllm_serve, "find_spec", lambda name: object())

    def run(*arguments):
        error = typer_testing.CliRunner().invoke(app, ["serve", *arguments]).exception
        if not isinstance(error, Became):
            raise error
        program, command = error.args
        assert program == command[0] == sys.executable
        return command[1:]

    return run


def repo(folder, model_type="shortv_llava", architecture="ShortVLlavaForConditionalGeneration"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    return str(folder)


def test_becomes_vllms_server(command, tmp_path):
    served = repo(tmp_path)
    server = ["-m", "vllm.entrypoints.openai.api_server", "--model", served]
    assert command(served, "--engine", "vllm") == server
    given = ["--port", "8080", "--tensor-parallel-size", "2"]
    assert command(served, "--engine", "vllm", "--revision", "v1", *given) == [*server, "--revision", "v1", *given]


def test_refuses_what_vllm_would_not_serve(command, tmp_path):
    with pytest.raises(ValueError, match="model_type 'llava', which is not ShortV's"):
        command(repo(tmp_path, "llava"), "--engine", "vllm")
    gemma = repo(tmp_path, "shortv_gemma3", "ShortVGemma3ForConditionalGeneration")
    with pytest.raises(ValueError, match="is a ShortVGemma3ForConditionalGeneration; on vLLM there are ShortVLlava"):
        command(gemma, "--engine", "vllm")


def test_says_what_is_missing(command, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_serve, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install '\.\[vllm\]'"):
        command(repo(tmp_path), "--engine", "vllm")
