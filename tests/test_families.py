"""Every family: stock without settings, and with them what the simple reference of `families.py` gives."""

import copy
import functools
import pickle
from contextlib import ExitStack

import pytest
import torch
import torch._dynamo.testing
import transformers
from families import (
    FAMILIES,
    KINDS,
    N_LAYERS,
    OTHERS,
    REFUSED,
    build,
    decoder,
    discard_updates,
    extended,
    greedy,
    hidden_tokens,
    inputs,
    kinds,
    make_inputs,
    refused,
    shortv_of,
    turns,
    visual_mask,
)
from torch._dynamo.exc import TorchDynamoException
from transformers import DynamicCache

import shortv_hf
from shortv_hf.configuration_shortv import frozen_updates
from shortv_hf.layer_contribution import rank_layers
from shortv_hf.reduction_vtw import VTW as VTWithdrawal
from shortv_hf.stream import Stream
from shortv_hf.upstream import CACHE, find_cache, image_features


LAYERS = [0, 2]
HALVES = [0, "1.mlp", "2.self_attn", "3.mlp", "3.self_attn"]
FAMILY = pytest.mark.parametrize("family", FAMILIES)
ATTENTION = pytest.mark.parametrize("attn", ["sdpa", "eager"])
LAYERS_AND_HALVES = pytest.mark.parametrize("layers", [LAYERS, HALVES], ids=["layers", "halves"])


def of_kinds(*wanted):
    """Each family with those of the wanted kinds of inputs that it has."""
    cases = [(family, kind) for family in FAMILIES for kind in kinds(family) if kind in wanted]
    return pytest.mark.parametrize(("family", "kind"), cases)


FAMILY_AND_KIND = of_kinds(*KINDS)
M_ROPE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]

FASTV, VTW = {"method": "fastv", "k": 2, "ratio": 0.5}, {"method": "vtw", "k": 2}
RANDOM, DOWNSAMPLE = {"method": "random", "token_num": 2}, {"method": "downsample", "factor": 2}
WITHOUT_GRID = ["llava_next", "llava_onevision"]  # newline tokens end the rows of theirs
WITH_CLIP = ["llava", "llava_next"]
DEEP = ["qwen3_vl"]  # adds features to visual tokens between its first three layers, so that they leave behind those


def name(options):
    return options["method"]


def fitting(family, options):
    return {**options, "k": 3} if family in DEEP and "k" in options else options


REDUCTIONS = [
    pytest.param(family, options, id=f"{family}-{name(options)}")
    for family in FAMILIES
    for options in (FASTV, VTW, RANDOM, DOWNSAMPLE)
    if options is not DOWNSAMPLE or family not in WITHOUT_GRID
]


@functools.cache
def frozen(family, attn="sdpa", halves=False):
    """The ShortV model with LAYERS or HALVES frozen; shared, so left as it is."""
    return shortv_of(build(family, attn), HALVES if halves else LAYERS)


def close(actual, expected, **options):
    torch.testing.assert_close(actual, expected, **{"atol": 1e-4, "rtol": 1e-4, **options})


def generated(model, given, n=6, **kwargs):
    """New ids `[B, n]` and their logits `[B, n, vocabulary]`."""
    output = greedy(model, given, n, return_dict_in_generate=True, output_logits=True, **kwargs)
    return output.sequences[:, -n:], torch.stack(output.logits, dim=1)


def same_answer(actual, expected):
    assert torch.equal(actual[0], expected[0])
    close(actual[1], expected[1])


def logits_of(model, given, **kwargs):
    """Logits of all tokens that are not padding."""
    with torch.no_grad():
        logits = model(**given, **kwargs).logits
    return logits if "attention_mask" not in given else logits[given["attention_mask"].bool()]


def unless_stock_fails(make, expected):
    """Skip the test unless stock's `make()` gives the `expected` ids: the installed Transformers cannot do it."""
    try:
        same = torch.equal(make(), expected)
    except Exception as error:
        pytest.skip(f"stock Transformers {transformers.__version__} raises {type(error).__name__}")
    if not same:
        pytest.skip(f"stock Transformers {transformers.__version__} gives another answer")


# ------------------------------------------------------------------------------------------------------------ freezing


@FAMILY_AND_KIND
@ATTENTION
def test_no_layers_are_bit_identical_to_stock(family, kind, attn):
    stock, given = build(family, attn), inputs(family, kind)
    model = shortv_of(stock, [])
    assert torch.equal(logits_of(model, given), logits_of(stock, given))
    assert torch.equal(greedy(model, given), greedy(stock, given))


