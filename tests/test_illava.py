"""iLLaVA as functions, in every family against the simple reference, in batches, and what it costs."""

import copy

import pytest
import torch
import transformers
from families import (
    FAMILIES,
    IMAGE,
    N_LAYERS,
    blocks,
    build,
    decoder,
    discard_updates,
    extended,
    greedy,
    make_inputs,
    shortv_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from illava_reference import merges_in_decoder, merging, tower_states

from shortv_hf import illava_defaults
from shortv_hf.reduction import METHODS, ModelSizes, TowerSizes, parse_visual_reduction, rank_in_groups, received
from shortv_hf.reduction_illava import ILLaVA, MergingInTower
from shortv_hf.tower import TowerMerging, tower_layers
from shortv_hf.upstream import find_cache, image_features
from shortv_hf.windows import Length, Lengths, Windows


LAYERS = [0, 2]
DECODER = [
    {"method": "illava", "vit_k": [], "llm_k": [3], "llm_r": 0.5},
    {"method": "illava", "vit_k": [], "llm_k": [3], "llm_r": 0.3, "score": "lse"},
]
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def illava(**options):
    return {"method": "illava", "vit_k": [], "llm_k": [], **options}


# ------------------------------------------------------------------------------------------------------ as functions


class TestInDecoder:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), r=st.sampled_from([0.3, 0.5, 0.7, 2, 3]))
    def test_equals_loops(self, data, r):
        rows = data.draw(st.lists(st.text("ab.", min_size=9, max_size=9), min_size=1, max_size=3))
        names = sorted({(i, letter) for i, row in enumerate(rows) for letter in row if letter != "."})
        if r >= 1 and any(rows[i].count(letter) <= r for i, letter in names):
            return
        number = {name: index for index, name in enumerate(names, 1)}
        groups = torch.tensor([[number.get((i, letter), 0) for letter in row] for i, row in enumerate(rows)])
        scores = torch.tensor(
            [data.draw(st.lists(st.integers(0, 4), min_size=9, max_size=9)) for _ in rows], dtype=torch.float32
        )
        states = torch.randn(*groups.shape, 2)
        method = ILLaVA(vit_k=[], llm_k=[1], llm_r=r)
        counts = torch.tensor([0, *(method.count(int((groups == n).sum())) for n in range(1, len(names) + 1))])
        found = method.reduce(scores, groups, counts)
        merged, kept = found.apply(states), found.kept
        for i, row in enumerate(rows):
            expected, gone = states[i].clone(), set()
            for letter in set(row) - {"."}:
                window = [j for j in range(9) if row[j] == letter]
                removed = min(round(len(window) * (1 - r)), len(window) - 1) if r < 1 else r
                order = sorted(window, key=lambda j: (-float(scores[i, j]), j))
                members = order[len(order) - removed - 1 :]
                weights = range(1, removed + 2)
                value = sum(w * states[i, j] for w, j in zip(weights, members, strict=True)) / sum(weights)
                expected[members[0]] = value
                gone |= set(members[1:])
            assert (~kept[i]).nonzero()[:, 0].tolist() == sorted(gone)
            close(merged[i][kept[i]], expected[kept[i]])

    @settings(max_examples=40, deadline=None)
    @given(data=st.data(), n=st.integers(1, 10))
    def test_ranks(self, data, n):
        scores = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
        groups = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
        found = rank_in_groups(torch.tensor([scores]).float(), torch.tensor([groups]))[0].tolist()
        for group in set(groups):
            order = sorted((i for i in range(n) if groups[i] == group), key=lambda i: (-scores[i], i))
            assert [found[i] for i in order] == list(range(len(order)))

    def test_how_many_go(self):
        assert [ILLaVA(llm_r=0.7).removed(n) for n in (0, 1, 2, 5, 10, 1064)] == [0, 0, 1, 2, 3, 319]
        assert ILLaVA(llm_r=0.5).removed(5) == 2 and ILLaVA(llm_r=0.5).removed(7) == 4  # half to even
        assert ILLaVA(llm_r=0.01).removed(4) == 3  # the one that takes the others in stays
        assert ILLaVA(llm_r=1).removed(9) == 0 and ILLaVA(llm_r=4).removed(9) == 4
        with pytest.raises(ValueError, match="llm_r is 9, and an image has 9 tokens"):
            ILLaVA(llm_r=9).removed(9)


