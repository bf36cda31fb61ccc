"""The `shortv` command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, make_model
from PIL import Image
from processor_files import write_processor
from test_base_weights import write_checkpoint
from transformers import AutoModelForImageTextToText

from shortv_hf.chat.comparison import compare
from shortv_hf.chat.conversation import Conversation
from shortv_hf.hub import build_repo
from shortv_hf.hub.loading import demo_model, load, place
from shortv_hf.layer_contribution import LayerRanking
from shortv_hf.layer_contribution.budget import choose_by_flops


typer_testing = pytest.importorskip("typer.testing")
from shortv_hf import cli  # noqa: E402
from shortv_hf.chat.command import _print_comparison as print_comparison  # noqa: E402


HUB_CONFIGS = Path(__file__).parent.parent / "hub_configs"


def invoke(*arguments):
    return typer_testing.CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_flops():
    result = invoke("flops", HUB_CONFIGS / "shortv-llava-1.5-7b-hf")
    assert result.exit_code == 0
    assert "8.504" in result.output and "4.694" in result.output and "55.2%" in result.output


def test_flops_of_other_layers():
    result = invoke("flops", HUB_CONFIGS / "shortv-llava-v1.6-vicuna-7b-hf", "--layers", "1,2", "-v", "2880")
    assert result.exit_code == 0 and "2 of 32" in result.output
    result = invoke("flops", HUB_CONFIGS / "shortv-llava-v1.6-vicuna-7b-hf")
    assert "42.675" in result.output and "21.560" in result.output  # v = 2880 by default


def test_flops_takes_v_from_the_model():
    result = invoke("flops")  # of the demonstration model
    assert result.exit_code == 0 and "t = 64, v = 64" in result.output and "8 of 12" in result.output
    result = invoke("flops", "--reduction", "prumerge")
    assert "say how many are kept before the decoder (--kept)" in str(result.exception)
    assert invoke("flops", "--reduction", "prumerge", "--kept", 9).exit_code == 0


TAKE_A_MODEL = ["chat", "demo", "flops", "lc", "search", "visualize", "vtw-k"]


@pytest.mark.parametrize("command", TAKE_A_MODEL)
def test_the_model_is_the_first_argument_everywhere(command):
    for arguments in (["/no/such/model"], ["--model", "/no/such/model"]):
        result = invoke(command, *arguments)
        assert isinstance(result.exception, (ValueError, OSError)) and "/no/such/model" in str(result.exception)
    result = invoke(command, "one", "--model", "another")
    assert str(result.exception) == "two models are named: one and, by --model, another"


def test_a_mistyped_folder_is_not_looked_for_on_the_hub():
    for command in ("chat", "check-repo"):
        assert "no such directory: nosuchmodel (and" in str(invoke(command, "nosuchmodel").exception)


def test_visualize_writes_png_only(tmp_path):
    assert "it must end in .png" in str(invoke("visualize", "--output", tmp_path / "x.jpg").exception)


def test_help_shows_choices_and_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no word is broken
    for command in TAKE_A_MODEL:
        text = " ".join(invoke(command, "--help").output.replace("│", " ").split())
        assert "MODEL" in text and "demonstration model" in text
        if command != "flops":
            assert "default: auto" in text
    text = invoke("lc", "--help").output
    assert all(name in text for name in ("greedy", "cosine", "random", "reverse", "bfloat16"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'."),
        (["chat", "--dtype", "float12"], "Invalid value for '--dtype'"),
        (["lc", "--metric", "norm"], "Invalid value for '--metric'"),
        (["lc", "--kl", "both"], "Invalid value for '--kl'"),
        (["chat", "--colour", "red"], "No such option: --colour"),
        (["chat", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["publish", "somewhere"], "Missing option '--repo-id'"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line_are_one_line(monkeypatch, arguments, message):
    monkeypatch.setattr("sys.argv", ["shortv", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code.startswith(f"shortv: {message}") and "\n" not in stop.value.code


def test_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shortv_hf.hub.loading.demo_model", interrupted)
    monkeypatch.setattr("sys.argv", ["shortv", "flops"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and capsys.readouterr().err.strip() == "shortv: interrupted"


def test_interruption_while_the_command_starts(tmp_path):
    """What a command imports takes seconds; who stops there sees no traceback."""
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(HUB_CONFIGS.parent)])}
    command = [sys.executable, "-m", "shortv_hf.cli", "flops"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 130 and ended.stderr.strip() == "shortv: interrupted"


@pytest.mark.parametrize("arguments", [["--help"], ["lc", "--help"], ["bench", "--help"], ["--version"]])
def test_help_needs_no_torch(arguments):
    code = f"import sys\nfrom shortv_hf import cli\nsys.argv = ['shortv', *{arguments}]\n"
    code += "try:\n    cli.main()\nfinally:\n    assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HUB_CONFIGS.parent)
    assert done.returncode == 0 and done.stdout.strip() and not done.stderr


def test_answers_are_never_markup(capsys):
    one = {"answer": "[/INST] [a] [b]c[/b]", "time_to_first_token_s": 0.01, "prefill_flops": 10**9}
    one |= {"shortv_layers": [], "visual_reduction": None, "visual_tokens_left": 4, "peak_memory_bytes": 2**20}
    one |= {"language_model_flops": 10**8}
    timing = {"speed_up": 1.5, "speed_up_quartiles": [1.45, 1.55], "rounds": 5, "settled": True}
    print_comparison(
        {"dense": one, "shortv": one, "answers_agree": True, "prompt_tokens": 9, "visual_tokens": 4, **timing}, False
    )
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert printed.count("[/INST]") == printed.count("[a]") == printed.count("[b]c[/b]") == 2
    assert "1.50x to the first token (quartiles 1.45x to 1.55x of 5 rounds)" in printed


def test_the_demonstration_model_says_what_it_knows(tmp_path):
    noise = Image.effect_noise((80, 80), 90)
    noise.save(tmp_path / "noise.png")
    example = HUB_CONFIGS / "shortv-shapes-demo" / "example.png"
    for picture, warned in ((example, False), (tmp_path / "noise.png", True)):
        result = invoke("chat", "--image", picture, "--prompt", "What is this?", "--max-new-tokens", 2)
        assert result.exit_code == 0 and result.stderr.count("The demonstration model knows 6 colours") == 1
        assert ("is not of that kind: 0% of its area" in " ".join(result.stderr.split())) == warned


def test_build_repo(tmp_path):
    base = write_checkpoint(tmp_path / "base", make_model())
    write_processor(base)
    result = invoke("build-repo", base, "--layers", "3,1", "--output", tmp_path / "repo")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "repo" / "tokenizer.json").is_file()
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "repo").config.shortv_layers == [3, 1]


@pytest.mark.parametrize(
    ("layers", "message"), [("9", "out of range"), ("1,1", "twice"), ("one", "separated by commas")], ids=str
)
def test_bad_layers(tmp_path, layers, message):
    base = write_checkpoint(tmp_path / "base", make_model())
    result = invoke("build-repo", base, "--layers", layers, "--output", tmp_path / "repo")
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
    assert not (tmp_path / "repo").exists()


def test_build_repo_refuses_what_it_cannot_reference(tmp_path):
    base = write_checkpoint(tmp_path / "base", make_model())
    before = (base / "config.json").read_text()
    result = invoke("build-repo", base, "--layers", "1", "--output", base)
    assert "the checkpoint itself" in str(result.exception) and (base / "config.json").read_text() == before
    make_model().save_pretrained(tmp_path / "own")
    result = invoke("build-repo", tmp_path / "own", "--layers", "1", "--output", tmp_path / "repo")
    assert "holds its own weights" in str(result.exception) and not (tmp_path / "repo").exists()


def write_ranking(file, order):
    LayerRanking([0.1] * len(order), order, "lc", "visual", "forward", 0).save(file)
    return file


def test_build_repo_from_a_ranking(tmp_path):
    base = write_checkpoint(tmp_path / "base", make_model())
    ranking = write_ranking(tmp_path / "ranking.json", [3, 1, 0, 2])
    result = invoke("build-repo", base, "--ranking", ranking, "--num-layers", 2, "--output", tmp_path / "repo")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "repo" / "config.json").read_text())["shortv_layers"] == [3, 1]
    assert "frozen in 2 of 4 layers" in (tmp_path / "repo" / "README.md").read_text()
    assert LayerRanking.load(tmp_path / "repo" / "ranking.json") == LayerRanking.load(ranking)
    assert "ranking.json says how the layers were chosen" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranking", "good.json"], "--num-layers"),
        (["--ranking", "good.json", "--num-layers", "5"], "cannot freeze 5 layers"),
        (["--ranking", "other.json", "--num-layers", "2"], "of a model with 6 layers; this one has 4"),
        (["--ranking", "broken.json", "--num-layers", "2"], "broken.json is not a saved LayerRanking"),
        (["--ranking", "good.json", "--num-layers", "2", "--layers", "1"], "either --layers, or --ranking"),
        (["--layers", "1", "--base-revision", "main"], "has no revisions"),
        ([], "either --layers, or --ranking"),
    ],
    ids=str,
)
def test_build_repo_refuses_options(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", make_model())
    write_ranking(tmp_path / "good.json", [3, 1, 0, 2])
    write_ranking(tmp_path / "other.json", [3, 1, 0, 2, 4, 5])
    (tmp_path / "broken.json").write_text("[]")
    result = invoke("build-repo", "base", *arguments, "--output", "repo")
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
    assert not (tmp_path / "repo").exists()


def test_build_repo_with_weights(tmp_path):
    """The files are copied as they are; the base is not needed any more."""
    base = write_processor(write_checkpoint(tmp_path / "base", make_model(), shards=2))
    (base / "README.md").write_text("---\nlicense: mit\n---\nA base.\n")
    result = invoke("build-repo", base, "--layers", "1", "--include-weights", "--output", tmp_path / "repo")
    assert result.exit_code == 0, result.output
    for file in base.glob("*.safetensors*"):
        assert (tmp_path / "repo" / file.name).read_bytes() == file.read_bytes()
    base.rename(tmp_path / "gone")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "repo")
    assert model.config.base_model_name_or_path is None and model.config.shortv_layers == [1]
    expected = make_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "license: mit" in card and "unchanged copy" in card


def test_errors_are_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["shortv", "flops", "/no/such/model"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert str(stop.value.code).startswith("shortv: ") and "/no/such/model" in str(stop.value.code)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An original checkpoint with a processor, and pictures with prompts beside it."""
    folder = tmp_path_factory.mktemp("lc")
    base = write_checkpoint(folder / "base", make_model())
    write_processor(base)
    data = folder / "data"
    data.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(data / f"{number}.png")
    lines = [json.dumps({"image": f"{number}.png", "prompt": f"w{number + 3}"}) for number in range(3)]
    (data / "prompts.jsonl").write_text("\n".join(lines))
    return base, data