@FAMILY_AND_KIND
@ATTENTION
@LAYERS_AND_HALVES
def test_frozen_layers_equal_the_reference(family, kind, attn, layers):
    stock, model, given = build(family, attn), frozen(family, attn, layers == HALVES), inputs(family, kind)
    dense = logits_of(stock, given)
    with discard_updates(stock, layers, visual_mask(given)):
        expected, answer = logits_of(stock, given), generated(stock, given)
    assert kind == "text" or (expected - dense).abs().max() > 0.1
    close(logits_of(model, given), expected)
    same_answer(generated(model, given), answer)


@FAMILY
@LAYERS_AND_HALVES
def test_hidden_states_and_attentions(family, layers):
    stock, model, given = build(family, "eager"), frozen(family, "eager", layers == HALVES), inputs(family, "images")
    asking_text, _ = frozen_updates(layers)
    visual, real = visual_mask(given), given["attention_mask"].bool()
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        output = model(**given, **options)
        with discard_updates(stock, layers, visual):
            expected = stock(**given, **options)
    assert len(output.hidden_states) == len(expected.hidden_states) == N_LAYERS + 1
    for actual, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        close(actual[real], other[real])
    assert len(output.attentions) == N_LAYERS
    for layer, (actual, other) in enumerate(zip(output.attentions, expected.attentions, strict=True)):
        assert actual.shape == other.shape
        rows, others = actual.transpose(1, 2), other.transpose(1, 2)  # [B, S, heads, keys]
        computed = real & ~visual if layer in asking_text else real
        close(rows[computed], others[computed])
        assert layer not in asking_text or not rows[visual].any()


@FAMILY_AND_KIND
@LAYERS_AND_HALVES
def test_cached_equals_uncached(family, kind, layers):
    """Decoding goes on at the right positions, behind images and videos too."""
    model, given = frozen(family, halves=layers == HALVES), inputs(family, kind)
    assert torch.equal(greedy(model, given), greedy(model, given, use_cache=False))


@FAMILY
@ATTENTION
def test_static_cache(family, attn):
    stock, model, given = build(family, attn), frozen(family, attn), inputs(family, "images")
    unless_stock_fails(lambda: greedy(stock, given, cache_implementation="static"), greedy(stock, given))
    assert torch.equal(greedy(model, given, cache_implementation="static"), greedy(model, given))


@of_kinds("images", "video")
@LAYERS_AND_HALVES
def test_padded_rows_equal_solo_rows(family, kind, layers):
    model, given = frozen(family, halves=layers == HALVES), inputs(family, kind)
    with torch.no_grad():
        batch, (ids, _) = model(**given).logits, generated(model, given)
    for i, row in enumerate(KINDS[kind]):
        solo = make_inputs(family, [row], seed=i)
        close(batch[i][given["attention_mask"][i].bool()], logits_of(model, solo))
        assert torch.equal(ids[i : i + 1], generated(model, solo)[0])


