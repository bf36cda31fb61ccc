"""LLaVA's question files: what is asked, what is written, and what is wrong with a file."""

import json
import sys
from pathlib import Path

import pytest
from llava_files import COLUMNS, write_files

from shortv_hf.data.images import load_image
from shortv_hf.evaluate.command import FormatName
from shortv_hf.evaluate.llava_formats import FORMATS, read_questions


pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return write_files(folder), folder / "images"


def test_the_command_takes_all_formats():
    assert list(FormatName.__args__) == list(FORMATS)
    with pytest.raises(ValueError, match="unknown format 'mme'; use pope, gqa, textvqa"):
        read_questions("mme", Path("q"))


@pytest.mark.parametrize("format", ["pope", "gqa", "textvqa", "seed", "mm-vet", "vqav2"])
def test_lines_of_json(world, format):
    """The text is asked as it is, and repeated in the answers."""
    files, images = world
    rows = [json.loads(line) for line in files[format].read_text().splitlines()]
    questions = read_questions(format, files[format], images)
    assert [q.id for q in questions] == [row["question_id"] for row in rows]
    assert [q.prompt for q in questions] == [q.asked for q in questions] == [row["text"] for row in rows]
    assert [q.image for q in questions] == [images / row["image"] for row in rows]
    assert questions[4].where == f"{files[format]}, line 5"


def test_sqa(world):
    """The letter prompt is asked and written, `<image>` is written only."""
    files, images = world
    first, second = read_questions("sqa", files["sqa"], images)[:2]
    asked = "\nAnswer with the option's letter from the given choices directly."
    assert first.id == "0" and first.image is None
    assert first.prompt == first.asked == f"Which color does the object at the left have?{asked}"
    assert second.image == images / "1.png"
    assert second.asked == f"Which shape does the object at the left have?{asked}"
    assert second.prompt == f"<image>\n{second.asked}"


@pytest.mark.parametrize(
    ("format", "hint", "letters"),
    [
        ("mmbench", "a hint", "Answer with the option's letter from the given choices directly."),
        ("mmbench-cn", "提示", "请直接回答选项字母。"),
    ],
)
def test_mmbench(world, format, hint, letters):
    """The letter prompt is asked and not written; options end before the first without a value."""
    files, images = world
    questions = read_questions(format, files[format])
    prompts = [
        "Which color does the object at the left have?\nA. red\nB. blue\nC. 2\nD. left",
        f"{hint}\nWhich shape does the object at the left have?\nA. yes\nB. no",
        "How big is the object at the bottom left?\nA. one",
    ]
    assert [q.prompt for q in questions[:3]] == prompts
    assert [q.asked for q in questions[:3]] == [f"{prompt}\n{letters}" for prompt in prompts]
    assert [q.id for q in questions] == list(range(241, 247)) and all(type(q.id) is int for q in questions)
    assert questions[1].fields == {"round_id": 0, "options": ["yes", "no"], "option_char": ["A", "B"]}
    assert load_image(questions[2].image) == load_image(images / "2.png")
    with pytest.raises(ValueError, match="leave --images out"):
        read_questions(format, files[format], images)


def tsv(tmp_path, **cells):
    file = tmp_path / "q.tsv"
    row = dict.fromkeys(COLUMNS, "x") | {"index": "1"} | cells
    file.write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("nothing", ["", "nan", "NaN", "None", "none", "NAN", "N/A", "null"])
def test_no_value(tmp_path, nothing):
    """As pandas and LLaVA's `is_none` see it."""
    (question,) = read_questions("mmbench", tsv(tmp_path, hint=nothing, B=nothing))
    assert question.prompt == "x\nA. x"
    (question,) = read_questions("mmbench", tsv(tmp_path, A=nothing))
    assert question.prompt == "x\nx" and question.fields["options"] == []


def test_numbers_are_text_in_options_and_hints(tmp_path):
    """Also where all of a column are numbers, which LLaVA's script cannot join to the question."""
    (question,) = read_questions("mmbench", tsv(tmp_path, hint="7", A="1", B="02", C="2.50", D="1e3"))
    assert question.prompt == "7\nx\nA. 1\nB. 02\nC. 2.50\nD. 1e3"


