"""`shortv answer` and `shortv score` on the demonstration model, against golden files of every format.

The golden prompts and uploads are what the rules of LLaVA's scripts gave, written down apart from this package; the texts are
the model's.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from llava_files import COLUMNS, N, write_files

from shortv_hf.evaluate.llava_uploads import EVAL_AI, UPLOADS
from shortv_hf.hub import loading


typer_testing = pytest.importorskip("typer.testing")
from shortv_hf import cli  # noqa: E402


GOLDENS = Path(__file__).parent.parent / "goldens" / "llava_answers"
FIELDS = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
FORMATS = ["pope", "gqa", "textvqa", "sqa", "mmbench", "mmbench-cn", "seed", "mm-vet", "vqav2"]
SENTENCE = "A chat between a curious user and an artificial intelligence assistant."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return write_files(folder), folder / "images"


def answer(world, format, answers, *options):
    """The command in float32, short answers; raises what it raises."""
    files, images = world
    options = ["--format", format, "--questions", files[format], "--answers", answers, *options]
    if not format.startswith("mmbench") and "--images" not in options:
        options += ["--images", images]
    if "--max-new-tokens" not in options:
        options += ["--max-new-tokens", 8]
    options += ["--dtype", "float32", "--device", "cpu"]
    result = typer_testing.CliRunner().invoke(cli.app, ["answer", *map(str, options)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def read(file):
    """The lines without their ids, which are unique."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row["answer_id"] for row in rows}) == len(rows)
    return [{name: value for name, value in row.items() if name != "answer_id"} for row in rows]