@FAMILY
@ATTENTION
def test_what_nobody_reads_is_not_computed(family, attn, monkeypatch):
    """Before VTW's layer: the answer is the same up to rounding, by kernels with fewer rows; and hidden states and attentions
    are whole where asked for."""
    stock, given, options = build(family, attn), inputs(family, "images"), fitting(family, VTW)
    model = shortv_of(stock, [0], options)
    fed = []
    mlp = decoder(model).layers[options["k"] - 1].mlp
    hook = mlp.register_forward_hook(lambda module, args, output: fed.append(args[0].shape[1]))
    spared = logits_of(model, given), generated(model, given)
    n = given["input_ids"].shape[1]
    assert fed and max(fed) < n
    fed.clear()
    with torch.no_grad():
        asked = model(**given, output_hidden_states=True)
    assert fed == [n]
    hook.remove()
    monkeypatch.setattr(VTWithdrawal, "dead_layer", None)
    computed = logits_of(model, given), generated(model, given)
    with torch.no_grad():
        whole = model(**given, output_hidden_states=True)
    close(spared[0], computed[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(spared[1][0], computed[1][0])
    assert all(map(torch.equal, asked.hidden_states, whole.hidden_states))


# --------------------------------------------------------------------------------------------------------------- turns


def positions_of(model, given):
    """The positions of a whole row where they have three dimensions: a later turn alone does not give them."""
    found = []

    def look(module, args, kwargs):
        found.append(kwargs.get("position_ids"))

    hook = decoder(model).register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**given)
    hook.remove()
    positions = found[0]
    return positions if positions is not None and positions.ndim == 3 else None


def two_turns(model, parts, positions):
    """Logits of both turns on one cache."""
    cache, logits, start = DynamicCache(config=model.config.get_text_config()), [], 0
    for part in parts:
        end = start + part["input_ids"].shape[1]
        given = part if positions is None else {**part, "position_ids": positions[..., start:end]}
        with torch.no_grad():
            logits.append(model(**given, **{CACHE: cache}, use_cache=True).logits)
        start = end
    return torch.cat(logits, dim=1)


@FAMILY
@pytest.mark.parametrize("second", ["tttt", "tttIt"])
def test_second_turn_on_a_kept_cache(family, second):
    stock, model = build(family), frozen(family)
    *parts, whole = turns(family, "tItt", second)
    positions = positions_of(stock, whole)
    try:
        dense = two_turns(stock, parts, positions)
    except IndexError:
        pytest.skip(f"stock Transformers {transformers.__version__} cannot have an image in a later turn")
    with torch.no_grad():
        stock_agrees = torch.allclose(dense, stock(**whole).logits, atol=1e-4)
        uncached = model(**whole).logits
    both = torch.cat([visual_mask(part) for part in parts], dim=1)
    with discard_in_chunks(stock, parts):
        expected = two_turns(stock, parts, positions)
    actual = two_turns(model, parts, positions)
    close(actual[~both], expected[~both])
    if stock_agrees:  # Gemma 3's images in a later turn do not attend both ways
        close(actual[~both], uncached[~both])


def discard_in_chunks(stock, parts):
    """The reference for chunks of different lengths."""
    stack = ExitStack()
    lengths = {part["input_ids"].shape[1] for part in parts}
    assert len(lengths) == len(parts)
    for part in parts:
        stack.enter_context(discard_updates(stock, LAYERS, visual_mask(part)))
    return stack


@FAMILY
def test_generate_continues_a_kept_cache(family):
    stock, model, given = build(family), frozen(family), inputs(family, "image")

    def answers(each):
        first = greedy(each, given, 3, return_dict_in_generate=True)
        more = torch.cat([first.sequences[:, given["input_ids"].shape[1] :], torch.tensor([[11, 12, 13]])], dim=1)
        whole = extended(family, given, more)
        text = {key: whole[key] for key in ("input_ids", "attention_mask")}
        kept = greedy(each, text, 4, **{CACHE: find_cache(first)})
        return kept, greedy(each, whole, 4)

    unless_stock_fails(lambda: answers(stock)[0], answers(stock)[1])
    kept, fresh = answers(model)
    assert torch.equal(kept, fresh)


@pytest.mark.parametrize("family", M_ROPE)
def test_positions_of_one_prompt_do_not_stay_for_the_next(family):
    """Upstream keeps the distance between positions and tokens on the model."""
    model = frozen(family)
    expected = [greedy(shortv_of(build(family), LAYERS), inputs(family, kind)) for kind in KINDS]
    for kind, ids in zip(KINDS, expected, strict=True):
        assert torch.equal(greedy(model, inputs(family, kind)), ids)


# ------------------------------------------------------------------------------------------------- layer contribution


@of_kinds("images", "video")
def test_layer_contribution_equals_the_reference(family, kind):
    stock, given = build(family), inputs(family, kind)

    def distribution(layers):
        with torch.no_grad(), discard_updates(stock, layers, visual_mask(given)):
            return stock(**given).logits[:, -1].double().log_softmax(-1)

    dense = distribution([])
    scores = [(dense.exp() * (dense - distribution([i]))).sum(-1) for i in range(N_LAYERS)]
    ranking = rank_layers(frozen(family), [given], metric="lc", layers_per_batch=3)
    found = torch.tensor(ranking.sample_scores, dtype=torch.float64)
    torch.testing.assert_close(found, torch.stack(scores, dim=1), atol=5e-6, rtol=1e-3)
    assert ranking.order == sorted(range(N_LAYERS), key=ranking.scores.__getitem__)
    assert ranking.visual_tokens == float(visual_mask(given).sum()) / len(KINDS[kind])


# ---------------------------------------------------------------------------------------------------------- reductions


def cache_lengths(cache):
    return [layer.keys.shape[-2] for layer in cache.layers]


def dropped_tokens(stock, given, options):
    """The tokens `[S]` of one row that leave before layer k."""
    visual = visual_mask(given)
    dropped = visual[0].clone()
    if options["method"] == "fastv":
        with torch.no_grad(), discard_updates(stock, LAYERS, visual):
            weights = stock(**given, output_attentions=True).attentions[options["k"] - 1]
        scores, positions = weights[0, :, -1].mean(0), visual[0].nonzero()[:, 0].tolist()
        best = sorted(positions, key=lambda position: -float(scores[position]))
        dropped[best[: round(len(positions) * (1 - options["ratio"]))]] = False
    return dropped


@of_kinds("image", "video")
@pytest.mark.parametrize("options", [FASTV, VTW], ids=name)
def test_dropping_equals_hiding(family, options, kind):
    """Tokens that leave before layer k are those that nobody attends to from layer k on: prefill and cached steps."""
    options, given = fitting(family, options), make_inputs(family, KINDS[kind][:1])
    stock = build(family, "eager")
    model = shortv_of(build(family), LAYERS, options)
    ids, logits = generated(model, given)
    n, whole = given["input_ids"].shape[1], extended(family, given, ids)
    visual = visual_mask(whole)
    dropped = torch.cat([dropped_tokens(stock, given, options), torch.zeros(ids.shape[1], dtype=torch.bool)])
    with torch.no_grad(), discard_updates(stock, LAYERS, visual), hidden_tokens(stock, options["k"], dropped):
        expected = stock(**whole).logits[0]
    close(logits[0], expected[n - 1 : -1])
    with torch.no_grad():
        close(model(**given).logits[0][~visual[0, :n]], expected[:n][~visual[0, :n]])


@pytest.mark.parametrize(("family", "options"), REDUCTIONS)
@pytest.mark.parametrize("layers", [[], LAYERS], ids=str)
def test_reductions_of_batches(family, options, layers):
    """Padded rows equal solo rows, cached steps equal uncached ones, and the cache is shorter than the prompt."""
    kind = "video" if "video" in kinds(family) else "images"
    model, given = shortv_of(build(family), layers, fitting(family, options)), inputs(family, kind)
    with torch.no_grad():
        batch = model(**given).logits
    output = greedy(model, given, return_dict_in_generate=True)
    ids = output.sequences[:, -6:]
    for i, row in enumerate(KINDS[kind]):
        solo = make_inputs(family, [row], seed=i)
        text = ~visual_mask(solo)
        with torch.no_grad():
            close(batch[i][given["attention_mask"][i].bool()][text[0]], model(**solo).logits[text])
        assert torch.equal(ids[i : i + 1], generated(model, solo)[0])
    if options is not FASTV:  # which chooses by the last token, another one at every step
        assert torch.equal(output.sequences, greedy(model, given, use_cache=False))
    assert cache_lengths(find_cache(output))[-1] < given["input_ids"].shape[1]


@pytest.mark.parametrize("family", DEEP)
def test_tokens_leave_behind_the_layers_that_add_to_them(family):
    for options in (FASTV, VTW):
        with pytest.raises(ValueError, match=f"{options['method']}: k is 2.*3 to {N_LAYERS}"):
            shortv_of(build(family), [], options)


@pytest.mark.parametrize("family", WITHOUT_GRID)
def test_downsampling_needs_a_grid(family):
    with pytest.raises(ValueError, match="downsample"):
        shortv_of(build(family), [], DOWNSAMPLE)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITH_CLIP])
