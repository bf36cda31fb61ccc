"""Answers files: resumed, in chunks, refused; with a stub in the place of a model."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortv_hf.evaluate.answering import AnswersFile, chunk, settings_file
from shortv_hf.evaluate.llava_formats import Question


pytestmark = pytest.mark.once
SETTINGS = {"format": "pope", "shortv_layers": (3, 1)}


def make_questions(n):
    return [
        Question(f"q.jsonl, line {i + 1}", i // 2, f"p{i}\n\u2028", f"p{i}", None, {"round_id": 0}) for i in range(n)
    ]


def ask(batch):
    return [f"of {question.asked}\n\u2028é" for question in batch]


def failing_at(name):
    def fail(batch):
        if any(question.asked == name for question in batch):
            raise ValueError(f"{name} cannot be asked")
        return ask(batch)

    return fail


def read(file):
    """The lines without their ids, which are unique."""
    rows = [json.loads(line) for line in Path(file).read_bytes().split(b"\n")[:-1]]
    assert len({row["answer_id"] for row in rows}) == len(rows)
    return [{name: value for name, value in row.items() if name != "answer_id"} for row in rows]


def expected(n):
    return [
        {"question_id": i // 2, "prompt": f"p{i}\n\u2028", "text": f"of p{i}\n\u2028é", "round_id": 0}
        | {"model_id": "m", "metadata": {}}
        for i in range(n)
    ]


def test_fresh(tmp_path):
    file = AnswersFile(tmp_path / "a.jsonl", make_questions(7), SETTINGS)
    assert (
        not list(tmp_path.iterdir()) and len(file.rest) == 7
    )  # nothing is written before there is something to write
    file.write(ask, 3, "m")
    assert read(tmp_path / "a.jsonl") == expected(7) and not file.rest
    assert json.loads((tmp_path / "a.settings.json").read_text()) == {"format": "pope", "shortv_layers": [3, 1]}
    assert {each.name for each in tmp_path.iterdir()} == {"a.jsonl", "a.settings.json"}


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 9), batch_size=st.integers(1, 10), cut=st.floats(0, 1))
def test_a_file_that_was_cut_anywhere_is_completed(n, batch_size, cut):
    """In the middle of a line, of a character, before or behind a line's end: nothing is lost, doubled or asked twice."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.jsonl")
        AnswersFile(file, make_questions(n), SETTINGS).write(ask, batch_size, "m")
        content = file.read_bytes()
        kept = content[: round(cut * len(content))]
        file.write_bytes(kept)
        asked = []
        AnswersFile(file, make_questions(n), SETTINGS).write(lambda batch: asked.extend(batch) or ask(batch), 2, "m")
        assert read(file) == expected(n) and len(asked) == n - kept.count(b"\n")
        assert file.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])  # the same lines, with their ids


