"""Answers on disk as they come, so that an evaluation that broke off goes on where it was.

A line of the file is a batch: its answers, and the figures that they add. What a break leaves half-written is the last
line, and is dropped.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from ..data.jsonl import append_object, drop_half_a_line, read_appended
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
            for batch in read_appended(file):
                self.answers |= {key: Answer(*answer) for key, answer in batch["answers"].items()}
                if file == self.file:
                    self.figures += Figures(**batch["figures"])
        if self.file.exists():
            drop_half_a_line(self.file)

    def add(self, answers: dict[str, Answer], figures: Figures):
        """Writes a batch to the disk."""
        self.answers |= answers
        append_object(self.file, {"answers": answers, "figures": asdict(figures)})


def _escaped(name: str) -> str:
    return name.replace("[", "[[]")
