"""Every command with every family, on tiny random models with processors of their own; none of them names a family."""

import json
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, OTHERS, REFUSED, SPECIAL, make_stock
from PIL import Image
from processor_files import write_processor
from test_family_loading import write_checkpoint
from transformers import AutoModelForImageTextToText

from shortv_hf.benchmark import subjects as benchmark_models
from shortv_hf.chat import comparison
from shortv_hf.chat import conversation as chat
from shortv_hf.command_line.options import load_config
from shortv_hf.data import scoring as evaluation
from shortv_hf.data import sources as calibration_data
from shortv_hf.flops import prefill_flops
from shortv_hf.hub import loading
from shortv_hf.hub.check import check_files, check_repo
from shortv_hf.hub.trial import check_decoding
from shortv_hf.layer_contribution import LayerRanking, rank_layers
from shortv_hf.layer_contribution.kl import last_logits
from shortv_hf.search import SearchResult


typer_testing = pytest.importorskip("typer.testing")
from shortv_hf import cli  # noqa: E402


IDS = {"<image>": 90, "<video>": 91, "<start>": 92, "<end>": 93}  # of `families.py`
LAYERS = [2, 1]


def checkpoint(folder, family):
    """An original checkpoint with a processor, which does not answer with special tokens."""
    write_checkpoint(folder, family)
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": SPECIAL, "pad_token_id": 0}))
    return write_processor(folder, family, ids=IDS)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def loaded(base):
    return loading.load(str(base), LAYERS, "cpu", "float32")


@pytest.fixture(scope="module")
def pictures():
    gradient = Image.linear_gradient("L").convert("RGB")
    return [gradient.resize((20, 14)), gradient.rotate(90).resize((14, 20)), gradient.rotate(180).resize((16, 16))]


@pytest.fixture(scope="module")
def picture(tmp_path_factory, pictures):
    file = tmp_path_factory.mktemp("picture") / "picture.png"
    pictures[0].save(file)
    return file