def test_killed_between_batches(tmp_path):
    """What was answered before SIGKILL is on the disk."""
    code = f"""
import os, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
from test_answering import AnswersFile, SETTINGS, Path, ask, make_questions
def kill_at_5(batch):
    if any(question.asked == "p5" for question in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return ask(batch)
AnswersFile(Path({str(tmp_path / "a.jsonl")!r}), make_questions(9), SETTINGS).write(kill_at_5, 2, "m")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert read(tmp_path / "a.jsonl") == expected(4)
    AnswersFile(tmp_path / "a.jsonl", make_questions(9), SETTINGS).write(ask, 4, "m")
    assert read(tmp_path / "a.jsonl") == expected(9)


def test_batches_are_on_the_disk_before_the_next_is_asked(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(len(read(tmp_path / "a.jsonl"))) or sync(number))
    with pytest.raises(ValueError, match="p5 cannot be asked"):
        AnswersFile(tmp_path / "a.jsonl", make_questions(9), SETTINGS).write(failing_at("p5"), 2, "m")
    assert synced == [2, 4] and read(tmp_path / "a.jsonl") == expected(4)


def test_no_answers_for_some_of_a_batch_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        AnswersFile(tmp_path / "a.jsonl", make_questions(2), SETTINGS).write(lambda batch: ["one"], 2, "m")


@pytest.fixture
def begun(tmp_path):
    """A file with 3 of 6 answers."""
    with pytest.raises(ValueError):
        AnswersFile(tmp_path / "a.jsonl", make_questions(6), SETTINGS).write(failing_at("p3"), 1, "m")
    return tmp_path / "a.jsonl"


def other_id(rows):
    rows[1]["question_id"] = 7


def other_prompt(rows):
    rows[2]["prompt"] = "p2"


def swapped(rows):
    rows[:2] = rows[1::-1]


def without_text(rows):
    del rows[0]["text"]


def too_many(rows):
    rows += rows + rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_id, r"line 2 is no answer to question 0 \(q.jsonl, line 2\)"),
        (other_prompt, r"line 3 is no answer to question 1 \(q.jsonl, line 3\)"),
        (swapped, "line 1 is no answer"),
        (without_text, "line 1 is no answer"),
        (too_many, "it holds 9 lines, and there are 6 questions"),
    ],
)
def test_answers_to_other_questions_are_refused(begun, change, message):
    rows = [json.loads(line) for line in begun.read_text().splitlines()]
    change(rows)
    begun.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = begun.read_bytes()
    with pytest.raises(ValueError, match=f"a.jsonl: {message}.*; name another file, or pass --overwrite"):
        AnswersFile(begun, make_questions(6), SETTINGS)
    assert begun.read_bytes() == before
    AnswersFile(begun, make_questions(6), SETTINGS, overwrite=True).write(ask, 4, "m")
    assert read(begun) == expected(6)


@pytest.mark.parametrize("content", ["notes\n", "notes", '{"question_id": 0}', "[]\n", "\n", "\xff\n"], ids=ascii)
def test_other_files_are_never_touched(tmp_path, content):
    """Nor is their last line cut off for want of a line feed."""
    file = tmp_path / "a.jsonl"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="a.jsonl: .*--overwrite"):
        AnswersFile(file, make_questions(6), SETTINGS)
    assert file.read_text(encoding="latin-1") == content and len(list(tmp_path.iterdir())) == 1


def test_settings_are_not_mixed(begun):
    changed = {"format": "pope", "shortv_layers": [1], "dtype": "float16"}
    with pytest.raises(ValueError) as caught:
        AnswersFile(begun, make_questions(6), changed)
    assert 'shortv_layers [3, 1], now [1]; dtype null, now "float16"; name another' in str(caught.value)
    before = begun.read_bytes()
    AnswersFile(begun, make_questions(6), changed, overwrite=True)  # looks only
    assert begun.read_bytes() == before
    AnswersFile(begun, make_questions(6), changed, overwrite=True).write(ask, 4, "m")
    assert json.loads(settings_file(begun).read_text()) == changed
    for content in ("{", "[]", ""):
        settings_file(begun).write_text(content)
        with pytest.raises(ValueError, match="a.settings.json.*--overwrite"):
            AnswersFile(begun, make_questions(6), changed)
    settings_file(begun).unlink()
    assert not AnswersFile(begun, make_questions(6), SETTINGS).rest  # all there: nothing is left to be mixed
    whole = begun.read_bytes()
    for content in (whole[:-1], whole + b"notes"):
        begun.write_bytes(content)
        with pytest.raises(ValueError, match="a.settings.json, with the settings of its answers, is not there"):
            AnswersFile(begun, make_questions(6), SETTINGS)


def test_an_empty_file_has_no_settings_yet(begun):
    """As after a break between --overwrite and the first answer."""
    begun.write_bytes(b"")
    AnswersFile(begun, make_questions(6), {"other": 1}).write(ask, 4, "m")
    assert read(begun) == expected(6) and json.loads(settings_file(begun).read_text()) == {"other": 1}


def test_where_a_file_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        AnswersFile(tmp_path / "no" / "a.jsonl", make_questions(1), SETTINGS)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        AnswersFile(tmp_path, make_questions(1), SETTINGS)


@pytest.mark.parametrize(
    ("name", "beside"), [("a.jsonl", "a.settings.json"), ("llava-v1.5", "llava-v1.5.settings.json")]
)
def test_settings_lie_beside(name, beside):
    assert settings_file(Path("b", name)) == Path("b", beside)


@given(n=st.integers(0, 40), num_chunks=st.integers(1, 12))
def test_chunks_are_the_whole(n, num_chunks):
    chunks = [chunk(range(n), num_chunks, index) for index in range(num_chunks)]
    assert [each for part in chunks for each in part] == list(range(n))
    size = -(-n // num_chunks)  # LLaVA's
    assert all(len(part) == size or index >= n // max(size, 1) for index, part in enumerate(chunks))


@pytest.mark.parametrize(("num_chunks", "chunk_idx"), [(1, 1), (3, 3), (3, -1), (0, 0)])
def test_no_such_chunk(num_chunks, chunk_idx):
    with pytest.raises(ValueError, match=f"--chunk-idx is {chunk_idx}; with --num-chunks {num_chunks}, 0 to"):
        chunk(range(9), num_chunks, chunk_idx)
