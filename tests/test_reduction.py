"""Methods as functions: maps of tokens, options and sizes, each against plain loops; and features of other families."""

import ast
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from reduction_reference import prumerge

import shortv_hf
from shortv_hf.reduction import (
    METHODS,
    ClsAttention,
    ModelSizes,
    Patches,
    TokenMap,
    TowerSizes,
    is_dropped,
    keep_highest,
    parse_visual_reduction,
)
from shortv_hf.reduction_prumerge import merge_neighbours
from shortv_hf.upstream import image_features
from shortv_hf.vision import listen, reduced_features, reduced_images


PACKAGE = Path(shortv_hf.__file__).parent
CPU = torch.device("cpu")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def naive(tokens: TokenMap, states: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """One row, entry by entry."""
    result, kept = torch.zeros_like(states), [False] * tokens.n
    for i, place in enumerate(tokens.target.tolist()):
        if place >= 0:
            source = i if tokens.source is None else int(tokens.source[i])
            result[place] += states[source] * (1 if tokens.weight is None else tokens.weight[i])
            kept[place] = True
    return result, kept


class TestTokenMap:
    @settings(max_examples=50, deadline=None)
    @given(n=st.integers(1, 9), entries=st.integers(0, 20), seed=st.integers(0, 99), weighted=st.booleans())
    def test_equals_loops(self, n, entries, seed, weighted):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(-1, n, (3, entries), generator=generator)
        source = torch.randint(0, n, (3, entries), generator=generator)
        weight = torch.rand(3, entries, generator=generator) if weighted else None
        states = torch.randn(3, n, 2, generator=generator)
        tokens = TokenMap(target, n, weight, source)
        applied, kept = tokens.apply(states), tokens.kept
        for i in range(3):
            row = TokenMap(target[i], n, None if weight is None else weight[i], source[i])
            expected, held = naive(row, states[i])
            close(applied[i], expected)
            close(row.apply(states[i]), expected)
            assert kept[i].tolist() == row.kept.tolist() == held

    @settings(max_examples=20, deadline=None)
    @given(n=st.integers(1, 9), seed=st.integers(0, 99))
    def test_each_token_once(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = TokenMap(torch.randint(-1, n, (n,), generator=generator), n, torch.rand(n, generator=generator))
        states = torch.randn(n, 4, generator=generator)
        close(tokens.apply(states), naive(tokens, states)[0])

    def test_states_themselves_where_nothing_is_merged(self):
        tokens, states = TokenMap(torch.tensor([0, -1, 2]), 3), torch.randn(3, 2)
        assert tokens.apply(states) is states and tokens.kept.tolist() == [True, False, True]

    def test_sums_are_float32(self):
        tokens = TokenMap(torch.zeros(4096, dtype=torch.long), 4096, torch.full((4096,), 1 / 4096))
        merged = tokens.apply(torch.ones(4096, 1, dtype=torch.float16))
        assert merged.dtype == torch.float16 and merged[0] == 1 and not merged[1:].any()

    def test_gradients(self):
        states = torch.randn(3, 2, requires_grad=True)
        TokenMap(torch.tensor([0, 0, -1]), 3, torch.tensor([0.5, 0.25, 1.0])).apply(states).sum().backward()
        assert states.grad.tolist() == [[0.5, 0.5], [0.25, 0.25], [0, 0]]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), n=st.integers(1, 12))
def test_keep_highest(data, n):
    scores = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    candidates = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    count = data.draw(st.integers(0, sum(candidates)))
    best = sorted((i for i in range(n) if candidates[i]), key=lambda i: (-scores[i], i))[:count]
    keep = keep_highest(torch.tensor([scores]).float(), torch.tensor([candidates]).long(), torch.tensor([9, count]))
    assert keep[0].nonzero()[:, 0].tolist() == sorted(best)


