"""Everything that keeps a cache: decoding, chat turns, chunked prefill, beams, assisted decoding, other cache kinds."""

import copy

import pytest
import torch
import transformers
from helpers import (
    FAMILIES,
    IMAGE_TOKEN,
    discard_updates,
    make_images,
    make_inputs,
    make_model,
    make_stock,
    reference_forward,
    solo_inputs,
)
from transformers import DynamicCache

from shortv_hf.upstream import CACHE, find_cache, used_image_features


ROWS = ["ttItt", "tItIttt", "tttt"]
FAMILY = pytest.mark.parametrize("family", FAMILIES)
TEXT = pytest.mark.parametrize("text", ["llama", "mistral_sliding", "qwen2_sliding"])
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
LAYERS = [0, 2, 3]


def greedy(model, inputs, n=6, **kwargs):
    """Greedy tokens; never an image token, which a random model may well answer and no model accepts back."""
    options = {"do_sample": False, "suppress_tokens": [IMAGE_TOKEN], "eos_token_id": -1, **kwargs}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=n, **options)


@FAMILY
@TEXT
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_cached_equals_uncached(family, text, attn):
    model = make_model(family, text, attn, shortv_layers=LAYERS)
    inputs = make_inputs(model, ROWS)
    cached = greedy(model, inputs)
    assert torch.equal(cached, greedy(model, inputs, use_cache=False))


@FAMILY
@TEXT
def test_cached_step_logits_equal_the_reference(family, text):
    model = make_model(family, text, shortv_layers=LAYERS)
    stock = make_stock(model)
    inputs = make_inputs(model, ["ttItt"])
    cache = DynamicCache(config=model.config)
    tokens = [7, 8, 9]
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        for i, token in enumerate(tokens):
            step = model(input_ids=torch.tensor([[token]]), **{CACHE: cache})
            new = torch.tensor([tokens[: i + 1]])
            full = {
                **inputs,
                "input_ids": torch.cat([inputs["input_ids"], new], 1),
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1),
            }
            expected = reference_forward(stock, LAYERS, full)
            torch.testing.assert_close(step.logits[:, -1], expected.logits[:, -1], **TOLERANCE)


@FAMILY
def test_batch_generates_what_solo_rows_do(family):
    model = make_model(family, shortv_layers=LAYERS)
    inputs = make_inputs(model, ROWS)
    batch = greedy(model, inputs)[:, -6:]
    for i in range(len(ROWS)):
        assert torch.equal(batch[i : i + 1], greedy(model, solo_inputs(inputs, ROWS, i))[:, -6:])


def split_images(inputs, rows_before):
    return {
        name: (inputs[name][:rows_before], inputs[name][rows_before:])
        for name in ("pixel_values", "image_sizes")
        if name in inputs
    }