@pytest.mark.parametrize(
    "options", [{"method": "vtc_cls", "layer": 0, "token_num": 2}, {"method": "prumerge"}], ids=name
)
def test_methods_that_need_a_class_token(family, options):
    stock = build(family)
    with pytest.raises(ValueError, match=options["method"]):
        shortv_of(stock, [], options)
    with pytest.raises(ValueError, match=options["method"]):
        frozen(family).set_visual_reduction(options)
    assert frozen(family).config.visual_reduction is None


# ------------------------------------------------------------------------------------------------ training and storage


def gradients(model, given, labels):
    model.zero_grad()
    loss = model(**given, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@FAMILY
def test_gradients_equal_the_reference(family):
    given, stock = inputs(family, "images"), copy.deepcopy(build(family)).train()
    visual = visual_mask(given)
    labels = given["input_ids"].masked_fill(visual | (given["attention_mask"] == 0), -100)
    with discard_updates(stock, LAYERS, visual):
        loss, expected = gradients(stock, given, labels)
    model = shortv_of(build(family), LAYERS).train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        actual_loss, actual = gradients(model, given, labels)
        close(actual_loss, loss)
        assert actual.keys() == expected.keys()
        for key, gradient in expected.items():
            close(actual[key], gradient, rtol=1e-3, msg=f"{key}, checkpointing {checkpointing}")


@FAMILY
def test_copies_and_files_give_equal_logits(family, tmp_path):
    model, given = frozen(family), inputs(family, "images")
    expected = logits_of(model, given)
    fresh = shortv_of(build(family), LAYERS)  # upstream leaves hooks that cannot be pickled on towers that have run
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(fresh))]
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for each in (*copies, loaded.eval()):
        assert each.config.shortv_layers == LAYERS and each.config.visual_reduction is None
        close(logits_of(each, given), expected, atol=1e-6)
        each.set_shortv_layers([])
        assert torch.equal(logits_of(each, given), logits_of(build(family), given))
    assert torch.equal(logits_of(model, given), expected)


