"""Answers on disk as they come, so that an evaluation that broke off goes on where it was.

A line of the file is a batch: its answers, and the figures that they add. What a break leaves half-written is the last
line, and is dropped.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from .figures import Figures


class Answer(NamedTuple):
    """An answer to a request: its text, tokens of the prompt and of the answer."""

    text: str
    prompt_tokens: int
    tokens: int


class Journal:
    """The journal of a process, with what all processes of earlier runs have written.

    Args:
        path: of the file without its end: rank 0 appends to `path.0.jsonl`, and so on.
        rank: of this process.
    """

    def __init__(self, path: Path, rank: int = 0):
        self.file = path.with_name(f"{path.name}.{rank}.jsonl")
        self.answers: dict[str, Answer] = {}
        self.figures = Figures()  # of what this process has written in earlier runs
        for file in sorted(path.parent.glob(f"{_escaped(path.name)}.*.jsonl")):
            for batch in _read(file):
                self.answers |= {key: Answer(*answer) for key, answer in batch["answers"].items()}
                if file == self.file:
                    self.figures += Figures(**batch["figures"])
        if self.file.exists():
            _drop_half_a_line(self.file)

    def add(self, answers: dict[str, Answer], figures: Figures):
        """Writes a batch to the disk."""
        self.answers |= answers
        line = json.dumps({"answers": answers, "figures": asdict(figures)}, ensure_ascii=False)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _escaped(name: str) -> str:
    return name.replace("[", "[[]")


def _read(file: Path) -> list[dict]:
    lines = file.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]  # after the last line's end there is nothing, or half a line


def _drop_half_a_line(file: Path):
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