@pytest.mark.parametrize("budget", [("--num-layers", 2), ("--flops-ratio", 0.7), ("--max-kl", 1000)])
@pytest.mark.parametrize("metric", ["lc", "greedy"])
def test_lc(base, tmp_path, budget, metric):
    base, data = base
    result = invoke(
        "lc", base, "--data", data, "--samples", 2, "--metric", metric, *budget,
        "--output", tmp_path / "out", "--save-model", tmp_path / "repo",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ranking = LayerRanking.load(tmp_path / "out" / "ranking.json")
    assert (
        ranking.metric == metric and ranking.data["samples"] == 2 and ranking.data["name"].startswith(f"{data.name}, ")
    )
    Image.open(tmp_path / "out" / "layer_scores.png").verify()
    n = {"--num-layers": 2, "--max-kl": 4}.get(budget[0])
    if n is None:
        n = choose_by_flops(ranking, make_model().config, 0.7)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "repo")
    assert model.config.shortv_layers == ranking.order[:n] and 0 < n
    assert model.config.base_model_name_or_path == str(base)
    assert not list((tmp_path / "repo").glob("*.safetensors"))
    assert f"freezes {n} of 4 layers" in result.output
    assert LayerRanking.load(tmp_path / "repo" / "ranking.json") == ranking