@FAMILY
def test_compiled_text_model_is_one_graph(family):
    prompts = [make_inputs(family, [row]) for row in ("ttItt", "tItttI" + "tttt")]

    def compiled(model):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        decoder(model).compile(backend=counter, dynamic=True, fullgraph=True)
        return [logits_of(model, given, use_cache=False) for given in prompts], counter.frame_count

    expected = [logits_of(frozen(family), given, use_cache=False) for given in prompts]
    try:
        actual, graphs = compiled(shortv_of(build(family), LAYERS))
    except TorchDynamoException as error:
        with pytest.raises(TorchDynamoException):
            compiled(copy.deepcopy(build(family)))
        pytest.skip(f"stock Transformers {transformers.__version__} raises {type(error).__name__}")
    assert graphs == 1
    for logits, other in zip(actual, expected, strict=True):
        close(logits, other)


# -------------------------------------------------------------------------------------------------------- apply_shortv


APPLIED = [
    pytest.param(family, attn, id=f"{family}-{attn}")
    for family, each in (FAMILIES | OTHERS).items()
    for attn in each.attentions
]


@pytest.mark.parametrize(("family", "attn"), APPLIED)
@LAYERS_AND_HALVES
def test_apply_shortv(family, attn, layers):
    stock, given = build(family, attn), inputs(family, "images")
    model, dense = copy.deepcopy(stock), logits_of(stock, given)
    assert shortv_hf.apply_shortv(model, shortv_layers=layers) is model
    with discard_updates(stock, layers, visual_mask(given)):
        expected, answer = logits_of(stock, given), generated(stock, given)
    assert (expected - dense).abs().max() > 0.1
    close(logits_of(model, given), expected)
    same_answer(generated(model, given), answer)
    model.set_shortv_layers([])
    assert torch.equal(logits_of(model, given), dense)
    shortv_hf.apply_shortv(model, shortv_layers=[1])  # once more
    with discard_updates(stock, [1], visual_mask(given)):
        close(logits_of(model, given), logits_of(stock, given))


@pytest.mark.parametrize("family", [*FAMILIES, "mistral3"])
def test_apply_shortv_with_a_reduction(family):
    model, given, options = copy.deepcopy(build(family)), inputs(family, "images"), fitting(family, VTW)
    shortv_hf.apply_shortv(model, shortv_layers=LAYERS, visual_reduction=options)
    output = greedy(model, given, return_dict_in_generate=True)
    assert cache_lengths(find_cache(output))[-1] < given["input_ids"].shape[1]
    if family in FAMILIES:
        same_answer(generated(model, given), generated(shortv_of(build(family), LAYERS, options), given))


@pytest.mark.parametrize("text_model", REFUSED)
def test_apply_shortv_refuses_what_it_would_get_wrong(text_model):
    """Layers that look like the others and compute something else are found by trying them."""
    model, given = refused(text_model), inputs("llava", "images")
    dense = logits_of(model, given)
    with pytest.raises(ValueError, match=type(decoder(model)).__name__):
        shortv_hf.apply_shortv(model, shortv_layers=LAYERS)
    assert torch.equal(logits_of(model, given), dense)


def test_halves_that_would_be_wrong_are_refused(monkeypatch):
    """Where upstream's layer does something else between its halves: found by trying, once halves are asked for."""
    model, given = shortv_of(build("llava"), [1]), inputs("llava", "images")
    monkeypatch.setattr(shortv_hf.modeling_shortv, "TESTED_TEXT_MODELS", set())
    monkeypatch.setattr(shortv_hf.upstream, "_checked", {})
    norms = shortv_hf.decoder_layer.layer_norms
    monkeypatch.setattr(shortv_hf.decoder_layer, "layer_norms", lambda layer: (*norms(layer)[:3], lambda new: 2 * new))
    logits_of(model, given)
    model.set_shortv_layers([1, "2.mlp"])
    with pytest.raises(ValueError, match="cannot freeze tokens in LlamaModel"):
        logits_of(model, given)


