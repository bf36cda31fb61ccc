"""Token reduction against a simple reference, solo and in padded batches, cached and not, with and without ShortV."""

import pytest
import torch
import transformers
from helpers import (
    FAMILIES,
    IMAGE_TOKEN,
    N_LAYERS,
    discard_updates,
    make_config,
    make_images,
    make_inputs,
    make_model,
    make_stock,
    solo_inputs,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from illava_reference import merges_in_decoder, merging
from reduction_reference import fastv_kept, hidden_tokens, text_logits
from test_generation import unless_stock_fails
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shortv_hf.cache import KeptLayer
from shortv_hf.reduction import METHODS
from shortv_hf.rows import Tokens
from shortv_hf.upstream import CACHE, find_cache, image_features, used_image_features


DECODER = [
    {"method": "fastv", "k": 2, "ratio": 0.5},
    {"method": "fastv", "k": 1, "ratio": 0.8},
    {"method": "fastv", "k": 3, "ratio": 1.0},
    {"method": "vtw", "k": 1},
    {"method": "vtw", "k": 3},
]
SELECTING = [
    {"method": "vtc_cls", "layer": 0, "token_num": 5},
    {"method": "vtc_cls", "layer": -2, "token_num": 11},
    {"method": "random", "token_num": 6, "seed": 3},
]
MERGING = [{"method": "prumerge"}, {"method": "prumerge_plus"}, {"method": "downsample", "factor": 2}]
ILLAVA = [
    {"method": "illava", "vit_k": [], "llm_k": [1, 3], "llm_r": 0.6},
    {"method": "illava", "vit_k": [0, 1], "vit_r": 3, "llm_k": []},
    {"method": "illava", "vit_k": [1], "vit_r": 7, "llm_k": [2], "llm_r": 0.5},
]
ALL = DECODER + SELECTING + MERGING + ILLAVA
NEXT = DECODER + SELECTING + [ILLAVA[0], ILLAVA[2]]
ROWS = ["ttttt", "Itttt", "ttItttItt", "tttI"]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
LAYERS = [[], [0, 2, 3], [1], [1, "0.mlp", "2.self_attn"]]
TEXTS = ["llama", "mistral_sliding", "qwen2_sliding"]


def name(options):
    return "-".join(str(value) for value in options.values())


def looks_at_last_token(options):
    """Whether which tokens stay depends on the last one."""
    return options["method"] == "fastv" and options["ratio"] < 1 or bool(options.get("llm_k"))


METHOD = pytest.mark.parametrize("options", ALL, ids=name)
SHORTV = pytest.mark.parametrize("layers", LAYERS, ids=str)
TEXT = pytest.mark.parametrize("text", TEXTS)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def reduced_model(options, layers=(), family="llava", text="llama", attn="sdpa", **kwargs):
    """A tiny model whose vision tower is random enough for attention to differ between patches."""
    model = make_model(family, text, attn, shortv_layers=list(layers), **kwargs)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.model.vision_tower.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    model.set_visual_reduction(options)
    return model


def reference_of(model):
    """The stock model in eager, which hands out its attention."""
    stock = make_stock(model)
    stock.set_attn_implementation("eager")
    return stock


def greedy(model, inputs, n=5, **kwargs):
    options = {"do_sample": False, "suppress_tokens": [IMAGE_TOKEN], "eos_token_id": -1, **kwargs}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=n, **options)


def cache_lengths(cache):
    return [layer.keys.shape[-2] for layer in cache.layers]


def text_of(model, inputs, logits, i=0):
    """The logits of row i's text tokens."""
    ids, mask = inputs["input_ids"][i], inputs["attention_mask"][i].bool()
    return logits[i][mask & (ids != IMAGE_TOKEN)]


def attend_like_flash(module, query, key, value, attention_mask, scaling, dropout=0.0, position_ids=None, **kwargs):
    n, total = query.shape[2], key.shape[2]
    places = torch.arange(total)
    allowed = (places <= places[total - n :, None])[None, None]
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None].bool()
        allowed = allowed | ~allowed.any(-1, keepdim=True)  # padding that looks at nothing
    elif position_ids is not None and n == total and len(position_ids) == 1:
        sequence = (position_ids.diff(prepend=position_ids[:, :1]) != 1).cumsum(1)  # as flash-attention's packing
        allowed = allowed & (sequence[:, None, :, None] == sequence[:, None, None])
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed, scale=scaling)
    return output.transpose(1, 2), None