class TestInTower:
    def test_how_many_go(self):
        quarter = MergingInTower((0,), 0.16, False)
        assert [quarter.removed(n, 4) for n in (4, 24, 25, 49, 300, 320)] == [0, 0, 4, 4, 48, 48]
        assert (
            MergingInTower((0,), 92, False).removed(729, 1) == 92
            and MergingInTower((0,), 10, False).removed(50, 4) == 8
        )
        with pytest.raises(ValueError, match="vit_r is 20, and a picture has 16 patches"):
            MergingInTower((0,), 20, False).removed(16, 1)

    @settings(max_examples=20, deadline=None)
    @given(n=st.integers(1, 12), heads=st.integers(1, 3), seed=st.integers(0, 99))
    def test_attention_received_in_blocks(self, n, heads, seed):
        generator = torch.Generator().manual_seed(seed)
        query, key = (torch.randn(2, heads, n, 4, generator=generator) for _ in range(2))
        found = received(query, key, 0.5)
        close(found, (query @ key.transpose(2, 3) * 0.5).softmax(-1).mean(1).mean(1))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(st.sampled_from("iv"), st.integers(1, 4), st.integers(0, 2)), max_size=4), min_size=1, max_size=3),
    ends=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_windows_equal_loops(rows, ends, seed):
    """Images and videos one behind the other or with text between, some of whose last tokens are dropped."""
    generator = torch.Generator().manual_seed(seed)
    length = max(sum(n + text for _, n, text in row) for row in rows) + 1
    masks = {kind: torch.zeros(len(rows), length, dtype=torch.bool) for kind in ("image", "video")}
    expected, left = torch.zeros(len(rows), length, dtype=torch.long), torch.ones(len(rows), length, dtype=torch.bool)
    lengths, spans = Lengths(image=[], video=[]), {"image": [], "video": []}
    for i, row in enumerate(rows):
        place = length - sum(n + text for _, n, text in row)  # padded on the left
        for letter, n, text in row:
            kind = {"i": "image", "v": "video"}[letter]
            masks[kind][i, place : place + n] = True
            kept = int(torch.randint(1, n + 1, (1,), generator=generator))
            left[i, place + kept : place + n] = False
            lengths[kind].append(Length(n, ends))
            spans[kind].append((i, range(place, place + kept - ends)))
            place += n + text
    for number, (i, span) in enumerate(spans["image"] + spans["video"], 1):
        expected[i, list(span)] = number
    windows = Windows(masks["image"] | masks["video"], masks, lengths)
    assert windows.groups(left).tolist() == expected.tolist()


def test_runs_where_nobody_says_how_long_images_are():
    visual = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    real = torch.ones_like(visual)
    expected = [[1, 1, 0, 2, 0], [3, 0, 0, 4, 4]]
    assert Windows(visual).groups(real).tolist() == expected
    of_tiles = Windows(visual, {"image": visual}, Lengths(image=[]))
    assert of_tiles.groups(real).tolist() == expected
    other = Windows(visual, {"image": visual}, Lengths(image=[Length(9, False)]))
    with pytest.raises(ValueError, match=r"cannot be told apart: .* \[9\] tokens, 9 in all, and it has places for 6"):
        other.groups(real)


# ----------------------------------------------------------------------------------------------------------- options