def shortv(*arguments):
    """What the command prints."""
    result = typer_testing.CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def at_once(model, processor, messages, images):
    """The tokens of an answer to a whole conversation."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_conversation_equals_the_whole_prompts(loaded, pictures):
    """Each of its turns; another conversation with the same model goes on between them."""
    model, processor = loaded
    talk = chat.Conversation(model, processor, 5)
    forwards = []
    hook = model.model.language_model.register_forward_hook(
        lambda _, args, kwargs, output: forwards.append(output.last_hidden_state.shape[1]), with_kwargs=True
    )
    for prompt, images, asked in (
        ("what is this ?", pictures[:1], pictures[:1]),
        ("is this red ?", [], pictures[:1]),
        ("what is a circle ?", pictures[1:2], pictures[:2]),
        ("a red circle ?", [], pictures[:2]),
    ):
        forwards.clear()
        answer = talk.ask(prompt, images)
        if not images and model.config.model_type != "shortv_gemma3":  # its window has slid on
            assert sum(forwards) < answer.prompt_tokens  # the earlier turns are not computed again
        assert answer.token_ids == at_once(model, processor, talk.messages[:-1], asked)
        chat.Conversation(model, processor, 5).ask("a circle ?")
    hook.remove()


def test_chat(base, picture):
    options = ["--image", picture, "--prompt", "what is this ?", "--layers", "2,1", "--max-new-tokens", 4]
    found = json.loads(shortv("chat", base, *options, "--json"))
    assert found["shortv_layers"] == LAYERS and 0 < found["visual_tokens"] < found["prompt_tokens"]
    comparison.MAX_ROUNDS, rounds = 2, comparison.MAX_ROUNDS
    try:
        found = json.loads(shortv("chat", base, *options, "--json", "--compare"))
    finally:
        comparison.MAX_ROUNDS = rounds
    assert found["shortv"]["prefill_flops"] < found["dense"]["prefill_flops"]


def test_special_tokens_in_a_prompt_are_text(loaded):
    answer = chat.Conversation(*loaded, 2).ask("what is <image> <video> <start> <end> ?")
    assert answer.visual_tokens == 0 and answer.prompt_tokens < 30


def test_evaluation(loaded, picture):
    """Batches of prompts with different numbers of pictures give the answers of single ones."""
    cases = [
        calibration_data.Case((Image.open(picture),), "what is this ?"),
        calibration_data.Case((), "is this a red circle ?"),
    ]
    single = [evaluation.answer(*loaded, [case], max_new_tokens=4) for case in cases]
    assert evaluation.answer(*loaded, cases, max_new_tokens=4) == sum(single, [])
    assert evaluation.answer(*loaded, cases[::-1], max_new_tokens=4) == sum(single[::-1], [])


def test_vtw_k(base):
    printed = shortv("vtw-k", base, "--data", "shapes", "--samples", 1, "--max-kl", 1e9, "--device", "cpu")
    assert "--reduction vtw:k=" in printed


def test_decoding_is_checked(loaded, picture):
    model, processor = loaded
    for case in (
        calibration_data.Case((), "what is this ?"),
        calibration_data.Case((Image.open(picture),), "what is this ?"),
    ):
        inputs = calibration_data.encode(case, processor)
        assert "8 out, equal with and without a cache" in check_decoding(model, inputs)


def test_layer_contribution(base, tmp_path):
    """Rank, choose, write a repo, use it; and apply the ranking to the checkpoint."""
    options = ["--data", "shapes", "--samples", 2, "--num-layers", 2, "--device", "cpu"]
    printed = shortv("lc", base, *options, "--output", tmp_path / "lc", "--save-model", tmp_path / "repo")
    ranking = LayerRanking.load(tmp_path / "lc" / "ranking.json")
    assert "freezes 2 of 4 layers, joint KL" in printed and ranking.visual_tokens > 1 and min(ranking.scores) == 0
    model, processor = loading.load(str(tmp_path / "repo"), device="cpu")
    assert model.config.shortv_layers == ranking.layers(2)
    dense, _ = loading.load(str(base), device="cpu")
    ranking.apply(dense, 2)
    inputs = next(calibration_data.load_samples("shapes", processor, 1))
    torch.testing.assert_close(last_logits(model, inputs), last_logits(dense, inputs))


def test_search(base, tmp_path):
    options = ["--data", "shapes", "--samples", 2, "--finalists", 4, "--max-kl", 1e3, "--device", "cpu"]
    shortv("search", base, *options, "--output", tmp_path / "out", "--output-repo", tmp_path / "repo")
    result = SearchResult.load(tmp_path / "out" / "search.json")
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "repo").config
    assert result.row_of(config) == result.best == result.rows[0]
    assert {"LC", "VTW", "fastv", "random"} <= {row.name for row in result.baselines}


def test_flops(base):
    printed = shortv("flops", base, "--layers", "2,1")
    assert "2 of 4" in printed and "100.0%" in printed


@pytest.mark.parametrize("method", ["fastv:k=3,ratio=0.5", "random:token_num=4,seed=1", "downsample:factor=2"])
def test_visualize(base, picture, tmp_path, method):
    arguments = ["visualize", base, "--image", picture, "--method", method, "--output", tmp_path / "p.png"]
    if method.startswith("downsample") and base.name.startswith(("llava_next", "llava_onevision")):
        with pytest.raises(ValueError, match="downsample is not defined for LLaVA-NeXT and others that cut images"):
            shortv(*arguments)
        return
    shortv(*arguments, "--device", "cpu")
    assert Image.open(tmp_path / "p.png").width > 100


@pytest.fixture(scope="module")
def repo(base, tmp_path_factory):
    """With weights of its own."""
    folder = tmp_path_factory.mktemp("repo") / "repo"
    shortv("build-repo", base, "--layers", "2,1", "--output", folder, "--include-weights")
    return folder


def test_publish(repo):
    printed = shortv("publish", repo, "--repo-id", "me/shortv", "--dry-run")
    assert "add      model.safetensors" in printed and "dry run: nothing was changed" in printed


def test_check_repo(repo):
    assert not [str(check) for check in check_files(repo) if check.problem]
    model_type = json.loads((repo / "config.json").read_text())["model_type"]
    if model_type in TRIED:
        if "qwen" in model_type:  # who loads the repo without this package has upstream's processors only
            pytest.importorskip("torchvision")
        checks = check_repo(str(repo))
        assert not [str(check) for check in checks if check.problem]
        assert "8 out, equal with and without a cache" in checks[-1].note


TRIED = ("shortv_qwen2_5_vl", "shortv_gemma3")  # in processes of their own, which take long


def test_serve(tmp_path, pictures, monkeypatch):
    """A family whose processor writes more than pixels; `test_serve.py` has the rest."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "serving")
    test_serve = pytest.importorskip("test_serve")  # needs the `serve` extra
    base = checkpoint(tmp_path / "base", "gemma3")
    shortv("build-repo", base, "--layers", "2,1", "--output", tmp_path / "repo")
    with test_serve.serving(tmp_path / "repo") as client:
        answers = [test_serve.ask(client, tmp_path / "repo", each).choices[0].message.content for each in pictures[:2]]
    assert answers == test_serve.expected(tmp_path / "repo", pictures[:2])


