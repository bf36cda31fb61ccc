"""What servers and notebooks score, made from answers: the files of LLaVA's `scripts/convert_*.py` at c121f04."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..data import outputs
from ..data.jsonl import read_objects
from .llava_formats import EXAMPLE, Question, mmbench_table


EVAL_AI = "lmms_eval.tasks._task_utils.vqa_eval_metric"


@dataclass(frozen=True)
class Upload:
    """`write(answers, questions, output)` writes the file; `packages` are what pip calls the modules that it needs."""

    suffix: str
    write: Callable[[Sequence[dict], Path, Path], None]
    packages: dict[str, str]


def check_upload(format: str, output: Path, overwrite: bool = False):
    """Raises `ValueError` unless the upload file of `format` can be written to `output`."""
    if format not in UPLOADS:
        raise ValueError(
            f"{format} has no upload file: its scorer reads the answers file (formats: {', '.join(UPLOADS)})"
        )
    upload = UPLOADS[format]
    if output.suffix != upload.suffix:
        raise ValueError(f"--upload is {output}; that of {format} must end in {upload.suffix}")
    if output.exists() and not overwrite:  # here --overwrite asks all questions again, so it is no advice
        raise ValueError(f"--upload {output} is already there; name another file")
    outputs.check_files(output, overwrite=True)
    for module, package in upload.packages.items():
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(f"--upload of {format} needs {package}: pip install {package} ({error})") from None


def check_upload_questions(format: str, file: Path, questions: Sequence[Question]):
    """Raises `ValueError` unless `file` lists what an upload of `format` has to name, all `questions` among it."""
    if format != "vqav2":
        raise ValueError(
            f"--upload-questions is for vqav2; the upload file of {format} names the questions that were asked"
        )
    ids = set(question_ids(file))
    for question in questions:
        if question.id not in ids:
            raise ValueError(f"{question.where}: question {question.id!r} is not in {file} (--upload-questions)")


def write_upload(format: str, answers: Sequence[dict], questions: Path, output: Path):
    """Write the upload file of all `answers`, whole or not at all.

    Args:
        answers: the lines of the answers file, in the order of the questions.
        questions: their file. Of vqav2, the file of all questions that the upload has to name.
    """
    with outputs.whole_file(output) as temporary:
        UPLOADS[format].write(answers, questions, temporary)


def gqa_prediction(text: str) -> str:
    """What GQA's scorer compares: without full stops at the end, in lower case."""
    return text.rstrip(".").lower()


def _gqa(answers: Sequence[dict], questions: Path, output: Path):
    rows = [{"questionId": each["question_id"], "prediction": gqa_prediction(each["text"])} for each in answers]
    output.write_text(json.dumps(rows), encoding="utf-8")


def _mmbench(answers: Sequence[dict], questions: Path, output: Path):
    table = mmbench_table(questions)
    unwanted = ["hint", "category", "source", "image", "comment", "l2-category"]
    table = table.drop(columns=unwanted, errors="ignore")
    table.insert(6, "prediction", [each["text"] for each in answers])
    table.to_excel(output, index=False, engine="openpyxl")


def _seed(answers: Sequence[dict], questions: Path, output: Path):
    # LLaVA's question file has whole numbers where SEED-Bench's own, whose ids the upload repeats, has texts
    rows = [{"question_id": str(each["question_id"]), "prediction": each["text"]} for each in answers]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _mm_vet(answers: Sequence[dict], questions: Path, output: Path):
    texts = {f"v1_{each['question_id']}": each["text"] for each in answers}
    output.write_text(json.dumps(texts, indent=2), encoding="utf-8")


def _vqav2(answers: Sequence[dict], questions: Path, output: Path):
    """The server wants every question of its split named: those that were not asked get an empty answer."""
    process = import_module(EVAL_AI).EvalAIAnswerProcessor()
    texts = {each["question_id"]: process(each["text"]) for each in answers}
    rows = [{"question_id": id, "answer": texts.get(id, "")} for id in question_ids(questions)]
    output.write_text(json.dumps(rows), encoding="utf-8")


def question_ids(questions: Path) -> list[int | str]:
    """The ids in a JSONL file of questions, in order. Raises `ValueError` as reading them does."""
    ids = []
    for where, row in read_objects(questions, EXAMPLE):
        if "question_id" not in row:
            raise ValueError(f'{where}: it lacks "question_id"')
        ids.append(row["question_id"])
    return ids


UPLOADS = {
    "gqa": Upload(".json", _gqa, {}),
    "mmbench": Upload(".xlsx", _mmbench, {"openpyxl": "openpyxl"}),
    "mmbench-cn": Upload(".xlsx", _mmbench, {"openpyxl": "openpyxl"}),
    "seed": Upload(".jsonl", _seed, {}),
    "mm-vet": Upload(".json", _mm_vet, {}),
    "vqav2": Upload(".json", _vqav2, {EVAL_AI: "lmms-eval"}),
}