@pytest.mark.parametrize(("metric", "log"), [("lc", True), ("greedy", True), ("cosine", False), ("random", False)])
def test_lc_chart(base, tmp_path, monkeypatch, metric, log):
    """Its title says what was measured; KL divergences get a logarithmic axis, where they span decades."""
    base, data = base
    charts = []

    def draw(*arguments):
        charts.append(arguments)
        arguments[2].touch()

    monkeypatch.setattr("shortv_hf.pictures.plots.plot_layer_scores", draw)
    arguments = ("--data", data, "--samples", 2, "--metric", metric, "--output", tmp_path / "out")
    assert invoke("lc", base, *arguments).exit_code == 0
    scores, label, file, logarithmic, title = charts[-1]
    assert len(charts) == len(scores)  # one more with the scores for text tokens
    assert logarithmic == log and file.suffix == ".png" and (tmp_path / "out" / "layer_scores.png").is_file()
    assert set(scores) == {"visual tokens", "text tokens"} - (
        {"text tokens"} if metric in ("greedy", "random") else set()
    )
    assert title.startswith(f"{base.name}: {label}\n")
    assert ("2 samples" in title and data.name in title) or metric == "random"


def test_lc_of_a_repo_with_its_own_weights(base, tmp_path):
    base, data = base
    make_model(shortv_layers=[0]).save_pretrained(tmp_path / "own")
    write_processor(tmp_path / "own")
    result = invoke(
        "lc", tmp_path / "own", "--data", data, "--samples", 1, "--metric", "random", "--num-layers", 3,
        "--output", tmp_path / "out", "--save-model", tmp_path / "repo",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    own, made = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("own", "repo"))
    assert own == made
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "repo")
    assert len(model.config.shortv_layers) == 3 and model.config.base_model_name_or_path is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-layers", 2, "--max-kl", 1), "--num-layers and --max-kl exclude each other"),
        (("--save-model", "repo"), "--save-model needs one of"),
        (("--num-layers", 5), "cannot freeze 5 layers"),
        (("--flops-ratio", 1.5), "flops_ratio is 1.5"),
        (("--max-kl", -1), "max_kl is -1"),
        (("--data", "vqav2"), "unknown data"),
        (("--samples", 20), "has only 3 samples, 20 were asked for; --samples 3 (n=3 in Python) takes all"),
    ],
)
def test_lc_refuses(base, tmp_path, arguments, message):
    base, data = base
    arguments = ("--samples", 1, *arguments) if "--data" in arguments else ("--data", data, "--samples", 1, *arguments)
    result = invoke("lc", base, "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 1 and message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_data_is_given_several_times(base, tmp_path, monkeypatch):
    """A folder whose name holds a comma is one source; without such a folder, a comma separates two."""
    base, data = base
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "a,b")
    options = ("--data", "a,b", "--data", f"{data},shapes")
    result = invoke("lc", base, *options, "--samples", 2, "--metric", "cosine", "--no-text", "--output", "out")
    assert result.exit_code == 0, result.output
    found = LayerRanking.load(tmp_path / "out" / "ranking.json").data
    assert found["samples"] == 6 and found["name"] == f"a,b,{data.name},shapes, 2 each, seed 0"  # no paths
    result = invoke("vtw-k", "--model", base, *options, "--samples", 1)
    assert result.exit_code == 0, result.output


