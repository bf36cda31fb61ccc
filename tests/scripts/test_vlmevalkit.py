"""The launcher of VLMEvalKit: what it is told, what models are asked, what it makes of failures. VLMEvalKit is in no extra:
where it is not installed, a stand-in builds and asks the models as its `run.py` does, and leaves the same `status.json`."""

import argparse
import base64
import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from shortv_hf.data import scoring
from shortv_hf.data.inputs import visual_mask
from shortv_hf.hub.loading import demo_model, load


pytest.importorskip("typer")
from families import FAMILIES  # noqa: E402
from test_family_tools import checkpoint  # noqa: E402


pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "vlmevalkit.py"
specification = importlib.util.spec_from_file_location("vlmevalkit", SCRIPT)
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)

DEMO = demo_model()
ON_CPU = ("device=cpu", "dtype=float32", "max_new_tokens=8")


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, None, "cpu", "float32")


def user(*parts):
    """A turn: text, and paths of pictures."""
    kinds = ["image" if isinstance(part, Path) else "text" for part in parts]
    return {
        "role": "user",
        "content": [{"type": kind, "value": str(part)} for kind, part in zip(kinds, parts, strict=True)],
    }


def picture(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


# ------------------------------------------------------------------------------------------------------------- options


def test_models():
    model = script.parse_model(["Dense", DEMO, "layers="])
    assert (model.name, model.path, model.fields) == ("Dense", DEMO, {"shortv_layers": []})
    assert (model.prompt, model.max_new_tokens, model.dtype, model.device) == ("vlmevalkit", 512, "auto", "auto")
    assert script.parse_model(["ShortV", DEMO]).fields == {}
    options = ("layers=11,9,10", "reduction=fastv:k=2,ratio=0.5", "prompt=letter", *ON_CPU)
    model = script.parse_model(["ShortV-2.5_x+y", DEMO, *options])
    reduction = {"method": "fastv", "k": 2, "ratio": 0.5}
    assert model.fields == {"shortv_layers": [11, 9, 10], "visual_reduction": reduction}
    assert (model.prompt, model.max_new_tokens, model.dtype, model.device) == ("letter", 8, "float32", "cpu")
    for form in ('{"method": "fastv", "k": 2, "ratio": 0.5}', "fastv:k=2,ratio=0.5"):
        assert script.parse_model(["x", DEMO, f"reduction={form}"]).fields == {"visual_reduction": reduction}
    assert script.parse_model(["x", DEMO, "reduction=none"]).fields == {"visual_reduction": None}


@pytest.mark.parametrize(
    "words, message",
    [
        (["x"], "takes NAME MODEL"),
        (["x", "layers=1"], "takes NAME MODEL"),
        (["a/b", DEMO], "name of folders and files"),
        (["..", DEMO], "name of folders and files"),
        ([DEMO, DEMO], "name of folders and files"),
        (["x", "/no/such/model"], "no such directory"),
        (["x", DEMO, "11,10"], "x: '11,10' is not OPTION=VALUE with one of layers, reduction"),
        (["x", DEMO, "speed=9"], "is not OPTION=VALUE"),
        (["x", DEMO, "layers=1", "layers=2"], "layers is given twice"),
        (["x", DEMO, "layers=one"], "layers= takes layer ids"),
        (["x", DEMO, "layers=99"], "out of range"),
        (["x", DEMO, "reduction=fast"], "fast"),
        (["x", DEMO, "reduction=fastv:k=200,ratio=0.5"], "k is 200"),
        (["x", DEMO, "prompt=short"], "prompt is one of vlmevalkit, letter"),
        (["x", DEMO, "dtype=int8"], "dtype is one of auto"),
        (["x", DEMO, "device=abacus"], "cannot be used"),
        (["x", DEMO, "max_new_tokens=0"], "max_new_tokens is a number from 1 on"),
    ],
)
def test_what_is_no_model(words, message):
    with pytest.raises(ValueError, match=message):
        script.parse_model(words)


# ------------------------------------------------------------------------------------------------------------- answers


def test_answers_are_those_of_the_package(demo, tmp_path):
    cases = scoring.held_out_cases(7)
    turns = [user(picture(tmp_path / f"{i}.png", case.images[0]), case.prompt) for i, case in enumerate(cases)]
    answers = [script.answer(*demo, [turn], 8) for turn in turns]
    assert answers == scoring.answer(*demo, cases) and scoring.accuracy(answers, cases)["overall"] == 1


def test_pictures_stay_in_their_places(tmp_path):
    """Where the chat template lets them; text that looks like a picture is none."""
    _, processor = load(DEMO, None, "cpu", "float32")
    processor.chat_template = (
        "{% for message in messages %}{{ message.role }}{% for part in message.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
    )
    image = picture(tmp_path / "0.png", Image.new("RGBA", (20, 20)))
    seen = {}
    processor_call = type(processor).__call__

    def call(self, text, **kwargs):
        seen.update(kwargs, text=text)
        return processor_call(self, text=text, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(processor), "__call__", call)
        turns = [user("one", image, "two <image>", image), {"role": "assistant", "content": user("red")["content"]}]
        inputs = script.encode([*turns, user(image, "three")], processor)
        assert seen["text"] == "userone<image>two < image><image>assistantreduser<image>three"
        assert len(seen["images"]) == len(inputs["pixel_values"]) == 3
        assert seen["images"][0].mode == "RGB" and seen["images"][0].getpixel((0, 0)) == (255, 255, 255)
        assert "pixel_values" not in script.encode([user("no picture")], processor)
    with pytest.raises(ValueError, match="cannot read the image"):
        script.encode([user(tmp_path / "gone.png")], processor)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    model, processor = load(str(checkpoint(tmp_path / family, family)), [2, 1], "cpu", "float32")
    gradient = Image.linear_gradient("L")
    one = picture(tmp_path / "0.png", gradient.resize((20, 14)))
    two = picture(tmp_path / "1.png", gradient.rotate(90).resize((16, 16)))
    counts = []
    for turn in (user("what is this"), user(one, "what is this"), user(one, "what is this", two, "and this")):
        counts.append(int(visual_mask(model.config, script.encode([turn], processor)["input_ids"]).sum()))
        assert isinstance(script.answer(model, processor, [turn], 4), str)
    assert 0 == counts[0] < counts[1] < counts[2]


# ------------------------------------------------------------------------------------------------------------ failures


class BaseModel:
    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)