@pytest.fixture(scope="module")
def simulated_flash():
    ALL_ATTENTION_FUNCTIONS.register("simulated_flash", attend_like_flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("simulated_flash", flash_attention_mask)
    return "simulated_flash"


def two_turns_of_illava(stock, whole, n, options, layers=(0, 2)):
    """Logits of the last token, where the first n tokens were a turn of their own. One image in each."""
    visual, decoder = whole["input_ids"] == IMAGE_TOKEN, stock.model.language_model.layers
    places = visual[0].nonzero()[:, 0].tolist()
    merges = []
    for window, end in (([p for p in places if p < n], n), ([p for p in places if p >= n], visual.shape[1])):

        def attentions(end=end, before=tuple(merges)):
            given = {"input_ids": whole["input_ids"][:, :end], "pixel_values": whole["pixel_values"][: 1 + (end > n)]}
            with torch.no_grad(), discard_updates(stock, layers, visual[:, :end]), merging(decoder, before):
                return stock(**given, output_attentions=True).attentions

        merges += merges_in_decoder(attentions, decoder, [window], options, end - 1)
    with torch.no_grad(), discard_updates(stock, layers, visual), merging(decoder, merges):
        return stock(**whole).logits[0, -1]


def check_solo(model, inputs):
    """Prefill and cached steps of one row against the reference."""
    stock, new = reference_of(model), [7, 11, 5]
    options, layers = model.config.visual_reduction, model.config.shortv_layers
    expected = text_logits(stock, inputs, new, options, layers)
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        close(text_of(model, inputs, output.logits), expected[: -len(new)])
        for i, token in enumerate(new):
            step = model(input_ids=torch.tensor([[token]]), **{CACHE: find_cache(output)})
            close(step.logits[0, -1], expected[len(expected) - len(new) + i])


@METHOD
@SHORTV
@TEXT
def test_equals_the_simple_reference(options, layers, text):
    model = reduced_model(options, layers, text=text)
    check_solo(model, make_inputs(model, ["ttItttItt"]))


@pytest.mark.parametrize("options", NEXT, ids=name)
@pytest.mark.parametrize("layers", LAYERS[:2], ids=str)
def test_llava_next_equals_the_simple_reference(options, layers):
    model = reduced_model(options, layers, "llava_next")
    check_solo(model, make_inputs(model, ["ttItttItt"]))


@METHOD
@SHORTV
@pytest.mark.parametrize(
    ("text", "attn", "side"),
    [("llama", "sdpa", "left"), ("qwen2_sliding", "eager", "left"), ("mistral_sliding", "sdpa", "right")],
)
def test_padded_rows_equal_solo_rows(options, layers, text, attn, side):
    model = reduced_model(options, layers, text=text, attn=attn)
    inputs = make_inputs(model, ROWS, side)
    with torch.no_grad():
        batch = model(**inputs).logits
        for i in range(len(ROWS)):
            solo = solo_inputs(inputs, ROWS, i)
            close(text_of(model, inputs, batch, i), text_of(model, solo, model(**solo).logits))


@METHOD
@SHORTV
def test_generate(options, layers):
    """Batch and solo rows, cached; and uncached where the method does not look at the last token of what it is given."""
    model = reduced_model(options, layers)
    inputs = make_inputs(model, ROWS)
    batch = greedy(model, inputs)
    for i in range(len(ROWS)):
        assert torch.equal(batch[i : i + 1, -5:], greedy(model, solo_inputs(inputs, ROWS, i))[:, -5:])
    if not looks_at_last_token(options):
        assert torch.equal(batch, greedy(model, inputs, use_cache=False))


@pytest.mark.parametrize("options", NEXT, ids=name)
def test_generate_with_llava_next(options):
    model = reduced_model(options, [0, 2], "llava_next")
    inputs = make_inputs(model, ROWS)
    batch = greedy(model, inputs)
    for i in range(len(ROWS)):
        assert torch.equal(batch[i : i + 1, -5:], greedy(model, solo_inputs(inputs, ROWS, i))[:, -5:])


@SHORTV
def test_fastv_without_a_cache_chooses_at_every_step(layers):
    """As the authors' code does: the last token is another one each time."""
    model = reduced_model(DECODER[0], layers)
    inputs, stock = make_inputs(model, ["ttItttt"]), reference_of(model)
    ids = greedy(model, inputs, use_cache=False)
    n = inputs["input_ids"].shape[1]
    for i in range(5):
        chunk = {**inputs, "input_ids": ids[:, : n + i]}
        chunk["attention_mask"] = torch.ones_like(chunk["input_ids"])
        logits = text_logits(stock, chunk, [], DECODER[0], layers)[-1]
        logits[IMAGE_TOKEN] = float("-inf")
        assert int(logits.argmax()) == int(ids[0, n + i])


ROW = st.text("ttI", min_size=2, max_size=6).filter(lambda row: row.count("I") <= 2)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(ROW, min_size=1, max_size=3),
    options=st.sampled_from(ALL),
    layers=st.lists(st.integers(0, N_LAYERS - 1), unique=True),
    side=st.sampled_from(["left", "right"]),
)
def test_any_batch_equals_the_reference_row_by_row(rows, options, layers, side):
    model = reduced_model(options, layers)
    stock = reference_of(model)
    inputs = make_inputs(model, rows, side)
    with torch.no_grad():
        batch = model(**inputs).logits
    for i in range(len(rows)):
        solo = solo_inputs(inputs, rows, i)
        close(text_of(model, inputs, batch, i), text_logits(stock, solo, [], options, layers))


