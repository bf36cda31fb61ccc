"""The demonstration model that the repository carries: what it says of itself is true, and it answers."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from transformers import AutoProcessor

from shortv_hf import ShortVLlavaForConditionalGeneration
from shortv_hf.data import scoring as evaluation
from shortv_hf.data.sources import load_samples
from shortv_hf.hub import loading
from shortv_hf.layer_contribution import LayerRanking, rank_layers


FOLDER = Path(__file__).parents[2] / "hub_configs" / "shortv-shapes-demo"
RESULTS = json.loads((FOLDER / "results.json").read_text())
QUESTIONS = 350


@pytest.fixture(scope="module")
def demo():
    model = ShortVLlavaForConditionalGeneration.from_pretrained(FOLDER, dtype="float32")
    return model, AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def cases():
    return evaluation.held_out_cases(QUESTIONS)


def test_is_a_small_shortv_repo_with_its_own_weights(demo):
    model, _ = demo
    assert loading.demo_model() == str(FOLDER)
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16e6
    assert model.config.base_model_name_or_path is None
    assert model.config.text_config.num_hidden_layers >= 12 and model.config.image_seq_length >= 64


def test_results_are_good_enough_to_show():
    assert RESULTS["questions"] >= 1000
    assert RESULTS["accuracy"]["dense"]["overall"] >= 0.9
    assert RESULTS["accuracy"]["shortv"]["overall"] >= RESULTS["accuracy"]["dense"]["overall"] - 0.02


@pytest.mark.parametrize("variant", ["dense", "shortv", "all_frozen"])
def test_accuracy_is_the_stated_one(demo, cases, variant):
    """On a part of the held-out questions: within three standard errors of what the model card says."""
    model, processor = demo
    layers = {"dense": [], "shortv": RESULTS["frozen_layers"], "all_frozen": list(range(12))}[variant]
    with model.using(shortv_layers=layers):
        measured = evaluation.accuracy(evaluation.answer(model, processor, cases), cases)["overall"]
    stated = RESULTS["accuracy"][variant]["overall"]
    assert abs(measured - stated) <= 3 * (stated * (1 - stated) / QUESTIONS) ** 0.5


def test_frozen_layers_come_from_the_ranking(demo):
    model, processor = demo
    ranking = LayerRanking.load(FOLDER / "ranking.json")
    n = len(model.config.shortv_layers)
    assert model.config.shortv_layers == RESULTS["frozen_layers"] == ranking.layers(n) and n >= 6
    again = rank_layers(model, load_samples("shapes", processor, 20))
    assert again.order[0] == ranking.order[0] == 11  # what the last layer makes of visual tokens is read by nothing
    assert len(set(again.layers(n)) & set(ranking.layers(n))) >= n - 1 and again.order[-1] == ranking.order[-1]


def test_answers_about_a_picture_that_no_generator_made(demo):
    """A circle with an outline on a two-coloured background."""
    picture = Image.new("RGB", (300, 200), (250, 250, 250))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((200, 110, 280, 180), fill=(220, 30, 40), outline=(120, 0, 0), width=3)
    answers = evaluation.answer(
        *demo,
        [evaluation.Case((picture,), text) for text in ("What color is the circle?", "How many objects are there?")],
    )
    assert answers == ["red", "one"]
