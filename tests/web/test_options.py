"""The controls of every method: where they start the model can have them, if it can have the method at all."""

import pytest
from transformers import AutoConfig

from shortv_hf.configuration_shortv import validate_visual_reduction
from shortv_hf.hub.loading import demo_model
from shortv_hf.reduction import METHODS
from shortv_hf.web.options import ABOUT, NONE, options_of, read


pytestmark = pytest.mark.once
NOT_IN_BOTH = {"vtc_cls"}  # needs more layers of a tower than the smallest have


@pytest.fixture(scope="module")
def config():
    return AutoConfig.from_pretrained(demo_model())


def test_every_method_is_described():
    assert set(ABOUT) == {NONE, *METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_controls_start_where_the_model_can_follow(config, name):
    options = options_of(name, config)
    for option in options:
        assert option.low is None or option.low <= option.value <= option.high
    values = {option.name: option.text if option.low is None else option.value for option in options}
    assert validate_visual_reduction(read(name, values), config)["method"] == name


def test_what_can_be_varied_is_a_slider(config):
    ranges = {option.name: (option.low, option.high, option.step) for option in options_of("fastv", config)}
    assert ranges == {"k": (None, None, None), "ratio": (0.0, 1.0, 0.01)}
    (option,) = options_of("downsample", config)
    assert (option.low, option.high, option.step) == (1, 8, 1)


def test_given_options_are_the_start(config):
    given = {"method": "vtw", "k": 5}
    assert [option.value for option in options_of("vtw", config, given)] == [5]
    assert [option.value for option in options_of("random", config, given)] != [5]


def test_fields_are_read_as_json_or_as_text():
    assert read(NONE, {}) is None
    values = {"vit_k": "[0, 1]", "score": "lse", "vit_r": 14.0, "llm_k": " ", "llm_r": 0.5}
    assert read("illava", values) == {"method": "illava", "vit_k": [0, 1], "score": "lse", "vit_r": 14, "llm_r": 0.5}
    assert read("random", {"token_num": 1.0}) == {"method": "random", "token_num": 1}


def test_what_the_model_cannot_have_says_why(config):
    with pytest.raises(ValueError, match="factor is 3"):
        validate_visual_reduction(read("downsample", {"factor": 3}), config)