def sizes(patches=729, unit=1, grid=True, layers=26, decoder=28, **fields):
    tower = TowerSizes(layers, patches, unit, grid)
    return ModelSizes(decoder, layers, "siglip_vision_model", None, True, False, tower=tower, **fields)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"vit_k": 5}, "vit_k is 5"),
            ({"vit_k": [5, 5]}, "names a layer twice"),
            ({"vit_k": ["5"]}, "vit_k is"),
            ({"vit_k": [26]}, "vit_k holds 26; the valid range is the integers 0 to 25"),
            ({"vit_r": 0}, "vit_r is 0"),
            ({"vit_r": 1.5}, "vit_r is 1.5"),
            ({"vit_r": True}, "vit_r is True"),
            ({"vit_r": 90}, "leave 369 of 729 patches.*a square number.*vit_r could be 92 or "),
            ({"vit_r": 800}, "vit_r is 800"),
            ({"llm_k": [0]}, "llm_k holds 0; the valid range is the integers 1 to 27"),
            ({"llm_k": [28]}, "llm_k holds 28"),
            ({"llm_r": 0}, "llm_r is 0"),
            ({"llm_r": -0.5}, "llm_r is -0.5"),
            ({"llm_r": float("nan")}, "llm_r is nan"),
            ({"vit_r": float("nan")}, "vit_r is nan"),
            ({"score": "received"}, "score is 'received'; valid are attention and lse"),
            ({"r": 92}, "no option 'r'"),
        ],
        ids=str,
    )
    def test_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            parse_visual_reduction({"method": "illava", **options}, sizes())

    def test_accepted(self):
        released = parse_visual_reduction({"method": "illava"}, sizes())
        assert released == ILLaVA((5, 6, 7, 8), 92, (8,), 0.7, "attention")
        assert released.in_tower.left(729, 1) == 361 and released.looks_at_last_token
        video = parse_visual_reduction({"method": "illava", "vit_k": [2, 3, 4, 5, 6, 7, 8], "vit_r": 80}, sizes())
        assert video.in_tower.left(729, 1) == 169
        half = parse_visual_reduction(illava(llm_k=[3]), sizes())
        assert half.in_tower is None and half.in_decoder is half and not half.cuts_images
        other = parse_visual_reduction(illava(vit_k=[5, 6, 7, 8]), sizes())
        assert other.in_decoder is None and other.cuts_images and not other.looks_at_last_token
        for nothing in (illava(), illava(llm_k=[3], llm_r=1)):
            assert parse_visual_reduction(nothing, sizes()).identity(sizes())
            assert parse_visual_reduction(nothing, sizes()).first_layer in (0, 3)

    @FAMILY
    def test_what_is_left_out_is_the_familys(self, family):
        """However the method is spelled."""
        config = build(family).config
        own = parse_visual_reduction(illava_defaults(config), ModelSizes.of(config))
        assert parse_visual_reduction({"method": "illava"}, ModelSizes.of(config)) == own
        other = parse_visual_reduction({"method": "illava", "llm_r": 0.4}, ModelSizes.of(config))
        assert (other.vit_k, other.vit_r, other.llm_k, other.llm_r) == (own.vit_k, own.vit_r, own.llm_k, 0.4)
        assert ("vit_r" in illava_defaults(config)) == bool(own.vit_k)

    def test_what_would_do_nothing_or_leave_nothing(self):
        config = build("qwen2_vl").config
        with pytest.raises(ValueError, match="vit_r is 3; a visual token is made of 4 patches"):
            parse_visual_reduction(illava(vit_k=[0], vit_r=3), ModelSizes.of(config))
        config = build("llava").config
        with pytest.raises(ValueError, match="vit_r is 0.01, of 16 patches not one"):
            parse_visual_reduction(illava(vit_k=[0], vit_r=0.01), ModelSizes.of(config))
        for options in (illava(llm_k=[1], llm_r=16), illava(llm_k=[1, 2, 3], llm_r=6)):
            with pytest.raises(ValueError, match="llm_r is .*, of which one must be left"):
                parse_visual_reduction(options, ModelSizes.of(config))

    def test_sides_that_pixels_are_shuffled_of(self):
        shuffled = sizes(1024, unit=4)
        assert parse_visual_reduction(illava(vit_k=[1], vit_r=124), shuffled).in_tower.left(1024, 4) == 900
        with pytest.raises(ValueError, match="the square of a multiple of 2.*could be 124 or"):
            parse_visual_reduction(illava(vit_k=[1], vit_r=63), shuffled)  # rounded down to 60: 31 squared is odd

    def test_features_that_are_added_later(self):
        with pytest.raises(ValueError, match="llm_k is 2.*3 to 28"):
            parse_visual_reduction(illava(llm_k=[2]), sizes(deepstack=3))

    @FAMILY
    def test_towers(self, family):
        config = build(family).config
        known = {"llava", "llava_next", "llava_onevision", "qwen2_vl", "internvl"}
        assert (TowerSizes.of(config) is not None) == (family in known)
        if family not in known:
            with pytest.raises(ValueError, match="cannot be merged in this model's vision tower.*vit_k = \\[\\]"):
                parse_visual_reduction(illava(vit_k=[0], vit_r=4), ModelSizes.of(config))

    def test_several_feature_layers(self):
        config = copy.deepcopy(build("llava").config)
        config.vision_feature_layer = [-2, -1]
        assert TowerSizes.of(config) is None

    def test_token_before_the_patches(self):
        config = copy.deepcopy(build("llava").config)
        config.vision_feature_select_strategy = "full"
        with pytest.raises(ValueError, match="'full'"):
            parse_visual_reduction(illava(vit_k=[0], vit_r=4), ModelSizes.of(config))