def test_lc_keeps_the_ranking_when_the_budget_is_out_of_reach(base, tmp_path):
    base, data = base
    arguments = ("--data", data, "--samples", 1, "--no-text", "--flops-ratio", 0.01, "--save-model", tmp_path / "repo")
    result = invoke("lc", base, *arguments, "--output", tmp_path / "out")
    assert result.exit_code == 1 and "out of reach" in str(result.exception)
    assert LayerRanking.load(tmp_path / "out" / "ranking.json").order and not (tmp_path / "repo").exists()


def test_lc_measures_in_one_dtype_and_saves_the_checkpoints(tmp_path):
    """Nor does a reduction method in the config stand in the way: layers are ranked without it."""
    model = make_model(visual_reduction={"method": "prumerge"}).half()
    model.save_pretrained(tmp_path / "own")
    write_processor(tmp_path / "own")
    result = invoke(
        "lc", tmp_path / "own", "--data", "shapes", "--samples", 1, "--no-text", "--num-layers", 2, "--dtype",
        "float32", "--output", tmp_path / "out", "--save-model", tmp_path / "repo",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "repo" / "config.json").read_text())
    assert config["dtype"] == "float16" and config["visual_reduction"] == {"method": "prumerge"}
    assert len(config["shortv_layers"]) == 2


def test_lc_without_a_budget_shows_what_budgets_give(base, tmp_path):
    base, data = base
    result = invoke("lc", base, "--data", data, "--samples", 2, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    curve = [[cell.strip() for cell in line[1:-1]] for line in lines[-5:]]
    assert [row[0] for row in curve] == list("01234") and curve[0][1:] == ["100.0%", "0 ± 0"]
    ranking = LayerRanking.load(tmp_path / "out" / "ranking.json")
    n = choose_by_flops(ranking, make_model().config, 0.75)
    assert f"--flops-ratio 0.75: N = {n} (" in result.output
    assert f"build-repo {base} --ranking" in " ".join(result.output.split())


def test_chat_takes_the_processor_of_the_base(tmp_path):
    """A repo that holds no processor files, as those of `hub_configs` do not."""
    base = write_processor(write_checkpoint(tmp_path / "base", make_model()))
    config = FAMILIES["llava"][0].from_pretrained(base, shortv_layers=[1])
    repo = build_repo(config, tmp_path / "repo")
    assert not (repo / "tokenizer.json").exists()
    model, processor = load(str(repo))
    assert processor.tokenizer.name_or_path == str(base) and model.config.shortv_layers == [1]
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="no processor can be loaded from .*repo or its base .*base"):
        load(str(repo))


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (1, "cuda"), (4, "auto")])
def test_device_auto(monkeypatch, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert place("auto") == expected


def test_comparison_stops_when_its_times_settle(monkeypatch):
    model, processor = load(demo_model())
    times = iter([])

    class Answer:
        text, token_ids, prompt_tokens, visual_tokens = "two", [5], 70, 64

        @property
        def time_to_first_token(self):
            return next(times)

    monkeypatch.setattr(Conversation, "ask", lambda *_, **__: Answer())
    times = iter([0.3, 0.2] * 40)  # dense, ShortV, in turn
    result = compare(model, processor, "how many ?", [], 3)
    assert result["settled"] and result["rounds"] == 5 and result["speed_up"] == pytest.approx(1.5)
    times = iter([0.3, 0.2, 0.3, 0.6] * 40)
    result = compare(model, processor, "how many ?", [], 3)
    assert not result["settled"] and result["rounds"] == 40
    assert result["speed_up_quartiles"] == pytest.approx([0.5, 1.5])
