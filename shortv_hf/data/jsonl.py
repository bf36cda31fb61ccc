"""JSON and JSONL files: what they hold, and where and how one is broken."""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path


def numbered_lines(content: bytes) -> list[tuple[int, bytes]]:
    """The lines of a JSONL file that are not blank, with their numbers from 1. Only \\n ends one: strings may hold what
    else Unicode calls a line's end."""
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def parse_object(line: bytes, example: str) -> dict:
    """The object in a line. Raises `ValueError` if there is none; `example` shows what one looks like."""
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError(f"it is no object such as {example}")
    return row


def parse_json(content: bytes) -> object:
    """What JSON in UTF-8 holds. Raises `ValueError` that says where it is broken."""
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not valid UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} at character {error.pos + 1}") from None


def read_content(file: Path) -> bytes:
    """All of a file. Raises `ValueError` that names it and says why it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None


def read_json(file: Path) -> object:
    """What a JSON file holds. Raises `ValueError` that names it and says what is wrong."""
    content = read_content(file).removeprefix(codecs.BOM_UTF8)
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_objects(file: Path, example: str) -> Iterator[tuple[str, dict]]:
    """The objects in a JSONL file, each with where it stands, such as "questions.jsonl, line 3".

    Raises:
        ValueError: it cannot be read; one line that names the file and, of a broken line, its number.
    """
    for number, line in numbered_lines(read_content(file)):
        where = f"{file}, line {number}"
        try:
            row = parse_object(line, example)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        yield where, row


def append_object(file: Path, row: dict):
    """Writes a line to the disk, and waits until it is there."""
    with open(file, "a", encoding="utf-8") as opened:
        opened.write(json.dumps(row, ensure_ascii=False) + "\n")
        opened.flush()
        os.fsync(opened.fileno())


def read_appended(file: Path) -> list[dict]:
    """What [`append_object`] has written; of a line that a break left half-written, nothing."""
    lines = file.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]  # after the last line's end there is nothing, or half a line


def drop_half_a_line(file: Path):
    """Cuts off what follows the last line's end, so that the next line can be appended."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
