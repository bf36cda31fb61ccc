"""JSON and JSONL files, and what is said of broken ones (lines with faults: `test_sources.py`)."""

import re

import pytest

from shortv_hf.data.jsonl import read_json, read_objects


pytestmark = pytest.mark.once


def test_objects_and_where_they_stand(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"a": 1}\n\n \r\n{"b": "\u2028\x85"}'.encode())
    assert list(read_objects(file, "{}")) == [(f"{file}, line 1", {"a": 1}), (f"{file}, line 4", {"b": "\u2028\x85"})]


def test_what_is_before_a_broken_line_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n[]\n')
    rows = read_objects(file, '{"a": 1}')
    assert next(rows)[1] == {"a": 1}
    with pytest.raises(ValueError, match=re.escape(f'{file}, line 2: it is no object such as {{"a": 1}}')):
        next(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[1", "it is no JSON: "), (b"\xff", "it is not valid UTF-8 at byte 1"), (b"", "it is no JSON: ")],
)
def test_json(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_bytes("\ufeff[1]".encode())
    assert read_json(file) == [1]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json: {message}"):
        read_json(file)
    file.unlink()
    with pytest.raises(ValueError, match="cannot read .*a.json: No such file or directory$"):
        read_json(file)
