"""lmms-eval's task `shapes`: questions about drawn scenes that the demonstration model was not trained on."""

import json
from functools import cache
from pathlib import Path

from datasets import Dataset

from shortv_hf.data import shapes
from shortv_hf.data.scoring import is_right


@cache
def held_out() -> list[tuple[shapes.Scene, shapes.Question]]:
    size = json.loads(Path(__file__).with_name("size.json").read_text())
    return list(shapes.held_out_questions(size["questions"]))


def questions(size: Dataset) -> Dataset:
    """In place of the data set, which holds their number only: the questions. A picture is drawn when it is asked for."""
    return Dataset.from_list(
        [
            {"id": number, "question": each.text, "answer": each.answer, "type": each.type}
            for number, (_, each) in enumerate(held_out())
        ]
    )


def picture(doc: dict) -> list:
    scene, _ = held_out()[doc["id"]]
    return [shapes.draw(scene)]


def score(doc: dict, results: list[str]) -> dict[str, float]:
    return {"exact_match": float(is_right(results[0], doc["answer"]))}
