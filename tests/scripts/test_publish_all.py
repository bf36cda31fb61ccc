"""`scripts/publish_all.py` against a local Hub: one repo that references a base, one with its own weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_model
from hub_shell import hub_environment
from local_hub import LocalHub
from processor_files import write_processor

from shortv_hf.hub.build import code_files
from shortv_hf.hub.check import check_files


pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PAPER = "shortv-llava-1.5-7b-hf"
SCRIPT = """
import sys
sys.path.insert(0, "scripts")
import publish_all
configs = sys.argv[1]
for options in ([], ["--publish"], ["--publish"]):
    sys.argv = ["publish_all.py", "me", "--private", "--configs", configs, *options]
    publish_all.main()
    print("-" * 20)
"""


@pytest.fixture
def configs(tmp_path):
    folder = tmp_path / "configs"
    shutil.copytree(ROOT / "hub_configs" / PAPER, folder / PAPER)
    demo = folder / "demo"
    make_model(shortv_layers=[1]).save_pretrained(demo)
    write_processor(demo)
    for file in demo.glob("*.py"):  # the checkout carries configs and weights, not copies of the code
        file.unlink()
    return folder


def test_dry_run_publish_repeat(configs, tmp_path):
    reference = json.loads((configs / PAPER / "config.json").read_text())
    processor = write_processor(tmp_path / "processor")
    files = {file.name: file.read_bytes() for file in processor.iterdir()}
    with LocalHub() as hub:
        base, commit = reference["base_model_name_or_path"], reference["base_model_revision"]
        hub.repos[base] = {"commits": {commit: files}, "branches": {"main": commit}, "token": None}
        environment = {**os.environ, **hub_environment(hub, tmp_path / "home"), "HF_TOKEN": "secret"}
        command = [sys.executable, "-c", SCRIPT, str(configs)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
        assert result.returncode == 0, result.stderr
        dry, first, second = result.stdout.split("-" * 20)[:3]
        assert dry.count("create   the repo, private") == 2 and "nothing was changed" in dry
        assert first.count("is at    commit") == 2 and "add      modeling_shortv.py" in first
        assert "add " not in second and "update" not in second
        commits = [path for method, path, _ in hub.requests if method == "POST" and "/commit/" in path]
        assert commits == ["api/models/me/demo/commit/main", f"api/models/me/{PAPER}/commit/main"]
        for name in ("demo", PAPER):
            published = tmp_path / "published" / name
            published.mkdir(parents=True)
            for path, content in hub.files(f"me/{name}").items():
                (published / path).write_bytes(content)
            assert not [check for check in check_files(published) if check.problem]
            assert {file.name for file in code_files()} < set(hub.files(f"me/{name}"))
            assert (published / "config.json").read_bytes() == (configs / name / "config.json").read_bytes()
        paper = hub.files(f"me/{PAPER}")
        assert paper["tokenizer.json"] == files["tokenizer.json"] and f'"me/{PAPER}"'.encode() in paper["README.md"]
        assert "frozen_layers.png" in paper and not [name for name in paper if name.endswith(".safetensors")]
        assert "model.safetensors" in hub.files("me/demo")
