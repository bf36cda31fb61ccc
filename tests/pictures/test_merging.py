"""What is drawn of merging is what the model does, and can be told from the picture."""

from functools import cache
from math import isqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import check_text, record, texts
from families import FAMILIES, build, make_inputs, shortv_of
from PIL import Image
from processor_files import write_processor

from shortv_hf.pictures import merging
from shortv_hf.pictures.merging import (
    draw_merging,
    draw_step,
    follow_merging,
    layout_of,
    patches_behind,
    token_patches,
)
from shortv_hf.reduction import TokenMap
from shortv_hf.stream import Stream
from shortv_hf.tower import TowerMerging
from shortv_hf.upstream import find_cache, image_features, text_model
from shortv_hf.vision import Watch, packed_patches


PROCESSOR = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
TOWERS = {  # options for the half in the tower of `families.py`'s models
    "llava": {"vit_k": [0, 1], "vit_r": 3},
    "llava_next": {"vit_k": [0], "vit_r": 7},
    "llava_onevision": {"vit_k": [0], "vit_r": 7},
    "qwen2_vl": {"vit_k": [0, 1], "vit_r": 0.34},
    "internvl": {"vit_k": [0], "vit_r": 12},
}
CASES = [
    (family, kind) for family in FAMILIES for kind in ("image", "video") if kind == "image" or FAMILIES[family].video
]
CASES = [(*case, half) for case in CASES for half in ("tower", "decoder") if half == "decoder" or case[0] in TOWERS]


def model_and_inputs(family, kind):
    return shortv_of(build(family), []), make_inputs(family, ["tItt" if kind == "image" else "tVtt"])


def options_for(family, half):
    return {"method": "illava", **(TOWERS[family] if half == "tower" else {"vit_k": []}), "llm_k": [3], "llm_r": 0.6}


@pytest.mark.parametrize(("family", "kind", "half"), CASES)
def test_steps_are_what_the_model_did(family, kind, half, tmp_path):
    model, inputs = model_and_inputs(family, kind)
    options = options_for(family, half)
    layout, chosen, steps = follow_merging(model, inputs, options)
    with torch.no_grad(), model.using(visual_reduction=options), Watch() as watch:
        cache = find_cache(model(**inputs, use_cache=True))
    tower = next((each for each in watch.seen if isinstance(each, TowerMerging)), None)
    assert (tower is None) == (half == "decoder")
    tokens = token_patches(model, inputs, layout, tower)
    left = torch.zeros(layout.pictures, layout.n, dtype=torch.bool)  # behind the tower
    for picture in range(layout.pictures):
        left[picture, layout.order if tower is None else layout.order[tower.left[picture]]] = True
    if tower is not None:
        assert [step.title.split(":")[0] for step in steps[:-1]] == [f"vision layer {k}" for k in options["vit_k"]]
        assert torch.equal(steps[-2].kept, left.flatten())
        assert steps[-2].middle.nonzero().tolist() == [[chosen]] and steps[-2].group.sum() > 1
    last = steps[-1]
    slots = cache.layers[-1].slots[0]
    first = inputs["input_ids"][0].tolist().index(90 if kind == "image" else 91)
    places = [i for i, token in enumerate(inputs["input_ids"][0].tolist()) if token in (90, 91)]
    held = [i for i, place in enumerate(places[: len(tokens)]) if place in slots.tolist()]
    kept = {patch for i in held for patch in tokens[i]}
    assert first == places[0] and last.kept.nonzero()[:, 0].tolist() == sorted(kept)
    assert kept <= set(left.flatten().nonzero()[:, 0].tolist())
    assert (last.middle <= last.kept).all() and (last.middle <= last.group).all() and last.middle.any()
    if half == "decoder":
        assert last.middle[chosen]
    draw_merging(model, inputs, PROCESSOR, options, tmp_path / "out.png")


def outputs_of(module, run):
    """What `module` is given and returns in `run()`."""
    found = []
    hook = module.register_forward_hook(lambda module, args, output: found.append((args[0], output)))
    with torch.no_grad():
        run()
    hook.remove()
    return found[0]


