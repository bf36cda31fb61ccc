"""LLaVA's question files: what each format asks, and what its scorer wants to find in the answers.

    questions = read_questions("pope", Path("llava_pope_test.jsonl"), images=Path("val2014"))

The rules are those of LLaVA's scripts at c121f04: `model_vqa_loader.py`, `model_vqa.py` (mm-vet), `model_vqa_science.py`
(sqa) and `model_vqa_mmbench.py`, with the options of `scripts/v1_5/eval`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.jsonl import read_json, read_objects
from ..data.prompts import check_utf8


if TYPE_CHECKING:
    from pandas import DataFrame

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
LETTER_PROMPT_CN = "请直接回答选项字母。"
OPTIONS = ("A", "B", "C", "D")  # MMBench's
EXAMPLE = '{"question_id": 1, "image": "1.jpg", "text": "Is there a dog?"}'


@dataclass(frozen=True)
class Question:
    """One question of a file.

    `prompt` is what the answers file repeats and scorers read; `asked` is what the model reads, after the picture. `image`
    is as `load_image` takes it; `None` where there is no picture. `fields` are those that only this format has.
    """

    where: str  # such as "questions.jsonl, line 3"
    id: int | str
    prompt: str
    asked: str
    image: Path | str | None
    fields: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """How a question file is read, and how long LLaVA lets answers be, in tokens."""

    read: Callable[[Path, Path | None], Iterator[Question]]
    max_new_tokens: int


def read_questions(format: str, file: Path, images: Path | None = None) -> list[Question]:
    """All questions in `file`, in its order; `images` is the folder of the pictures that it names.

    Raises:
        ValueError: the format is unknown, the file cannot be read or has no questions, a question lacks something, or a
            picture is not there. One line that names the file and the line.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; use {', '.join(FORMATS)}")
    if images is not None and not images.is_dir():
        raise ValueError(f"there is no folder {images} (--images)")
    questions = list(FORMATS[format].read(file, images))
    if not questions:
        raise ValueError(f"{file} holds no questions")
    return questions


# ------------------------------------------------------------------------------------------------- lines of JSON


def _read_jsonl(file: Path, images: Path | None, also: tuple[str, ...] = ()) -> Iterator[Question]:
    """A line `{"question_id", "image", "text"}` per question; `also` names what the format's scorer reads besides."""
    for where, row in read_objects(file, EXAMPLE):
        with _at(where):
            text, image = _text(row, "text"), _text(row, "image")
            for name in also:
                _text(row, name)
            question = Question(where, _id(row, "question_id"), text, text, _picture(image, images))
        yield question


def _read_sqa(file: Path, images: Path | None) -> Iterator[Question]:
    """A JSON list of `{"id", "image"?, "conversations": [{"value"}]}`. The scorer tells questions with a picture by the
    `<image>` in the prompt."""
    rows = read_json(file)
    if not isinstance(rows, list):
        raise ValueError(f'{file} is no JSON list of {{"id": "1", "image": "1/image.png", "conversations": [...]}}')
    for number, row in enumerate(rows, start=1):
        where = f"{file}, entry {number}"
        with _at(where):
            turns = row.get("conversations") if isinstance(row, dict) else None
            if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
                raise ValueError('it lacks "conversations", a list whose first entry holds the question')
            asked = f"{_text(turns[0], 'value').replace('<image>', '').strip()}\n{LETTER_PROMPT}"
            has_image = "image" in row
            image = _picture(_text(row, "image"), images) if has_image else None
            prompt = f"<image>\n{asked}" if has_image else asked
            question = Question(where, _id(row, "id"), prompt, asked, image)
        yield question


# -------------------------------------------------------------------------------------------------------- MMBench


def mmbench_table(file: Path) -> "DataFrame":
    """MMBench's TSV as pandas reads it, which says what counts as no value; options are text, also where all are numbers.

    Raises:
        ValueError: pandas is missing, or the file cannot be read or lacks a column.
    """
    try:
        import pandas
    except ImportError as error:
        raise ValueError(f"mmbench's tables need pandas: pip install pandas ({error})") from None
    text = ("question", "hint", *OPTIONS, "image")
    try:
        table = pandas.read_table(file, dtype=dict.fromkeys(text, str), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:  # pandas' own errors and those of UTF-8
        raise ValueError(f"cannot read {file}: {' '.join(str(error).split())}") from None
    missing = [name for name in ("index", *text) if name not in table.columns]
    if missing:
        raise ValueError(
            f"{file} has no column {', '.join(missing)}; a table of MMBench, separated by tabs, was expected"
        )
    return table


def _read_mmbench(file: Path, images: Path | None, letter_prompt: str) -> Iterator[Question]:
    """A row per question, with its picture. The letter prompt is asked, and not in the answers file."""
    if images is not None:
        raise ValueError("mmbench's tables hold their pictures; leave --images out")
    for number, row in enumerate(mmbench_table(file).to_dict("records"), start=1):
        where = f"{file}, row {number}"
        with _at(where):
            for name in ("index", "question", "image"):
                if _is_none(row[name]):
                    raise ValueError(f'it has no "{name}"')
            options = _options(row)
            hint = [] if _is_none(row["hint"]) else [row["hint"]]
            letters = [f"{letter}. {option}" for letter, option in zip(OPTIONS, options, strict=False)]
            prompt = "\n".join([*hint, row["question"], *letters])
            fields = {"round_id": 0, "options": options, "option_char": list(OPTIONS[: len(options)])}
            image = f"data:;base64,{row['image']}"
            question = Question(where, _id(row, "index"), prompt, f"{prompt}\n{letter_prompt}", image, fields)
        yield question


def _options(row: dict) -> list[str]:
    """The options before the first that has no value."""
    values = [row[name] for name in OPTIONS]
    return values[: next((i for i, value in enumerate(values) if _is_none(value)), len(values))]


def _is_none(value: object) -> bool:
    if isinstance(value, str):
        return value.lower() in ("nan", "none")
    return value is None or isinstance(value, float) and math.isnan(value)


# --------------------------------------------------------------------------------------------------- fields of a row


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Errors inside say where they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _id(row: dict, name: str) -> int | str:
    if name not in row:
        raise ValueError(f'it lacks "{name}"')
    value = row[name]
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise ValueError(f'"{name}" is {value!r}, neither a whole number nor a text')
    return value


def _text(row: dict, name: str) -> str:
    if name not in row:
        raise ValueError(f'it lacks "{name}"')
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {value!r}, not a text')
    check_utf8(value)
    return value


def _picture(name: str, images: Path | None) -> Path:
    if images is None:
        raise ValueError(f"it is about the picture {name}; --images says in which folder that is")
    if not (images / name).is_file():
        raise ValueError(f"there is no picture {images / name}")
    return images / name


FORMATS = {
    "pope": Format(partial(_read_jsonl, also=("category",)), 128),
    "gqa": Format(_read_jsonl, 128),
    "textvqa": Format(_read_jsonl, 128),
    "sqa": Format(_read_sqa, 1024),
    "mmbench": Format(partial(_read_mmbench, letter_prompt=LETTER_PROMPT), 1024),
    "mmbench-cn": Format(partial(_read_mmbench, letter_prompt=LETTER_PROMPT_CN), 1024),
    "seed": Format(_read_jsonl, 128),
    "mm-vet": Format(_read_jsonl, 1024),
    "vqav2": Format(_read_jsonl, 128),
}
