"""The forward pass against the stock model, the simple reference, and itself in another batch."""

import logging

import pytest
import torch
import transformers
from helpers import (
    FAMILIES,
    IMAGE_TOKEN,
    N_LAYERS,
    TEXT_CONFIGS,
    discard_updates,
    make_config,
    make_inputs,
    make_model,
    make_stock,
    reference_forward,
    solo_inputs,
)
from helpers import TEXT as TEXT_FIELDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Cohere2Config

from shortv_hf.upstream import CACHE, find_cache, used_image_features


FAMILY = pytest.mark.parametrize("family", FAMILIES)
TEXT = pytest.mark.parametrize("text", TEXT_CONFIGS)
ATTENTION = pytest.mark.parametrize("attn", ["sdpa", "eager"])
LAYERS = pytest.mark.parametrize("layers", [[0], [3], [2, 1], [3, 1, 0, 2]], ids=str)
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
MIXED_ROWS = ["ttttt", "Itttt", "ttItttIt", "tttI"]


def close(actual, expected, **kwargs):
    torch.testing.assert_close(actual, expected, **{**TOLERANCE, **kwargs})


@FAMILY
@TEXT
@ATTENTION
class TestDense:
    def test_no_layers_is_bit_identical(self, family, text, attn):
        model = make_model(family, text, attn)
        stock = make_stock(model)
        inputs = make_inputs(model, ["ttItt", "ttt"])
        with torch.no_grad():
            actual, expected = model(**inputs), stock(**inputs)
            assert torch.equal(actual.logits, expected.logits)
            assert torch.equal(used_image_features(actual), used_image_features(expected))
            assert torch.equal(model.generate(**inputs, max_new_tokens=4), stock.generate(**inputs, max_new_tokens=4))

    def test_text_only_and_decoding_are_bit_identical_whatever_the_layers(self, family, text, attn):
        model = make_model(family, text, attn, shortv_layers=[0, 2])
        stock = make_stock(model)
        inputs = make_inputs(model, ["ttttt", "ttt"])
        with torch.no_grad():
            actual, expected = model(**inputs, use_cache=True), stock(**inputs, use_cache=True)
            assert torch.equal(actual.logits, expected.logits)
            step = {
                "input_ids": torch.tensor([[5], [6]]),
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1),
            }
            actual = model(**step, **{CACHE: find_cache(actual)})
            expected = stock(**step, **{CACHE: find_cache(expected)})
            assert torch.equal(actual.logits, expected.logits)


@FAMILY
@TEXT
@ATTENTION
@LAYERS
def test_equals_the_simple_reference(family, text, attn, layers):
    model = make_model(family, text, attn, shortv_layers=layers)
    stock = make_stock(model)
    inputs = make_inputs(model, ["ttIttttIttttttttttt"])
    with torch.no_grad():
        actual = model(**inputs, output_hidden_states=True)
        expected = reference_forward(stock, layers, inputs, output_hidden_states=True)
    close(actual.logits, expected.logits)
    for one, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
        close(one, other)
    for layer in range(N_LAYERS):
        for one, other in zip(cache_layer(actual, layer), cache_layer(expected, layer), strict=True):
            close(one, other)


def cache_layer(output, layer):
    cache = find_cache(output).layers[layer]
    return cache.keys, cache.values


def test_last_layer_does_not_matter():
    model = make_model(shortv_layers=[])
    inputs = make_inputs(model, ["ttIttt"])
    with torch.no_grad():
        dense = model(**inputs).logits[:, -1]
        model.set_shortv_layers([N_LAYERS - 1])
        close(model(**inputs).logits[:, -1], dense)
        model.set_shortv_layers([N_LAYERS - 2])
        assert (model(**inputs).logits[:, -1] - dense).abs().max() > 1e-3


def test_order_of_the_layers_is_kept_and_does_not_matter():
    model = make_model(shortv_layers=[2, 0])
    assert model.config.shortv_layers == [2, 0]
    inputs = make_inputs(model, ["ttIttt"])
    with torch.no_grad():
        logits = model(**inputs).logits
        model.set_shortv_layers([0, 2])
        assert torch.equal(model(**inputs).logits, logits)


@FAMILY
@TEXT
@ATTENTION
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padded_rows_equal_solo_rows(family, text, attn, padding_side):
    model = make_model(family, text, attn, shortv_layers=[0, 2, 3])
    inputs = make_inputs(model, MIXED_ROWS, padding_side)
    with torch.no_grad():
        batch = model(**inputs).logits
        for i in range(len(MIXED_ROWS)):
            solo = model(**solo_inputs(inputs, MIXED_ROWS, i)).logits[0]
            close(batch[i][inputs["attention_mask"][i].bool()], solo)