GOOD = {"question_id": 1, "image": "0.png", "text": "a", "category": "random"}
LINES = {
    "{": "it is no JSON: Expecting property name",
    "[]": 'it is no object such as {"question_id": 1',
    '{"image": "0.png", "text": "a", "category": "c"}': 'it lacks "question_id"',
    json.dumps({**GOOD, "question_id": 1.5}): '"question_id" is 1.5, neither a whole number nor a text',
    json.dumps({**GOOD, "question_id": True}): '"question_id" is True, neither',
    json.dumps({**GOOD, "text": None}): '"text" is None, not a text',
    json.dumps({**GOOD, "text": "\ud800"}): "the prompt is not valid UTF-8 at character 1",
    json.dumps({**GOOD, "image": ["0.png"]}): "\"image\" is ['0.png'], not a text",
    json.dumps({**GOOD, "image": "no.png"}): "there is no picture ",
    json.dumps({**GOOD, "image": "."}): "there is no picture ",
    '{"question_id": 1, "image": "0.png", "text": "a"}': 'it lacks "category"',
    '{"question_id": 1, "image": "0.png", "text": "\udcff"}': "it is not valid UTF-8 at byte 47",
}


@pytest.mark.parametrize("line", LINES, ids=ascii)
def test_lines_with_faults(world, tmp_path, line):
    """The error is one line with the file, the line in the file and what is wrong."""
    file = tmp_path / "q.jsonl"
    file.write_bytes(f"\ufeff{json.dumps(GOOD)}\n\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as caught:
        read_questions("pope", file, world[1])
    assert str(caught.value).startswith(f"{file}, line 3: {LINES[line]}") and "\n" not in str(caught.value)


def test_the_category_is_popes(world, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question_id": 1, "image": "0.png", "text": "a"}')
    assert len(read_questions("gqa", file, world[1])) == 1


SQA = {
    "{": ": it is no JSON: Expecting",
    "{}": " is no JSON list of ",
    "[3]": ', entry 1: it lacks "conversations"',
    '[{"id": "1", "conversations": []}]': ', entry 1: it lacks "conversations"',
    '[{"id": "1", "conversations": [{"from": "human"}]}]': ', entry 1: it lacks "value"',
    '[{"conversations": [{"value": "a"}]}]': ', entry 1: it lacks "id"',
    '[{"id": "1", "image": null, "conversations": [{"value": "a"}]}]': ', entry 1: "image" is None',
    '[{"id": "1", "image": "no.png", "conversations": [{"value": "a"}]}]': ", entry 1: there is no picture",
    "[]": " holds no questions",
}


@pytest.mark.parametrize("content", SQA, ids=ascii)
def test_sqa_with_faults(world, tmp_path, content):
    file = tmp_path / "q.json"
    file.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_questions("sqa", file, world[1])
    assert str(caught.value).startswith(f"{file}{SQA[content]}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"question": ""}, ', row 1: it has no "question"'),
        ({"image": "nan"}, ', row 1: it has no "image"'),
        ({"index": ""}, ', row 1: it has no "index"'),
        ({"index": "1.5"}, ', row 1: "index" is 1.5'),
    ],
)
def test_rows_with_faults(tmp_path, cells, message):
    file = tsv(tmp_path, **cells)
    with pytest.raises(ValueError) as caught:
        read_questions("mmbench", file)
    assert str(caught.value).startswith(f"{file}{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"index,question\n1,a\n", " has no column index, question, hint, A, B, C, D, image; a table"),
        (b"index\tquestion\thint\tA\tB\tC\tD\timage\n", " holds no questions"),
    ],
)
def test_other_tables(tmp_path, content, message):
    (tmp_path / "q.tsv").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_questions("mmbench", tmp_path / "q.tsv")
    assert str(caught.value).startswith(f"{tmp_path / 'q.tsv'}{message}")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b'index\tquestion\n1\t"a\n', b"a\n1\t2\t3\n4\n5\t6\t7\t8\n", None]
)
def test_tables_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "q.tsv").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_questions("mmbench", tmp_path / "q.tsv")
    assert str(caught.value).startswith(f"cannot read {tmp_path / 'q.tsv'}: ") and "\n" not in str(caught.value)


def test_missing_pandas(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="mmbench's tables need pandas: pip install pandas"):
        read_questions("mmbench", tsv(tmp_path))


@pytest.mark.parametrize("format", ["pope", "sqa"])
def test_files_and_folders_that_are_not_there(world, tmp_path, format):
    with pytest.raises(ValueError, match="cannot read .*q.json: No such file"):
        read_questions(format, tmp_path / "q.json", world[1])
    with pytest.raises(ValueError, match=r"there is no folder .*no \(--images\)"):
        read_questions(format, world[0][format], tmp_path / "no")
    with pytest.raises(ValueError, match=r"(line 1|entry 2): it is about the picture [01].png; --images says"):
        read_questions(format, world[0][format])
