"""The repos of the paper's four models: complete, readable by both lines, of the right architecture."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from shortv_hf.hub import build_repo


ROOT = Path(__file__).parents[2]
CLIP = 303_507_456  # CLIP ViT-L/14 at 336 pixels
REPOS = {  # name: (parameters, layers of Table 8, base)
    "shortv-llava-1.5-7b-hf": (
        7_063_427_072,
        "31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19",
        "llava-hf/llava-1.5-7b-hf",
    ),
    "shortv-llava-1.5-13b-hf": (
        13_351_494_656,
        "39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17",
        "llava-hf/llava-1.5-13b-hf",
    ),
    "shortv-llava-v1.6-vicuna-7b-hf": (
        7_063_427_072 + 4096,  # image_newline
        "31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2",
        "llava-hf/llava-v1.6-vicuna-7b-hf",
    ),
    "shortv-llava-v1.6-vicuna-13b-hf": (
        13_351_494_656 + 5120,
        "39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2, 28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17",
        "llava-hf/llava-v1.6-vicuna-13b-hf",
    ),
}


def known_parameters(h, m, layers, vocabulary=32064):
    """Llama, CLIP and projector of LLaVA, from their definitions."""
    llama = layers * (4 * h * h + 3 * h * m + 2 * h) + 2 * vocabulary * h + h
    projector = (1024 * h + h) + (h * h + h)
    return llama + CLIP + projector


def test_known_parameters():
    assert known_parameters(4096, 11008, 32) == REPOS["shortv-llava-1.5-7b-hf"][0]
    assert known_parameters(5120, 13824, 40) == REPOS["shortv-llava-1.5-13b-hf"][0]


@pytest.mark.parametrize("name", REPOS)
def test_repo(name):
    folder = ROOT / "hub_configs" / name
    parameters, layers, base = REPOS[name]
    config = AutoConfig.from_pretrained(folder)
    assert config.shortv_layers == [int(layer) for layer in layers.split(",")]
    assert config.base_model_name_or_path == base
    assert re.fullmatch("[0-9a-f]{40}", config.base_model_revision)
    assert config.image_token_id == 32000 and config.pad_token_id == 32001
    assert config.dtype == torch.float16
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert type(model).__name__ == config.architectures[0]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.model.vision_tower.parameters()) == CLIP
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001}
    raw = json.loads((folder / "config.json").read_text())
    assert raw["auto_map"] == config.to_dict()["auto_map"]
    assert len(raw["auto_map"]) == 5


@pytest.mark.parametrize("name", REPOS)
def test_repo_can_be_built_from_it(name, tmp_path):
    config = AutoConfig.from_pretrained(ROOT / "hub_configs" / name)
    again = AutoConfig.from_pretrained(build_repo(config, tmp_path))
    for field in ("shortv_layers", "base_model_name_or_path", "base_model_revision"):
        assert getattr(again, field) == getattr(config, field)


def test_script_writes_what_is_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_hub_configs

    monkeypatch.setattr(sys, "argv", ["make_hub_configs.py", "--output", str(tmp_path)])
    make_hub_configs.main()
    for name in REPOS:
        for file in ("config.json", "generation_config.json", "README.md"):
            assert (tmp_path / name / file).read_text() == (ROOT / "hub_configs" / name / file).read_text()
        assert_same_picture(tmp_path / name / make_hub_configs.PICTURE, name)


def assert_same_picture(file: Path, repo: str):
    """As the committed one, apart from the font, which depends on Pillow's version."""
    committed = ROOT / "hub_configs" / repo / file.name
    small = [Image.open(each).resize((200, 80), Image.Resampling.BOX).convert("RGB") for each in (file, committed)]
    one, other = (torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() for picture in small)
    assert (one - other).abs().mean() < 3, f"{committed} is out of date"


@pytest.mark.parametrize("name", ["shortv-shapes-demo", "shortv-moving-shapes-demo"])
def test_card_of_a_demonstration_model_is_what_the_script_writes(name, tmp_path, monkeypatch):
    folder = ROOT / "hub_configs" / name
    if not (folder / "results.json").is_file():
        pytest.skip("the demonstration model is not there yet")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_hub_configs

    copy = tmp_path / folder.name
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix in (".json", ".png"):
            (copy / file.name).write_bytes(file.read_bytes())
    make_hub_configs.write_demo_card(copy)
    assert (copy / "README.md").read_text() == (folder / "README.md").read_text()
    assert_same_picture(copy / make_hub_configs.PICTURE, folder.name)