class TestDefaults:
    def released(self, family, layers=28):
        if family == "qwen2_vl":
            return transformers.Qwen2VLConfig()
        vision = transformers.SiglipVisionConfig(
            image_size=384, patch_size=14, num_hidden_layers=26, hidden_size=1152, vision_use_head=False
        )
        text = transformers.Qwen2Config(num_hidden_layers=layers)
        return transformers.LlavaOnevisionConfig(vision_config=vision, text_config=text)

    @pytest.mark.parametrize("layers", [24, 28, 80])
    def test_onevision(self, layers):
        config = self.released("llava_onevision", layers)
        image = {"method": "illava", "vit_k": [5, 6, 7, 8], "vit_r": 92, "llm_k": [8], "llm_r": 0.7}
        assert illava_defaults(config, "image") == illava_defaults(config, kind="image") == image
        assert illava_defaults(config, "video") == {**image, "vit_k": [3, 4, 5, 6], "llm_k": [2]}

    def test_qwen2_vl(self):
        config = self.released("qwen2_vl")
        expected = {"method": "illava", "vit_k": [12, 13, 14, 15], "vit_r": 0.16, "llm_k": [6, 7, 8], "llm_r": 0.9}
        assert illava_defaults(config, "image") == illava_defaults(config, "video") == expected

    @FAMILY
    @pytest.mark.parametrize("kind", ["image", "video"])
    def test_small_models(self, family, kind):
        """Valid whatever the sizes are, and only where a tower is published for are patches merged."""
        config = build(family).config
        options = illava_defaults(config, kind)
        assert parse_visual_reduction(options, ModelSizes.of(config)) is not None
        assert bool(options["vit_k"]) == (family in ("llava_onevision", "qwen2_vl"))
        assert METHODS["illava"].defaults(config, kind) == options
        assert METHODS["fastv"].defaults(config, kind) == {"method": "fastv"}

    def test_another_kind(self):
        with pytest.raises(ValueError, match="kind is 'audio'"):
            illava_defaults(self.released("qwen2_vl"), "audio")


# ------------------------------------------------------------------------------------- the decoder, in every family


def windows_of(family, row):
    """Positions of the tokens of each image or video of a row, without a newline that ends it alone."""
    found, place = [], 0
    for letter, block in zip(row, blocks(family, row), strict=True):
        visual = [place + i for i, token in enumerate(block.tokens) if token in (IMAGE, IMAGE + 1)]
        if letter == "V" and family == "llava_onevision":
            visual = visual[:-1]
        if letter in "IV":
            found.append(visual)
        place += len(block.tokens)
    return found


