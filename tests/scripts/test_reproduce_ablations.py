"""The ablation script, from a model to its table and charts."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from shortv_hf.hub import loading


pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce_ablations.py"
specification = importlib.util.spec_from_file_location("reproduce_ablations", SCRIPT)
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


@pytest.mark.parametrize("reduction", ["none", "vtw:k=6"])
def test_from_model_to_table(tmp_path, monkeypatch, reduction):
    arguments = ["--questions", 7, "--samples", 2, "--seeds", 1, "--every", 12, "--num-layers", 6]
    arguments = ["ablations", *arguments, "--reduction", reduction, "--output", tmp_path / "x"]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    script.main()
    results = json.loads((tmp_path / "x.json").read_text())
    assert set(results["curves"]) == {"LC", "greedy", "cosine", "random"}
    assert [row["N"] for row in results["curves"]["LC"]] == [0, 6, 12]
    last = {method: (rows[-1]["accuracy"], rows[-1]["kl"]) for method, rows in results["curves"].items()}
    assert len(set(last.values())) == 1  # all layers are all layers, whatever their order
    first = results["curves"]["LC"][0]["kl"]
    table = (tmp_path / "x.md").read_text()
    if reduction == "none":
        assert first == pytest.approx(0, abs=1e-6) and "(b) all tokens" in table
        assert (
            results["frozen_tokens"]["(b) all tokens"]["kl"] > results["frozen_tokens"]["visual tokens (ShortV)"]["kl"]
        )
    else:
        assert first > 1e-6 and "(b) all tokens" not in table
    for name in ("x.png", "x-layers.png"):
        Image.open(tmp_path / name).verify()


def test_committed_results_can_be_drawn_again(tmp_path, monkeypatch):
    """From JSON, where numbers of layers that are keys have become text."""
    charts = {}
    monkeypatch.setattr(script.plots, "plot_curves", lambda panels, *args: charts.update(panels))
    results = json.loads((SCRIPT.parent / "results" / "ablations-shapes-demo.json").read_text())
    script.draw(results, tmp_path / "x.png", tmp_path / "x-layers.png")
    assert len(charts) == 3
    for curves in charts.values():
        assert curves["LC"]["x"] == [row["N"] for row in results["curves"]["LC"]]
    Image.open(tmp_path / "x-layers.png").verify()


def test_random_tokens_are_as_many_as_the_visual_ones():
    """Table 7 (c): never padding, and other ones for another seed."""
    model, processor = loading.load(loading.demo_model(), [], "cpu", "float32")
    cases = script.evaluation.held_out_cases(3)
    measure = script.Measurement(model, processor, cases, 3)
    masks = []

    def keep(module, args, kwargs):
        if kwargs.get("visual_mask") is not None and kwargs["visual_mask"].shape[1] > 1:  # the prefill
            masks.append(kwargs["visual_mask"])

    model.register_forward_pre_hook(keep, with_kwargs=True)
    for seed in (0, 1):
        measure.random_tokens([0, 1], seed)
    (inputs,) = measure.batches
    assert len(masks) == 2 and not torch.equal(*masks)
    for mask in masks:
        assert mask.sum(1).tolist() == [64] * 3
        assert not (mask & (inputs["attention_mask"] == 0)).any()


def test_cases_are_split(tmp_path):
    lines = []
    for number in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": f"w{number}", "answer": "yes"}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    ranked, evaluated = script.split_cases(str(tmp_path), 2, 3)
    assert len(ranked) == 2 and len(evaluated) == 3
    assert not {case.prompt for case in ranked} & {case.prompt for case in evaluated}
    (tmp_path / "prompts.jsonl").write_text("\n".join(line.replace(', "answer": "yes"', "") for line in lines))
    with pytest.raises(ValueError, match="no answers"):
        script.split_cases(str(tmp_path), 2, 3)
