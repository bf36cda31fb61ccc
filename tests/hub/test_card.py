"""Model cards: valid metadata, figures that come from the data, refusals."""

import json
from pathlib import Path

import pytest
from helpers import make_config
from huggingface_hub import ModelCard

from shortv_hf import ShortVLlavaConfig, ShortVLlavaOnevisionConfig
from shortv_hf.hub.card import demo_card, reference_card, with_repo_id


pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "hub_configs" / "shortv-llava-1.5-7b-hf"
LOADED = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}


def test_metadata_of_the_papers_models():
    for folder in (ROOT / "hub_configs").glob("shortv-llava-*"):
        data = ModelCard.load(folder / "README.md").data.to_dict()
        assert data.items() >= {**LOADED, "license": "llama2", "base_model_relation": "finetune"}.items()
        assert data["base_model"] == json.loads((folder / "config.json").read_text())["base_model_name_or_path"]
        assert data["datasets"] == ["lmms-lab/GQA", "lmms-lab/flickr30k"] and "shortv" in data["tags"]


def test_the_papers_results_go_with_the_papers_layers_only():
    config = ShortVLlavaConfig.from_pretrained(FOLDER)
    paper = str(reference_card(config, "x", license="llama2", of_the_paper=True))
    assert "Reported by the paper" in paper and "| GQA | 61.9 | 60.9 |" in paper and "1.30×" in paper
    assert "This project has measured neither speed nor quality" in paper and "55.2%" in paper
    own = str(reference_card(config, "x"))
    assert (
        "commit `b234b804b114d9e37bb655e11cbbb5f5e971b7a9`" in own
        and "Reported" not in own
        and "datasets" not in own
        and "license:" not in own
    )
    config.shortv_layers = [1, 2]
    with pytest.raises(ValueError, match="no results for llava-hf/llava-1.5-7b-hf with 2 of 32"):
        reference_card(config, "x", of_the_paper=True)


def test_where_the_weights_are():
    card = reference_card(make_config(), "x")
    assert "The weights are this repo's own." in str(card) and "base_model" not in card.data.to_dict()
    card = reference_card(make_config(), "x", base="/home/me/llava")
    assert "unchanged copy of those of a checkpoint in a local directory" in str(card) and "/home/me" not in str(card)
    assert "base_model" not in card.data.to_dict()


def test_measured_results_are_quoted_with_their_conditions(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_hub_configs

    row = {"model": "llava-1.5-7b", "batch": 1, "text_tokens": 64, "visual_tokens": 576, "mode": "compiled"}
    stages = {"prefill": {"speed_up": 1.754}, "time_to_first_token": {"speed_up": 1.62}}
    rows = [{**row, **stages, "method": f"ShortV N={n}"} for n in (4, 19)]
    rows += [{**rows[1], "model": "llava-next-7b"}, {**row, "method": "stock", "prefill": {"speed_up": 1.0}}]
    conditions = {"device": "some GPU", "dtype": "bfloat16", "torch": "2.13.0", "transformers": "5.23.0"}
    (tmp_path / "gpu.json").write_text(json.dumps({"conditions": conditions, "results": rows}))
    reports = make_hub_configs.measured("shortv-llava-1.5-7b-hf", tmp_path)
    assert [len(each["results"]) for each in reports] == [3]
    assert make_hub_configs.measured("shortv-llava-1.5-13b-hf", tmp_path) == []
    card = str(reference_card(ShortVLlavaConfig.from_pretrained(FOLDER), "x", measured=reports))
    line = "| some GPU, bfloat16, compiled, torch 2.13.0, Transformers 5.23.0 | 1, 64 + 576 | 1.75× | 1.62× |  |"
    assert line in card and card.count("some GPU") == 1
    assert "has measured neither" not in card


def test_examples_name_the_repo():
    card = str(reference_card(ShortVLlavaConfig.from_pretrained(FOLDER), "some-name.v1"))
    assert '"ORG/some-name.v1"' in card
    assert '"me/mine"' in with_repo_id(card, "me/mine") and "ORG/" not in with_repo_id(card, "me/mine")


def results(**changes):
    shares = {"overall": 0.95, "color": 1.0, "count": 0.9}
    accuracy = {"dense": shares, "shortv": {**shares, "overall": 0.94}, "all_frozen": {**shares, "overall": 0.125}}
    fields = {"questions": 1400, "frozen_layers": [3, 1], "accuracy": accuracy, "training": {"pictures": "48,000"}}
    return {**fields, **changes}


def test_demo_card():
    config = make_config(shortv_layers=[3, 1])
    card = demo_card(config, "shortv-shapes-demo", results())
    assert card.data.to_dict().items() >= {**LOADED, "license": "apache-2.0", "language": "en"}.items()
    assert "base_model" not in card.data.to_dict()
    text = str(card)
    assert "| overall | 95.0% | 94.0% | 12.5% |" in text and "| count | 90.0% | 90.0% | 90.0% |" in text
    assert "1400 held-out questions" in text and "- pictures: 48,000" in text and "2 of 4 frozen" in text


def test_demo_card_of_a_model_of_videos():
    text_config = {"model_type": "qwen2", "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    config = ShortVLlavaOnevisionConfig(text_config=text_config, shortv_layers=[3, 1])
    pictures = dict.fromkeys(("dense", "shortv", "all_frozen"), {"overall": 0.875})
    text = str(demo_card(config, "shortv-moving-shapes-demo", results(picture_accuracy=pictures)))
    assert "# A small LLaVA-OneVision" in text and "videos of moving shapes" in text
    assert "| overall | 95.0% | 94.0% | 12.5% |" in text and "| overall | 87.5% | 87.5% | 87.5% |" in text
    assert "load_video" in text and "load_image" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_layers": [1, 3]}, "results are of layers"),
        ({"picture_accuracy": {"dense": {"overall": 1}}}, "picture_accuracy"),
        ({"accuracy": {"dense": {"overall": 1}, "shortv": {"overall": 1}}}, "all_frozen"),
        ({"accuracy": dict.fromkeys(("dense", "shortv", "all_frozen"), {"overall": 95.0})}, "between 0 and 1"),
    ],
    ids=str,
)
def test_demo_card_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        demo_card(make_config(shortv_layers=[3, 1]), "x", results(**changes))
    incomplete = results()
    del incomplete["questions"]
    with pytest.raises(ValueError, match="lack 'questions'"):
        demo_card(make_config(shortv_layers=[3, 1]), "x", incomplete)
