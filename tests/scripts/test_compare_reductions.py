"""The comparison at matched FLOPs, from a repo to the table."""

import importlib.util
import json
from pathlib import Path

import pytest
from helpers import IMAGE_TOKEN, make_config
from processor_files import write_processor
from test_visual_reduction import reduced_model

from shortv_hf.flops import flops_ratio


pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_reductions.py"
specification = importlib.util.spec_from_file_location("compare_reductions", SCRIPT)
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_from_repo_to_table(family, tmp_path, monkeypatch, capsys):
    model = reduced_model(None, [3, 1], family)
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]
    model.save_pretrained(tmp_path / "repo")
    write_processor(tmp_path / "repo", family)
    arguments = ["compare", tmp_path / "repo", "--questions", 4, "--measured", 2, "--output", tmp_path / "table.json"]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    script.main()
    report = json.loads((tmp_path / "table.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["dense"]["kl_nats"] == 0 and rows["dense"]["flops_ratio"] == rows["dense"]["cache_ratio"] == 1
    assert rows["ShortV"]["cache_ratio"] == 1 and rows["ShortV"]["kl_nats"] > 0
    assert rows["ShortV"]["flops_ratio"] == pytest.approx(report["target_ratio"], abs=0.02)
    methods = {"fastv", "vtw", "vtc_cls", "random", "illava"}
    if family == "llava":
        methods |= {"prumerge", "prumerge_plus", "downsample"}
        assert rows["random"]["flops_ratio"] == pytest.approx(report["target_ratio"], abs=0.05)
    assert set(rows) == {"dense", "ShortV"} | methods | {f"ShortV + {method}" for method in methods}
    for method in methods:
        assert rows[f"ShortV + {method}"]["flops_ratio"] <= rows[method]["flops_ratio"]
    assert rows["fastv"]["cache_ratio"] < 1
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_matched_options():
    config = make_config()
    target = flops_ratio(20, 16, config, visual_reduction={"method": "fastv", "k": 2, "ratio": 0.5})
    found = script.matched("fastv", config, 20, 16, target)
    assert found == {"method": "fastv", "k": 2, "ratio": 0.5}
    assert script.matched("vtw", config, 20, 16, 1.0) == {"method": "vtw", "k": 4}
    assert script.matched("downsample", make_config("llava_next"), 20, 48, 0.5) is None