def test_bench(repo, tmp_path, monkeypatch):
    """Of a repo's config, with other weights. Its FLOPs are those of the equations; no time is judged."""
    monkeypatch.setattr(benchmark_models, "SIDE_IN_PIXELS", 32)
    options = ["--models", repo, "--methods", "shortv", "--images", 2, "--text-tokens", 50, "--repeats", 1]
    shortv("bench", *options, "--device", "cpu", "--output", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["method"] for row in report["results"]] == ["stock", "ShortV N=2"] and not report["skipped"]
    config = load_config(str(repo))
    for row in report["results"]:
        counted = prefill_flops(50, row["visual_tokens"], config, shortv_layers=row["shortv_layers"] or [])
        assert row["language_model_flops"] == pytest.approx(counted, rel=0.05)


# ------------------------------------------------------------------------------------------------- without a ShortV class


@pytest.fixture
def stock(tmp_path):
    """Writes an Idefics3, for which there is no class of ours, around a text model."""

    def write(text_config=None):
        config = OTHERS["idefics3"].config()
        if text_config is not None:
            config.text_config = text_config
        make_stock("Idefics3", config, "sdpa").save_pretrained(tmp_path / "stock")
        ids = {"<image>": 90, "<fake_token_around_image>": 94, "<end_of_utterance>": 95}
        return write_processor(tmp_path / "stock", "idefics3", ids=ids)

    return write


def test_layer_contribution_without_a_class(stock, tmp_path):
    base, options = stock(), ["--data", "shapes", "--samples", 2, "--device", "cpu", "--output", tmp_path / "lc"]
    printed = shortv("lc", base, *options)
    assert f'apply_shortv(model, shortv_layers=LayerRanking.load("{tmp_path}/lc/ranking.json").layers(N))' in printed
    assert "build-repo" not in printed and f'from_pretrained("{base}")' in printed
    printed = shortv("lc", base, *options, "--num-layers", 2, "--overwrite")
    ranking = LayerRanking.load(tmp_path / "lc" / "ranking.json")
    assert f"apply_shortv(model, shortv_layers={ranking.layers(2)})" in printed
    model, processor = loading.load_stock(str(base), "cpu")
    model.set_shortv_layers(ranking.layers(2))
    inputs = next(calibration_data.load_samples("shapes", processor, 1))
    frozen = last_logits(model, inputs)
    with model.using(shortv_layers=[]):
        assert not torch.equal(frozen, last_logits(model, inputs))

    with pytest.raises(ValueError, match="no ShortV class for 'idefics3', so no repo of it"):
        shortv("lc", base, "--num-layers", 2, "--save-model", tmp_path / "repo")
    with pytest.raises(ValueError, match="has model_type 'idefics3'; ShortV has classes for llava, "):
        shortv("chat", base, "--prompt", "what is this ?")
    fresh = AutoModelForImageTextToText.from_pretrained(base)
    with pytest.raises(ValueError, match=r"call shortv_hf.apply_shortv\(model, \[\]\) first"):
        rank_layers(fresh, [inputs])


def test_search_without_a_class(stock, tmp_path):
    base, options = stock(), ["--data", "shapes", "--samples", 2, "--finalists", 4, "--device", "cpu", "--max-kl", 1e3]
    shortv("search", base, *options, "--output", tmp_path / "out")
    best = SearchResult.load(tmp_path / "out" / "search.json").best
    model, _ = loading.load_stock(str(base), "cpu")
    with model.using(shortv_layers=best.shortv_layers, visual_reduction=best.visual_reduction):
        assert best.flops_ratio < 1
    with pytest.raises(ValueError, match="no ShortV class for 'idefics3', so no repo of it"):
        shortv("search", base, *options, "--output", tmp_path / "other", "--output-repo", tmp_path / "repo")


def test_a_family_that_the_self_test_refuses(stock, tmp_path, monkeypatch):
    base = stock(REFUSED["smollm3"]())
    monkeypatch.setattr(sys, "argv", ["shortv", "lc", str(base), "--data", "shapes", "--output", str(tmp_path / "lc")])
    with pytest.raises(SystemExit) as stop:  # its text is printed, and the exit code is 1
        cli.main()
    assert str(stop.value).startswith("shortv: ShortV cannot freeze tokens in SmolLM3Model")
    assert len(str(stop.value).splitlines()) == 1 and not (tmp_path / "lc").exists()