@pytest.mark.parametrize(("family", "kind", "half"), [case for case in CASES if case[0] in TOWERS])
def test_token_is_made_of_its_patches(family, kind, half):
    """The text model's input at each placeholder is what the projector made of just these patches."""
    model, inputs = model_and_inputs(family, kind)
    layout, options = layout_of(model, inputs), options_for(family, half)
    qwen = "qwen" in family
    projector = model.model.visual.merger if qwen else model.model.multi_modal_projector
    seen = []
    hook = text_model(model.model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with model.using(visual_reduction=options), Watch() as watch:
        states, made = outputs_of(projector, lambda: model(**inputs))
    hook.remove()
    tower = next((each for each in watch.seen if isinstance(each, TowerMerging)), None)
    left = [torch.arange(layout.n)] * layout.pictures if tower is None else tower.left
    at = {}  # the row of the tower's output, by patch
    for picture, patches in enumerate(left):
        for patch in patches.tolist():
            at[picture * layout.n + int(layout.order[patch])] = len(at)
    places = torch.isin(inputs["input_ids"][0], torch.tensor([90, 91])).nonzero()[:, 0]
    tokens = token_patches(model, inputs, layout, tower)
    made = made.flatten(0, -2)
    used = set()
    for place, patches in zip(places.tolist(), tokens, strict=False):
        feature = seen[0][0, place]
        if not patches:
            assert (feature == float("-inf")).all() or (feature == model.model.image_newline).all()
            continue
        rows = [at[patch] for patch in patches]
        used |= set(rows)
        if family == "internvl":  # a square of 2 x 2 of those left in a picture
            side = isqrt(len(left[0]))
            picture, row = divmod(rows[0], side**2)
            assert rows == [rows[0] + i for i in (0, 1, side, side + 1)]
            expected = made[picture * side**2 // 4 + row // side // 2 * (side // 2) + row % side // 2]
        elif qwen:
            assert rows == list(range(rows[0], rows[0] + 4)) and rows[0] % 4 == 0
            with torch.no_grad():
                expected = projector(states[rows])[0]
        elif kind == "video" and half == "tower":  # 3 x 3 pooled to 2 x 2: a quarter of what is in the middle
            assert len(rows) == 4
            y, x = ([0.25, 0.75] if at else [0.75, 0.25] for at in (rows[0] % 9 // 3, rows[0] % 3))
            weights = torch.tensor([a * b for a in y for b in x])
            expected = (weights[:, None] * made[rows]).sum(0)
        else:
            expected = made[rows].mean(0)
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-5)
    assert len(used) == len(at)


@pytest.mark.parametrize("size", [[16, 32], [10, 32], [32, 14]])
def test_tokens_of_a_tiled_image_are_those_of_its_packing(size):
    model = shortv_of(build("llava_next"), [])
    inputs = {"pixel_values": torch.zeros(1, 3, 3, 16, 16), "image_sizes": torch.tensor([size])}
    (patches,) = packed_patches(model.model, 16, inputs["image_sizes"], torch.device("cpu"))
    expected = [
        [16 * t + p] if p >= 0 else [] for t, p in zip(patches.tile.tolist(), patches.patch.tolist(), strict=True)
    ]
    assert token_patches(model, inputs, layout_of(model, inputs), None) == expected


def test_interpolated_tokens_name_all_their_patches(monkeypatch):
    """A grid of more tiles than the ratio allows is scaled down."""
    model = shortv_of(build("llava_onevision"), [])
    monkeypatch.setattr(model.config, "vision_aspect_ratio", "anyres_max_1")
    inputs = {"pixel_values": torch.randn(1, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]])}
    tokens = token_patches(model, inputs, layout_of(model, inputs), None)
    with torch.no_grad():
        (features,) = image_features(model.model.get_image_features(**inputs, vision_aspect_ratio="anyres_max_1"))
    assert len(tokens) == len(features) < 16 + 4 * 9
    assert {1, 2, 4} >= {len(patches) for patches in tokens if patches} > {1}
    assert set(sum(tokens, [])) == set(range(48))


def merge(layer, patches, target):
    target = torch.tensor([target])
    return SimpleNamespace(
        layer=layer, pictures=[0], patches=torch.tensor([patches]), map=TokenMap(target, target.shape[1])
    )


def test_patches_are_followed_through_the_layers():
    """1 goes into 2, which goes into 5 in the next layer; numbers in a later layer are of the patches left."""
    layout = merging.Layout("image", 1, 2, 3, torch.arange(6), 1)
    tower = SimpleNamespace(
        merges=[merge(3, [0, 1, 2, 3, 4, 5], [0, 2, 2, 3, 4, 5]), merge(4, [0, 2, 3, 4, 5], [0, 4, 2, 4, 4])]
    )
    steps = list(merging._in_tower(tower, layout))
    assert [(layer, into.tolist()) for layer, into in steps] == [(3, [0, 2, 2, 3, 4, 5]), (4, [0, 5, 5, 3, 5, 5])]
    assert merging._last_in_tower(tower, layout) == 5
    assert patches_behind([[0], [3, 5], []], steps[-1][1]) == [[0], [3, 5, 1, 2, 4], []]
    step = merging._tower_step(*steps[-1], layout, 2)
    assert step.title == "vision layer 4: 3 of 6 patches left"
    assert step.kept.tolist() == [True, False, False, True, False, True]
    assert step.group.nonzero()[:, 0].tolist() == [1, 2, 4, 5] and step.middle.nonzero().tolist() == [[5]]


def test_chosen_token():
    model, inputs = model_and_inputs("llava", "image")
    options = options_for("llava", "tower")
    for token in (0, 5, 15):
        _, chosen, steps = follow_merging(model, inputs, options, token)
        assert chosen == token and all(step.group[token] for step in steps)
        assert all((before.group <= step.group).all() for before, step in zip(steps, steps[1:], strict=False))
    with pytest.raises(ValueError, match="there is no patch 16; the valid range is the integers 0 to 15"):
        follow_merging(model, inputs, options, 16)


def test_nothing_to_draw():
    model, inputs = model_and_inputs("llava", "image")
    with pytest.raises(ValueError, match="nothing of this image is merged by illava: .*llm_r = 1"):
        follow_merging(model, inputs, {"method": "illava", "vit_k": [], "llm_k": [1], "llm_r": 1})
    with pytest.raises(ValueError, match="no image"):
        follow_merging(model, make_inputs("llava", ["ttt"]), options_for("llava", "tower"))


def test_watch_sees_its_own_thread_only():
    model, inputs = model_and_inputs("llava", "image")
    with (
        Watch() as watch,
        Watch() as inner,
        torch.no_grad(),
        model.using(visual_reduction=options_for("llava", "tower")),
    ):
        model(**inputs)
    assert [type(each) for each in inner.seen] == [TowerMerging, Stream] and not watch.seen
    with torch.no_grad(), model.using(visual_reduction=options_for("llava", "tower")):
        model(**inputs)
    assert len(inner.seen) == 2


@pytest.fixture
def photo():
    noise = np.random.default_rng(0).integers(0, 256, (12, 24, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 48), Image.Resampling.BICUBIC)


class TestPicture:
    @pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
    def test_what_the_model_sees(self, photo, tmp_path, family):
        """Cut into patches and put together again."""
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(write_processor(tmp_path, family))
        picture = photo if family == "qwen2_vl" else photo.crop((0, 0, 48, 48)).resize((16, 16))
        inputs = dict(processor(images=picture, return_tensors="pt"))
        model = shortv_of(build(family), [])
        layout = layout_of(model, inputs)
        (seen,) = merging.pictures_of(model, inputs, layout, processor)
        assert seen.size == (4 * layout.width, 4 * layout.height)
        again = np.asarray(picture.resize(seen.size, Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(np.asarray(seen).astype(int) - again).mean() < 3

    @pytest.mark.parametrize(("kind", "pictures", "chosen", "expected"), [
        ("image", 10, 0, list(range(10))),
        ("video", 8, 0, list(range(8))),
        ("video", 32, 0, [0, 4, 9, 13, 18, 22, 27, 31]),
        ("video", 32, 5 * 4, [0, 5, 9, 13, 18, 22, 27, 31]),
    ])  # fmt: skip
    def test_frames(self, kind, pictures, chosen, expected):
        layout = merging.Layout(kind, pictures, 2, 2, torch.arange(4), 1)
        assert merging.shown_pictures(layout, chosen) == expected

    @pytest.mark.parametrize("cell", [4, 8, 20])
    def test_colours(self, photo, cell):
        """Left: red. Merged: grey. Absent: blank. An outline around the group, a square in its middle."""
        names = ("kept", "absent", "group", "middle")
        parts = {name: torch.zeros(6, 12, dtype=torch.bool) for name in names}
        parts["kept"][:, :6], parts["absent"][:, 9:] = True, True
        parts["group"][1:4, 4:8], parts["middle"][2, 5] = True, True
        drawn = np.asarray(draw_step(photo, parts, cell)).astype(int)
        assert drawn.shape == (6 * cell, 12 * cell, 3)
        red, green, blue = (drawn[..., i] for i in range(3))
        assert (red - green > 40)[4 * cell :, : 6 * cell].all() and (red - blue > 40)[4 * cell :, : 6 * cell].all()
        assert (red == green)[4 * cell :, 6 * cell : 9 * cell].all() and len(np.unique(drawn[:, 9 * cell :])) == 1
        yellow = (red > 200) & (green > 180) & (blue < 100)
        assert yellow[cell, 4 * cell : 8 * cell].all() and yellow[4 * cell - 1, 4 * cell : 8 * cell].all()
        assert (
            yellow[cell : 4 * cell, 4 * cell].all()
            and not yellow[:, : 4 * cell].any()
            and not yellow[4 * cell :].any()
        )
        assert not yellow[2 * cell : 3 * cell, 6 * cell - 1 : 6 * cell + 1].any()  # within the group
        middle = drawn[2 * cell + cell // 2, 5 * cell + cell // 2]
        assert middle[0] < 50 and middle[1:].min() > 200

    @pytest.mark.parametrize(("family", "kind", "names"), [
        ("llava", "image", []),
        ("llava_next", "image", ["overview", "tile 1", "tile 2"]),
        ("llava_onevision", "video", ["frame 1", "frame 2"]),
        ("qwen2_vl", "video", ["frame 1", "frame 3"]),
    ])  # fmt: skip
    def test_text(self, monkeypatch, tmp_path, family, kind, names):
        model, inputs = model_and_inputs(family, kind)
        drawn = record(monkeypatch)
        draw_merging(model, inputs, PROCESSOR, options_for(family, "tower"), tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as sheet:
            drawn = [entry for entry in drawn if entry[0].size == sheet.size]
        check_text(drawn)
        written = texts(drawn)
        panels = 2 + len(TOWERS[family]["vit_k"])
        assert sum(kind == "picture" for _, kind, _, _ in drawn) == panels * max(len(names), 1)
        assert all(name in written for name in names)
        legend = "".join(written).replace(" ", "")
        for part in (
            "llm_k = [3]",
            "red: left",
            "grey: merged",
            "yellow outline: in one token with patch",
            "blue square",
        ):
            assert part.replace(" ", "") in legend
        titles = " ".join(written)
        assert (
            "vision layer 0: " in titles and "decoder layer 3: " in titles and "what the vision tower sees" in titles
        )


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        shortv_of(build(family), [3, 1]).save_pretrained(folder)
        return write_processor(folder, family, ids={"<image>": 90, "<video>": 91, "<start>": 92, "<end>": 93})

    return cache(make)


class TestCommand:
    @pytest.fixture
    def visualize(self, repos, monkeypatch, capsys, tmp_path):
        cli = pytest.importorskip("shortv_hf.cli")
        Image.new("RGB", (20, 14), "red").save(tmp_path / "picture.png")

        def call(*arguments, family="llava", of=("--image", tmp_path / "picture.png")):
            given = ["visualize", repos(family), *of, "--output", tmp_path / "out.png", "--overwrite"]
            monkeypatch.setattr("sys.argv", ["shortv", *map(str, given), *arguments])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            return stop.value.code, capsys.readouterr().out, tmp_path / "out.png"

        return call

    @pytest.mark.parametrize("reduction", [
        "illava",
        "illava:vit_k=[0,1],vit_r=7,llm_k=[1,2]",
        '{"method": "illava", "vit_k": [1], "vit_r": 7, "llm_k": [2]}',
    ])  # fmt: skip
    def test_draws(self, visualize, reduction):
        code, out, file = visualize("--method", reduction, "--token", "5")
        assert code == 0 and out.strip().endswith("out.png")
        with Image.open(file) as sheet:
            assert sheet.format == "PNG" and min(sheet.size) > 300

    def test_errors(self, visualize):
        assert "there is no patch 16" in visualize("--method", "illava", "--token", "16")[0]
        assert "fastv merges nothing" in visualize("--method", "fastv:k=2,ratio=0.5", "--token", "1")[0]
        assert "vit_k holds 9" in visualize("--method", "illava:vit_k=[9],llm_k=[2]")[0]

    @pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
    def test_video(self, visualize, monkeypatch, tmp_path, family):
        """12 frames of one colour each, from blue to red: 8 are drawn, of Qwen2-VL 6 pairs."""
        pytest.importorskip("av")
        from video_files import write_video

        clip = write_video(tmp_path / "clip.mp4", 12)
        drawn = record(monkeypatch)
        code, _, file = visualize("--method", "illava", family=family, of=("--video", clip))
        assert code == 0
        with Image.open(file) as sheet:
            drawn = [entry for entry in drawn if entry[0].size == sheet.size]
        check_text(drawn)
        names = [text for text in texts(drawn) if text.startswith("frame") and ":" not in text]
        numbers = [1, 3, 4, 6, 7, 9, 10, 12] if family == "llava_onevision" else [1, 3, 5, 7, 9, 11]
        assert names == [f"frame {i}" for i in numbers]
        colours = [np.asarray(tile)[:, :, 0].mean() for _, kind, tile, _ in drawn if kind == "picture"][: len(names)]
        assert colours == sorted(colours) and colours[-1] - colours[0] > 150

    def test_video_errors(self, visualize, tmp_path):
        pytest.importorskip("av")
        from video_files import write_video

        clip = write_video(tmp_path / "clip.mp4", 3)
        assert "only one of them" in visualize("--video", str(clip))[0]
        assert "takes no video" in visualize("--method", "illava", of=("--video", clip))[0]
        answer = visualize("--method", "fastv:k=2", family="llava_onevision", of=("--video", clip))[0]
        assert "what fastv does is drawn on pictures only" in answer