ROW = st.text("ttI", min_size=1, max_size=6).filter(lambda row: row.count("I") <= 2)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(ROW, min_size=1, max_size=3),
    layers=st.lists(st.integers(0, N_LAYERS - 1), unique=True),
    padding_side=st.sampled_from(["left", "right"]),
    attn=st.sampled_from(["sdpa", "eager"]),
)
def test_any_batch_equals_the_reference_row_by_row(rows, layers, padding_side, attn):
    model = make_model(attn=attn, shortv_layers=layers)
    stock = make_stock(model)
    inputs = make_inputs(model, rows, padding_side)
    with torch.no_grad():
        batch = model(**inputs).logits
        for i in range(len(rows)):
            solo = solo_inputs(inputs, rows, i)
            close(batch[i][inputs["attention_mask"][i].bool()], reference_forward(stock, layers, solo).logits[0])


def test_positions_and_4d_mask_are_honoured():
    model = make_model(shortv_layers=[0, 1])
    stock = make_stock(model)
    inputs = make_inputs(model, ["ttIttt"])
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.arange(length)[None] * 2 + 3
    allowed = torch.ones(length, length).tril().bool()
    allowed[:, 1] = False  # no one sees token 1
    allowed[1, 1] = True
    inputs["attention_mask"] = allowed[None, None]
    with torch.no_grad():
        close(model(**inputs).logits, reference_forward(stock, [0, 1], inputs).logits)


def test_packed_sequences_do_not_see_each_other():
    model = make_model(shortv_layers=[0, 2])
    rows = ["ttIttt", "tItt"]
    inputs = make_inputs(model, rows, "right")
    solos = [solo_inputs(inputs, rows, i) for i in range(2)]
    lengths = [solo["input_ids"].shape[1] for solo in solos]
    packed = {
        "input_ids": torch.cat([solo["input_ids"] for solo in solos], 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "pixel_values": inputs["pixel_values"],
    }
    with torch.no_grad():
        logits = model(**packed, use_cache=False).logits[0].split(lengths)
        for part, solo in zip(logits, solos, strict=True):
            close(part, model(**solo).logits[0])


@FAMILY
def test_inputs_embeds_with_visual_mask(family):
    model = make_model(family, shortv_layers=[0, 2])
    inputs = make_inputs(model, ["ttItt", "tItItt"])
    visual_mask = inputs["input_ids"] == IMAGE_TOKEN
    with torch.no_grad():
        expected = model(**inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[visual_mask] = used_image_features(expected)
        kept = {"attention_mask": inputs["attention_mask"], "inputs_embeds": embeds, "visual_mask": visual_mask}
        assert torch.equal(model(**kept).logits, expected.logits)
        new = model.generate(**kept, max_new_tokens=4)
        assert torch.equal(new, model.generate(**inputs, max_new_tokens=4)[:, -4:])
        assert torch.equal(new, model.generate(**kept, max_new_tokens=4, use_cache=False))


def test_inputs_embeds_with_pixel_values():
    model = make_model(shortv_layers=[0, 2])
    inputs = make_inputs(model, ["ttItt"])
    with torch.no_grad():
        expected = model(**inputs).logits
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.randn(1, 6, 32)}, "without `visual_mask`"),
        ({"input_ids": torch.tensor([[5, IMAGE_TOKEN, 6]])}, "no image features were passed"),
    ],
    ids=["embeds", "ids"],
)
def test_prompts_without_features_are_text_and_warn(inputs, message, caplog):
    model = make_model(shortv_layers=[0, 2])
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        logger.removeHandler(caplog.handler)
    assert torch.equal(logits, make_stock(model)(**inputs).logits)
    assert message in caplog.text


@FAMILY
def test_attentions_have_full_shape_and_zero_rows_at_frozen_tokens(family):
    model = make_model(family, attn="eager", shortv_layers=[1])
    stock = make_stock(model)
    inputs = make_inputs(model, ["ttItt", "tt"])
    with torch.no_grad():
        actual = model(**inputs, output_attentions=True).attentions
        expected = reference_forward(stock, [1], inputs, output_attentions=True).attentions
    batch, length = inputs["input_ids"].shape
    assert [tuple(a.shape) for a in actual] == [(batch, 4, length, length)] * N_LAYERS
    text = inputs["input_ids"] != IMAGE_TOKEN
    rows = text[:, None, :, None].expand_as(actual[1])
    close(actual[1][rows], expected[1][rows])
    assert not actual[1][~rows].any()


def test_output_tuple_and_loss():
    model = make_model(shortv_layers=[0, 1])
    stock = make_stock(model)
    inputs = make_inputs(model, ["ttItt"])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    with torch.no_grad():
        close(model(**inputs, labels=labels).loss, reference_forward(stock, [0, 1], {**inputs, "labels": labels}).loss)
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ATTENTION
def test_half_precision(dtype, attn):
    model = make_model(attn=attn, shortv_layers=[0, 1])
    inputs = make_inputs(model, ["ttItt", "tt"])
    with torch.no_grad():
        expected = model(**inputs).logits
        model.to(dtype)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        logits = model(**inputs).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    keep = inputs["attention_mask"].bool()
    assert (logits.float() - expected)[keep].norm() < 0.05 * expected[keep].norm()


