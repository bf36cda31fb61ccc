"""The config classes: fields, validation, round trips, original checkpoints."""

import json

import numpy as np
import pytest
import torch
from helpers import FAMILIES, make_config, make_model, make_stock
from transformers import AutoConfig

from shortv_hf import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
from shortv_hf.configuration_shortv import frozen_text, frozen_updates


FAMILY = pytest.mark.parametrize("family", FAMILIES)


@FAMILY
def test_defaults(family):
    config = FAMILIES[family][0]()
    assert config.shortv_layers == [] and config.visual_reduction is None
    assert config.base_model_name_or_path is None and config.base_model_revision is None
    assert config.image_token_id == config.image_token_index
    assert config.model_type == f"shortv_{family}"
    assert config.text_config.num_hidden_layers == 32


@FAMILY
def test_round_trip(family, tmp_path):
    config = make_config(family, shortv_layers=[3, 0], base_model_name_or_path="org/base", base_model_revision="abc")
    config.save_pretrained(tmp_path)
    for again in (AutoConfig.from_pretrained(tmp_path), FAMILIES[family][0].from_pretrained(tmp_path)):
        assert type(again) is FAMILIES[family][0]
        assert again.shortv_layers == [3, 0]
        assert (again.base_model_name_or_path, again.base_model_revision) == ("org/base", "abc")
        assert again.text_config.to_dict() == config.text_config.to_dict()


@FAMILY
def test_auto_map_names_every_auto_class_of_both_lines(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert all((tmp_path / f"{value.split('.')[0]}.py").is_file() for value in saved.values())
    name = FAMILIES[family][1].__name__
    model_classes = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq")
    assert {saved[key] for key in model_classes} == {f"modeling_shortv.{name}"}
    assert saved["AutoConfig"] == f"configuration_shortv.{FAMILIES[family][0].__name__}"
    assert saved["AutoModel"] == f"modeling_shortv.{name.replace('ForConditionalGeneration', 'Model')}"


@FAMILY
def test_a_config_alone_names_no_code_that_is_not_there(family, tmp_path):
    config = make_config(family, shortv_layers=[2])
    config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).shortv_layers == [2]


@FAMILY
def test_original_checkpoint(family, tmp_path):
    make_stock(make_model(family)).config.save_pretrained(tmp_path)
    config = FAMILIES[family][0].from_pretrained(tmp_path, shortv_layers=[2])
    assert config.model_type == f"shortv_{family}"
    assert config.base_model_name_or_path == str(tmp_path)
    assert config.shortv_layers == [2]


def test_relative_directories_are_referenced_absolutely(tmp_path, monkeypatch):
    make_stock(make_model()).config.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert ShortVLlavaConfig.from_pretrained("base").base_model_name_or_path == str(tmp_path / "base")


def test_other_model_types_are_refused(tmp_path):
    make_config().text_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama'.*'shortv_llava'.*'llava'"):
        ShortVLlavaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], "4, which is out of range"),
        ([-1], "-1, which is out of range"),
        ([1, 2, 1], "1 twice"),
        ([1.0], "1.0, which is not an integer"),
        ([True], "True, which is not an integer"),
        (["3"], "'3', which is not an integer"),
        (["3.ffn"], "'3.ffn', which is not an integer"),
        (["03.mlp"], "'03.mlp', which is not an integer"),
        (["4.mlp"], "4.mlp, which is out of range"),
        ([1, "1.mlp"], "1.mlp twice, or beside a part of it"),
        (["1.mlp", 2, "1.mlp"], "1.mlp twice"),
        (["2.self_attn", 2], "2 twice, or beside a part of it"),
        ("3,1", "must be a list"),
        (3, "must be a list"),
    ],
    ids=str,
)
def test_bad_layers(layers, message):
    with pytest.raises(ValueError, match=message) as error:
        make_config(shortv_layers=layers)
    assert "0 to 3" in str(error.value)


@pytest.mark.parametrize("layers", [(2, 0), [2, 0], np.array([2, 0])], ids=str)
def test_layers_become_a_list_of_ints(layers):
    config = make_config(shortv_layers=layers)
    assert config.shortv_layers == [2, 0]
    assert all(type(layer) is int for layer in config.shortv_layers)


def test_halves_of_layers(tmp_path):
    layers = [3, "1.mlp", "0.self_attn", "0.mlp"]
    make_config(shortv_layers=layers).save_pretrained(tmp_path)
    assert ShortVLlavaConfig.from_pretrained(tmp_path).shortv_layers == layers
    assert frozen_updates(layers) == ({3, 0}, {3, 1, 0})
    assert frozen_text(layers, 4) == "2 of 4 layers and 1 half"
    assert [frozen_text(few, 4) for few in ([], ["1.mlp", "2.mlp"])] == ["0 of 4 layers", "0 of 4 layers and 2 halves"]


def test_configs_do_not_share_layers():
    one, other = ShortVLlavaConfig(), ShortVLlavaConfig()
    one.shortv_layers.append(3)
    assert other.shortv_layers == []


@pytest.mark.parametrize("reduction", [{"method": "nonsense"}, {}, "fastv"], ids=str)
def test_bad_reduction(reduction):
    with pytest.raises(ValueError, match="visual_reduction"):
        make_config(visual_reduction=reduction)


@pytest.mark.parametrize("layers", [[99], ["a"], [1, 1]], ids=str)
@pytest.mark.parametrize("auto", [False, True])
def test_overrides_are_validated(tmp_path, layers, auto):
    make_config().save_pretrained(tmp_path)
    load = (AutoConfig if auto else ShortVLlavaConfig).from_pretrained
    with pytest.raises(ValueError, match="0 to 3"):
        load(tmp_path, shortv_layers=layers)
    with pytest.raises(ValueError, match="visual_reduction"):
        load(tmp_path, visual_reduction={"method": "nonsense"})


def test_bad_fields_are_not_written(tmp_path):
    config = make_config()
    config.shortv_layers = [77]
    with pytest.raises(ValueError, match="77"):
        config.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},  # as 4.x writes it
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},  # as 5.x does
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}},
    ],
    ids=["4.x", "5.x", "4.x scaled", "5.x scaled"],
)
@pytest.mark.parametrize("original", [False, True])
def test_rotary_settings_of_either_line(tmp_path, rope, original):
    """A config written on one line means the same on the other."""
    make_config(text="mistral").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        raw["text_config"].pop(name, None)
    raw["text_config"] |= rope
    raw["text_config"]["model_type"] = "llama"
    if original:
        raw["model_type"] = "llava"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = ShortVLlavaConfig.from_pretrained(tmp_path)
    scaled = "linear" in str(rope)

    def frequencies(config):
        model = ShortVLlavaForConditionalGeneration(config)
        return model.model.language_model.rotary_emb.inv_freq

    expected = 1e6 ** -(torch.arange(0, 8, 2) / 8) / (4 if scaled else 1)
    torch.testing.assert_close(frequencies(config), expected)
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["text_config"]
    assert saved["rope_theta"] == 1e6 and bool(saved.get("rope_scaling")) == scaled  # what 4.x reads
    again = ShortVLlavaConfig.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(frequencies(again), expected)
