"""Upload files: what can be written is known before anything is asked."""

import json
import sys
import types
from pathlib import Path

import pytest

from shortv_hf.evaluate.llava_formats import FORMATS, Question
from shortv_hf.evaluate.llava_uploads import (
    EVAL_AI,
    UPLOADS,
    check_upload,
    check_upload_questions,
    gqa_prediction,
    write_upload,
)


pytestmark = pytest.mark.once
ANSWERS = [{"question_id": 1, "text": "A Dog."}, {"question_id": "b", "text": "Two, é"}]


@pytest.fixture
def eval_ai(monkeypatch):
    """lmms-eval's module, with a processor that only lowers the case."""
    module = types.ModuleType(EVAL_AI)
    module.EvalAIAnswerProcessor = lambda: str.lower
    monkeypatch.setitem(sys.modules, EVAL_AI, module)


@pytest.mark.parametrize("format", sorted(FORMATS.keys() - UPLOADS.keys()))
def test_formats_without_one(tmp_path, format):
    with pytest.raises(ValueError, match=f"{format} has no upload file: its scorer reads the answers file"):
        check_upload(format, tmp_path / "u.json")


@pytest.mark.parametrize("format", UPLOADS)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, format):
    suffix, packages = UPLOADS[format].suffix, UPLOADS[format].packages
    for module in packages:
        monkeypatch.setitem(sys.modules, module, None)
    if packages:
        with pytest.raises(ValueError, match=f"--upload of {format} needs .*: pip install (openpyxl|lmms-eval) "):
            check_upload(format, tmp_path / f"u{suffix}")
    else:
        check_upload(format, tmp_path / f"u{suffix}")
    with pytest.raises(ValueError, match=f"that of {format} must end in {suffix}"):
        check_upload(format, tmp_path / "u.txt")
    assert not list(tmp_path.iterdir())


def test_where_an_upload_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        check_upload("gqa", tmp_path / "no" / "u.json")
    (tmp_path / "u.json").write_text("mine")
    with pytest.raises(ValueError, match="u.json is already there; name another file$"):
        check_upload("gqa", tmp_path / "u.json")
    check_upload("gqa", tmp_path / "u.json", overwrite=True)
    assert (tmp_path / "u.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ("Yes.", "yes"),
        ("Two dogs...", "two dogs"),
        (" a.b. ", " a.b. "),
        ("", ""),
        (".", ""),
        ("No,", "no,"),
        (".5", ".5"),
    ],
)
def test_gqa_prediction(text, prediction):
    assert gqa_prediction(text) == prediction


def test_vqav2_names_all_questions_of_the_split(tmp_path, eval_ai):
    questions, output = tmp_path / "q.jsonl", tmp_path / "u.json"
    questions.write_text('{"question_id": 0}\n{"question_id": "b"}\n{"question_id": 1}\n')
    write_upload("vqav2", ANSWERS, questions, output)
    assert json.loads(output.read_text()) == [
        {"question_id": 0, "answer": ""},
        {"question_id": "b", "answer": "two, é"},
        {"question_id": 1, "answer": "a dog."},
    ]


def test_questions_of_the_split(tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question_id": 0}\n{"question_id": 1}\n')
    asked = [Question(f"asked.jsonl, line {id + 1}", id, "", "", None) for id in (1, 2)]
    check_upload_questions("vqav2", questions, asked[:1])
    with pytest.raises(
        ValueError, match=r"asked.jsonl, line 3: question 2 is not in .*q.jsonl \(--upload-questions\)"
    ):
        check_upload_questions("vqav2", questions, asked)
    with pytest.raises(ValueError, match="--upload-questions is for vqav2"):
        check_upload_questions("gqa", questions, asked)
    questions.write_text('{"question": 0}\n')
    with pytest.raises(ValueError, match='q.jsonl, line 1: it lacks "question_id"'):
        check_upload_questions("vqav2", questions, asked)
    with pytest.raises(ValueError, match="cannot read .*no.jsonl"):
        check_upload_questions("vqav2", Path("no.jsonl"), asked)


@pytest.mark.parametrize(
    ("format", "content"),
    [
        ("gqa", '[{"questionId": 1, "prediction": "a dog"}, {"questionId": "b", "prediction": "two, \\u00e9"}]'),
        ("mm-vet", '{\n  "v1_1": "A Dog.",\n  "v1_b": "Two, \\u00e9"\n}'),
        (
            "seed",
            '{"question_id": "1", "prediction": "A Dog."}\n{"question_id": "b", "prediction": "Two, \\u00e9"}\n',
        ),
    ],
)
def test_texts(tmp_path, format, content):
    write_upload(format, ANSWERS, tmp_path / "none", tmp_path / "u")
    assert (tmp_path / "u").read_text() == content and [each.name for each in tmp_path.iterdir()] == ["u"]