@pytest.mark.parametrize("layers", LAYERS[:2], ids=str)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llava", {"method": "fastv", "k": 2, "ratio": 0}),
        ("llava", {"method": "fastv", "k": 2, "ratio": 0.01}),  # rounds to nothing
        ("llava", {"method": "fastv", "k": N_LAYERS, "ratio": 0.5}),
        ("llava", {"method": "vtw", "k": N_LAYERS}),
        ("llava", {"method": "vtc_cls", "layer": 0, "token_num": 16}),
        ("llava", {"method": "random", "token_num": 16}),
        ("llava", {"method": "downsample", "factor": 1}),
        ("llava", {"method": "illava", "vit_k": [], "llm_k": [2], "llm_r": 1}),
        ("llava", {"method": "illava", "vit_k": [], "llm_k": [2], "llm_r": 0.99}),  # rounds to nothing
        ("llava_next", {"method": "vtw", "k": N_LAYERS}),
        ("llava_next", {"method": "vtc_cls", "layer": 0, "token_num": 16}),
    ],
    ids=str,
)
def test_identity_settings_are_bit_identical(family, options, layers):
    model = reduced_model(options, layers, family)
    inputs = make_inputs(model, ["ttItt", "tIt"])
    with torch.no_grad():
        reduced, ids = model(**inputs, output_hidden_states=True), greedy(model, inputs)
        model.set_visual_reduction(None)
        off = model(**inputs, output_hidden_states=True)
    assert torch.equal(reduced.logits, off.logits) and torch.equal(ids, greedy(model, inputs))
    assert torch.equal(used_image_features(reduced), used_image_features(off))
    if not layers:
        assert torch.equal(reduced.logits, make_stock(model)(**inputs).logits)


@METHOD
def test_text_only_prompts_are_bit_identical(options):
    model = reduced_model(options, [0, 2])
    inputs = make_inputs(model, ["ttttt", "ttt"])
    stock = make_stock(model)
    assert torch.equal(greedy(model, inputs), greedy(stock, inputs))


@pytest.mark.parametrize(
    "options", [o for o in ALL if o["method"] not in ("prumerge", "prumerge_plus", "illava")], ids=name
)
def test_caches_shrink(options):
    model = reduced_model(options, [0, 2])
    inputs = make_inputs(model, ["ttIttt"])
    output = greedy(model, inputs, 3, return_dict_in_generate=True)
    v, t = 16, 5 + 2  # the last new token is not in the cache
    kept = {
        "fastv": lambda: round(v * (1 - options["ratio"])),
        "vtw": lambda: 0,
        "downsample": lambda: 4,
    }.get(options["method"], lambda: options["token_num"])()
    k = options.get("k", 0)
    assert cache_lengths(find_cache(output)) == [t + v] * k + [t + kept] * (N_LAYERS - k)
    assert find_cache(output).get_seq_length() == t + v  # what `generate` counts on


def test_cache_of_a_batch_is_as_long_as_its_longest_row():
    model = reduced_model({"method": "fastv", "k": 1, "ratio": 0.75})
    inputs = make_inputs(model, ["ttttt", "ttIt", "tI", "ttttttttI"])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    assert cache_lengths(cache) == [24] + [12] * (N_LAYERS - 1)