def run():
    """VLMEvalKit's `run.main`; the data set's name says what becomes of it."""
    parser = argparse.ArgumentParser()
    for option in ("--model", "--data"):
        parser.add_argument(option, nargs="+")
    for option in ("--work-dir", "--mode", "--judge", "--limit"):
        parser.add_argument(option)
    parser.add_argument("--reuse", action="store_true")
    args = parser.parse_args()
    ends = {
        "Good": {"status": "done"},
        "Unscored": {"status": "done", "error_message": ""},
        "Broken": {"status": "done", "error_message": "out of memory"},
        "Unknown": {"status": "done", "skip_reason": "invalid_dataset"},
        "Halted": {"status": "infer"},
    }
    for name in args.model:
        folder, built = Path(args.work_dir) / name, None
        folder.mkdir(parents=True, exist_ok=True)
        status = {}
        for data in filter(ends.get, args.data):
            status[data] = {"prediction_file": f"{name}_{data}.json", **ends[data]}
            if data != "Unknown":
                built = built or sys.modules["vlmeval.config"].supported_VLM[name]()
                message = user(Path(os.environ["LMUData"]) / "0.png", "What color is the square?")["content"]
                found = {"answer": built.generate(message, data), "letter": built.use_custom_prompt(data)}
                found["layers"] = built.model.config.shortv_layers
                (folder / f"{name}_{data}.json").write_text(json.dumps(found))
        (folder / "status.json").write_text(json.dumps({"datasets": status}))


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Calls the launcher with the words of a command line."""
    contents = {
        "vlmeval": {},
        "vlmeval.config": {"supported_VLM": {"theirs": None}},
        "vlmeval.dataset": {"DATASET_TYPE": lambda name: "MCQ"},
        "vlmeval.vlm": {"LLaVA_Next": type("LLaVA_Next", (), {"build_prompt": None})},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
        "vlmeval.run": {"main": run},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "data").mkdir()
    picture(tmp_path / "data" / "0.png", scoring.held_out_cases(1)[0].images[0])
    monkeypatch.setenv("LMUData", str(tmp_path / "data"))
    monkeypatch.setenv("MMEVAL_ROOT", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)

    def launch(*words):
        monkeypatch.setattr(sys, "argv", ["vlmevalkit.py", *map(str, words)])
        script.main()

    return launch


def test_dense_and_shortv_in_one_run(stand_in, tmp_path):
    models = ["--shortv", "Dense", DEMO, "layers=", *ON_CPU, "--shortv", "ShortV", DEMO, "prompt=letter", *ON_CPU]
    stand_in(*models, "--data", "Good", "--work-dir", "out", "--limit", 3)
    found = {
        name: json.loads((tmp_path / "out" / name / f"{name}_Good.json").read_text()) for name in ("Dense", "ShortV")
    }
    assert found["Dense"]["layers"] == [] and len(found["ShortV"]["layers"]) == 8
    assert not found["Dense"]["letter"] and found["ShortV"]["letter"] and found["ShortV"]["answer"]
    assert sys.argv[1:3] == ["--limit", "3"] and sys.argv[sys.argv.index("--judge") + 1] == "exact_matching"
    assert "MMEVAL_ROOT" not in os.environ


def test_failures_set_the_exit_code(stand_in, capsys):
    data = ["Good", "Unscored", "Broken", "Unknown", "Halted", "Absent"]
    with pytest.raises(SystemExit) as caught:
        stand_in("--shortv", "x", DEMO, *ON_CPU, "--data", *data, "--work-dir", "out")
    assert caught.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    said = [line.removeprefix("vlmevalkit: no result of x on ") for line in lines if "no result" in line]
    assert [line.split(":")[0] for line in said] == data[1:]
    assert "--mode infer" in said[0] and said[1] == "Broken: out of memory" and "invalid_dataset" in said[2]
    assert "it ended at 'infer'" in said[3] and said[4] == "Absent: it was not asked"


def test_what_is_refused(stand_in, tmp_path, monkeypatch, capsys):
    def error(*words):
        with pytest.raises(SystemExit) as caught:
            stand_in(*words, "--data", "Good")
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    model = shutil.copytree(DEMO, tmp_path / "repo" / "model")
    given = ["--shortv", "x", DEMO, *ON_CPU]
    assert "--work-dir" in error(*given)
    assert "has a model named theirs" in error("--shortv", "theirs", DEMO, "--work-dir", "out")
    assert "names of the models are to differ" in error(*given, "--shortv", "x", DEMO, "--work-dir", "out")
    assert "in the directory of the model" in error("--shortv", "x", model, "--work-dir", model)
    assert "in the directory of the model" in error("--shortv", "model", model, "--work-dir", tmp_path / "repo")
    assert "out of range" in error("--shortv", "x", DEMO, "layers=99", "--work-dir", "out")
    for option in ("--config", "--base-url", "--api-mode"):
        assert f"{option} is about other models" in error(*given, "--work-dir", "out", f"{option}=y")
    stand_in(*given, "--data", "Good", "--work-dir", "out")
    assert "--reuse to go on with them" in error(*given, "--work-dir", "out")
    del sys.modules["vlmeval.config"].supported_VLM["x"]  # as in the next process
    stand_in(*given, "--data", "Good", "--work-dir", "out", "--reuse")
    assert sys.argv[-1] == "--reuse"
    monkeypatch.delenv("LMUData")
    assert "--lmu-data is needed" in error(*given, "--work-dir", "out2")
    assert sorted(file.name for file in model.iterdir()) == sorted(file.name for file in Path(DEMO).iterdir())


def test_without_vlmevalkit(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    words = ["--shortv", "x", DEMO, "--data", "Good", "--work-dir", tmp_path / "out", "--lmu-data", tmp_path / "data"]
    monkeypatch.setattr(sys, "argv", ["vlmevalkit.py", *map(str, words)])
    monkeypatch.setenv("LMUData", "")
    with pytest.raises(SystemExit, match="VLMEvalKit does not work here"):
        script.main()


# ------------------------------------------------------------------------------------------------------- VLMEvalKit


def write_tsv(path: Path, cases, *columns):
    with open(path, "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", *[name for name, _ in columns]])
        for i, case in enumerate(cases):
            png = BytesIO()
            case.images[0].save(png, "PNG")
            values = [value(case) for _, value in columns]
            table.writerow([i, base64.b64encode(png.getvalue()).decode(), case.prompt, *values])


# Not `importorskip`: importing it switches gradients and checks of certificates off, here for all tests.
@pytest.mark.skipif(importlib.util.find_spec("vlmeval") is None, reason="VLMEvalKit is not installed")
def test_vlmevalkit_itself(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_tsv(data / "ShapesVQA.tsv", scoring.held_out_cases(7), ("answer", lambda case: case.answer))
    letters = [("A", lambda case: "red"), ("B", lambda case: "blue"), ("answer", lambda case: "A")]
    write_tsv(data / "ShapesMCQ.tsv", scoring.held_out_cases(2), *letters)
    command = [sys.executable, str(SCRIPT), "--lmu-data", str(data), "--work-dir", "out", "--shortv", "ShortV", DEMO]
    command += [*ON_CPU, "--shortv", "Dense-Qwen2-VL", DEMO, "layers=", "prompt=letter", *ON_CPU]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HOME": str(tmp_path)}

    def launch(*words):
        return subprocess.run(
            [*command, *words], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
        )

    done = launch("--data", "ShapesVQA", "--mode", "infer")
    assert done.returncode == 0, done.stderr
    pandas = pytest.importorskip("pandas")
    answers = pandas.read_excel(tmp_path / "out" / "ShortV" / "ShortV_ShapesVQA.xlsx", dtype=str)
    assert all(map(scoring.is_right, answers["prediction"], answers["answer"]))
    done = launch("--data", "ShapesMCQ", "ShapesVQA", "--reuse")
    assert done.returncode == 1 and (tmp_path / "out" / "ShortV" / "ShortV_ShapesMCQ_acc.csv").is_file()
    said = [line for line in done.stderr.splitlines() if line.startswith("vlmevalkit: ")]
    assert len(said) == 2 and all("on ShapesVQA: no error message" in line for line in said)
    assert not (tmp_path / "LMUData").exists()