@pytest.mark.parametrize("layers", [[N_LAYERS], [-1], [1, 1], ["all"]], ids=str)
def test_apply_shortv_refuses_layers_that_are_not_there(layers):
    model, given = copy.deepcopy(build("qwen2_vl")), inputs("qwen2_vl", "image")
    with pytest.raises(ValueError, match=str(layers[0])):
        shortv_hf.apply_shortv(model, shortv_layers=layers)
    assert torch.equal(logits_of(model, given), logits_of(build("qwen2_vl"), given))


# -------------------------------------------------------------------------------------------------- what a review found


def test_a_window_is_measured_without_tokens_that_never_came():
    """Gemma 3 hands its layers masks whose windows count them: against stock on the tokens that are left."""
    stock = build("gemma3")
    model = shortv_of(stock, [], {"method": "random", "token_num": 4})
    given = make_inputs("gemma3", ["tttItttttttttttt"])
    with torch.no_grad():
        output = model(**given, output_hidden_states=True)
        left = output.hidden_states[-1][0].abs().sum(-1) > 0
        assert 0 < int((~left).sum()) and int(left.sum()) > model.config.text_config.sliding_window
        features = torch.cat(list(image_features(stock.model.get_image_features(given["pixel_values"]))))
        embeds = stock.get_input_embeddings()(given["input_ids"])
        embeds = embeds.masked_scatter(visual_mask(given)[..., None], features.to(embeds.dtype))
        types = {"token_type_ids": given["token_type_ids"][:, left]}
        expected = stock.model(inputs_embeds=embeds[:, left], **types).last_hidden_state
    close(output.hidden_states[-1][:, left], expected)


def test_a_mask_of_the_callers_own_in_a_compiled_graph():
    """Image tokens that it leaves out are text."""
    model, given = shortv_of(build("llava"), LAYERS), inputs("llava", "image")
    mask = visual_mask(given)
    mask[:, mask[0].nonzero()[3:, 0]] = False
    torch._dynamo.reset()
    with torch.no_grad():
        actual = torch.compile(model.forward, backend="eager")(**given, visual_mask=mask).logits
        close(actual, model(**given, visual_mask=mask).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_choice_of_the_last_token(reentrant):
    stock, given = build("llava"), inputs("llava", "images")

    def gradient(checkpointing):
        model = shortv_of(stock, [1], FASTV).requires_grad_(True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
        return model.get_input_embeddings().weight.grad

    close(gradient(True), gradient(False))


def test_apply_shortv_changes_all_or_nothing():
    model = build.__wrapped__("idefics3")
    layers = decoder(model).layers
    layers[2].forward = lambda *args, **kwargs: None
    before = [type(module) for module in (model, model.model, *layers)]
    with pytest.raises(ValueError, match="forward of its own"):
        shortv_hf.apply_shortv(model, [1])
    assert [type(module) for module in (model, model.model, *layers)] == before
    del layers[2].forward
    shortv_hf.apply_shortv(model, [1])
    with pytest.raises(ValueError, match="nope"):
        shortv_hf.apply_shortv(model, [2], {"method": "nope"})
    assert model.config.shortv_layers == [1] and model.config.visual_reduction is None


def test_a_method_that_changes_between_turns():
    """The last token's attention is that over the tokens that are left, also where a model makes masks by kind of layer."""
    first, second, whole = turns("gemma3", "tIttt", "tttt")
    model = shortv_of(build("gemma3"), [])
    with torch.no_grad(), model.using(visual_reduction={"method": "vtw", "k": 1}):
        cache = find_cache(model(**first, use_cache=True))
    seen, choose = [], Stream.choose

    def recording(self, *args):
        choose(self, *args)
        seen.extend(scores.sum() for scores in self.scores.values())

    visual = torch.ones_like(second["input_ids"], dtype=torch.bool)
    visual[:, -1] = False
    length = whole["input_ids"].shape[1]
    second = {"input_ids": second["input_ids"], "attention_mask": torch.ones(1, length, dtype=torch.long)}
    with torch.no_grad(), model.using(visual_reduction=FASTV), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "choose", recording)
        model(**second, visual_mask=visual, **{CACHE: cache})
    assert seen and 0 < float(seen[0]) <= 1 + 1e-5