@FAMILY
@pytest.mark.parametrize("row", ["ttItttIt", "tttVtt"])
@pytest.mark.parametrize("options", [illava(llm_k=[3], llm_r=0.5), illava(llm_k=[3, 1], llm_r=0.6)], ids=str)
def test_decoder_equals_the_simple_reference(family, row, options):
    if "V" in row and FAMILIES[family].video is None:
        pytest.skip("no videos")
    if family == "qwen3_vl":
        options = illava(llm_k=[3], llm_r=0.6)
    given, stock = make_inputs(family, [row]), build(family, "eager")
    visual = (given["input_ids"] == IMAGE) | (given["input_ids"] == IMAGE + 1)
    n = visual.shape[1]

    def attentions():
        with torch.no_grad(), discard_updates(stock, LAYERS, visual):
            return stock(**given, output_attentions=True).attentions

    layers = decoder(stock).layers
    merges = merges_in_decoder(attentions, layers, windows_of(family, row), options, n - 1)
    assert merges
    model = shortv_of(build(family), LAYERS, options)
    output = greedy(model, given, return_dict_in_generate=True, output_logits=True)
    whole = extended(family, given, output.sequences[:, n:])
    longer = torch.nn.functional.pad(visual, (0, whole["input_ids"].shape[1] - n))
    with torch.no_grad(), discard_updates(stock, LAYERS, longer), merging(layers, merges):
        expected = stock(**whole).logits[0]
    close(torch.stack(output.logits)[:, 0], expected[n - 1 : -1])
    lengths = [layer.keys.shape[2] for layer in find_cache(output).layers]
    gone = [sum(len(m.members) - 1 for m in merges if m.k <= layer) for layer in range(N_LAYERS)]
    assert lengths == [whole["input_ids"].shape[1] - 1 - each for each in gone]


ROWS = ["ttItttIt", "tt", "tIt", "tttIIt"]


@FAMILY
@pytest.mark.parametrize("options", DECODER, ids=str)
@pytest.mark.parametrize("layers", [[], LAYERS], ids=str)
def test_batches(family, options, layers):
    """Padded rows equal solo rows; one row is text, in one an image follows the other without text between."""
    model, batch = shortv_of(build(family), layers, options), make_inputs(family, ROWS)
    ids = greedy(model, batch)[:, -6:]
    with torch.no_grad():
        logits = model(**batch).logits
    for i, row in enumerate(ROWS):
        solo = make_inputs(family, [row], seed=i)
        text = solo["input_ids"][0] < IMAGE
        with torch.no_grad():
            close(logits[i][batch["attention_mask"][i].bool()][text], model(**solo).logits[0][text])
        assert torch.equal(ids[i : i + 1], greedy(model, solo)[:, -6:])


@FAMILY
def test_text_alone_is_the_stock_model(family):
    stock, ids = build(family), torch.tensor([[3, 4, 5, 6]])
    options = DECODER[0] if TowerSizes.of(stock.config) is None else tower_options(family)
    model = shortv_of(stock, [], options)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_prompt_in_parts_is_refused():
    model, given = shortv_of(build("llava"), [], DECODER[0]), make_inputs("llava", ["ttIt"])
    with pytest.raises(ValueError, match="illava ranks visual tokens.*prefill_chunk_size"):
        model.generate(**given, prefill_chunk_size=4, max_new_tokens=2)


# -------------------------------------------------------------------------------------------------------- the tower


TOWER = {"llava": 3, "llava_next": 7, "llava_onevision": 7, "internvl": 12, "qwen2_vl": 0.3}


def tower_options(family, **more):
    return illava(vit_k=[0] if family != "qwen2_vl" else [0, 1], vit_r=TOWER[family], **more)


def merged_tower(model, given, kind="image"):
    """What the tower of `model` merges, what its last used layer returns, and the features of Qwen2-VL's."""
    sizes, outputs = ModelSizes.of(model.config), []
    reduction = parse_visual_reduction(model.config.visual_reduction, sizes)
    last = tower_layers(model)[sizes.tower.layers - 1]
    hook = last.register_forward_hook(lambda module, args, output: outputs.append(output))
    pixels = given["pixel_values" if kind == "image" else "pixel_values_videos"]
    features = None
    with TowerMerging(model.model, reduction.in_tower, sizes.tower) as found, torch.no_grad():
        if hasattr(model.model, "visual"):
            output = model.model.visual(pixels, grid_thw=given[f"{kind}_grid_thw"])
            features = getattr(output, "pooler_output", output)
        else:
            model.model.vision_tower(pixels.flatten(0, -4))
    hook.remove()
    states = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    return found, states, features


