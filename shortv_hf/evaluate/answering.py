"""Answers files: one JSON line per question, in the order of the questions, written so that a broken run can go on.

Beside `answers.jsonl` lies `answers.settings.json`, which LLaVA's scorers do not read: what the answers depend on. A run
goes on only with the same settings. An answer counts once its line is complete, newline included; a batch is on the disk
before the next one is asked.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import ProcessorMixin

from ..data import outputs
from ..data.images import load_image
from ..data.jsonl import parse_object, read_content, read_json
from ..data.scoring import answer
from ..data.sources import Case
from .llava_formats import Question


Ask = Callable[[Sequence[Question]], Sequence[str]]
EXAMPLE = '{"question_id": 1, "prompt": "Is there a dog?", "text": "Yes"}'


def chunk(questions: Sequence[Question], num_chunks: int, chunk_idx: int) -> Sequence[Question]:
    """The questions of one process of several, as LLaVA's `get_chunk`: parts of equal length, of which the last ones are
    shorter, or empty where there are few questions (LLaVA raises `IndexError` there).

    Raises:
        ValueError: there is no such chunk.
    """
    if num_chunks < 1 or not 0 <= chunk_idx < num_chunks:
        raise ValueError(
            f"--chunk-idx is {chunk_idx}; with --num-chunks {num_chunks}, 0 to {num_chunks - 1} are valid"
        )
    size = math.ceil(len(questions) / num_chunks)
    return questions[chunk_idx * size : (chunk_idx + 1) * size]


def settings_file(answers: Path) -> Path:
    return answers.with_name(answers.name.removesuffix(".jsonl") + ".settings.json")


class AnswersFile:
    """The file with the answers to `questions`. Making one reads what is there already and changes nothing.

    Args:
        settings: what answers depend on; a JSON object.
        overwrite: begin anew, whatever is there.

    Raises:
        ValueError: the file cannot be written, holds anything but answers to these questions in their order, or was begun
            with other settings.
    """

    def __init__(self, file: Path, questions: Sequence[Question], settings: dict, overwrite: bool = False):
        outputs.check_files(file, settings_file(file), overwrite=True)  # a file that is there is looked into below
        self.file, self.questions, self.settings = file, questions, settings
        self.answers: list[dict] = []
        self._size = 0  # of these answers, in bytes
        if file.exists() and not overwrite:
            self._take_up(read_content(file))

    @property
    def rest(self) -> Sequence[Question]:
        """The questions that have no answer yet."""
        return self.questions[len(self.answers) :]

    def begin(self):
        """Make the file, cut off what is behind its answers, and lay the settings beside it."""
        with open(self.file, "ab") as file:
            file.truncate(self._size)
        if not self.answers:  # only now, so that no answers lie beside settings that are not theirs
            outputs.write_text(settings_file(self.file), json.dumps(self.settings, indent=1) + "\n")

    def write(self, ask: Ask, batch_size: int, model_id: str, progress: Callable[[range], Iterable[int]] = iter):
        """Begin, ask the rest, `batch_size` questions at a time, and append the answers; `progress` wraps the iteration.

        If `ask` fails, the answers before are in the file.
        """
        self.begin()
        rest = self.rest
        with open(self.file, "ab") as file:
            for start in progress(range(0, len(rest), batch_size)):
                batch = rest[start : start + batch_size]
                lines = [_line(each, text, model_id) for each, text in zip(batch, ask(batch), strict=True)]
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
                self.answers += lines

    def _take_up(self, content: bytes):
        if not content:
            return
        self._size = content.rfind(b"\n") + 1
        lines = content[: self._size].split(b"\n")[:-1]
        if len(lines) > len(self.questions):
            raise self._other(f"it holds {len(lines)} lines, and there are {len(self.questions)} questions")
        for number, (line, question) in enumerate(zip(lines, self.questions, strict=False), start=1):
            try:
                row = parse_object(line, EXAMPLE)
            except ValueError as error:
                raise self._other(f"line {number}: {error}") from None
            if row.get("question_id") != question.id or row.get("prompt") != question.prompt or "text" not in row:
                raise self._other(f"line {number} is no answer to question {question.id!r} ({question.where})")
            self.answers.append(row)
        settings = settings_file(self.file)
        if settings.exists():
            self._compare(settings)
        elif self.rest or self._size < len(content):  # where all is there, as in joined chunks, nothing can be mixed
            raise self._other(f"{settings}, with the settings of its answers, is not there")

    def _compare(self, file: Path):
        try:
            before = read_json(file)
        except ValueError as error:
            raise self._other(str(error)) from None
        if not isinstance(before, dict):
            raise self._other(f"{file} holds no settings")
        now = json.loads(json.dumps(self.settings))  # tuples as lists
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            changes = (f"{name} {json.dumps(before.get(name))}, now {json.dumps(now.get(name))}" for name in names)
            raise self._other(f"it was begun with other settings: {'; '.join(changes)}")

    def _other(self, reason: str) -> ValueError:
        return ValueError(f"{self.file}: {reason}; name another file, or pass --overwrite to begin anew")


def _line(question: Question, text: str, model_id: str) -> dict:
    given = {"question_id": question.id, "prompt": question.prompt, "text": text, **question.fields}
    return {**given, "answer_id": uuid4().hex, "model_id": model_id, "metadata": {}}


def asker(model: Any, processor: ProcessorMixin, max_new_tokens: int, system_prompt: str | None = None) -> Ask:
    """What asks a model: greedy, the questions of a call as one batch, padded on the left.

    The function raises `ValueError` that names the question if its picture cannot be read.
    """

    def ask(questions: Sequence[Question]) -> list[str]:
        cases = [_case(question) for question in questions]
        return answer(model, processor, cases, len(cases), max_new_tokens, system_prompt=system_prompt)

    return ask


def _case(question: Question) -> Case:
    try:
        images = () if question.image is None else (load_image(question.image),)
    except ValueError as error:
        raise ValueError(f"{question.where}: {error}") from None
    return Case(images, question.asked)
