"""What is drawn is what the methods do; and the commands that draw, count and calibrate."""

import json

import numpy as np
import pytest
import torch
from drawn import check_text, record, texts
from helpers import IMAGE_TOKEN, make_inputs, make_model
from PIL import Image
from processor_files import write_processor
from test_visual_reduction import ALL, NEXT, name, reduced_model
from transformers import AutoProcessor

from shortv_hf.data.images import to_rgb
from shortv_hf.data.inputs import encode_messages
from shortv_hf.data.prompts import user_message
from shortv_hf.hub import loading
from shortv_hf.pictures import patches
from shortv_hf.pictures.patches import (
    ABSENT,
    DROPPED,
    KEPT,
    LEGEND,
    LEGEND_OF_AVERAGING,
    LEGEND_OF_MERGING,
    MERGED,
    REST,
    PatchFates,
    draw_fates,
    draw_patches,
    patch_fates,
)
from shortv_hf.reduction import visual_reduction_from_text
from shortv_hf.upstream import image_features


@pytest.mark.parametrize("options", ALL, ids=name)
def test_fates(options):
    model = reduced_model(None, [1])
    inputs = make_inputs(model, ["ttItt"])
    (fates,) = patch_fates(model, inputs, options)
    states = fates.states.tolist()
    model.set_visual_reduction(options)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    left = cache.layers[-1].keys.shape[-2] - 4  # the text
    if options["method"] == "downsample":
        assert states == [MERGED] * 16 and len(set(fates.group.tolist())) == left
    elif "prumerge" in options["method"]:
        assert states.count(KEPT) + (REST in states or MERGED in states) == left
        merged = [group for group, state in zip(fates.group.tolist(), states, strict=True) if state == MERGED]
        assert all(states[group] == KEPT for group in merged)
    else:
        assert states.count(KEPT) == left and states.count(DROPPED) == 16 - left
    if options["method"] in ("fastv", "vtw"):
        visual = inputs["input_ids"][0] == IMAGE_TOKEN
        slots = cache.layers[-1].slots[0]
        assert [slot - 2 for slot in slots.tolist() if visual[slot]] == [i for i in range(16) if states[i] == KEPT]


@pytest.mark.parametrize("options", NEXT, ids=name)
def test_fates_of_tiles(options):
    model = reduced_model(None, family="llava_next")
    inputs = make_inputs(model, ["ttIt"])
    inputs["image_sizes"] = torch.tensor([[10, 32]])  # a strip: most of its two tiles is padding
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    n = len(image_features(features)[0])
    inputs["input_ids"] = torch.tensor([[5, 6] + [IMAGE_TOKEN] * n + [7]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    fates = patch_fates(model, inputs, options)
    assert len(fates) == 3 and ABSENT not in fates[0].states and ABSENT in fates[1].states
    present = sum(int((fate.states != ABSENT).sum()) for fate in fates)
    newlines = n - present
    assert newlines > 0
    if options["method"] in ("random", "vtc_cls"):
        assert [int((fate.states == KEPT).sum()) for fate in fates] == [
            min(options["token_num"], int((fate.states != ABSENT).sum())) for fate in fates
        ]


def test_nothing_to_draw():
    model = make_model()
    with pytest.raises(ValueError, match="no image"):
        patch_fates(model, make_inputs(model, ["ttt"]), {"method": "vtw", "k": 1})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fastv:k=2,ratio=0.5", {"method": "fastv", "k": 2, "ratio": 0.5}),
        ("prumerge", {"method": "prumerge"}),
        (' {"method": "vtw", "k": 16}', {"method": "vtw", "k": 16}),
        ("vtw: k=3", {"method": "vtw", "k": 3}),
        ("illava:vit_k=[1],vit_r=7,llm_k=[2]", {"method": "illava", "vit_k": [1], "vit_r": 7, "llm_k": [2]}),
        ("illava:vit_k=[5, 6],llm_k=[],vit_r=5", {"method": "illava", "vit_k": [5, 6], "llm_k": [], "vit_r": 5}),
        ("none", None),
    ],
    ids=str,
)
def test_reduction_from_text(text, expected):
    assert visual_reduction_from_text(text) == expected


@pytest.mark.parametrize("text", ["{broken", "fastv:k", "fastv:k=two", "illava:llm_k=[2,3", "illava:llm_k=2,3]"])
def test_unreadable_reduction(text):
    with pytest.raises(ValueError, match="cannot read.*method:option=value"):
        visual_reduction_from_text(text)


