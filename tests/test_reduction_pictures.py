"""What is drawn is what the methods do; and the commands that draw, count and calibrate."""

import json

import pytest
import torch
from helpers import IMAGE_TOKEN, make_inputs, make_model
from PIL import Image
from processor_files import write_processor
from test_visual_reduction import ALL, NEXT, name, reduced_model

from shortv_hf.reduction_pictures import ABSENT, DROPPED, KEPT, MERGED, REST, patch_fates
from shortv_hf.upstream import image_features
from shortv_hf.visual_reduction import visual_reduction_from_text


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
        ("none", None),
    ],
    ids=str,
)
def test_reduction_from_text(text, expected):
    assert visual_reduction_from_text(text) == expected


@pytest.mark.parametrize("text", ["{broken", "fastv:k", "fastv:k=two"])
def test_unreadable_reduction(text):
    with pytest.raises(ValueError, match="cannot read.*method:option=value"):
        visual_reduction_from_text(text)


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
    from shortv_hf import chat

    model = reduced_model(options, [3, 1])
    model.generation_config.suppress_tokens = [0, 1, 2, 3, IMAGE_TOKEN]
    model.save_pretrained(tmp_path)
    write_processor(tmp_path)
    model, processor = chat.load(str(tmp_path))
    images = [Image.new("RGB", (20, 14), colour) for colour in ("red", "blue")]
    talk = chat.Conversation(model, processor, max_new_tokens=4)
    talk.ask("what is this ?", images[:1])
    second = talk.ask("is this red ?", images[1:])
    whole = processor.apply_chat_template(talk.messages[:3], add_generation_prompt=True)
    inputs = processor(text=whole, images=images, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids[0, -4:].tolist() == second.token_ids
