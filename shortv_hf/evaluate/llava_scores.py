"""Two of LLaVA's rules as scorers: POPE's yes or no and GQA's exact match, which other frameworks change.

lmms-eval takes only the exact words "yes" and "no" for POPE's answers, and removes punctuation for GQA; figures in papers
that follow LLaVA need these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.jsonl import read_json, read_objects
from .answering import EXAMPLE
from .llava_uploads import gqa_prediction


@dataclass(frozen=True)
class PopeScore:
    """Numbers of answers: true and false positives and negatives, where yes is positive. Shares are `None` where they are
    undefined, because they would divide by zero (LLaVA's script stops there)."""

    tp: int = 0
    fp: int = 0
    tn: int = 0
    fn: int = 0

    def __add__(self, other: "PopeScore") -> "PopeScore":
        return PopeScore(self.tp + other.tp, self.fp + other.fp, self.tn + other.tn, self.fn + other.fn)

    @property
    def total(self) -> int:
        return self.tp + self.fp + self.tn + self.fn

    @property
    def accuracy(self) -> float | None:
        return _share(self.tp + self.tn, self.total)

    @property
    def precision(self) -> float | None:
        return _share(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float | None:
        return _share(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float | None:
        """Undefined where LLaVA's 2PR / (P + R) is: without a right yes."""
        return _share(2 * self.tp, 2 * self.tp + self.fp + self.fn) if self.tp else None

    @property
    def yes_ratio(self) -> float | None:
        return _share(self.tp + self.fp, self.total)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def says_no(text: str) -> bool:
    """POPE's rule for an answer (`eval_pope.py`): no, if "No", "not" or "no" is a word before the first full stop. All
    else is yes, "NO" and an empty answer too."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.isdisjoint(words)


def pope_score(texts: Sequence[str], labels: Sequence[str]) -> PopeScore:
    """The answers to questions whose right answers are `labels`, "yes" or "no", in the same order."""
    counts = {"tp": 0, "fp": 0, "tn": 0, "fn": 0}
    for text, label in zip(texts, labels, strict=True):
        right = says_no(text) == (label == "no")
        counts[("t" if right else "f") + ("n" if says_no(text) else "p")] += 1
    return PopeScore(**counts)


def score_pope(answers: Path, questions: Path, labels: Path) -> dict[str, PopeScore]:
    """The score of each category, and last of "all".

    Answers are paired with labels by their order, not by ids, as in LLaVA's script; it cuts the longer of the two off
    without a word, which here is an error.

    Args:
        answers: an answers file.
        questions: their file, which knows the categories.
        labels: the folder with `coco_pope_CATEGORY.json`.

    Raises:
        ValueError: a file cannot be read, an answer is to none of the questions, or a category has no labels or another
            number of them.
    """
    files = {file.stem.removeprefix("coco_pope_"): file for file in sorted(labels.glob("coco_pope_*.json"))}
    if not files:
        raise ValueError(f"there is no coco_pope_CATEGORY.json in {labels} (--labels)")
    asked = {row.get("question_id"): row for _, row in read_objects(questions, EXAMPLE)}
    texts: dict[str, list[str]] = {category: [] for category in files}
    for where, row in _read_answers(answers):
        question = asked.get(row["question_id"], {})
        category = question.get("category")
        if "prompt" in row and row["prompt"] != question.get("text", row["prompt"]):
            raise ValueError(
                f"{where} is no answer to question {row['question_id']!r} of {questions}: the texts differ"
            )
        if category not in texts:
            known = row["question_id"] in asked
            reason = (
                f"has category {category!r}, of which {labels} has no labels" if known else f"is not in {questions}"
            )
            raise ValueError(f"{where}: question {row['question_id']!r} {reason}")
        texts[category].append(row["text"])
    scores = {}
    for category, file in files.items():
        right = [_label(where, row) for where, row in read_objects(file, '{"question_id": 1, "label": "no"}')]
        given = len(texts[category])
        if given != len(right):
            raise ValueError(
                f"{answers} has {given} answers of category {category!r}, and {file} has {len(right)} labels"
            )
        scores[category] = pope_score(texts[category], right)
    return {**scores, "all": sum(scores.values(), PopeScore())}


def score_gqa(answers: Path, labels: Path) -> tuple[int, int]:
    """How many answers are right, and of how many balanced questions, by GQA's `eval.py`: the same text, but for case and
    full stops at the end (`convert_gqa_for_eval.py`).

    Args:
        answers: an answers file.
        labels: GQA's questions with their answers, such as `testdev_balanced_questions.json`.

    Raises:
        ValueError: a file cannot be read, or a question has no answer.
    """
    questions = read_json(labels)
    if not isinstance(questions, dict) or not all(isinstance(q, dict) and "answer" in q for q in questions.values()):
        raise ValueError(f"{labels} is no JSON object of questions with their answers, such as GQA's")
    given = {str(row["question_id"]): gqa_prediction(row["text"]) for _, row in _read_answers(answers)}
    balanced = {id: question["answer"] for id, question in questions.items() if question.get("isBalanced", True)}
    if not balanced:
        raise ValueError(f"{labels} holds no balanced questions, and the others do not count")
    missing = [id for id in balanced if id not in given]
    if missing:
        raise ValueError(
            f"{answers} has no answer to {len(missing)} of {len(balanced)} questions, such as {missing[0]}"
        )
    return sum(given[id] == answer for id, answer in balanced.items()), len(balanced)


def _read_answers(file: Path):
    for where, row in read_objects(file, EXAMPLE):
        if "question_id" not in row or not isinstance(row.get("text"), str):
            raise ValueError(f"{where}: it is no answer such as {EXAMPLE}")
        yield where, row


def _label(where: str, row: dict) -> str:
    if row.get("label") not in ("yes", "no"):
        raise ValueError(f'{where}: "label" is {row.get("label")!r}, neither "yes" nor "no"')
    return row["label"]
