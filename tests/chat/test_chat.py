"""Answers, conversations on a kept cache, the comparison, and the command's errors."""

import copy
import json
import os
import statistics
import subprocess
import sys

import pytest
import torch
from helpers import FAMILIES, make_model
from PIL import Image
from processor_files import write_processor
from test_base_weights import write_checkpoint
from transformers import AutoProcessor
from transformers.cache_utils import DynamicLayer

from shortv_hf.chat import comparison
from shortv_hf.chat import conversation as chat
from shortv_hf.command_line.options import parse_reduction
from shortv_hf.data import scoring as evaluation
from shortv_hf.data import sources as calibration_data
from shortv_hf.flops import flops_ratio
from shortv_hf.flops.equations import visual_tokens_by_layer
from shortv_hf.flops.meters import language_model_flops
from shortv_hf.hub import loading
from shortv_hf.pictures import patches as reduction_pictures


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
    family = loading.model_classes(str(repo))[0].base_model_type
    write_processor(repo, family, tokenizer)
    model, processor = loading.load(str(repo), visual_reduction=reduction)
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
    model, processor = loading.load(str(repo))
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
    model, processor = loading.load(str(repo))
    pieces = []
    answer = chat.Conversation(model, processor, max_new_tokens=5).ask("what ?", images[:1], on_text=pieces.append)
    assert "".join(pieces).strip() == answer.text
    assert len(answer.token_ids) == 5 and answer.time_to_first_token > 0 and answer.time_per_output_token > 0


def test_text_only(repo):
    model, processor = loading.load(str(repo))
    assert chat.Conversation(model, processor, max_new_tokens=2).ask("what is a circle ?").visual_tokens == 0


def test_compare(repo, images):
    model, processor = loading.load(str(repo))
    result = comparison.compare(model, processor, "what is this ?", images[:1], max_new_tokens=3)
    assert result["shortv"]["shortv_layers"] == [3, 1] and result["dense"]["shortv_layers"] == []
    assert model.config.shortv_layers == [3, 1]
    v, t = result["visual_tokens"], result["prompt_tokens"] - result["visual_tokens"]
    counted = result["shortv"]["language_model_flops"] / result["dense"]["language_model_flops"]
    assert counted == pytest.approx(flops_ratio(t, v, model.config, N=2), rel=0.01)
    for found in (result["dense"], result["shortv"]):
        assert found["visual_tokens_left"] == v and found["peak_memory_bytes"] > 0
        assert found["prefill_flops"] > found["language_model_flops"]  # the vision tower's are among them


@pytest.mark.parametrize(
    ("reduction", "left"), [("fastv:k=2,ratio=0.5", 8), ("vtw:k=2", 0), ("random:token_num=6", 6)]
)
@pytest.mark.parametrize("repo", ["llava"], indirect=True)
def test_compare_counts_what_is_left_in_the_last_layer(repo, images, reduction, left, monkeypatch):
    monkeypatch.setattr(comparison, "MAX_ROUNDS", 1)
    model, processor = loading.load(str(repo), **parse_reduction(reduction))
    result = comparison.compare(model, processor, "what is this ?", images[:1], max_new_tokens=2)
    assert result["dense"]["visual_tokens_left"] == 16 and result["shortv"]["visual_tokens_left"] == left
    by_layer = visual_tokens_by_layer(16, 4, result["shortv"]["visual_reduction"], model.config)
    assert (
        result["shortv"]["visual_tokens_by_layer"] == by_layer
        and result["dense"]["visual_tokens_by_layer"] == [16] * 4
    )
    text = result["prompt_tokens"] - 16
    assert result["shortv"]["kv_tokens"] == text + statistics.mean(by_layer)
    # The tokens that a method takes out after the vision tower are in the processor's prompt all the same
    assert result["visual_tokens"] == 16 and result["shortv"]["prefill_flops"] < result["dense"]["prefill_flops"]


@pytest.mark.parametrize("repo", ["llava"], indirect=True)
def test_compare_tells_the_answers_and_can_be_ended(repo, images):
    model, processor = loading.load(str(repo))
    told = {"dense": [], "shortv": []}
    result = comparison.compare(
        model, processor, "what ?", images[:1], 3, on_text=lambda name, text: told[name].append(text), max_seconds=0.01
    )
    for name, texts in told.items():
        assert "".join(texts).strip() == result[name]["answer"] and texts.count("") >= result["rounds"] == 1

    def end(name, text):
        raise KeyError(name)

    with pytest.raises(KeyError, match="dense"):
        comparison.compare(model, processor, "what ?", images[:1], 3, on_text=end)
    assert model.settings == ([3, 1], None)
    assert not any(layer._forward_hooks for layer in model.model.language_model.layers)