class TestCaches:
    @METHOD
    @pytest.mark.parametrize("second", ["ttt", "tIt"])
    def test_second_turn_on_a_kept_cache(self, options, second):
        """A turn is a prefill of its own: the reference hides what each turn has dropped."""
        model = reduced_model(options, [0, 2])
        whole = make_inputs(model, ["tItt" + second])
        n = make_inputs(model, ["tItt"])["input_ids"].shape[1]
        pixels, cache = whole["pixel_values"], DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=whole["input_ids"][:, :n], pixel_values=pixels[:1], **{CACHE: cache})
            images = {"pixel_values": pixels[1:]} if "I" in second else {}
            logits = model(input_ids=whole["input_ids"][:, n:], **{CACHE: cache}, **images).logits
            if "I" not in second:
                inputs = {"input_ids": whole["input_ids"][:, :n], "pixel_values": pixels[:1]}
                new = whole["input_ids"][0, n:].tolist()
                expected = text_logits(reference_of(model), inputs, new, options, [0, 2])[-len(new) :]
                close(logits[0], expected)
            elif options["method"] == "fastv" and options["ratio"] < 1:
                stock, fastv = reference_of(model), {"k": options["k"], "ratio": options["ratio"]}
                first = {"input_ids": whole["input_ids"][:, :n], "pixel_values": pixels[:1]}
                visual = whole["input_ids"] == IMAGE_TOKEN
                dropped = visual[0].clone()
                dropped[fastv_kept(stock, first, [0, 2], **fastv)] = False
                dropped[fastv_kept(stock, whole, [0, 2], **fastv, start=n)] = False  # each turn by its last token
                with discard_updates(stock, [0, 2], visual), hidden_tokens(stock, options["k"], dropped):
                    close(logits[0, -1], stock(**whole).logits[0, -1])
            elif options.get("llm_k"):
                if not options["vit_k"]:
                    close(logits[0, -1], two_turns_of_illava(reference_of(model), whole, n, options))
            else:
                close(logits[0, -1], model(**whole).logits[0, -1])

    def test_second_turn_of_generate_in_a_padded_batch(self):
        for options in (DECODER[0], SELECTING[0], MERGING[1], ILLAVA[2]):
            model = reduced_model(options, [1])
            rows = ["ttItt", "tttt", "Itt"]
            inputs = make_inputs(model, rows)
            first = greedy(model, inputs, 3, return_dict_in_generate=True)
            turn = torch.cat([first.sequences, torch.tensor([[11, 12, 13]] * 3)], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, 6, dtype=torch.long)], 1)
            batch = greedy(model, {"input_ids": turn, "attention_mask": mask}, 4, **{CACHE: find_cache(first)})
            for i in range(3):
                solo = solo_inputs(inputs, rows, i)
                one = greedy(model, solo, 3, return_dict_in_generate=True)
                ids = torch.cat([one.sequences, torch.tensor([[11, 12, 13]])], 1)
                again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                answer = greedy(model, again, 4, **{CACHE: find_cache(one)})
                assert torch.equal(batch[i, -4:], answer[0, -4:])

    @METHOD
    @pytest.mark.parametrize("text", ["llama", "mistral_sliding"])
    def test_beam_search(self, options, text):
        """Beams reorder the cache and its record: the sequences are those of an uncached search. (One image per row:
        4.x mixes up the images of several when it repeats them for the beams.)"""
        model = reduced_model(options, [0, 2], text=text)
        rows = ["ttItt", "tItttt", "tttt"]
        inputs = make_inputs(model, rows)
        beams = greedy(model, inputs, num_beams=3)
        if not looks_at_last_token(options):
            assert torch.equal(beams, greedy(model, inputs, num_beams=3, use_cache=False))
        for i in range(len(rows)):
            solo = greedy(model, solo_inputs(inputs, rows, i), num_beams=3)
            assert torch.equal(beams[i : i + 1, -5:], solo[:, -5:])

    @METHOD
    def test_assisted_decoding(self, options):
        model = reduced_model(options, [0, 2])
        inputs = make_inputs(model, ["ttItttttt"])
        inputs["input_ids"][0, -2:] = inputs["input_ids"][0, -5:-3]
        if looks_at_last_token(options):
            with pytest.raises(ValueError, match="assisted"):
                greedy(model, inputs, prompt_lookup_num_tokens=3)
        else:
            assert torch.equal(greedy(model, inputs, 9, prompt_lookup_num_tokens=3), greedy(model, inputs, 9))

    @METHOD
    def test_static_cache_is_refused(self, options):
        model = reduced_model(options)
        with pytest.raises(ValueError, match="DynamicCache"):
            greedy(model, make_inputs(model, ["tIItIIt"]), cache_implementation="static")

    @pytest.mark.parametrize("second", [{"method": "vtw", "k": 1}, None], ids=str)
    def test_switching_between_turns(self, second):
        """Layers whose caches lack different tokens share neither a mask nor a plan."""
        model = reduced_model({"method": "vtw", "k": 2}, [1, 2, 3])
        whole = make_inputs(model, ["tIttttItt"])
        first = make_inputs(model, ["tItt"])["input_ids"].shape[1]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            turn = {"input_ids": whole["input_ids"][:, :first], "pixel_values": whole["pixel_values"][:1]}
            model(**turn, **{CACHE: cache})
            model.set_visual_reduction(second)
            turn = {"input_ids": whole["input_ids"][:, first:], "pixel_values": whole["pixel_values"][1:]}
            logits = model(**turn, **{CACHE: cache}).logits[0, -1]
            k = N_LAYERS if second is None else second["k"]
            expected = two_turns(reference_of(model), whole, whole["input_ids"] == IMAGE_TOKEN, first, 2, k)
        close(logits, expected)
        lacking = [16 * (i >= 2) + 16 * (i >= k) for i in range(N_LAYERS)]
        assert cache_lengths(cache) == [39 - n for n in lacking]

    def test_off_on_a_reduced_cache(self):
        model = reduced_model({"method": "vtw", "k": 1}, [1, 3])
        inputs = make_inputs(model, ["tItt"])
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(**inputs, **{CACHE: cache})
            model.set_visual_reduction(None)
            logits = model(input_ids=torch.tensor([[5, 6]]), **{CACHE: cache}).logits[0]
        expected = text_logits(reference_of(model), inputs, [5, 6], {"method": "vtw", "k": 1}, [1, 3])
        close(logits, expected[-2:])

    def test_crop(self):
        layer = KeptLayer.of(DynamicCache(config=make_config()).layers[0], 0, 1, torch.device("cpu"))
        for slots, seen, reduced in (([[0, 1, 5]], 6, True), ([[6]], 7, False), ([[7]], 8, False)):
            layer.add(Tokens(torch.tensor(slots), torch.tensor(slots)), seen, reduced, False)
            states = torch.randn(1, 2, len(slots[0]), 4)
            layer.update(states, states)
        layer.crop(-1)
        assert layer.seen == 7 and layer.slots.tolist() == [[0, 1, 5, 6]] and layer.keys.shape[2] == 4
        layer.crop(6)
        assert layer.seen == 6 and layer.slots.tolist() == [[0, 1, 5]]
        layer.crop(-1)
        assert layer.seen == 5 and layer.slots.tolist() == [[0, 1]]
        with pytest.raises(ValueError, match="cannot crop"):
            layer.crop(-2)
        layer.reset()
        assert layer.get_seq_length() == 0 and layer.slots.shape == (1, 0)

    def test_rows_of_the_record_move_with_the_cache(self):
        model = reduced_model({"method": "fastv", "k": 1, "ratio": 0.75})
        inputs = make_inputs(model, ["ttItt", "tIt", "tttt"])
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        slots = cache.layers[2].slots.clone()
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.layers[2].slots, slots.repeat_interleave(2, 0))
        cache.batch_select_indices(torch.tensor([4, 0, 2]))
        assert torch.equal(cache.layers[2].slots, slots[[2, 0, 1]])
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        assert torch.equal(cache.layers[2].slots, slots)