def golden(format):
    return [json.loads(line) for line in (GOLDENS / f"{format}.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More only get in each other's way in so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load", load)


@pytest.mark.parametrize("format", FORMATS)
def test_goldens(world, tmp_path, format):
    output = answer(world, format, tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl") == golden(format)
    assert output.endswith(f"a.jsonl: {len(golden(format))} answers\n")
    own = {"round_id", "options", "option_char"} if format.startswith("mmbench") else set()
    assert all(set(json.loads(line)) == FIELDS | own for line in (tmp_path / "a.jsonl").read_text().splitlines())
    settings = json.loads((tmp_path / "a.settings.json").read_text())
    assert Path(settings.pop("model")) == Path(loading.demo_model()) and "transformers" in settings.pop("versions")
    assert settings == {
        "format": format,
        "shortv_layers": [4, 5, 6, 7, 8, 9, 10, 11],
        "visual_reduction": None,
        "dtype": "float32",
        "max_new_tokens": 8,
        "system_prompt": None,
        "chunk": "0 of 1",
    }


@pytest.mark.parametrize("batch_size", [1, 10])
def test_batches_do_not_matter(world, tmp_path, batch_size):
    """Of questions of different length, with a picture and without (the goldens' batches are of 8)."""
    answer(world, "sqa", tmp_path / "a.jsonl", "--batch-size", batch_size)
    assert read(tmp_path / "a.jsonl") == golden("sqa")


@pytest.fixture(scope="module")
def chunks(world, tmp_path_factory):
    """GQA's answers by five processes."""
    folder = tmp_path_factory.mktemp("chunks")
    for index in range(5):
        answer(world, "gqa", folder / f"5_{index}.jsonl", "--num-chunks", 5, "--chunk-idx", index)
    return folder


def test_chunks_joined_are_the_whole(world, chunks, tmp_path, no_weights):
    """The last of five is empty. The joined file has no settings, and its upload needs no model."""
    parts = [(chunks / f"5_{index}.jsonl").read_text() for index in range(5)]
    assert [part.count("\n") for part in parts] == [3, 3, 3, 3, 0]
    joined = tmp_path / "merge.jsonl"
    joined.write_text("".join(parts))
    assert read(joined) == golden("gqa")
    output = answer(world, "gqa", joined, "--upload", tmp_path / "u.json")
    assert f"{N} answers are there, 0 questions are left" in output and "u.json: the upload file" in output
    assert (tmp_path / "u.json").read_text() == (GOLDENS / "gqa.upload.json").read_text()
    assert joined.read_text() == "".join(parts) and not (tmp_path / "merge.settings.json").exists()


def test_chunks_are_not_mixed(world, chunks, no_weights):
    with pytest.raises(ValueError, match="5_0.jsonl: line 1 is no answer to question '201300003'"):
        answer(world, "gqa", chunks / "5_0.jsonl", "--num-chunks", 5, "--chunk-idx", 1)
    with pytest.raises(ValueError, match='5_0.jsonl: it was begun with other settings: chunk "0 of 5", now "0 of 1"'):
        answer(world, "gqa", chunks / "5_0.jsonl")


def test_a_run_that_broke_goes_on(world, tmp_path):
    """In the middle of a line: the answers before it stay, ids and all."""
    file = tmp_path / "a.jsonl"
    answer(world, "pope", file, "--batch-size", 5)
    whole = file.read_bytes()
    cut = len(b"".join(whole.splitlines(keepends=True)[:7])) + 30
    file.write_bytes(whole[:cut])
    assert "7 answers are there, 5 questions are left" in answer(world, "pope", file, "--batch-size", 2)
    assert read(file) == golden("pope") and file.read_bytes().startswith(whole[: cut - 30])


def test_a_picture_that_breaks_loses_nothing(world, tmp_path):
    """The error names the question; with the picture mended, the same command goes on."""
    files, images = world
    shutil.copytree(images, tmp_path / "images")
    picture = (images / "6.png").read_bytes()
    (tmp_path / "images" / "6.png").write_bytes(picture[:200])
    options = ("--images", tmp_path / "images", "--batch-size", 2)
    with pytest.raises(ValueError, match=r"vqav2.jsonl, line 7: cannot read the image .*6.png: "):
        answer(world, "vqav2", tmp_path / "a.jsonl", *options)
    assert read(tmp_path / "a.jsonl") == golden("vqav2")[:6]
    (tmp_path / "images" / "6.png").write_bytes(picture)
    answer(world, "vqav2", tmp_path / "a.jsonl", *options)
    assert read(tmp_path / "a.jsonl") == golden("vqav2")


@pytest.mark.parametrize("format", ["seed", "mm-vet"])
def test_uploads(world, tmp_path, format):
    suffix = UPLOADS[format].suffix
    answer(world, format, tmp_path / "a.jsonl", "--upload", tmp_path / f"u{suffix}")
    assert (tmp_path / f"u{suffix}").read_text() == (GOLDENS / f"{format}.upload{suffix}").read_text()


def test_upload_of_mmbench(world, tmp_path):
    """The table without what the server does not want, `prediction` as its seventh column."""
    openpyxl = pytest.importorskip("openpyxl")
    answer(world, "mmbench", tmp_path / "a.jsonl", "--upload", tmp_path / "u.xlsx")
    cells = [[cell.value for cell in row] for row in openpyxl.load_workbook(tmp_path / "u.xlsx").active]
    assert cells == json.loads((GOLDENS / "mmbench.upload.json").read_text())
    assert cells[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert set(cells[0]) - {"prediction"} < set(COLUMNS)


def test_upload_of_vqav2(world, tmp_path):
    """By lmms-eval's processor, which is EvalAI's."""
    pytest.importorskip(EVAL_AI)
    answer(world, "vqav2", tmp_path / "a.jsonl", "--upload", tmp_path / "u.json")
    assert (tmp_path / "u.json").read_text() == (GOLDENS / "vqav2.upload.json").read_text()


def test_layers_reduction_and_the_system_prompt_change_answers(world, tmp_path):
    """And are settings: answers of different ones are not mixed."""
    before = golden("textvqa")
    for number, options in enumerate(
        (["--layers", ""], ["--reduction", "vtw:k=1"], ["--system-prompt", SENTENCE], ["--layers", "11,1,0"])
    ):
        answer(world, "textvqa", tmp_path / f"{number}.jsonl", *options)
        rows = read(tmp_path / f"{number}.jsonl")
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in before] and rows != before, options
    settings = [json.loads((tmp_path / f"{number}.settings.json").read_text()) for number in range(4)]
    assert [each["shortv_layers"] for each in settings[::3]] == [[], [0, 1, 11]]
    assert settings[1]["visual_reduction"] == {"method": "vtw", "k": 1} and settings[2]["system_prompt"] == SENTENCE
    with pytest.raises(ValueError, match="0.jsonl: it was begun with other settings: shortv_layers.*--overwrite"):
        answer(world, "textvqa", tmp_path / "0.jsonl")
    answer(world, "textvqa", tmp_path / "0.jsonl", "--overwrite")
    assert read(tmp_path / "0.jsonl") == before


def test_llavas_lengths(world, tmp_path, monkeypatch):
    """Where --max-new-tokens is not given."""

    class Stop(Exception):
        pass

    def asker(model, processor, max_new_tokens, system_prompt):
        raise Stop(max_new_tokens)

    monkeypatch.setattr("shortv_hf.evaluate.answering.asker", asker)
    monkeypatch.setattr(loading, "load", lambda *_, **__: (None, None))
    lengths = {}
    for format in FORMATS:
        files, images = world
        options = ["--format", format, "--questions", files[format], "--answers", tmp_path / "a.jsonl"]
        options += [] if format.startswith("mmbench") else ["--images", images]
        result = typer_testing.CliRunner().invoke(cli.app, ["answer", *map(str, options)])
        assert isinstance(result.exception, Stop), result.exception
        lengths[format] = result.exception.args[0]
    long = {"sqa", "mmbench", "mmbench-cn", "mm-vet"}
    assert lengths == {format: 1024 if format in long else 128 for format in FORMATS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "/no/such/model"), "/no/such/model"),
        (("--layers", "one"), "--layers takes layer ids"),
        (("--layers", "1,99"), "shortv_layers holds 99, which is out of range"),
        (("--reduction", "fastv:speed=1"), "speed"),
        (("--images", "/no/such/folder"), "there is no folder /no/such/folder"),
        (("--num-chunks", 2, "--chunk-idx", 2), "--chunk-idx is 2; with --num-chunks 2, 0 to 1 are valid"),
        (("--num-chunks", 2, "--upload", "u.json"), "--upload needs all answers: join the chunks' files"),
        (("--upload", "u.xlsx"), "that of gqa must end in .json"),
        (("--upload-questions", "q.jsonl"), "--upload-questions needs --upload"),
        (("--upload", "u.json", "--upload-questions", "q.jsonl"), "--upload-questions is for vqav2"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_weights_are_read(world, tmp_path, monkeypatch, no_weights, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)) as caught:
        answer(world, "gqa", tmp_path / "a.jsonl", *options)
    assert message in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_answers_to_other_questions_are_found_before_weights_are_read(world, tmp_path, no_weights):
    shutil.copy(GOLDENS / "gqa.jsonl", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="a.jsonl: line 1 is no answer to question 0 .*pope.jsonl, line 1"):
        answer(world, "pope", tmp_path / "a.jsonl")


def test_a_template_without_a_system_prompt(world, tmp_path, monkeypatch, no_weights):
    load_processor = loading.load_processor

    def without(*arguments):
        processor = load_processor(*arguments)
        processor.chat_template = "{% for message in messages if message.role == 'user' %}x{% endfor %}"
        return processor

    monkeypatch.setattr(loading, "load_processor", without)
    with pytest.raises(ValueError, match="the model's chat template does not print a system prompt"):
        answer(world, "gqa", tmp_path / "a.jsonl", "--system-prompt", SENTENCE)


def score(*options):
    result = typer_testing.CliRunner().invoke(cli.app, ["score", *map(str, options)], env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return " ".join(result.output.replace("│", " ").split())


def test_score_of_pope(world, tmp_path):
    """Of the golden answers; only those that hold a lone "no" count as no."""
    files, _ = world
    for category, labels in {"popular": ["no"] * 6, "random": ["yes"] * 6}.items():
        lines = [json.dumps({"question_id": 1, "label": label}) + "\n" for label in labels]
        (tmp_path / f"coco_pope_{category}.json").write_text("".join(lines))
    answers = GOLDENS / "pope.jsonl"
    said_no = [("no" in row["text"].split()) for row in golden("pope")]
    popular, random = said_no[::2].count(True), said_no[1::2].count(False)
    assert 0 < popular < 6 and 0 < random
    output = score("--format", "pope", "--answers", answers, "--questions", files["pope"], "--labels", tmp_path)
    assert f"popular 6 {popular / 6:.2%} 0.00% undefined undefined {1 - popular / 6:.2%}" in output
    assert f"random 6 {random / 6:.2%} 100.00% {random / 6:.2%}" in output
    assert f"all 12 {(popular + random) / 12:.2%} {random / (random + 6 - popular):.2%}" in output
    assert output.endswith("undefined, because they divide by zero: recall of popular, F1 of popular")
    with pytest.raises(ValueError, match="pope needs --questions"):
        score("--format", "pope", "--answers", answers, "--labels", tmp_path)


def test_score_of_gqa(world, tmp_path):
    labels = {row["question_id"]: {"answer": row["text"]} for row in golden("gqa")}
    labels["201300000"] = {"answer": "green"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    options = ("--format", "gqa", "--answers", GOLDENS / "gqa.jsonl", "--labels", tmp_path / "labels.json")
    assert score(*options) == "91.67% of 12 answers are right (exact match)"
    with pytest.raises(ValueError, match="leave --questions out"):
        score(*options, "--questions", world[0]["gqa"])