class TestStream:
    GROUPS = torch.tensor([[0, 1, 1, 1, 0], [2, 0, 0, 2, 0]])

    def test_fastv(self):
        scores = torch.tensor([[9, 0.1, 0.3, 0.2, 9], [0.1, 9, 9, 0.2, 9]])
        tokens = METHODS["fastv"](k=1, ratio=0.5).reduce(scores, self.GROUPS, torch.tensor([0, 2, 1]))
        assert tokens.target.tolist() == [[0, -1, 2, 3, 4], [-1, 1, 2, 3, 4]] and tokens.weight is None

    @pytest.mark.parametrize("options", [{"method": "fastv", "k": 1, "ratio": 1}, {"method": "vtw", "k": 1}], ids=str)
    def test_all_dropped(self, options):
        reduction = parse_visual_reduction(options, ModelSizes.of(make_config()))
        tokens = reduction.reduce(None, self.GROUPS, torch.tensor([0, 0, 0]))
        assert not reduction.needs_scores and reduction.first_layer == 1
        assert tokens.target.tolist() == [[0, -1, -1, -1, 4], [-1, 1, 2, -1, 4]]

    @pytest.mark.parametrize("method", ["fastv", "vtw"])
    def test_not_before_the_last_feature_is_added(self, method):
        sizes = ModelSizes(8, 4, "some", None, False, False, deepstack=3)
        with pytest.raises(ValueError, match="k is 2; .*valid range is the integers 3 to 8"):
            parse_visual_reduction({"method": method, "k": 2}, sizes)
        assert parse_visual_reduction({"method": method, "k": 3}, sizes).k == 3
        assert all(options["k"] >= 3 for options in METHODS[method].candidates(sizes, 4))


def newline_patches() -> Patches:
    """Two tiles of 2 x 2 with a newline token after the first row of the second, whose last patch is padding."""
    tile, patch = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1]), torch.tensor([0, 1, 2, 3, 0, 1, -1, 2])
    return Patches(tile, patch, 2, 2, 2)