def two_turns(stock, whole, visual, first, k_first, k_second):
    """Last logits of two VTW turns by masks: the tokens of each turn's image are hidden from its k on."""
    turns = torch.arange(visual.shape[1]) >= first
    hooks = []
    for i, layer in enumerate(stock.model.language_model.layers):
        gone = visual[0] & torch.where(turns, i >= k_second, i >= k_first)

        def hide(module, args, kwargs, gone=gone):
            mask = kwargs["attention_mask"]
            return args, {**kwargs, "attention_mask": mask.masked_fill(gone, torch.finfo(mask.dtype).min)}

        hooks.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        with discard_updates(stock, [1, 2, 3], visual):
            return stock(**whole).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()


class TestOtherInputs:
    @pytest.mark.parametrize("options", [*DECODER, ILLAVA[0]], ids=name)
    def test_embeddings_with_visual_mask(self, options):
        model = reduced_model(options, [0, 2])
        inputs = make_inputs(model, ["ttItt", "tItItt"])
        visual_mask = inputs["input_ids"] == IMAGE_TOKEN
        with torch.no_grad():
            expected = model(**inputs)
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            embeds[visual_mask] = used_image_features(expected)
            kept = {"attention_mask": inputs["attention_mask"], "inputs_embeds": embeds, "visual_mask": visual_mask}
            assert torch.equal(model(**kept).logits, expected.logits)
            assert torch.equal(greedy(model, kept), greedy(model, inputs)[:, -5:])

    @pytest.mark.parametrize("options", SELECTING + MERGING + ILLAVA[1:], ids=name)
    def test_embeddings_that_hold_features_cannot_be_reduced_before_the_model(self, options):
        model = reduced_model(options)
        mask = torch.tensor([[False, True, True, False]])
        with pytest.raises(ValueError, match="hold their features already"):
            model(inputs_embeds=torch.randn(1, 4, 32), visual_mask=mask)

    @METHOD
    def test_embeddings_of_image_tokens_with_pixels(self, options):
        model = reduced_model(options, [0])
        inputs = make_inputs(model, ["ttItt"])
        with torch.no_grad():
            expected = model(**inputs).logits
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
            close(model(**inputs).logits, expected)

    @pytest.mark.parametrize("cuts", [(3, 9), (19,), (1, 2, 10, 20)], ids=str)
    def test_chunked_prefill_with_vtw(self, cuts):
        model = reduced_model({"method": "vtw", "k": 2}, [0, 3])
        inputs = make_inputs(model, ["ttItttt"])
        visual_mask = inputs["input_ids"] == IMAGE_TOKEN
        with torch.no_grad():
            output = model(**inputs)
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            embeds[visual_mask] = used_image_features(output)
            cache, logits = DynamicCache(config=model.config), []
            for start, end in zip((0, *cuts), (*cuts, embeds.shape[1]), strict=True):
                chunk = {"inputs_embeds": embeds[:, start:end], "visual_mask": visual_mask[:, start:end]}
                logits.append(model(**chunk, **{CACHE: cache}).logits)
        close(torch.cat(logits, 1)[~visual_mask], output.logits[~visual_mask])

    @pytest.mark.parametrize("options", [o for o in ALL if o["method"] != "fastv" and not o.get("llm_k")], ids=name)
    def test_chunked_prefill_of_generate(self, options):
        model = reduced_model(options, [0, 2])
        stock, inputs = make_stock(model), make_inputs(model, ["ttItttItt"])
        unless_stock_fails(greedy(stock, inputs), lambda: greedy(stock, inputs, prefill_chunk_size=7))
        assert torch.equal(greedy(model, inputs, prefill_chunk_size=7), greedy(model, inputs))

    def test_visual_mask_of_something_else(self):
        """It says what is frozen; what a method leaves out goes all the same."""
        model = reduced_model({"method": "vtc_cls", "layer": 0, "token_num": 5}, [1])
        inputs = make_inputs(model, ["ttItt"])
        with torch.no_grad():
            logits = model(**inputs, visual_mask=torch.zeros_like(inputs["input_ids"])).logits
            model.set_shortv_layers([])
            close(logits, model(**inputs).logits)

    def test_chunked_prefill_with_fastv_is_refused(self):
        model = reduced_model(DECODER[0])
        with pytest.raises(ValueError, match="prefill_chunk_size is 5"):
            greedy(model, make_inputs(model, ["ttItttt"]), prefill_chunk_size=5)

    @METHOD
    def test_packed_sequences_are_refused(self, options):
        model = reduced_model(options)
        inputs = make_inputs(model, ["ttItttItt"])
        del inputs["attention_mask"]
        n = inputs["input_ids"].shape[1]
        positions = torch.cat([torch.arange(20), torch.arange(n - 20)])[None]
        with pytest.raises(ValueError, match="packed"):
            model(**inputs, position_ids=positions, use_cache=False)

    @pytest.mark.parametrize("options", DECODER[:1] + DECODER[3:4], ids=name)
    @pytest.mark.parametrize("attn", ["sdpa", "eager"])
    def test_4d_mask(self, options, attn):
        """A mask that the caller made counts as it is: here one that no one can see token 1 by."""
        model = reduced_model(options, [1], attn=attn)
        inputs = make_inputs(model, ["ttIttt"])
        n = inputs["input_ids"].shape[1]
        allowed = torch.ones(n, n).tril().bool()
        allowed[2:, 1] = False
        masks = [allowed[None, None], torch.zeros(1, 1, n, n).masked_fill(~allowed, torch.finfo(torch.float).min)]
        if attn == "eager":
            masks = masks[1:]
        two_d = torch.ones(1, n, dtype=torch.long)
        two_d[0, 1] = 0
        with torch.no_grad():
            expected = model(**{**inputs, "attention_mask": two_d}).logits[0, 2:]
            for mask in masks:
                close(model(**{**inputs, "attention_mask": mask}).logits[0, 2:], expected)

    @METHOD
    def test_attention_with_the_conventions_of_flash_attention(self, options, simulated_flash):
        """Padding as a 2D mask, queries aligned with the last keys, packed sequences read off `position_ids`."""
        model = reduced_model(options, [0, 2])
        inputs = make_inputs(model, ROWS)
        solo = solo_inputs(inputs, ROWS, 2)
        with torch.no_grad():
            expected = [model(**each).logits for each in (inputs, solo)], greedy(model, inputs)
            model.set_attn_implementation({"text_config": simulated_flash})
            actual = [model(**each).logits for each in (inputs, solo)], greedy(model, inputs)
        for each, one, other in zip((inputs, solo), actual[0], expected[0], strict=True):
            for i in range(len(each["input_ids"])):
                close(text_of(model, each, one, i), text_of(model, each, other, i))
        assert torch.equal(actual[1], expected[1])

    @pytest.mark.parametrize(
        ("text", "attn", "message"),
        [
            ("llama", "flex_attention", "does not work with attn_implementation='flex_attention'"),
            ("mistral_sliding", "flash_attention_2", "sliding window needs attn_implementation sdpa or eager"),
        ],
    )
    def test_attention_that_cannot_be_reduced(self, text, attn, message):
        model = reduced_model({"method": "random", "token_num": 5}, text=text)
        model.config.text_config._attn_implementation = attn
        with pytest.raises(ValueError, match=message):
            model(**make_inputs(model, ["ttItt"]))

    def test_outputs_keep_their_shapes(self):
        model = reduced_model({"method": "fastv", "k": 2, "ratio": 0.75}, [1], attn="eager")
        inputs = make_inputs(model, ["ttItt", "tt"])
        n = inputs["input_ids"].shape[1]
        with torch.no_grad():
            output = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=True)
            step = model(
                input_ids=torch.tensor([[5], [6]]),
                attention_mask=torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1),
                **{CACHE: find_cache(output)},
                output_attentions=True,
            )
        assert [tuple(states.shape) for states in output.hidden_states] == [(2, n, 32)] * (N_LAYERS + 1)
        assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, n, n)] * N_LAYERS
        assert [tuple(weights.shape) for weights in step.attentions] == [(2, 4, 1, n + 1)] * N_LAYERS
        dropped = ~output.hidden_states[3][0].any(-1)
        assert dropped.sum() == 12 and (inputs["input_ids"][0][dropped] == IMAGE_TOKEN).all()
        late = output.attentions[3][0]
        assert not late[:, dropped].any() and not late[:, :, dropped].any()
        close(late[:, ~dropped].sum(-1), torch.ones(4, n - 12))
        close(step.attentions[3].sum(-1), torch.ones(2, 4, 1))
        assert not step.attentions[3][0, :, 0, :-1][:, dropped].any()
        assert not output.logits[0, dropped].any() and output.logits[0, ~dropped].any(-1).all()

    @pytest.mark.parametrize("options", [DECODER[0], SELECTING[0], MERGING[1]], ids=name)
    def test_gradients_flow_with_and_without_checkpointing(self, options):
        gradients = []
        for checkpointing in (False, True):
            model = reduced_model(options, [1]).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            inputs = make_inputs(model, ["ttItt", "tIt"])
            labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
            model(**inputs, labels=labels).loss.backward()
            parts = {
                part: parameter.grad
                for part, parameter in model.named_parameters()
                if "multi_modal_projector" in part or "language_model.layers.0.mlp" in part
            }
            assert all(gradient.isfinite().all() and gradient.any() for gradient in parts.values())
            gradients.append(parts)
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @METHOD
    def test_half_precision(self, dtype, options):
        model = reduced_model(options, [0, 1])
        inputs = make_inputs(model, ["ttItt", "tt"])
        model.to(dtype)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with torch.no_grad():
            logits = model(**inputs).logits
        assert logits.dtype == dtype and logits.isfinite().all()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_outputs_as_a_tuple_hold_no_marks(self, family):
        model = reduced_model({"method": "random", "token_num": 6}, family=family).model
        inputs = make_inputs(model, ["ttItt"])
        with torch.no_grad():
            parts = model(**inputs, return_dict=False)
        assert isinstance(parts, tuple) and all(part.isfinite().all() for part in parts if torch.is_tensor(part))

    def test_image_hidden_states_are_those_that_the_model_sees(self):
        model = reduced_model({"method": "vtc_cls", "layer": 0, "token_num": 5})
        with torch.no_grad():
            output = model(**make_inputs(model, ["ttItIt"]))
        assert used_image_features(output).shape == (10, 32) and used_image_features(output).isfinite().all()

    @pytest.mark.skipif(transformers.__version__ < "5", reason="4.x has no such argument")
    @pytest.mark.parametrize("family", FAMILIES)
    def test_image_features_as_a_tuple(self, family):
        model = reduced_model(None, family=family)
        images, stock = make_images(model.config, 1), make_stock(model)
        with torch.no_grad():
            expected = stock.model.get_image_features(**images, return_dict=False)
            actual = model.model.get_image_features(**images, return_dict=False)
            torch.testing.assert_close(actual, expected)
            model.set_visual_reduction({"method": "random", "token_num": 5})
            reduced = model.model.get_image_features(**images, return_dict=False)
        assert type(reduced) is type(expected) is tuple and len(reduced) == len(expected)

    def test_newlines_of_llava_next_stay(self):
        model = reduced_model({"method": "vtc_cls", "layer": 0, "token_num": 2}, family="llava_next")
        images = make_images(model.config, 1)
        with torch.no_grad():
            features = model.get_image_features(**images)
            features = image_features(features)[0]
            kept = features[features.isfinite().all(-1)]
            newline = (kept == model.model.image_newline).all(-1)
        assert len(kept) == 3 * 2 + 4 and newline.sum() == 4  # three tiles; a grid of 4 rows


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("fastv", "one of downsample, fastv, illava, prumerge"),
            ({}, "one of downsample, fastv, illava, prumerge"),
            ({"method": "nonsense"}, "'nonsense'; valid methods are downsample, fastv"),
            ({"method": "fastv", "r": 0.5}, "no option 'r'; valid options are k, ratio"),
            ({"method": "prumerge", "k": 1}, "valid options are none"),
            ({"method": "fastv", "k": 0}, "k is 0; the valid range is the integers 1 to 4"),
            ({"method": "fastv", "k": 5}, "k is 5; the valid range is the integers 1 to 4"),
            ({"method": "fastv", "k": True}, "k is True"),
            ({"method": "fastv", "k": 2.0}, "k is 2.0"),
            ({"method": "fastv", "ratio": 1.5}, "ratio is 1.5; the valid range is 0 to 1"),
            ({"method": "fastv", "ratio": "half"}, "ratio is 'half'"),
            ({"method": "fastv", "ratio": float("nan")}, "ratio is nan"),
            ({"method": "vtw"}, "k is 16; the valid range is the integers 1 to 4"),
            ({"method": "vtc_cls", "layer": 0, "token_num": 17}, "token_num is 17; the valid range is the integers 1"),
            ({"method": "vtc_cls", "layer": 0, "token_num": 0}, "token_num is 0"),
            ({"method": "vtc_cls", "layer": 2, "token_num": 4}, "layer is 2; the valid range is the integers -3 to 1"),
            ({"method": "vtc_cls", "layer": -1, "token_num": 4}, "layer is -1"),
            ({"method": "prumerge_plus", "token_num": 64}, r"token_num is 64; valid with 16 patches are None"),
            ({"method": "random", "token_num": 4, "seed": -1}, "seed is -1"),
            ({"method": "downsample", "factor": 3}, "factor is 3; with 4 x 4 patches, valid are 1, 2, 4"),
        ],
        ids=str,
    )
    def test_bad_options(self, options, message):
        model = make_model()
        with pytest.raises(ValueError, match=message):
            model.set_visual_reduction(options)
        assert model.config.visual_reduction is None
        with pytest.raises(ValueError, match=message):  # before there is a model
            make_config(visual_reduction=options)

    @pytest.mark.parametrize("options", MERGING, ids=name)
    def test_undefined_for_llava_next(self, options):
        with pytest.raises(ValueError, match="not defined for LLaVA-NeXT.*fastv, random, vtc_cls and vtw"):
            make_config("llava_next", visual_reduction=options)

    def test_other_vision_towers(self):
        config = make_config()
        config.vision_config.model_type = "siglip_vision_model"
        config.visual_reduction = {"method": "vtc_cls", "layer": 0, "token_num": 4}
        with pytest.raises(ValueError, match="clip_vision_model.*siglip"):
            config.validate_shortv()

    def test_full_features(self):
        with pytest.raises(ValueError, match="'full', the valid value is 'default'"):
            make_config(vision_feature_select_strategy="full", visual_reduction={"method": "prumerge"})

    @pytest.mark.parametrize("options", [*SELECTING, *MERGING, {"method": "random", "token_num": 16}], ids=name)
    def test_full_features_of_one_call(self, options):
        """The error is the config's, wherever the call says it; other methods take the CLS token's feature."""
        with pytest.raises(ValueError) as config_error:
            make_config(vision_feature_select_strategy="full", visual_reduction=options)
        model = reduced_model(options, [1])
        pixels = make_images(model.config, 1)["pixel_values"]
        ids = torch.tensor([[5] + [IMAGE_TOKEN] * 17 + [6]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        full = {"vision_feature_select_strategy": "full"}
        for call in (
            lambda: model(**inputs, **full),
            lambda: model.model(**inputs, **full),
            lambda: model.generate(**inputs, **full, max_new_tokens=1),
            lambda: model.get_image_features(pixels, **full),
            lambda: model.get_image_features(pixels, -2, "full"),
        ):
            with pytest.raises(ValueError) as error, torch.no_grad():
                call()
            assert str(error.value) == str(config_error.value)
        for other in (None, DECODER[0], DECODER[3]):
            model.set_visual_reduction(other)
            with torch.no_grad():
                assert model(**inputs, **full).logits.isfinite().all()
                assert model.generate(**inputs, **full, max_new_tokens=1).shape == (1, 20)

    @pytest.mark.parametrize("layers", [[], [1]], ids=str)
    @pytest.mark.parametrize(
        ("family", "options"), [("llava", each) for each in [None, *ALL]] + [("llava_next", each) for each in NEXT]
    )
    def test_no_image(self, family, options, layers):
        """Neither where the prompt has a place for one nor in a text; that is what `None` is for."""
        model = reduced_model(options, layers, family)
        inputs = {key: value[:0] for key, value in make_images(model.config, 1).items()}
        for text in ([[5, 6, 7]], [[5, IMAGE_TOKEN, 7]]):
            with pytest.raises(ValueError, match=r"pixel_values hold no image: their shape is \(0, 3, .*16, 16\)"):
                model(input_ids=torch.tensor(text), **inputs)
        with pytest.raises(ValueError, match="pixel_values hold no image"):
            model.get_image_features(**inputs)

    def test_assigned_past_the_setter(self):
        model = make_model()
        model.config.visual_reduction = {"method": "fastv", "k": 9}
        with pytest.raises(ValueError, match="k is 9"):
            model(**make_inputs(model, ["ttItt"]))

    @METHOD
    def test_saved_and_loaded(self, options, tmp_path):
        config = make_config(visual_reduction=options)
        config.save_pretrained(tmp_path)
        assert type(config).from_pretrained(tmp_path).visual_reduction == options

    def test_every_method_is_tested(self):
        assert {options["method"] for options in ALL} == set(METHODS)
        assert set(FAMILIES) == {"llava", "llava_next"}


def test_prumerge_keeps_some_patches_in_these_tests():
    """The models above do have outliers, and images differ in how many."""
    model = reduced_model({"method": "prumerge"})
    with torch.no_grad():
        features = model.get_image_features(**make_images(model.config, 12))
    features = image_features(features)
    assert len({int(feature.isfinite().all(-1).sum()) for feature in features}) > 1