class TestBadInput:
    @pytest.mark.parametrize("layers", [[0]], ids=str)
    def test_image_tokens_and_features_do_not_match(self, layers, monkeypatch):
        model = make_model(shortv_layers=layers)
        inputs = make_inputs(model, ["ttItt"])
        inputs["input_ids"][0, 2] = 5
        for switch in ("0", "1"):
            monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", switch)
            with pytest.raises(ValueError, match="15 image tokens.*16 features"):
                model(**inputs)

    def test_image_tokens_and_features_do_not_match_among_embeddings(self, monkeypatch):
        monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
        model = make_model(shortv_layers=[0])
        inputs = make_inputs(model, ["ttItt"])
        inputs["input_ids"][0, 2] = 5
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        with pytest.raises(ValueError, match="15 image tokens.*16 features"):
            model(**inputs)

    def test_layers_assigned_past_the_setter(self):
        model = make_model()
        model.config.shortv_layers = [77]
        with pytest.raises(ValueError, match="77.*0 to 3"):
            model(**make_inputs(model, ["ttItt"]))

    def test_visual_mask_shape(self):
        model = make_model(shortv_layers=[0])
        with pytest.raises(ValueError, match=r"\(1, 4\).*\(1, 6\)"):
            model(inputs_embeds=torch.randn(1, 6, 32), visual_mask=torch.ones(1, 4))

    @pytest.mark.parametrize("layers", [[4], [-1], [1, 1], [1.0], ["1"], [True], "1,2", 3, None], ids=str)
    def test_layers(self, layers):
        model = make_model(shortv_layers=[1, 2])
        with pytest.raises(ValueError, match="0 to 3"):
            model.set_shortv_layers(layers)
        assert model.config.shortv_layers == [1, 2]

    def test_reduction(self):
        model = make_model()
        with pytest.raises(ValueError, match="nonsense"):
            model.set_visual_reduction({"method": "nonsense"})
        assert model.config.visual_reduction is None

    def test_text_backbone(self):
        """Cohere2 looks like the others, and has layers without rotary embedding."""
        config = make_config()
        config.text_config = Cohere2Config(**TEXT_FIELDS, sliding_window=8)
        with pytest.raises(ValueError, match="cannot freeze tokens in Cohere2Model"):
            FAMILIES["llava"][1](config)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_padding_is_computed_as_the_reference_does(padding_side, attn):
    """Outside `generate`, whatever reads padding positions (a shifted loss reads the last one) gets the same."""
    model = make_model(attn=attn, shortv_layers=[0, 2])
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = torch.randn(32)
        stock = make_stock(model)
        inputs = make_inputs(model, MIXED_ROWS, padding_side)
        close(model(**inputs).logits, reference_forward(stock, [0, 2], inputs).logits)


def test_a_layer_that_promotes():
    """Sub-layers in a wider type, as some adapters and quantized layers are, promote the text as in stock models."""
    model = make_model(shortv_layers=[1]).to(torch.bfloat16)
    stock = make_stock(model).to(torch.bfloat16)
    inputs = make_inputs(model, ["ttItt"])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    for each in (model, stock):
        layer = each.model.language_model.layers[1]
        layer.mlp.register_forward_hook(lambda _, __, output: output.float())
        each.model.language_model.layers[2].to(torch.float32)
        each.model.language_model.layers[3].to(torch.float32)
        each.model.language_model.norm.to(torch.float32)
        each.lm_head.to(torch.float32)
    with torch.no_grad():
        assert model.model(**inputs).last_hidden_state.dtype == torch.float32


def test_same_seed_same_weights_as_stock():
    torch.manual_seed(0)
    model = FAMILIES["llava"][1](make_config())
    config = make_stock(model).config
    torch.manual_seed(0)
    stock = FAMILIES["llava"][2](config)
    for (name, one), (other_name, other) in zip(model.state_dict().items(), stock.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other)


def test_reference_discards_updates():
    """The reference itself: hidden states of visual tokens repeat through its frozen layers, and only there."""
    stock = make_stock(make_model())
    inputs = make_inputs(make_model(), ["ttItt"])
    visual = inputs["input_ids"] == IMAGE_TOKEN
    with torch.no_grad(), discard_updates(stock, [1], visual):
        hidden = stock(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[1][visual], hidden[2][visual])
    assert not torch.equal(hidden[1][~visual], hidden[2][~visual])
    assert not torch.equal(hidden[0][visual], hidden[1][visual])


@pytest.mark.skipif(not transformers.utils.is_flash_attn_2_available(), reason="FlashAttention is not installed")
@pytest.mark.parametrize("text", ["llama", "mistral_sliding", "qwen2_sliding"])
def test_flash_attention(text):
    """Dense layers run FlashAttention, frozen ones SDPA with the mask that stands for the same."""
    model = make_model("llava", text, shortv_layers=[0, 2, 3])
    inputs = {name: value.cuda() for name, value in make_inputs(model, MIXED_ROWS).items()}
    model.to("cuda", torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation({"text_config": "flash_attention_2"})
        actual = model(**inputs).logits
    keep = inputs["attention_mask"].bool()
    assert (actual - expected)[keep].norm() < 0.05 * expected[keep].norm()
