"""Answers, conversations on a kept cache, the comparison, and the command's errors."""

import json

import pytest
import torch
from helpers import FAMILIES, make_model
from PIL import Image
from processor_files import write_processor
from test_base_weights import write_checkpoint

from shortv_hf import chat
from shortv_hf.flops import flops_ratio


@pytest.fixture(params=FAMILIES)
def repo(request, tmp_path):
    """A self-contained tiny ShortV repo with a processor; answers never hold an image token."""
    model = make_model(request.param, shortv_layers=[3, 1])
    model.generation_config.suppress_tokens = [0, 1, 2, 3, 98]
    model.save_pretrained(tmp_path / "repo")
    write_processor(tmp_path / "repo", request.param)
    return tmp_path / "repo"


@pytest.fixture
def images():
    return [Image.new("RGB", (20, 14), colour) for colour in ("red", "blue")]


@pytest.mark.parametrize("tokenizer", ["words", "prepend", "bytes"])
@pytest.mark.parametrize(
    "reduction", [None, {"method": "vtc_cls", "layer": 1, "token_num": 6}, {"method": "vtw", "k": 2}], ids=str
)
def test_ids_of_every_turn_are_those_of_the_whole_prompt(repo, images, tokenizer, reduction):
    """Whatever the text of an answer is cut into when it is read again, also where a cut goes through a turn's end."""
    family = chat.model_classes(str(repo))[0].base_model_type
    write_processor(repo, family, tokenizer)
    model, processor = chat.load(str(repo), visual_reduction=reduction)
    talk, seen, generate = chat.Conversation(model, processor, max_new_tokens=5), [], model.generate
    model.generate = lambda **inputs: seen.append(inputs["input_ids"]) or generate(**inputs)
    given = []
    for question, new in (
        ("what is this ?", images[:1]),
        ("is a red circle here?", []),
        ("and?", images[1:]),
        ("why", []),
    ):
        given += new
        content = [{"type": "image"} for _ in new] + [{"type": "text", "text": question}]
        messages = [*talk.messages, {"role": "user", "content": content}]
        answer = talk.ask(question, new)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        whole = processor(text=text, images=given, return_tensors="pt")
        assert seen[-1].tolist() == whole["input_ids"].tolist()
        fresh = generate(**whole, max_new_tokens=5, do_sample=False)
        assert answer.token_ids == fresh[0, whole["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("later_image", [False, True])
def test_conversation_equals_the_whole_prompt_at_once(repo, images, later_image):
    model, processor = chat.load(str(repo))
    talk = chat.Conversation(model, processor, max_new_tokens=4)
    first = talk.ask("what is this ?", images[:1])
    more = images[1:] if later_image else []
    forwards = []
    model.model.language_model.register_forward_hook(
        lambda _, args, kwargs, __: forwards.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    second = talk.ask("is this red ?", more)
    assert first.text and second.text and first.text != second.text
    assert sum(forwards) < second.prompt_tokens  # the first turn is not computed again

    whole = processor.apply_chat_template(talk.messages[:3], add_generation_prompt=True)
    inputs = processor(text=whole, images=images[: 1 + len(more)], return_tensors="pt")
    assert inputs["input_ids"].shape[1] == second.prompt_tokens
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids[0, -4:].tolist() == second.token_ids
    assert second.visual_tokens == int((inputs["input_ids"] == 98).sum())


def test_streamed_text_is_the_answer(repo, images):
    model, processor = chat.load(str(repo))
    pieces = []
    answer = chat.Conversation(model, processor, max_new_tokens=5).ask("what ?", images[:1], on_text=pieces.append)
    assert "".join(pieces).strip() == answer.text
    assert len(answer.token_ids) == 5 and answer.time_to_first_token > 0 and answer.time_per_output_token > 0


def test_text_only(repo):
    model, processor = chat.load(str(repo))
    assert chat.Conversation(model, processor, max_new_tokens=2).ask("what is a circle ?").visual_tokens == 0


def test_compare(repo, images):
    model, processor = chat.load(str(repo))
    result = chat.compare(model, processor, "what is this ?", images[:1], max_new_tokens=3)
    assert result["shortv"]["shortv_layers"] == [3, 1] and result["dense"]["shortv_layers"] == []
    assert model.config.shortv_layers == [3, 1]
    v, t = result["visual_tokens"], result["prompt_tokens"] - result["visual_tokens"]
    counted = result["shortv"]["prefill_flops"] / result["dense"]["prefill_flops"]
    assert counted == pytest.approx(flops_ratio(t, v, model.config, N=2), rel=0.01)


def test_layers_on_request(repo):
    assert chat.load(str(repo), layers=[])[0].config.shortv_layers == []
    assert chat.load(str(repo), layers=[0])[0].config.shortv_layers == [0]


def test_original_checkpoint(tmp_path, images):
    base = write_checkpoint(tmp_path / "base", make_model())
    write_processor(base)
    model, processor = chat.load(str(base), layers=[1], dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert chat.Conversation(model, processor, max_new_tokens=2).ask("what ?", images[:1]).prompt_tokens > 16


class TestCommand:
    """`shortv chat` as a user types it."""

    @pytest.fixture
    def shortv(self, monkeypatch, capsys):
        cli = pytest.importorskip("shortv_hf.cli")

        def call(*arguments):
            monkeypatch.setattr("sys.argv", ["shortv", "chat", *map(str, arguments)])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            return stop.value.code, capsys.readouterr().out

        return call

    @pytest.fixture
    def picture(self, tmp_path, images):
        images[0].save(tmp_path / "picture.png")
        return tmp_path / "picture.png"

    def test_one_answer_as_json(self, shortv, repo, picture):
        code, out = shortv("--model", repo, "--image", picture, "--prompt", "what ?", "--json", "--max-new-tokens", 3)
        assert code == 0
        answer = json.loads(out.splitlines()[-1])
        assert answer["text"] and answer["shortv_layers"] == [3, 1] and answer["visual_tokens"] > 0

    def test_compare_as_json_and_as_table(self, shortv, repo, picture):
        arguments = ("--model", repo, "--image", picture, "--prompt", "what ?", "--compare", "--max-new-tokens", 3)
        code, out = shortv(*arguments, "--json")
        assert code == 0 and set(json.loads(out.splitlines()[-1])) >= {"dense", "shortv", "answers_agree"}
        code, out = shortv(*arguments)
        assert code == 0 and "of the prefill's FLOPs" in " ".join(out.split())

    def test_conversation(self, shortv, repo, picture, monkeypatch):
        lines = iter(["what is this ?", "is this red ?", ""])
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        code, out = shortv("--model", repo, "--image", picture, "--max-new-tokens", 3)
        assert code == 0 and len([line for line in out.splitlines() if line.strip()]) == 2

    def test_dense(self, shortv, repo):
        code, out = shortv("--model", repo, "--prompt", "what ?", "--dense", "--json", "--max-new-tokens", 2)
        assert code == 0 and json.loads(out.splitlines()[-1])["shortv_layers"] == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--image", "/no/such/picture.png"], "no such file"),
            (["--image", "BROKEN"], "cannot read the image"),
            (["--image", "http://127.0.0.1:9/picture.png"], "cannot read the image"),
            (["--layers", "7"], "0 to 3"),
            (["--layers", "x"], "separated by commas"),
            (["--dtype", "float12"], "float12"),
            (["--device", "nowhere"], "nowhere"),
            (["--dense", "--compare"], "--dense"),
            (["--model", "/no/such/model"], "/no/such/model"),
        ],
        ids=str,
    )
    def test_errors_are_one_clear_line(self, shortv, tmp_path, arguments, message):
        model = make_model()
        model.save_pretrained(tmp_path / "repo")
        write_processor(tmp_path / "repo")
        (tmp_path / "broken.png").write_bytes(b"no picture")
        arguments = [str(tmp_path / "broken.png") if a == "BROKEN" else a for a in arguments]
        if "--model" not in arguments:
            arguments += ["--model", tmp_path / "repo"]
        code, _ = shortv("--prompt", "what ?", *arguments)
        assert isinstance(code, str) and code.startswith("shortv: ") and message in code and "\n" not in code