def test_a_cache_can_be_forgotten(repo, images):
    model, processor = loading.load(str(repo))
    talk, other = (chat.Conversation(model, processor, max_new_tokens=3) for _ in range(2))
    for each in (talk, other):
        assert each.cache_bytes() == 0
        each.ask("what is this ?", images[:1])
        assert each.cache_bytes() == sum(x.keys.nbytes + x.values.nbytes for x in each._cache.layers) > 0
    other.forget_cache()
    assert other.cache_bytes() == 0
    assert talk.ask("is it red ?").token_ids == other.ask("is it red ?").token_ids


def test_layers_on_request(repo):
    assert loading.load(str(repo), layers=[])[0].config.shortv_layers == []
    assert loading.load(str(repo), layers=[0])[0].config.shortv_layers == [0]


def test_original_checkpoint(tmp_path, images):
    base = write_checkpoint(tmp_path / "base", make_model())
    write_processor(base)
    model, processor = loading.load(str(base), layers=[1], dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert chat.Conversation(model, processor, max_new_tokens=2).ask("what ?", images[:1]).prompt_tokens > 16


# ------------------------------------------------------------------------------------------- turns that go wrong


class Interruption(Exception):
    pass


def while_the_answer_is_written(talk):
    """All layers of the cache hold the prompt and part of the answer."""

    def on_text(_):
        raise KeyboardInterrupt

    return {"on_text": on_text}


def between_layers(talk, calls=2):
    """Two of the four layers have run: of the prompt with one of the `calls`, of the answer with more."""
    left = iter(range(1, calls))

    def hook(*_):
        if next(left, None) is None:
            raise Interruption

    talk.model.model.language_model.layers[2].register_forward_pre_hook(hook)
    return {}


def between_layers_of_the_prompt(talk):
    return between_layers(talk, calls=1)


def after_the_answer(talk):
    """Cache and tokens are complete, and only the book-keeping is left."""

    def decode(*args, **kwargs):
        raise Interruption

    talk.processor.decode = decode
    return {}


BREAKS = [while_the_answer_is_written, between_layers, between_layers_of_the_prompt, after_the_answer]


def known(talk):
    """All that a conversation holds; of the cache, its content."""
    layers = [] if talk._cache is None else talk._cache.layers
    cached = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    return copy.deepcopy((talk.messages, talk._images, talk._ids, cached))


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts conversations with equal models."""
    folder = tmp_path_factory.mktemp("processors")
    processors = {family: write_processor(folder / family, family) for family in FAMILIES}

    def start(reduction=None, family="llava", text="llama"):
        model = make_model(family, text, shortv_layers=[3, 1], visual_reduction=reduction)
        model.generation_config.suppress_tokens = [0, 1, 2, 3, 98]
        return chat.Conversation(model, AutoProcessor.from_pretrained(processors[family]), max_new_tokens=5)

    return start


REDUCTIONS = {
    "none": None,
    "fastv": {"method": "fastv", "k": 2},
    "vtw": {"method": "vtw", "k": 2},
    "random": {"method": "random", "token_num": 4},
}


@pytest.mark.parametrize("break_off", BREAKS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("text", ["llama", "mistral_sliding"])
@pytest.mark.parametrize("turn", ["first", "later", "later with an image"])
def test_a_turn_that_breaks_off_leaves_no_trace(start, images, break_off, reduction, text, turn):
    """The conversation is as before it; the next answer is that of a conversation in which it never was."""
    if turn == "later with an image" and reduction == "fastv":
        pytest.skip("refused: test_refused_turns_leave_no_trace")
    talk, other = (start(REDUCTIONS[reduction], text=text) for _ in range(2))
    first, more = images[:1], images[1:] if turn == "later with an image" else []
    if turn != "first":
        talk.ask("what is this ?", first)
        other.ask("what is this ?", first)
        first = []
    before = known(talk)
    with pytest.raises((Interruption, KeyboardInterrupt)):
        talk.ask("w20 w21 w22", first + more, **break_off(talk))
    talk.model.model.language_model.layers[2]._forward_pre_hooks.clear()
    vars(talk.processor).pop("decode", None)

    given_up = turn != "first" and talk._cache is None  # the next turn computes the whole prompt
    if given_up:
        assert text == "mistral_sliding" or (more and reduction != "none")
        assert same(known(talk)[:2], before[:2])
    else:
        assert same(known(talk), before)
    answer, expected = talk.ask("is this red ?", first), other.ask("is this red ?", first)
    assert answer.prompt_tokens == expected.prompt_tokens and answer.visual_tokens == expected.visual_tokens
    if not (given_up and reduction == "fastv"):  # which ranks by the last token of what is computed
        assert answer.token_ids == expected.token_ids and talk.messages == other.messages


@pytest.mark.parametrize("tokenizer", ["prepend", "bytes"])
def test_a_turn_that_cut_the_cache_and_broke_off(start, images, tmp_path, tokenizer):
    """The text of an answer is cut otherwise than it was made, so the next turn begins by taking tokens off the cache."""
    talk, other = start(), start()
    for each in (talk, other):
        each.processor = AutoProcessor.from_pretrained(write_processor(tmp_path / tokenizer, "llava", tokenizer))
        each.ask("what is this ?", images[:1])
    with pytest.raises(KeyboardInterrupt):
        talk.ask("why is a cat red ?", **while_the_answer_is_written(talk))
    assert talk._cache is None  # not one that holds other tokens than it is taken to
    assert talk.ask("is this red ?").token_ids == other.ask("is this red ?").token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_refused_turns_leave_no_trace(start, images, family):
    talk = start(REDUCTIONS["fastv"], family)
    nothing = known(talk)
    for refused, message in (
        (("\udcff ?", images[:1]), "not valid UTF-8 at character 1"),
        (("what ?", [images[0].convert("F")]), "floating-point numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            talk.ask(*refused)
        assert same(known(talk), nothing)
    talk.ask("what is this ?", images[:1])
    before = known(talk)
    for refused, message in (
        (("is this \ud800 ?",), "not valid UTF-8 at character 9"),
        (("what ?", images[1:]), "a new picture needs a new conversation"),
        (("what ?", ["photo.png"]), "must be a Pillow image"),
    ):
        with pytest.raises(ValueError, match=message):
            talk.ask(*refused)
        assert talk._cache is not None and same(known(talk), before)


def test_a_pass_that_breaks_off_within_a_cache_layer(start, images, monkeypatch):
    """Keys are longer than values then, which cropping mends on 4.57 only."""
    talk, other = start(), start()
    talk.ask("what is this ?", images[:1])
    before = known(talk)

    def update(layer, keys, values, *args, **kwargs):
        layer.keys = torch.cat([layer.keys, keys], dim=-2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DynamicLayer, "update", update)
        talk.ask("is this red ?")
    assert same(known(talk)[:2], before[:2]) if talk._cache is None else same(known(talk), before)
    other.ask("what is this ?", images[:1])
    assert talk.ask("is this red ?").token_ids == other.ask("is this red ?").token_ids


@pytest.mark.parametrize("prompt", ["is there an <image> here ?", "<image>", "<image><image> </s> <pad><s>"])
@pytest.mark.parametrize("with_image", [False, True])
def test_special_tokens_in_a_prompt_are_text(start, images, prompt, with_image):
    talk = start()
    for turn in range(2):
        answer = talk.ask(prompt, images[:1] if with_image and turn == 0 else [])
        assert answer.visual_tokens == 16 * with_image
    ids = talk._ids[0].tolist()
    assert ids.count(98) == 16 * with_image and not {0, 1, 2} & set(ids[1:])
    assert talk.messages[0]["content"][-1]["text"] == prompt.replace("<", "< ")
    case = calibration_data.Case(tuple(images[:1]), prompt)
    assert language_model_flops(talk.model, calibration_data.encode(case, talk.processor)) > 0


@pytest.mark.parametrize("reader", ["encode", "encode_batches", "draw_reduction"])
def test_special_tokens_in_the_prompts_of_others(start, images, reader, tmp_path):
    processor, prompt = start().processor, "is there an <image> here ?"
    case = calibration_data.Case((images[0],), prompt)
    if reader == "draw_reduction":
        model, method = make_model(), {"method": "random", "token_num": 4}
        reduction_pictures.draw_reduction(model, processor, images[0], prompt, method, tmp_path / "out.png")
        return
    encoded = {
        "encode": lambda: calibration_data.encode(case, processor),
        "encode_batches": lambda: next(evaluation.encode_batches(processor, [case], 1)),
    }[reader]()
    assert int((encoded["input_ids"] == 98).sum()) == 16


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
        assert code == 0 and "of the language model's prefill FLOPs" in " ".join(out.split())

    def test_conversation(self, shortv, repo, picture, monkeypatch):
        lines = iter(["what is this ?", "is this red ?", ""])
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        code, out = shortv("--model", repo, "--image", picture, "--max-new-tokens", 3)
        assert code == 0 and len([line for line in out.splitlines() if line.strip()]) == 2

    @pytest.mark.parametrize("repo", ["llava"], indirect=True)
    def test_conversation_goes_on_after_errors(self, repo, picture, tmp_path):
        """In a process of its own, whose input is bytes and whose interruptions are signals."""
        lines = [b"what is this ?", b"is there an <image> here ?", b"caf\xe9 ?", b"INTERRUPT", b"is this red ?"]
        code = (
            "import signal, sys, torch\n"
            "from shortv_hf import cli\n"
            "from shortv_hf.chat import conversation as chat\n"
            "ask = chat.Conversation._encode\n"
            "def encode(self, messages):\n"
            "    if 'INTERRUPT' in messages[-1]['content'][-1]['text']:\n"
            "        signal.raise_signal(signal.SIGINT)\n"
            "    return ask(self, messages)\n"
            "chat.Conversation._encode = encode\n"
            f"sys.argv = ['shortv', 'chat', '--model', {str(repo)!r}, '--image', {str(picture)!r}]\n"
            "sys.argv += ['--max-new-tokens', '3']\n"
            "cli.main()\n"
        )
        environment = {**os.environ, "PYTHONUTF8": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], input=b"\n".join(lines) + b"\n", capture_output=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        errors = [line for line in done.stderr.decode().splitlines() if line.startswith("shortv")]
        assert errors == ["shortv: the prompt is not valid UTF-8 at character 4", "shortv: interrupted"]
        assert "Traceback" not in done.stderr.decode()
        answers = [line for line in done.stdout.decode().replace("> ", "\n").splitlines() if line.strip()]
        assert len(answers) == 3

    def test_an_image_of_a_turn_that_broke_off_is_asked_about_again(self, shortv, repo, picture, monkeypatch):
        lines, asked = iter(["what ?", "what ?", "is this red ?", ""]), []
        monkeypatch.setattr("builtins.input", lambda _: next(lines))

        def ask(self, prompt, images, on_text, videos):
            asked.append(len(images))
            if len(asked) == 1:
                raise RuntimeError("out of memory\nin detail")

        monkeypatch.setattr(chat.Conversation, "ask", ask)
        code, _ = shortv("--model", repo, "--image", picture)
        assert code == 0 and asked == [1, 1, 0]

    def test_dense(self, shortv, repo):
        code, out = shortv("--model", repo, "--prompt", "what ?", "--dense", "--json", "--max-new-tokens", 2)
        assert code == 0 and json.loads(out.splitlines()[-1])["shortv_layers"] == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--image", "/no/such/picture.png"], "no such file"),
            (["--image", "BROKEN"], "it is no picture that Pillow can read"),
            (["--image", "http://127.0.0.1:9/picture.png"], "picture.png: Connection refused"),
            (["--image", "NOTHING"], "nothing holds no pictures"),
            (["--image", "~/no such picture.png"], "no such file"),
            (["--image", "file:///no%20such.png"], "no such file"),
            (["--prompt", "caf\udce9"], "the prompt is not valid UTF-8 at character 4"),
            (["--prompt", "caf\udce9", "--compare"], "the prompt is not valid UTF-8 at character 4"),
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
        (tmp_path / "nothing").mkdir()
        files = {"BROKEN": str(tmp_path / "broken.png"), "NOTHING": str(tmp_path / "nothing")}
        arguments = [files.get(a, a) for a in arguments]
        if "--model" not in arguments:
            arguments += ["--model", tmp_path / "repo"]
        code, _ = shortv("--prompt", "what ?", *arguments)
        assert isinstance(code, str) and code.startswith("shortv: ") and message in code and "\n" not in code
