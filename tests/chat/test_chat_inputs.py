"""`shortv chat` about directories of pictures and about videos, as a user types it."""

import json

import pytest
from families import END, FAMILIES, IMAGE, SPECIAL, START, VIDEO, build, shortv_of
from PIL import Image
from processor_files import write_processor
from test_family_loading import write_checkpoint
from transformers.utils import is_torchvision_available

from shortv_hf import reduction
from shortv_hf.chat import comparison
from shortv_hf.chat import conversation as chat
from shortv_hf.data.images import load_images
from shortv_hf.data.video import load_video
from shortv_hf.hub import loading


pytest.importorskip("av")
cli = pytest.importorskip("shortv_hf.cli")
from video_files import write_video  # noqa: E402


IDS = {"<image>": IMAGE, "<video>": VIDEO, "<start>": START, "<end>": END}
ONEVISION, QWEN, NO_VIDEO = "llava_onevision", "qwen2_5_vl", "llava"


@pytest.fixture
def shortv(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["shortv", "chat", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """A ShortV repo of a family, with layers 2 and 1 frozen, which does not answer with special tokens."""
    made = {}

    def repo(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            model = shortv_of(build(family), [2, 1])
            model.generation_config.suppress_tokens = SPECIAL
            model.save_pretrained(made[family])
            write_processor(made[family], family, ids=IDS)
        return made[family]

    return repo


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", 25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures whose widths are the order in which people would list them, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    for width, name in enumerate(["1.png", "2.JPG", "10.png", "b2.bmp", "B10.png"], start=16):
        Image.new("RGB", (width, 14), "red").save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".1.png").write_text("no picture")
    (folder / "inner").mkdir()
    return folder


def test_pictures_of_a_directory_are_in_natural_order(folder, monkeypatch):
    assert [image.width for image in load_images([folder])] == [16, 17, 18, 19, 20]
    assert [image.width for image in load_images([folder / "b2.bmp", str(folder)])] == [19, 16, 17, 18, 19, 20]
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load_images([f"~/{folder.name}"])) == 5
    with pytest.raises(ValueError, match="inner holds no pictures"):
        load_images([folder / "inner"])


@pytest.mark.parametrize("family", [NO_VIDEO, ONEVISION])
def test_a_directory_is_several_images(shortv, repos, folder, family):
    arguments = (repos(family), "--prompt", "what ?", "--json", "--max-new-tokens", 2)
    code, out = shortv(*arguments, "--image", folder)
    each = [
        option for name in ("1.png", "2.JPG", "10.png", "b2.bmp", "B10.png") for option in ("--image", folder / name)
    ]
    assert code == 0
    several, one_by_one = json.loads(out), json.loads(shortv(*arguments, *each)[1])
    assert several["text"] == one_by_one["text"] and several["prompt_tokens"] == one_by_one["prompt_tokens"]
    if family == NO_VIDEO:
        assert several["visual_tokens"] == 5 * 16


@pytest.mark.parametrize("options", [(), ("--max-frames", 5), ("--fps", 2), ("--fps", 4, "--max-frames", 5)], ids=str)
def test_video(shortv, repos, clip, options):
    arguments = (repos(ONEVISION), "--video", clip, "--prompt", "what ?", "--json", "--max-new-tokens", 2)
    code, out = shortv(*arguments, *options)
    assert code == 0
    assert json.loads(out)["visual_tokens"] == (5 if options else 25) * 4 + 1


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family].video])
def test_video_and_pictures(shortv, repos, clip, folder, family):
    image = ("--image", folder / "1.png")
    arguments = (repos(family), "--prompt", "what ?", "--json", "--max-new-tokens", 2)
    found = [
        json.loads(shortv(*arguments, *options)[1])["visual_tokens"]
        for options in (image, ("--video", clip, "--max-frames", 4), (*image, "--video", clip, "--max-frames", 4))
    ]
    assert 0 < found[0] < found[2] and found[0] + found[1] == found[2]


@pytest.mark.parametrize("family", [ONEVISION, QWEN])
def test_a_conversation_about_a_video(repos, clip, folder, family):
    """Later turns see it; a later video starts the cache anew, and a turn that is refused leaves no trace."""
    model, processor = loading.load(str(repos(family)), dtype="float32")
    video, image = load_video(clip, 4), load_images([folder / "1.png"])
    talk = chat.Conversation(model, processor, 3)
    first = talk.ask("what is this ?", videos=[video])
    forwards = []
    hook = model.model.language_model.register_forward_hook(
        lambda _, args, kwargs, output: forwards.append(output.last_hidden_state.shape[1]), with_kwargs=True
    )
    second = talk.ask("is this red ?")
    hook.remove()
    assert sum(forwards) < second.prompt_tokens and second.visual_tokens == first.visual_tokens
    third = talk.ask("and this ?", image, videos=[video])
    assert third.visual_tokens > 2 * first.visual_tokens
    whole = chat.Conversation(model, processor, 3, messages=talk.messages[:4])
    whole._images, whole._videos = [], [video]
    assert whole.ask("and this ?", image, videos=[video]).token_ids == third.token_ids
    with model.using(shortv_layers=[], visual_reduction={"method": "fastv", "k": 2}):
        with pytest.raises(ValueError, match="a new picture needs a new conversation"):
            talk.ask("what ?", videos=[video])
    assert len(talk._videos) == 2 and len(talk.messages) == 6