@FAMILY
@TEXT
@pytest.mark.parametrize("second", ["ttt", "tIt", "It"])
def test_second_turn_on_a_kept_cache(family, text, second):
    """A chunk of several tokens on a filled cache, with or without an image of its own."""
    model = make_model(family, text, shortv_layers=LAYERS)
    first = "tItt"
    whole = make_inputs(model, [first + second])
    n_first = make_inputs(model, [first])["input_ids"].shape[1]
    images = split_images(whole, 1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(**whole).logits
        turn = {name: parts[0] for name, parts in images.items()}
        one = model(input_ids=whole["input_ids"][:, :n_first], **{CACHE: cache}, **turn).logits
        turn = {name: parts[1] for name, parts in images.items()} if "I" in second else {}
        two = model(
            input_ids=whole["input_ids"][:, n_first:],
            attention_mask=whole["attention_mask"],
            **{CACHE: cache},
            **turn,
        ).logits
    torch.testing.assert_close(torch.cat([one, two], 1), expected, **TOLERANCE)


def test_second_turn_in_a_padded_batch():
    model = make_model(shortv_layers=LAYERS)
    rows, more = ["ttItt", "tt"], "tIt"
    inputs = make_inputs(model, rows)
    turn = make_inputs(model, [more, more], seed=3)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        mask = torch.cat([inputs["attention_mask"], turn["attention_mask"]], 1)
        batch = model(**{**turn, "attention_mask": mask}, **{CACHE: cache}).logits
        for i in range(2):
            cache = DynamicCache(config=model.config)
            model(**solo_inputs(inputs, rows, i), **{CACHE: cache})
            solo = solo_inputs(turn, [more, more], i)
            solo.pop("attention_mask")
            torch.testing.assert_close(batch[i : i + 1], model(**solo, **{CACHE: cache}).logits, **TOLERANCE)


@FAMILY
def test_generate_continues_a_kept_cache(family):
    model = make_model(family, shortv_layers=LAYERS)
    inputs = make_inputs(model, ["ttItt"])
    first = greedy(model, inputs, 3, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kept = greedy(model, turn, 4, **{CACHE: find_cache(first)})
    fresh = greedy(model, {**inputs, **turn}, 4)
    assert torch.equal(kept, fresh)


@TEXT
@pytest.mark.parametrize("cuts", [(3, 9), (9,), (2, 18), (1, 2, 10, 20)], ids=str)
def test_chunked_prefill(text, cuts):
    """Chunks that begin and end anywhere, also inside the image: embeddings with their part of the visual mask."""
    model = make_model("llava", text, shortv_layers=LAYERS)
    inputs = make_inputs(model, ["ttItttt"])
    visual_mask = inputs["input_ids"] == IMAGE_TOKEN
    with torch.no_grad():
        output = model(**inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[visual_mask] = used_image_features(output)
        cache = DynamicCache(config=model.config)
        logits = []
        for start, end in zip((0, *cuts), (*cuts, embeds.shape[1]), strict=True):
            chunk = {"inputs_embeds": embeds[:, start:end], "visual_mask": visual_mask[:, start:end]}
            logits.append(model(**chunk, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(logits, 1), output.logits, **TOLERANCE)


@pytest.mark.parametrize("text", ["llama", "mistral_sliding"])
@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("padded", [False, True])
def test_chunked_prefill_of_a_batch(text, step, padded):
    """Chunks in which one row is visual and another is text, down to one token."""
    model = make_model("llava", text, shortv_layers=LAYERS)
    inputs = make_inputs(model, ["tIttttt", "tttIt" if padded else "ttttItt"])
    visual_mask = inputs["input_ids"] == IMAGE_TOKEN
    with torch.no_grad():
        output = model(**inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[visual_mask] = used_image_features(output)
        cache, logits = DynamicCache(config=model.config), []
        for start in range(0, embeds.shape[1], step):
            end = start + step
            chunk = {"inputs_embeds": embeds[:, start:end], "visual_mask": visual_mask[:, start:end]}
            if padded:
                chunk["attention_mask"] = inputs["attention_mask"][:, :end]
                positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
                chunk["position_ids"] = positions[:, start:end]
            logits.append(model(**chunk, **{CACHE: cache}).logits)
        if padded:
            output = model(**inputs, position_ids=positions)
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(logits, 1)[keep], output.logits[keep], **TOLERANCE)


def unless_stock_fails(expected, make):
    """`make()`, or skip the test if it raises or differs from `expected`: stock LLaVA cannot do it on this version."""
    try:
        same = torch.equal(make(), expected)
    except Exception as error:
        pytest.skip(f"stock Transformers {transformers.__version__} raises {type(error).__name__}")
    if not same:
        pytest.skip(f"stock Transformers {transformers.__version__} gives another answer")


@FAMILY
@TEXT
def test_chunked_prefill_of_generate(family, text):
    model = make_model(family, text, shortv_layers=LAYERS)
    stock = make_stock(model)
    inputs = make_inputs(model, ["ttItttt"])
    unless_stock_fails(greedy(stock, inputs), lambda: greedy(stock, inputs, prefill_chunk_size=5))
    assert torch.equal(greedy(model, inputs, prefill_chunk_size=5), greedy(model, inputs))


@FAMILY
def test_beam_search(family):
    model = make_model(family, shortv_layers=LAYERS)
    inputs = make_inputs(model, ROWS)
    with discard_updates(make_stock(model), LAYERS, inputs["input_ids"] == IMAGE_TOKEN) as reference:
        expected = greedy(reference, inputs, num_beams=3)
    beams = greedy(model, inputs, num_beams=3)
    assert torch.equal(beams, expected)
    for i in range(len(ROWS)):  # with the images of each row
        solo = greedy(model, solo_inputs(inputs, ROWS, i), num_beams=3)
        assert torch.equal(beams[i : i + 1, -6:], solo[:, -6:])


@FAMILY
def test_prompt_lookup_decoding(family):
    model = make_model(family, shortv_layers=LAYERS)
    inputs = make_inputs(model, ["ttItttttt"])
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, -5:-3]  # there are candidates from the first step on
    assert torch.equal(greedy(model, inputs, prompt_lookup_num_tokens=3), greedy(model, inputs))


def test_candidates_that_are_image_tokens():
    """Prompt lookup can propose image tokens. They hold no features: they are text, and no error."""
    model = make_model(shortv_layers=LAYERS)
    stock = make_stock(model)
    inputs = make_inputs(model, ["ttItt"])
    chunk = torch.tensor([[5, IMAGE_TOKEN, IMAGE_TOKEN]])
    logits = []
    for each in (model, stock):
        cache = DynamicCache(config=each.config)
        with torch.no_grad(), discard_updates(stock, LAYERS, inputs["input_ids"] == IMAGE_TOKEN):
            each(**inputs, **{CACHE: cache})
            logits.append(each(input_ids=chunk, **{CACHE: cache}).logits)
    torch.testing.assert_close(*logits, **TOLERANCE)


@FAMILY
@TEXT
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_static_cache(family, text, attn):
    model = make_model(family, text, attn, shortv_layers=LAYERS)
    stock = make_stock(model)
    inputs = make_inputs(model, ROWS)
    for some in (inputs, solo_inputs(inputs, ROWS, 0)):
        unless_stock_fails(greedy(stock, some), lambda some=some: greedy(stock, some, cache_implementation="static"))
        assert torch.equal(greedy(model, some, cache_implementation="static"), greedy(model, some))


def test_quantized_cache():
    pytest.importorskip("optimum.quanto")
    model = make_model(shortv_layers=LAYERS)
    stock = make_stock(model)
    inputs = make_inputs(model, ["ttItt"])
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4}
    options = {"cache_implementation": "quantized", "cache_config": config}
    with discard_updates(stock, LAYERS, inputs["input_ids"] == IMAGE_TOKEN):
        expected = greedy(stock, inputs, **options)
    assert torch.equal(greedy(model, inputs, **options), expected)
    model.set_shortv_layers([])
    assert torch.equal(greedy(model, inputs, **options), greedy(stock, inputs, **options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the offloaded cache needs an accelerator")
def test_offloaded_cache():
    model = make_model(shortv_layers=LAYERS)
    inputs = {name: value.cuda() for name, value in make_inputs(model, ["ttItt"]).items()}
    model.cuda()
    assert torch.equal(greedy(model, inputs, cache_implementation="offloaded"), greedy(model, inputs))


def test_switching_layers_between_calls():
    model = make_model(shortv_layers=LAYERS)
    inputs = make_inputs(model, ["ttItt"])
    frozen = greedy(model, inputs)
    model.set_shortv_layers([])
    assert torch.equal(greedy(model, inputs), greedy(make_stock(model), inputs))
    model.set_shortv_layers(LAYERS)
    assert torch.equal(greedy(model, inputs), frozen)


@FAMILY
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_one_vision_tower_call_per_generate(family, options):
    model = make_model(family, shortv_layers=LAYERS)
    inputs = make_inputs(model, ["ttItt"])
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    greedy(model, inputs, **options)
    assert len(calls) == 1


@FAMILY
@pytest.mark.parametrize(
    "arguments", [{"vision_feature_layer": 1}, {"vision_feature_select_strategy": "full"}], ids=str
)
def test_arguments_of_the_vision_tower_reach_it(family, arguments):
    """5.24 hands `get_image_features` those that it finds in its signature, and drops the others."""
    if family == "llava_next" and "vision_feature_select_strategy" in arguments:
        pytest.skip("upstream cannot pack tiles with a CLS token")
    model = make_model(family)
    inputs = make_inputs(model, ["ttItt"])
    if "vision_feature_select_strategy" in arguments:
        inputs["input_ids"] = torch.tensor([[5] + [IMAGE_TOKEN] * 17 + [6]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"return_dict_in_generate": True, "output_logits": True, "n": 1}
    found = greedy(model, inputs, **options, **arguments).logits[0]
    torch.testing.assert_close(found, greedy(make_stock(model), inputs, **options, **arguments).logits[0], **TOLERANCE)
    if "vision_feature_layer" in arguments:
        assert not torch.allclose(found, greedy(model, inputs, **options).logits[0], **TOLERANCE)


def test_padding_is_skipped_in_generate_only():
    """A row without an image beside one with: its padding is most of it."""
    model = make_model(shortv_layers=[1])
    inputs = make_inputs(model, ["ttItt", "ttt"])
    lengths = []
    norm = model.model.language_model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    greedy(model, inputs, 1)
    with torch.no_grad():
        model(**inputs)
    assert lengths == [4, 20]


def test_decoding_builds_no_plan(monkeypatch):
    """What a decoding step costs beyond stock is the check that there is nothing to freeze."""
    import shortv_hf.modeling_shortv as modeling

    built = []
    build = modeling.Plan.build
    monkeypatch.setattr(modeling.Plan, "build", lambda *args, **kwargs: built.append(1) or build(*args, **kwargs))
    model = make_model(shortv_layers=LAYERS)
    greedy(model, make_inputs(model, ["ttItt"]), 6)
    assert len(built) == 1


def test_deepcopy_keeps_its_own_layers():
    model = make_model(shortv_layers=LAYERS)
    other = copy.deepcopy(model)
    other.set_shortv_layers([])
    assert model.config.shortv_layers == LAYERS
    images = make_images(model.config, 1)
    assert torch.equal(other.get_image_features(**images)[0][0], model.get_image_features(**images)[0][0])