class TestImages:
    @settings(max_examples=20, deadline=None)
    @given(n=st.integers(4, 60), seed=st.integers(0, 99), plus=st.booleans(), peak=st.integers(0, 12))
    def test_prumerge(self, n, seed, plus, peak):
        generator = torch.Generator().manual_seed(seed)
        features, queries, keys = (torch.randn(n + 1, 8, generator=generator) for _ in range(3))
        keys[1 : 1 + min(peak, n)] += queries[0]
        image = Patches.without_grid(n, CPU)
        image.vision = [ClsAttention(queries[None, 0], keys[None], heads=2)]
        tokens = METHODS["prumerge_plus" if plus else "prumerge"]().reduce(image)
        expected = prumerge(features[1:], queries, keys, plus)
        close(tokens.apply(features[1:])[: len(expected)], expected)
        assert tokens.kept.nonzero()[:, 0].tolist() == list(range(len(expected)))

    @settings(max_examples=30, deadline=None)
    @given(n=st.integers(2, 50), seed=st.integers(0, 99), data=st.data())
    def test_merge_neighbours_never_grows(self, n, seed, data):
        kept = data.draw(st.lists(st.integers(0, n - 1), unique=True))
        generator = torch.Generator().manual_seed(seed)
        features, attention = torch.randn(n, 3, generator=generator), torch.rand(n, generator=generator)
        tokens = merge_neighbours(attention, features, torch.tensor(kept, dtype=torch.long))
        assert int(tokens.kept.sum()) == min(len(kept) + 1, n)
        if not kept:
            close(tokens.apply(features)[0], (attention[:, None] * features).sum(0))

    def test_downsample(self):
        features = torch.arange(16.0)[:, None].repeat(1, 2)
        tokens = METHODS["downsample"](factor=2).reduce(Patches.of_grid(1, 4, 4, CPU))
        assert tokens.kept.nonzero()[:, 0].tolist() == [0, 2, 8, 10]
        assert tokens.apply(features)[tokens.kept][:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
    def test_downsample_of_any_grid(self, frames, height, width, factor):
        grid = torch.randn(frames, height, width, 2)
        tokens = METHODS["downsample"](factor=factor).reduce(Patches.of_grid(frames, height, width, CPU, video=True))
        merged = tokens.apply(grid.flatten(0, 2)).view_as(grid)
        kept = tokens.kept.view(frames, height, width)
        for y in range(height):
            for x in range(width):
                is_first = y % factor == 0 and x % factor == 0
                assert (kept[:, y, x] == is_first).all()
                if is_first:
                    close(merged[:, y, x], grid[:, y : y + factor, x : x + factor].mean((1, 2)))

    def test_downsample_without_a_grid(self):
        with pytest.raises(ValueError, match="needs a grid.* 7 tokens"):
            METHODS["downsample"]().reduce(Patches.without_grid(7, CPU))

    @pytest.mark.parametrize("number", [1, 3, 4])
    def test_tiles_and_newlines(self, number):
        image = newline_patches()
        image.vision = [ClsAttention(torch.randn(2, 4), torch.randn(2, 5, 4), heads=2)]
        for method, options in (("random", {}), ("vtc_cls", {"layer": 0})):
            kept = METHODS[method](token_num=number, **options).reduce(image).kept
            assert kept[image.patch < 0].all()
            for tile, there in ((0, 4), (1, 3)):
                assert kept[(image.tile == tile) & (image.patch >= 0)].sum() == min(number, there)

    @pytest.mark.parametrize("video", [False, True])
    def test_random_keeps_so_many_of_a_video(self, video):
        image = Patches.of_grid(3, 2, 2, CPU, video)
        assert METHODS["random"](token_num=2).reduce(image).kept.sum() == (2 if video else 6)
        assert METHODS["random"](token_num=99).reduce(image).kept.all()


def test_left():
    sizes, tiled = ModelSizes.of(make_config()), ModelSizes.of(make_config("llava_next"))
    varying = ModelSizes(4, 2, "some", None, False, False)
    for options, expected in (
        ({"method": "fastv", "k": 1, "ratio": 0.75}, (8, 12, 10)),
        ({"method": "vtw", "k": 1}, (0, 0, 0)),
        ({"method": "random", "token_num": 5}, (10, None, None)),
        ({"method": "downsample", "factor": 2}, (8, 12, None)),
        ({"method": "prumerge"}, (None, None, None)),
    ):
        reduction = METHODS[options["method"]](**{name: value for name, value in options.items() if name != "method"})
        found = tuple(reduction.left(v, each) for v, each in ((32, sizes), (50, tiled), (40, varying)))
        assert found == expected
    assert METHODS["random"](token_num=5).left(50, tiled, tiles=3) == 3 * 5 + 2  # and two newlines
    assert METHODS["random"](token_num=5).left(40, varying, tiles=2) == 10


# Other families

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
ROPE = {"rope_scaling" if transformers.__version__.startswith("4") else "rope_parameters": ROPE}
QWEN = {
    "depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def stock_config(family: str):
    if family == "gemma3":
        text = transformers.Gemma3TextConfig(**TEXT, head_dim=8)
        tower = transformers.SiglipVisionConfig(**TOWER, vision_use_head=False)
        return transformers.Gemma3Config(vision_config=tower, text_config=text, mm_tokens_per_image=4)
    if family == "internvl":
        tower = transformers.InternVLVisionConfig(**{**TOWER, "image_size": [56, 56], "patch_size": [7, 7]})
        text = transformers.Qwen2Config(**TEXT)
        return transformers.InternVLConfig(vision_config=tower, text_config=text, image_seq_length=16)
    if family == "llava_onevision":
        return transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
            text_config=transformers.Qwen2Config(**TEXT),
            image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]],
            vision_feature_select_strategy="full",
        )
    text = {**TEXT, **ROPE}
    if family == "qwen2_vl":
        return transformers.Qwen2VLConfig(vision_config={**QWEN, "embed_dim": 32, "mlp_ratio": 2}, text_config=text)
    more = {"out_hidden_size": 32, "intermediate_size": 48}
    if family == "qwen2_5_vl":
        tower = {**QWEN, **more, "window_size": 28, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(vision_config=tower, text_config=text)
    tower = {**QWEN, **more, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
    return transformers.Qwen3VLConfig(vision_config=tower, text_config={**text, "head_dim": 8})


SIZES = {
    "gemma3": ModelSizes(4, 3, "siglip_vision_model", 4, False, False),
    "internvl": ModelSizes(4, 3, "internvl_vision", 16, False, False, tower=TowerSizes(3, 64, 4, True, 1)),
    "llava_onevision": ModelSizes(4, 3, "siglip_vision_model", None, True, False, tower=TowerSizes(3, 16, 1, True)),
    "qwen2_vl": ModelSizes(4, 3, "qwen2_vl", None, False, False, tower=TowerSizes(3, None, 4)),
    "qwen2_5_vl": ModelSizes(4, 3, "qwen2_5_vl", None, False, False),
    "qwen3_vl": ModelSizes(4, 3, "qwen3_vl", None, False, False, deepstack=2),
}
MODELS = {
    "gemma3": "Gemma3Model", "internvl": "InternVLModel", "llava_onevision": "LlavaOnevisionModel",
    "qwen2_vl": "Qwen2VLModel", "qwen2_5_vl": "Qwen2_5_VLModel", "qwen3_vl": "Qwen3VLModel",
}  # fmt: skip
FAMILY = pytest.mark.parametrize("family", list(SIZES))


def build(family: str):
    """A tiny stock model without head, and what its features are made of: images, and their grids or sizes."""
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[family])(stock_config(family)).eval()
    if family == "gemma3":
        torch.nn.init.normal_(model.multi_modal_projector.mm_input_projection_weight)
    if family.startswith("qwen"):
        grid = torch.tensor([[1, 6, 10], [1, 4, 4]])
        return model, {"pixel_values": torch.randn(76, 3 * 2 * 49), "image_grid_thw": grid}, {"grid_thw": grid}
    if family == "llava_onevision":
        sizes = torch.tensor([[28, 56], [28, 28]])
        return model, {"pixel_values": torch.randn(2, 3, 3, 28, 28), "image_sizes": sizes}, {"image_sizes": sizes}
    side = 56 if family == "internvl" else 28
    return model, {"pixel_values": torch.randn(2, 3, side, side)}, {}


def features_of(model, images: dict) -> list[torch.Tensor]:
    if isinstance(model.config, transformers.LlavaOnevisionConfig):
        defaults = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        images = {**images, **defaults}
    if isinstance(model.config, transformers.InternVLConfig):
        images = {**images, "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    output = model.get_image_features(**images)
    if isinstance(model.config, transformers.Qwen3VLConfig) and isinstance(output, tuple):
        output = output[0]
    return image_features(output)


class TestOtherFamilies:
    @FAMILY
    def test_sizes(self, family):
        config = stock_config(family)
        expected = SIZES[family]
        found = ModelSizes.of(config)
        assert {**vars(found), "vision_type": ""} == {**vars(expected), "vision_type": ""}
        assert found.vision_type == config.vision_config.model_type

    @FAMILY
    @pytest.mark.parametrize(
        "method", [name for name, each in METHODS.items() if getattr(each, "needs_cls_attention", 0)]
    )
    def test_no_cls_token(self, family, method):
        with pytest.raises(ValueError, match=rf"{method} looks at the \[CLS\] token of a clip_vision_model"):
            parse_visual_reduction({"method": method}, ModelSizes.of(stock_config(family)))

    @torch.no_grad()
    @FAMILY
    def test_random(self, family):
        model, images, where = build(family)
        listen(model)
        dense = features_of(model, images)
        options = {"method": "random", "token_num": 3, "seed": 2}
        reduction = parse_visual_reduction(options, ModelSizes.of(model.config))
        reduced = reduced_features(model, reduction, lambda: features_of(model, images), **where)
        assert len(reduced) == len(dense) == 2
        for before, after in zip(dense, reduced, strict=True):
            kept = ~is_dropped(after)
            assert before.shape == after.shape and int(kept.sum()) == 3
            close(after[kept], before[kept])

    @torch.no_grad()
    @FAMILY
    def test_downsample(self, family):
        model, images, where = build(family)
        options, sizes = {"method": "downsample", "factor": 2}, ModelSizes.of(model.config)
        if sizes.tiled:
            with pytest.raises(ValueError, match="cut images into tiles"):
                parse_visual_reduction(options, sizes)
            return
        listen(model)
        reduction = parse_visual_reduction(options, sizes)
        projected = []
        projector = getattr(model, "multi_modal_projector", None)
        if projector is not None:
            handle = projector.register_forward_pre_hook(lambda _, args: projected.append(args[0]))
        dense = features_of(model, images)
        if projector is not None:
            handle.remove()
        reduced = reduced_images(model, reduction, lambda: features_of(model, images), **where)
        before = family == "internvl"
        for i, (feature, image) in enumerate(zip(projected[0] if before else dense, reduced, strict=True)):
            height, width = image.patches.height, image.patches.width
            grid = feature.view(height, width, -1)
            windows = [
                grid[y : y + 2, x : x + 2].mean((0, 1)) for y in range(0, height, 2) for x in range(0, width, 2)
            ]
            expected = projector(torch.stack(windows)[None])[0] if before else torch.stack(windows)
            assert image.features.shape == dense[i].shape
            close(image.features[~is_dropped(image.features)], expected)

    @torch.no_grad()
    def test_video(self):
        model, images, _ = build("qwen2_vl")
        grid = torch.tensor([[3, 4, 6]])
        images = {"pixel_values": torch.randn(72, 3 * 2 * 49), "image_grid_thw": grid}
        for options, kept in (({"method": "random", "token_num": 4}, 4), ({"method": "downsample", "factor": 2}, 6)):
            reduction = parse_visual_reduction(options, ModelSizes.of(model.config))
            (features,) = reduced_features(model, reduction, lambda: features_of(model, images), grid_thw=grid)
            assert features.shape[0] == 18 and int((~is_dropped(features)).sum()) == kept

    @torch.no_grad()
    def test_grid_that_does_not_fit(self):
        model, images, where = build("qwen2_vl")
        reduction = METHODS["random"](token_num=3)
        with pytest.raises(ValueError, match=r"\[15\] places.*\[15, 4\]"):
            reduced_features(model, reduction, lambda: features_of(model, images), grid_thw=where["grid_thw"][:1])


# The layout


def method_files() -> dict[str, set[str]]:
    """The classes that are methods, by the file that each is in."""
    files: dict[str, set[str]] = {}
    for method in METHODS.values():
        files.setdefault(method.__module__.rpartition(".")[2], set()).add(method.__name__)
    return files


def test_every_method_file_registers_a_method():
    files = {path.stem for path in PACKAGE.glob("reduction_*.py")} - {"reduction_pictures"}
    assert files == set(method_files())


def test_no_other_file_knows_a_method():
    """Adding one touches its file and the line that imports it."""
    classes = set.union(*method_files().values())
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").rglob("*.py")]:
        if path.stem == "configuration_shortv" or path.stem in method_files():
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {node.name for node in nodes if isinstance(node, ast.alias)}
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        assert not names & classes, path
        assert not {module.rpartition(".")[2] for module in modules} & set(method_files()), path


def test_a_method_imports_torch_and_what_a_method_is():
    for stem in method_files():
        imported = set()
        for node in ast.walk(ast.parse((PACKAGE / f"{stem}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("." * node.level + (node.module or ""))
        assert imported - set(sys.stdlib_module_names) == {"torch", ".reduction"}, stem