def test_the_conversation_gives_the_video_once(shortv, repos, clip, monkeypatch):
    lines, asked = iter(["what is this ?", "is this red ?", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    ask = chat.Conversation.ask
    monkeypatch.setattr(
        chat.Conversation, "ask", lambda *given: asked.append((len(given[2]), len(given[4]))) or ask(*given)
    )
    code, out = shortv(repos(ONEVISION), "--video", clip, "--max-frames", 3, "--max-new-tokens", 2)
    assert code == 0 and asked == [(0, 1), (0, 0)] and len(out.split("\n")) > 2


@pytest.mark.parametrize("family", [ONEVISION, QWEN])
def test_compare_about_a_video(shortv, repos, clip, monkeypatch, family):
    monkeypatch.setattr(comparison, "MAX_ROUNDS", 1)
    options = ("--video", clip, "--max-frames", 4, "--prompt", "what ?", "--compare", "--max-new-tokens", 2)
    arguments = (repos(family), *options, "--reduction", "vtw:k=3")
    found = json.loads(shortv(*arguments, "--json")[1])
    dense, ours, visual = found["dense"], found["shortv"], found["visual_tokens"]
    assert visual > 0 and dense["visual_tokens_left"] == visual and ours["visual_tokens_left"] == 0
    for name in ("prefill_flops", "language_model_flops"):
        assert ours[name] < dense[name]
    assert ours["peak_memory_bytes"] > 0 and dense["peak_memory_bytes"] > 0
    assert (
        dense["prefill_flops"] - dense["language_model_flops"] == ours["prefill_flops"] - ours["language_model_flops"]
    )
    code, out = shortv(*arguments)
    words = " ".join(out.replace("│", " ").replace("┃", " ").split())
    assert code == 0 and f"visual tokens in the last layer {visual} 0" in words and "MiB" in words


def test_options_of_a_method_that_depend_on_model_and_input(shortv, repos, clip, folder, monkeypatch):
    """A bare name is a method's `defaults`, if it has them."""

    class Fitting(reduction.METHODS["vtw"]):
        @classmethod
        def defaults(cls, config, kind):
            return {"method": "vtw", "k": {"image": 1, "video": 2}[kind] + len(config.shortv_layers) - 2}

    monkeypatch.setitem(reduction.METHODS, "fitting", Fitting)
    arguments = (repos(ONEVISION), "--prompt", "what ?", "--json", "--max-new-tokens", 2, "--reduction")
    for options, k in ((("--image", folder / "1.png"), 1), (("--video", clip), 2)):
        code, out = shortv(*arguments, "fitting", *options)
        assert code == 0 and json.loads(out)["visual_reduction"] == {"method": "vtw", "k": k}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (NO_VIDEO, ("--video", "CLIP"), "takes no video: its family, llava, has no token for one"),
        (ONEVISION, ("--video", "/no/such.mp4"), "cannot read the video /no/such.mp4: no such file"),
        (ONEVISION, ("--video", "CLIP", "--fps", 0), "--fps is 0.0; it must be more than 0"),
        (ONEVISION, ("--video", "CLIP", "--max-frames", 0), "--max-frames"),
    ],
    ids=str,
)
def test_errors_are_one_line(shortv, repos, clip, family, options, message):
    code, _ = shortv(
        repos(family), "--prompt", "what ?", *(clip if option == "CLIP" else option for option in options)
    )
    assert code.startswith("shortv: ") and message in code and "\n" not in code


def test_a_text_model_takes_no_video(shortv, tmp_path, clip):
    build(NO_VIDEO).config.text_config.save_pretrained(tmp_path)
    code, _ = shortv(tmp_path, "--prompt", "what ?", "--video", clip)
    assert (
        code.startswith("shortv: ") and "has model_type 'llama'; ShortV has classes for" in code and "\n" not in code
    )


@pytest.mark.skipif(is_torchvision_available(), reason="upstream's own processors are used")
def test_original_checkpoint(shortv, tmp_path, clip):
    write_checkpoint(tmp_path, ONEVISION)
    write_processor(tmp_path, ONEVISION, ids=IDS)
    options = ("--layers", "2,1", "--prompt", "what ?", "--json", "--max-new-tokens", 2, "--max-frames", 3)
    code, out = shortv(tmp_path, "--video", clip, *options)
    assert code == 0 and json.loads(out)["visual_tokens"] == 3 * 4 + 1