@pytest.mark.parametrize("score", ["attention", "lse"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl"])
def test_towers_equal_loops(family, score):
    stock = build(family)
    model = shortv_of(stock, [], tower_options(family, score=score))
    given = make_inputs(family, ["tItIt"])
    found, states, _ = merged_tower(model, given)
    layers = tower_layers(stock)
    sizes = TowerSizes.of(model.config)
    before = []
    hook = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: before.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        stock.model.vision_tower(given["pixel_values"].flatten(0, -4))
    hook.remove()
    for i, picture in enumerate(before[0]):
        with torch.no_grad():
            expected, left = tower_states(
                layers[: sizes.layers], picture, model.config.visual_reduction, others=sizes.others, unit=sizes.unit
            )
        assert found.left[i].tolist() == left
        close(states[i], expected)


@pytest.mark.parametrize("score", ["attention", "lse"])
@pytest.mark.parametrize(("kind", "row"), [("image", "tItIt"), ("video", "tVt")])
def test_qwens_tower_equals_loops(kind, row, score):
    """Frames by themselves; what is left of one takes the first of its places."""
    stock = build("qwen2_vl")
    model = shortv_of(stock, [], tower_options("qwen2_vl", score=score))
    given = make_inputs("qwen2_vl", [row])
    found, _, features = merged_tower(model, given, kind)
    seen = {}

    def note(module, args, kwargs):
        seen.update(states=args[0] if args else kwargs["hidden_states"], tables=kwargs["position_embeddings"])

    layers = tower_layers(stock)
    hook = layers[0].register_forward_pre_hook(note, with_kwargs=True)
    pixels = given["pixel_values" if kind == "image" else "pixel_values_videos"]
    with torch.no_grad():
        stock.model.visual(pixels, grid_thw=given[f"{kind}_grid_thw"])
    hook.remove()
    frames = [h * w for t, h, w in given[f"{kind}_grid_thw"].tolist() for _ in range(t)]
    start, place = 0, 0
    for i, n in enumerate(frames):
        part = slice(start, start + n)
        tables = [table[part] for table in seen["tables"]]
        with torch.no_grad():
            states, left = tower_states(
                layers, seen["states"][part], model.config.visual_reduction, unit=4, tables=tables
            )
            expected = stock.model.visual.merger(states)
        assert found.left[i].tolist() == left and len(left) < n
        close(features[place : place + len(expected)], expected)
        assert torch.isneginf(features[place + len(expected) : place + n // 4]).all()
        start, place = start + n, place + n // 4


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TOWER)
@pytest.mark.parametrize("layers", [[], LAYERS], ids=str)
def test_both_halves_in_batches(family, layers, attn):
    """Padded rows equal solo rows, whatever the attention implementation."""
    options = tower_options(family, llm_k=[3], llm_r=0.5)
    model, batch = shortv_of(build(family, attn), layers, options), make_inputs(family, ROWS)
    output = greedy(model, batch, return_dict_in_generate=True)
    for i, row in enumerate(ROWS):
        solo = make_inputs(family, [row], seed=i)
        assert torch.equal(output.sequences[i : i + 1, -6:], greedy(model, solo)[:, -6:])
    lengths = [layer.keys.shape[2] for layer in find_cache(output).layers]
    assert lengths[0] == lengths[2] > lengths[3] and lengths[0] < output.sequences.shape[1] - 1


@pytest.mark.parametrize("family", TOWER)
def test_tower_alone_cached_and_not(family):
    model, given = shortv_of(build(family), LAYERS, tower_options(family)), make_inputs(family, ROWS)
    assert torch.equal(greedy(model, given), greedy(model, given, use_cache=False))


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_shorter_features_are_the_language_models_input(family):
    """What is left of each image, and contiguous positions."""
    stock = build(family)
    model, given = shortv_of(stock, [], tower_options(family)), make_inputs(family, ["ttIt"])
    with torch.no_grad():
        marked = torch.cat([each for each in image_features(model.model.get_image_features(given["pixel_values"]))])
        features = marked[~torch.isneginf(marked).all(-1)]
        embeds = stock.get_input_embeddings()(given["input_ids"])[0]
        visual = given["input_ids"][0] == IMAGE
        first = int(visual.nonzero()[0, 0])
        shorter = torch.cat([embeds[:first], features, embeds[first + int(visual.sum()) :]])
        expected = stock(inputs_embeds=shorter[None]).logits[0, -1]
        assert len(features) < int(visual.sum())
        close(model(**given).logits[0, -1], expected)


def test_no_part_of_the_tower_is_changed():
    """Outside of a pass, hooks do nothing; and the config is the one that it was."""
    model, given = (
        shortv_of(build("llava_onevision"), [], tower_options("llava_onevision")),
        make_inputs("llava_onevision", ["tIt"]),
    )
    before = copy.deepcopy(model.config.to_dict())
    with torch.no_grad():
        model(**given)
        assert model.config.to_dict() == before
        with model.using(visual_reduction=None):
            assert torch.equal(model(**given).logits, build("llava_onevision")(**given).logits)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl"])
def test_gradients_equal_those_of_loops(family):
    stock = copy.deepcopy(build(family))
    model = shortv_of(stock, [], tower_options(family))
    given, sizes, before = make_inputs(family, ["tIt"]), TowerSizes.of(model.config), []
    pixels = given["pixel_values"].flatten(0, -4)
    layers = tower_layers(stock)
    hook = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: before.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    stock.model.vision_tower(pixels)
    hook.remove()
    loops = [
        tower_states(
            layers[: sizes.layers], each, model.config.visual_reduction, others=sizes.others, unit=sizes.unit
        )[0]
        for each in before[0]
    ]
    torch.stack(loops).square().sum().backward()
    outputs = []
    last = tower_layers(model)[sizes.layers - 1]
    last.register_forward_hook(lambda module, args, output: outputs.append(output))
    reduction = parse_visual_reduction(model.config.visual_reduction, ModelSizes.of(model.config))
    with TowerMerging(model.model, reduction.in_tower, sizes):
        model.model.vision_tower(pixels)
    states = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    states.square().sum().backward()
    expected, compared = dict(stock.model.vision_tower.named_parameters()), 0
    for name, weight in model.model.vision_tower.named_parameters():
        if expected[name].grad is not None:
            torch.testing.assert_close(weight.grad, expected[name].grad, atol=1e-3, rtol=1e-3)
            compared += 1
    assert compared > 10


def test_gradient_checkpointing_of_the_tower_is_refused():
    model, given = (
        shortv_of(build("llava_onevision"), [], tower_options("llava_onevision")),
        make_inputs("llava_onevision", ["tIt"]),
    )
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(**given, use_cache=False)
    model.gradient_checkpointing_disable()
    model(**given, use_cache=False)


def adds_to_a_copy(self, hidden_states, attention_mask=None, **kwargs):
    """A SigLIP layer as it could become."""
    states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), attention_mask=attention_mask)[0]
    return states.clone() + self.mlp(self.layer_norm2(states))


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "qwen2_vl"])
def test_layers_of_untested_versions_are_tried(family, monkeypatch):
    monkeypatch.setattr("shortv_hf.tower.is_newer_than_tested", lambda: True)
    monkeypatch.setattr("shortv_hf.tower._checked", set())
    model, given = shortv_of(build(family), [], tower_options(family)), make_inputs(family, ["tItIt"])
    with torch.no_grad():
        expected = model(**given).logits
        assert torch.equal(model(**given).logits, expected)
        if family == "llava_onevision":
            monkeypatch.setattr("shortv_hf.tower._checked", set())
            monkeypatch.setattr(type(tower_layers(model)[0]), "forward", adds_to_a_copy)
            with pytest.raises(ValueError, match="cannot run on Transformers .*SiglipEncoderLayer"):
                model(**given)