def fates_of(method: str, side: int) -> PatchFates:
    """As `method` decides: "select" keeps the left half; "merge" keeps every third patch, and merges the next into it and
    the one after that into the first kept; "average" makes groups of 2 x 2. "vtw" drops all."""
    n = side * side
    index = torch.arange(n)
    row, column = index // side, index % side
    if method == "average":
        return PatchFates("title", torch.full((n,), MERGED), row // 2 * side + column // 2)
    if method == "merge":
        states = torch.where(index % 3 == 0, KEPT, MERGED)
        states[-2:] = REST
        group = torch.where(index % 3 == 2, 0, index - index % 3)
        return PatchFates("title", states, torch.where(states == REST, -1, group))
    states = torch.where((column < side // 2) & (method == "select"), KEPT, DROPPED)
    return PatchFates("title", states, torch.where(states == KEPT, index, -1))


@pytest.fixture
def photo():
    """Smooth noise, 96 x 96 pixels: no two patches alike, no sharp edges."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC)


class TestPicture:
    """The tiles of `shortv visualize`: the picture can be recognised, and what is drawn on it is what happens."""

    SIZES = pytest.mark.parametrize(("side", "size"), [(4, 224), (8, 720), (24, 720), (24, 448), (24, 216)])

    def draw(self, photo, fates, size):
        """The tile, the picture below, `[H, H, 3]` each, and the size of a patch."""
        tile = draw_patches(photo, fates, size)
        below = photo.resize(tile.size, Image.Resampling.LANCZOS)
        return (
            np.asarray(tile).astype(int),
            np.asarray(below).astype(int),
            tile.width // round(len(fates.states) ** 0.5),
        )

    @SIZES
    @pytest.mark.parametrize(("method", "untouched"), [("select", 0.85), ("merge", 0.2), ("average", 0.5)])
    def test_inside_of_a_patch_is_the_picture(self, photo, side, size, method, untouched):
        """Exactly so in the middle of each patch that the model sees, and in this share of them all."""
        fates = fates_of(method, side)
        tile, below, cell = self.draw(photo, fates, size)
        seen = 0
        for i, state in enumerate(fates.states.tolist()):
            if state in (KEPT, MERGED):
                top, left = i // side * cell, i % side * cell
                patch = np.s_[top : top + cell, left : left + cell]
                inner = np.s_[top + cell // 3 : top + cell - cell // 3, left + cell // 3 : left + cell - cell // 3]
                assert (tile[inner] == below[inner]).all()
                seen += (tile[patch] == below[patch]).all(-1).sum() / cell**2
        assert seen >= untouched * sum(state in (KEPT, MERGED) for state in fates.states.tolist())

    @SIZES
    @pytest.mark.parametrize("method", ["select", "merge", "average", "vtw"])
    def test_whole_tile_correlates_with_the_picture(self, photo, side, size, method):
        fates = fates_of(method, side)
        tile, below, cell = self.draw(photo, fates, size)
        middles = np.s_[cell // 2 :: cell, cell // 2 :: cell]
        veiled = np.isin(fates.states.numpy(), (DROPPED, REST)).reshape(side, side)
        alike = veiled if method == "vtw" else ~veiled
        for channel in range(3):
            values = [picture[middles][..., channel][alike] for picture in (tile, below)]
            assert np.corrcoef(*values)[0, 1] > 0.95

    def test_dropped_patches_are_greyed_out(self, photo):
        """A quarter of the contrast is left."""
        tile, below, cell = self.draw(photo, fates_of("select", 8), 224)
        dropped = np.s_[:, 4 * cell :]
        assert (tile[dropped].std((0, 1)) <= 0.27 * below[dropped].std((0, 1))).all()

    @pytest.mark.parametrize("ground", ["black", "white", "red"])
    def test_dropped_patches_differ_from_kept_ones(self, ground):
        tile, _, cell = self.draw(Image.new("RGB", (96, 96), ground), fates_of("select", 8), 224)
        assert np.abs(tile[cell // 2, 4 * cell - cell // 2] - tile[cell // 2, 4 * cell + cell // 2]).max() > 50

    def test_outlines_run_between_groups_only(self, photo):
        """2 x 2 patches each on a 4 x 4 grid: lines along the middle and the rim."""
        tile, below, cell = self.draw(photo, fates_of("average", 4), 224)
        changed = (tile != below).any(-1)
        lines = np.flatnonzero(changed.all(0))
        assert set(lines // (cell // 4)) == {0, 7, 8, 15}  # in quarters of a patch
        assert (lines == np.flatnonzero(changed.all(1))).all()
        assert not changed[cell // 2 :: 2 * cell][:, cell - 4 : cell + 4].any()

    def test_colours_tell_groups_apart(self, photo):
        """A merged patch has the outline of the patch that it is merged into, a kept one the thicker frame."""
        fates = fates_of("merge", 8)
        tile, below, cell = self.draw(photo, fates, 720)
        corners = tile[::cell, ::cell].reshape(64, 3)
        for i, (state, group) in enumerate(zip(fates.states.tolist(), fates.group.tolist(), strict=True)):
            if state == MERGED:
                assert (corners[i] == corners[group]).all()
        kept = corners[(fates.states == KEPT).numpy()]
        assert len(np.unique(kept, axis=0)) == len(kept) and np.abs(np.diff(kept, axis=0)).sum(1).min() > 100
        assert (tile[:, 5 * cell : 6 * cell] != below[:, 5 * cell : 6 * cell]).any(-1)[cell // 2].sum() < 10  # merged
        assert (tile[:, :cell] != below[:, :cell]).any(-1)[cell // 2].sum() > 12  # patch 0, kept

    def test_padding_is_blank(self, photo):
        tile = draw_patches(photo, PatchFates("title", torch.full((16,), ABSENT), torch.full((16,), -1)))
        assert len(tile.getcolors()) == 1

    @pytest.mark.parametrize(
        "title", ["fastv: k = 2, ratio = 0.5", "token_num=" + 9 * "a very, very_long_option" + 90 * "x"]
    )
    @pytest.mark.parametrize(("panels", "tiles"), [(1, 1), (7, 1), (1, 5), (3, 5)])
    @pytest.mark.parametrize("side", [4, 24])
    def test_text_fits_the_sheet(self, photo, monkeypatch, tmp_path, side, panels, tiles, title):
        fates = fates_of("merge", side)
        fates.states[-1], fates.states[-2] = ABSENT, DROPPED
        fates.title = f"tile 4: {side**2} of {side**2} patches kept"
        drawn = record(monkeypatch)
        draw_fates([photo] * tiles, [[fates] * tiles] * panels, [title] * panels, tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as sheet:
            drawn = [entry for entry in drawn if entry[0].size == sheet.size]
        check_text(drawn)
        assert sum(kind == "picture" for _, kind, _, _ in drawn) == panels * tiles
        written = "".join(texts(drawn)).replace(" ", "")
        assert written.count(title.replace(" ", "")) == panels
        assert all(LEGEND_OF_MERGING[state].replace(" ", "") in written for state in set(fates.states.tolist()))

    @pytest.mark.parametrize(
        ("method", "entries"),
        [
            ("select", [LEGEND[KEPT], LEGEND[DROPPED]]),
            ("vtw", [LEGEND[DROPPED]]),
            ("merge", [LEGEND_OF_MERGING[state] for state in (KEPT, MERGED, REST)]),
            ("average", [LEGEND_OF_AVERAGING]),
        ],
    )
    def test_legend_names_what_is_drawn(self, photo, monkeypatch, tmp_path, method, entries):
        drawn = record(monkeypatch)
        draw_fates([photo], [[fates_of(method, 8)]], ["method"], tmp_path / "x.png")
        assert " ".join(texts(drawn)[2:]) == " · ".join(entries)


class TestCommands:
    @pytest.fixture(params=["llava", "llava_next"])
    def repo(self, request, tmp_path):
        model = reduced_model(None, [3, 1], request.param)
        model.generation_config.suppress_tokens = [0, 1, 2, 3, IMAGE_TOKEN]
        model.save_pretrained(tmp_path / "repo")
        write_processor(tmp_path / "repo", request.param)
        return tmp_path / "repo"

    @pytest.fixture
    def picture(self, tmp_path):
        Image.new("RGB", (20, 14), "red").save(tmp_path / "picture.png")
        return tmp_path / "picture.png"

    @pytest.fixture
    def shortv(self, monkeypatch, capsys):
        cli = pytest.importorskip("shortv_hf.cli")

        def call(*arguments):
            monkeypatch.setattr("sys.argv", ["shortv", *map(str, arguments)])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            return stop.value.code, capsys.readouterr().out

        return call

    @pytest.mark.parametrize("method", ["fastv:k=2,ratio=0.5", "vtc_cls:layer=0,token_num=5", "prumerge"])
    def test_visualize(self, shortv, repo, picture, tmp_path, method):
        code, out = shortv(
            "visualize", "--model", repo, "--image", picture, "--method", method, "--output", tmp_path / "out.png"
        )
        if method == "prumerge" and json.loads((repo / "config.json").read_text())["model_type"].endswith("next"):
            assert "not defined for LLaVA-NeXT" in code
            return
        assert code == 0 and out.strip().endswith("out.png")
        with Image.open(tmp_path / "out.png") as sheet:
            assert sheet.format == "PNG" and min(sheet.size) > 200
            assert len(sheet.convert("RGB").getcolors(10**6)) > 3

    def test_visualize_errors(self, shortv, repo, picture):
        assert "no method to draw" in shortv("visualize", "--model", repo, "--image", picture, "--method", "none")[0]
        assert "k is 9" in shortv("visualize", "--model", repo, "--image", picture, "--method", "vtw:k=9")[0]

    def test_chat(self, shortv, repo, picture):
        arguments = [
            "chat",
            "--model",
            repo,
            "--image",
            picture,
            "--prompt",
            "what ?",
            "--max-new-tokens",
            3,
            "--json",
        ]
        code, out = shortv(*arguments, "--reduction", '{"method": "fastv", "k": 1, "ratio": 0.75}')
        assert code == 0
        assert json.loads(out.splitlines()[-1])["visual_reduction"] == {"method": "fastv", "k": 1, "ratio": 0.75}
        code, out = shortv(*arguments, "--compare", "--reduction", "vtw:k=1")
        result = json.loads(out.splitlines()[-1])
        assert result["dense"]["visual_reduction"] is None
        assert result["shortv"]["prefill_flops"] < 0.6 * result["dense"]["prefill_flops"]
        assert "--dense freezes and drops nothing" in shortv(*arguments, "--dense", "--reduction", "vtw:k=1")[0]

    def test_flops(self, shortv, repo):
        code, out = shortv("flops", repo, "--layers", "", "--reduction", "vtw:k=2", "-t", 8, "-v", 16)
        assert code == 0 and "ShortV + vtw" in out

    def test_vtw_k(self, shortv, repo, picture):
        code, out = shortv("vtw-k", "--model", repo, "--data", "shapes", "--samples", 1, "--max-kl", 1000)
        assert code == 0 and out.splitlines()[-1] == "--reduction vtw:k=1"
        code, out = shortv("vtw-k", "--model", repo, "--data", "shapes", "--samples", 2, "--max-kl", 0)
        assert code == 0 and "no layer stays within" in out
        assert "max_kl is -1" in shortv("vtw-k", "--model", repo, "--max-kl", -1.0)[0]

    def test_build_repo(self, shortv, tmp_path):
        from test_base_weights import write_checkpoint

        base = write_checkpoint(tmp_path / "base", make_model())
        arguments = ["build-repo", base, "--layers", "3,1", "--output", tmp_path / "repo"]
        assert "k is 7" in shortv(*arguments, "--reduction", "fastv:k=7")[0]
        assert shortv(*arguments, "--reduction", "fastv:k=2,ratio=0.25")[0] == 0
        config = json.loads((tmp_path / "repo" / "config.json").read_text())
        assert config["visual_reduction"] == {"method": "fastv", "k": 2, "ratio": 0.25}


@pytest.mark.parametrize(
    "options", [{"method": "vtw", "k": 2}, {"method": "vtc_cls", "layer": 0, "token_num": 5}], ids=name
)
def test_conversation_keeps_its_cache(tmp_path, options):
    """Turns of `shortv chat`, a later image among them, equal the whole conversation at once."""
    from shortv_hf.chat import conversation as chat

    model = reduced_model(options, [3, 1])
    model.generation_config.suppress_tokens = [0, 1, 2, 3, IMAGE_TOKEN]
    model.save_pretrained(tmp_path)
    write_processor(tmp_path)
    model, processor = loading.load(str(tmp_path))
    images = [Image.new("RGB", (20, 14), colour) for colour in ("red", "blue")]
    talk = chat.Conversation(model, processor, max_new_tokens=4)
    talk.ask("what is this ?", images[:1])
    second = talk.ask("is this red ?", images[1:])
    whole = processor.apply_chat_template(talk.messages[:3], add_generation_prompt=True)
    inputs = processor(text=whole, images=images, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids[0, -4:].tolist() == second.token_ids


def test_of_several_pictures_the_first_is_drawn_as_their_prompt_has_it(tmp_path, monkeypatch):
    """FastV ranks all pictures of a prompt together. Its choice at other layers can be left out."""
    write_processor(tmp_path / "repo")
    model, processor = make_model(), AutoProcessor.from_pretrained(tmp_path / "repo")
    pictures = [Image.linear_gradient("L").resize((20, 14)), Image.new("RGB", (20, 14), "blue")]
    options, drawn = {"method": "fastv", "k": 2, "ratio": 0.5}, []
    monkeypatch.setattr(patches, "draw_fates", lambda seen, panels, titles, output: drawn.append(panels))
    for given in (pictures, pictures[0]):
        patches.draw_reduction(model, processor, given, "what ?", options, tmp_path / "x.png", other_layers=False)
    patches.draw_reduction(model, processor, pictures, "what ?", options, tmp_path / "x.png")
    assert [len(panels) for panels in drawn] == [1, 1, 3]
    inputs = encode_messages([user_message("what ?", pictures, processor)], processor, list(map(to_rgb, pictures)))
    expected = patches.patch_fates(model, inputs, options)
    assert torch.equal(drawn[0][0][0].states, expected[0].states)
    assert int((drawn[1][0][0].states == patches.KEPT).sum()) == 8
