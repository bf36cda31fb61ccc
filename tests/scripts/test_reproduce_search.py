"""The script of the search's table, from a model to its files, and its arithmetic."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
from PIL import Image


pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce_search.py"
specification = importlib.util.spec_from_file_location("reproduce_search", SCRIPT)
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


def test_from_model_to_table(tmp_path, monkeypatch):
    arguments = ["--questions", 3, "--samples", 2, "--rounds", 2, "--num-layers", 8, "--batch", 1]
    monkeypatch.setattr("sys.argv", ["x", *map(str, arguments), "--output", str(tmp_path / "x")])
    script.main()
    results = json.loads((tmp_path / "x.json").read_text())
    rows = {(row["group"], row["name"]): row for row in results["rows"]}
    dense, frozen, found = rows["", "dense"], rows["N = 8", "LC, 8 of 12 layers"], rows["N = 8", "search"]
    assert dense["kl"] == pytest.approx(0, abs=1e-6) and dense["flops_ratio"] == dense["speed_up"] == 1
    assert found["flops_ratio"] <= frozen["flops_ratio"] + 0.01 and len(frozen["shortv_layers"]) == 8
    assert {"vtw", "fastv", "random", "downsample"} <= {name for _, name in rows}
    assert {"search", "LC", "VTW", "fastv", "random"} <= set(results["curves"]) == set(results["flops_at"])
    assert (tmp_path / "x.md").read_text().count("\n") > len(rows) + 4
    Image.open(tmp_path / "x.png").verify()


def test_paired_p_value():
    """Against the sign test's tables: 0 of 3 gives 0.25, 1 of 8 gives 0.0703."""
    right, wrong = [True], [False]
    assert script.mcnemar(right * 9, right * 6 + wrong * 3) == pytest.approx(0.25)
    assert script.mcnemar(right * 7 + wrong, wrong * 7 + right) == pytest.approx(0.0703, abs=1e-4)
    assert script.mcnemar(right * 4, right * 4) == 1


def test_flops_at_a_kl():
    points = [(20.0, 0.1, 0), (30.0, 0.2, 0), (40.0, 0.001, 0), (50.0, 0.0, 0)]
    assert script.flops_at(points, 0.01) == pytest.approx(30)  # half way, by the logarithm; 30 % is beaten
    assert script.flops_at(points, 0.2) == 20 and script.flops_at(points, 1e-4) == 50
    assert script.flops_at([(20.0, 0.1, 0)], 0.01) is None
    assert not math.isnan(script.flops_at(points, 0.05))
